"""The memory of training PI0, by part: estimated, and measured beside it.

Everywhere: the estimate of the full model for expert, LoRA and full training. With a GPU: builds
that model on it with random weights (they need as much memory as trained ones), acts on one
observation, makes two optimizer steps of the effective batch in the planned micro-batches, and
reports the allocator's peak of each phase beside the estimate. Without a GPU: a small model's
estimate against the peak of torch's CPU allocator, as its profiler sees it.

    python benchmarks/speed/memory.py   # minutes on a CPU, mostly for the table's twelve rows
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cfgrl_gym.algorithms.flow import NULL, POSITIVE
from cfgrl_gym.algorithms.memory.device import available_bytes
from cfgrl_gym.algorithms.pi0.condition import Pi0CFGRLConfig
from cfgrl_gym.algorithms.pi0.lora import add_lora
from cfgrl_gym.algorithms.pi0.memory import (
    GIB,
    MemoryEstimate,
    encode_example,
    estimate_update,
    example_inputs,
    example_loss,
    plan_update,
)
from cfgrl_gym.algorithms.pi0.model import Pi0ForCFGRL
from cfgrl_gym.algorithms.pi0.presets import TinySizes, new_model, tiny_config
from cfgrl_gym.algorithms.weight_average import WeightAverage
from cfgrl_gym.cli.run_folder import versions

TOLERANCE = 0.05
PROMPT_TOKENS = 48
SMALL = TinySizes(hidden_size=256, num_heads=8, num_layers=4)
SMALL_HORIZON = 50
TRAINABLE = ("expert", "lora", "all")


def set_trainable(model: Pi0ForCFGRL, trainable: str) -> None:
    """As `Pi0Policy` does; the VLM's weights in bfloat16 unless they are trained themselves."""
    if trainable != "all":
        for parameter in model.model.vlm.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    if trainable == "expert":
        model.model.vlm.requires_grad_(False)
    if trainable == "lora":
        add_lora(model, seed=0)


def full_model(trainable: str, checkpointing: bool = False) -> Pi0ForCFGRL:
    """The 3.3 B model on the meta device."""
    with torch.device("meta"):
        model = Pi0ForCFGRL(Pi0CFGRLConfig())
        model.drop_unused_embeddings()
        set_trainable(model, trainable)
    if checkpointing:
        model.checkpoint_layers()
    return model


def gib(estimate: MemoryEstimate) -> dict[str, float]:
    return {
        name: size / GIB for name, size in [*estimate.parts().items(), ("total", estimate.total)]
    }


# Without a GPU --------------------------------------------------------------------------------


def full_size_estimates(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What each way to train needs at the effective batch, and what fits the budget."""
    found = []
    for trainable in TRAINABLE:
        for checkpointing in (False, True):
            for average in (False, True):
                model = full_model(trainable, checkpointing)
                how: dict[str, Any] = {"cameras": args.cameras, "average": average}
                row: dict[str, Any] = {
                    "trainable": trainable,
                    "gradient_checkpointing": checkpointing,
                    "moving_average": average,
                }
                whole = estimate_update(model, args.batch_size, accumulate=False, **how)
                row["whole_batch_gib"] = gib(whole)
                try:
                    free = int(args.budget_gb * 1e9)
                    plan = plan_update(
                        model, args.batch_size, free=free, device="the budget", **how
                    )
                    row["micro_batch"] = plan.batch_size
                    row["planned_gib"] = gib(plan.estimate)
                    row["prefix_room_gib"] = plan.prefix_room / GIB
                except MemoryError as refused:
                    row["refused"] = str(refused)
                found.append(row)
    return found


def allocated_peak(work: Callable[[], Any]) -> int:
    """The most bytes that torch's CPU allocator had given out at once during `work`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    now = peak = 0
    for _, size in sorted(events):
        now += size
        peak = max(peak, now)
    return peak


def small_checks(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Estimates of a small model against the CPU allocator: all that an update has beside weights
    and optimizer states, which are plain counts."""
    found = []
    for trainable in TRAINABLE:
        for checkpointing in (False, True):
            for accumulate in (False, True):
                model = new_model(tiny_config(SMALL, SMALL_HORIZON), args.seed)
                if trainable == "expert":
                    model.model.vlm.requires_grad_(False)
                if trainable == "lora":
                    add_lora(model, seed=args.seed)
                if checkpointing:
                    model.checkpoint_layers()
                inputs = example_inputs(model, args.small_batch, args.cameras, PROMPT_TOKENS)
                if accumulate:
                    update(model, inputs)
                measured = allocated_peak(lambda: update(model, inputs))  # noqa: B023
                estimate = estimate_update(
                    model,
                    args.small_batch,
                    cameras=args.cameras,
                    device_type="cpu",
                    accumulate=accumulate,
                )
                given = 0 if accumulate else estimate.gradients
                expected = estimate.prefix + estimate.activations + given
                found.append(
                    {
                        "trainable": trainable,
                        "gradient_checkpointing": checkpointing,
                        "accumulate": accumulate,
                        "measured_bytes": measured,
                        "estimated_bytes": expected,
                        "deviation": expected / measured - 1,
                    }
                )
    return found


def update(model: Pi0ForCFGRL, inputs: dict[str, Tensor]) -> None:
    """Forward and backward pass of one micro-batch; a frozen VLM's part without gradients."""
    prefix = None
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=inputs["state"].is_cuda)
    if not any(parameter.requires_grad for parameter in model.model.vlm.parameters()):
        with torch.no_grad(), autocast:
            prefix = encode_example(model, inputs)
    with autocast:
        loss = example_loss(model, inputs, prefix)
    loss.backward()


# With a GPU -----------------------------------------------------------------------------------


def measure_on_gpu(args: argparse.Namespace) -> dict[str, Any]:
    """Peaks of torch's CUDA allocator, phase by phase, beside the estimate."""
    device = torch.device("cuda")
    model = full_model(args.trainable, args.gradient_checkpointing)
    budget = min(available_bytes(device, model), int(args.budget_gb * 1e9))
    how: dict[str, Any] = {"cameras": args.cameras, "average": args.moving_average}
    plan = plan_update(model, args.batch_size, free=budget, device=str(device), **how)
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
        on_cpu = example_inputs(model, batch, args.cameras, PROMPT_TOKENS)
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
            update(model, inputs(len(part)))
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
        "estimated_gib": gib(plan.estimate),
        "deviation": plan.estimate.total / GIB / peaks["step"] - 1,
    }


@torch.no_grad()
def random_weights(model: Pi0ForCFGRL, device: torch.device) -> None:
    model.to_empty(device=device)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.normal_(std=0.02) if tensor.is_floating_point() else tensor.zero_()


# Both -----------------------------------------------------------------------------------------


def print_table(rows: list[dict[str, Any]]) -> None:
    """Full-size estimates, GiB by part."""
    parts = list(rows[0]["whole_batch_gib"])
    print(f"{'':34}" + "".join(f"{name:>12}" for name in parts))
    for row in rows:
        name = row["trainable"]
        name += ", checkpointing" if row["gradient_checkpointing"] else ""
        name += ", average" if row["moving_average"] else ""
        values = row["whole_batch_gib"].values()
        fit = f"micro-batch {row['micro_batch']}" if "micro_batch" in row else "does not fit"
        print(f"{name:34}" + "".join(f"{value:12.2f}" for value in values) + f"   {fit}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch_size", type=int, default=32, help="effective (%(default)s)")
    parser.add_argument("--cameras", type=int, default=2, help="images a window (%(default)s)")
    parser.add_argument(
        "--budget_gb",
        type=float,
        default=16.0,
        help="GB of device memory to plan for (%(default)s)",
    )
    parser.add_argument("--small_batch", type=int, default=16, help="of the check (%(default)s)")
    parser.add_argument("--trainable", choices=TRAINABLE, default="expert", help="on a GPU")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="on a GPU")
    parser.add_argument("--moving_average", action="store_true", help="on a GPU")
    parser.add_argument("--seed", type=int, default=0, help="of the small model (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory.json"))
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "versions": versions(),
        "settings": {**vars(args), "out": str(args.out)},
    }
    estimates = report["full_size"] = full_size_estimates(args)
    print(f"full size, {args.batch_size} windows, GiB; micro-batch within {args.budget_gb} GB")
    print_table(estimates)
    if torch.cuda.is_available():
        measured = report["gpu"] = measure_on_gpu(args)
        print(json.dumps(measured, indent=1))
        deviations = [measured["deviation"]]
    else:
        checks = report["small_model"] = small_checks(args)
        deviations = [check["deviation"] for check in checks]
    worst = report["worst_deviation"] = max(deviations, key=abs)
    print(f"estimate against what was allocated: at worst {worst:+.2%} (at most {TOLERANCE:.0%})")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if abs(worst) <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
