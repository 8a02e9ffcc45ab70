"""The memory of training PI0, by part: estimated, and on a GPU measured beside it.

Everywhere: the estimate of the full model for expert, LoRA and full training; what it says of small
models is compared with the CPU's allocator in tests/test_pi0_memory.py. With a GPU: builds the full
model on it with random weights (they need as much memory as trained ones), acts on one observation,
makes two optimizer steps of the effective batch in the planned micro-batches, and reports the
allocator's peak of each phase beside the estimate.

    python benchmarks/speed/memory.py   # minutes on a CPU, for the table's twelve rows
"""

import json
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from timing_common import arguments, write_json
from torch import Tensor

from cfgrl_gym.algorithms.flow import NULL, POSITIVE
from cfgrl_gym.algorithms.memory.device import GIB, available_bytes
from cfgrl_gym.algorithms.pi0 import Pi0CFGRLConfig, Pi0ForCFGRL
from cfgrl_gym.algorithms.pi0.lora import set_trainable
from cfgrl_gym.algorithms.pi0.memory import (
    MemoryEstimate,
    encode_example,
    estimate_update,
    example_inputs,
    example_loss,
    plan_update,
)
from cfgrl_gym.algorithms.pi0.tokenizer import PALIGEMMA_PROMPT_TOKENS
from cfgrl_gym.algorithms.weight_average import WeightAverage
from cfgrl_gym.cli.run_folder import versions

TOLERANCE = 0.05
TRAINABLE = ("expert", "lora", "all")


def full_model(trainable: str, checkpointing: bool) -> Pi0ForCFGRL:
    """Build the 3.3 B model on the meta device; the VLM is in bfloat16 unless it is trained."""
    with torch.device("meta"):
        model = Pi0ForCFGRL(Pi0CFGRLConfig())
        model.drop_unused_embeddings()
        if trainable != "all":
            model.cast_vlm(torch.bfloat16)
        set_trainable(model, trainable, seed=0)
    if checkpointing:
        model.checkpoint_layers()
    return model


def gib(estimate: MemoryEstimate) -> dict[str, float]:
    parts = {**estimate.parts(), "total": estimate.total}
    return {name: size / GIB for name, size in parts.items()}


def full_size_estimates(args: Any) -> list[dict[str, Any]]:
    """Estimate what each way to train needs at the effective batch, and what fits the budget."""
    found = []
    for trainable, checkpointing, average in product(TRAINABLE, (False, True), (False, True)):
        model = full_model(trainable, checkpointing)
        how: dict[str, Any] = {"cameras": args.cameras, "average": average}
        whole = estimate_update(model, args.batch_size, accumulate=False, **how)
        row: dict[str, Any] = {
            "trainable": trainable,
            "gradient_checkpointing": checkpointing,
            "moving_average": average,
            "whole_batch_gib": gib(whole),
        }
        try:
            free = int(args.budget_gb * 1e9)
            plan = plan_update(model, args.batch_size, free=free, device="the budget", **how)
            row["micro_batch"] = plan.batch_size
            row["prefix_room_gib"] = plan.room / GIB
        except MemoryError as refused:
            row["refused"] = str(refused)
        found.append(row)
    return found


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the full-size estimates, in GiB by part."""
    parts = list(rows[0]["whole_batch_gib"])
    print(f"{'':34}" + "".join(f"{name:>12}" for name in parts))
    for row in rows:
        name = row["trainable"]
        name += ", checkpointing" if row["gradient_checkpointing"] else ""
        name += ", average" if row["moving_average"] else ""
        values = row["whole_batch_gib"].values()
        fit = f"micro-batch {row['micro_batch']}" if "micro_batch" in row else "does not fit"
        print(f"{name:34}" + "".join(f"{value:12.2f}" for value in values) + f"   {fit}")


def measure_on_gpu(args: Any) -> dict[str, Any]:
    """Measure the peaks of torch's CUDA allocator, phase by phase, beside the estimate."""
    device = torch.device("cuda")
    model = full_model(args.trainable, args.gradient_checkpointing)
    budget = min(available_bytes(device, model), int(args.budget_gb * 1e9))
    how: dict[str, Any] = {"cameras": args.cameras, "average": args.moving_average}
    plan = plan_update(model, args.batch_size, free=budget, device=str(device), **how)
    accumulate = plan.batch_size < args.batch_size
    estimate = estimate_update(model, plan.batch_size, accumulate=accumulate, **how)
    torch.cuda.set_per_process_memory_fraction(budget / torch.cuda.mem_get_info(device)[1])
    peaks: dict[str, float] = {}

    def phase(name: str, work: Callable[[], Any]) -> Any:
        torch.cuda.reset_peak_memory_stats(device)
        result = work()
        torch.cuda.synchronize(device)
        peaks[name] = torch.cuda.max_memory_allocated(device) / GIB
        return result

    phase("weights", lambda: random_weights(model, device))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    average = phase("average", lambda: WeightAverage(model, 0.99)) if args.moving_average else None

    def inputs(batch: int) -> dict[str, Tensor]:
        on_cpu = example_inputs(model, batch, args.cameras, PALIGEMMA_PROMPT_TOKENS)
        return {name: value.to(device) for name, value in on_cpu.items()}

    @torch.no_grad()
    def act() -> None:
        one = inputs(1)
        with torch.autocast("cuda", torch.bfloat16):
            prefix = encode_example(model, one)
            x = one["noise"]
            for _ in range(model.config.num_inference_steps):
                velocities = model.branch_velocities(
                    prefix, one["state"], x, one["t"], (NULL, POSITIVE)
                )
                x = x - velocities[1] / model.config.num_inference_steps

    def step() -> None:
        optimizer.zero_grad()
        for part in torch.arange(args.batch_size).split(plan.batch_size):
            of_part, prefix = inputs(len(part)), None
            with torch.autocast("cuda", torch.bfloat16):
                if args.trainable == "expert":
                    with torch.no_grad():
                        prefix = encode_example(model, of_part)
                loss = example_loss(model, of_part, prefix)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if average is not None:
            average.update()

    phase("acting, before the first step", act)
    phase("first step", step)  # before it there are no optimizer states
    phase("step", step)
    phase("acting, after a step", act)
    return {
        "device": torch.cuda.get_device_name(device),
        "budget_gib": budget / GIB,
        "trainable": args.trainable,
        "gradient_checkpointing": args.gradient_checkpointing,
        "moving_average": args.moving_average,
        "micro_batch": plan.batch_size,
        "measured_peak_gib": peaks,
        "estimated_gib": gib(estimate),
        "deviation": estimate.total / GIB / peaks["step"] - 1,
    }


@torch.no_grad()
def random_weights(model: Pi0ForCFGRL, device: torch.device) -> None:
    model.to_empty(device=device)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.normal_(std=0.02) if tensor.is_floating_point() else tensor.zero_()


def main() -> int:
    parser = arguments(__doc__, "memory.json")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--batch_size", type=int, default=32, help="effective (%(default)s)")
    parser.add_argument("--cameras", type=int, default=2, help="images a window (%(default)s)")
    parser.add_argument(
        "--budget_gb", type=float, default=16.0, help="GB of device memory (%(default)s)"
    )
    parser.add_argument("--trainable", choices=TRAINABLE, default="expert", help="on a GPU")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="on a GPU")
    parser.add_argument("--moving_average", action="store_true", help="on a GPU")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "versions": versions(),
        "settings": {**vars(args), "out": str(args.out)},
        "full_size": full_size_estimates(args),
    }
    print(f"full size, {args.batch_size} windows, GiB; micro-batch within {args.budget_gb} GB")
    print_table(report["full_size"])
    deviation = 0.0
    if torch.cuda.is_available():
        measured = report["gpu"] = measure_on_gpu(args)
        deviation = measured["deviation"]
        print(json.dumps(measured, indent=1))
        print(f"estimate against the allocator: {deviation:+.2%} (at most {TOLERANCE:.0%})")
    write_json(args.out, report)
    return 0 if abs(deviation) <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
