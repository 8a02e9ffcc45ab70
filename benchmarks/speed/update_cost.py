"""What an update costs with the prefixes kept from acting, and with computing them again.

    python benchmarks/speed/update_cost.py               # tiny: a minute
    python benchmarks/speed/update_cost.py --size full   # a quarter of an hour on 2 CPU cores

One epoch over the same windows both ways, with CFGRL's own update: VLM frozen, random weights,
two cameras; the full size computes in bfloat16. Also the gradients of a few windows both ways, and
the floating-point operations at full size, counted on the meta device. That both ways learn the
same weights is tested in tests/test_prefix_cache.py.
"""

import argparse
from functools import partial
from typing import Any

import torch
from pi0_timing import (
    CHUNK,
    keep,
    make_observation,
    make_policy,
    pi0_arguments,
    precision,
    seconds,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from cfgrl_gym.algorithms.flow import NULL, POSITIVE
from cfgrl_gym.algorithms.memory.micro_batches import MicroBatches
from cfgrl_gym.algorithms.memory.prefix_cache import PrefixCache
from cfgrl_gym.algorithms.pi0 import Pi0CFGRLConfig, Pi0ForCFGRL, Pi0Policy
from cfgrl_gym.algorithms.pi0.memory import encode_example, example_inputs, example_loss
from cfgrl_gym.algorithms.pi0.tokenizer import PALIGEMMA_PROMPT_TOKENS
from cfgrl_gym.algorithms.windows import WindowBatch

PLENTY = 2**40
# Both ways run the same operations on the same numbers; only the batch in which a prefix was
# computed may differ, and with it the order of sums.
GRADIENT_TOLERANCE = {"tiny": 1e-4, "full": 5e-2}  # relative; float32 and bfloat16


class Update:
    """CFGRL's update of a policy on fixed windows, with every draw from one seed."""

    def __init__(self, policy: Pi0Policy, args: Any, kept: bool) -> None:
        self.policy, self.args = policy, args
        self.memory = PrefixCache(policy, PLENTY, PLENTY if kept else 0)
        self.micro_batches = MicroBatches(args.micro_batch)
        self.generator = torch.Generator().manual_seed(args.seed)
        self.windows = make_windows(policy, args)

    def act(self) -> None:
        """Keep the prefix of every window, as acting does."""
        for part in torch.arange(self.args.windows).split(self.args.micro_batch):
            batch = self.windows[part]
            with precision(self.policy, self.args.size):
                self.memory.recall(batch.observations, batch.prefix_keys, batch.labels)

    def gradients(self, batch: WindowBatch) -> Tensor:
        """Leave a step's gradients in the parameters; returns its losses."""
        t, noise = self.policy.draw_flow(len(batch), self.generator)
        with precision(self.policy, self.args.size):
            return self.micro_batches.backward(
                self.policy.optimizer, self.losses, batch, t, noise, batch_size=len(batch)
            )

    def losses(self, batch: WindowBatch, t: Tensor, noise: Tensor) -> Tensor:
        """Compute the losses of windows as `CFGRL.train` does."""
        prefix = self.memory.recall(batch.observations, batch.prefix_keys, batch.labels)
        return self.policy.flow_matching_loss(*batch.samples, t, noise, prefix)

    def epoch(self, name: str) -> list[float]:
        """Make one pass over the windows; returns each step's loss."""
        order = torch.randperm(self.args.windows, generator=self.generator)
        losses = []
        for indices in tqdm(order.split(self.args.step), desc=name, leave=False, disable=None):
            losses.append(self.gradients(self.windows[indices]).mean().item())
            self.policy.optimizer.step()
        return losses


def make_windows(policy: Pi0Policy, args: Any) -> WindowBatch:
    generator = torch.Generator().manual_seed(args.seed)
    shape = (args.windows, policy.horizon, policy.action_width)
    return WindowBatch(
        make_observation(policy, args.windows, args.seed),
        torch.randn(shape, generator=generator),
        torch.zeros(shape[:2], dtype=torch.bool),
        torch.where(torch.arange(args.windows) % 2 == 0, POSITIVE, NULL),
        torch.arange(args.windows),
        torch.zeros(args.windows, dtype=torch.int64),
    )


def first_gradients(update: Update) -> list[Tensor]:
    update.gradients(update.windows[torch.arange(update.args.step)])
    of = [p.grad for p in update.policy.parameters() if p.grad is not None]
    return [gradient.detach().float().cpu().clone() for gradient in of]


def compare_gradients(policy: Pi0Policy, args: Any) -> dict[str, float]:
    """Return the distance of the two ways' gradients of a few windows, relative to their norm."""
    number = min(8, args.micro_batch)
    few = argparse.Namespace(**{**vars(args), "windows": number, "step": number})
    kept = Update(policy, few, kept=True)
    kept.act()
    one, other = first_gradients(kept), first_gradients(Update(policy, few, kept=False))
    difference = sum(float((a - b).square().sum()) for a, b in zip(one, other, strict=True))
    norm = sum(float(a.square().sum()) for a in one)
    return {
        "relative_difference": (difference / norm) ** 0.5,
        "tolerance": GRADIENT_TOLERANCE[args.size],
    }


def compare_epochs(policy: Pi0Policy, args: Any) -> dict[str, Any]:
    """Time an epoch both ways, in turns."""
    weights = {name: value.clone() for name, value in trained(policy).items()}
    found: dict[str, Any] = {"kept": [], "recomputed": []}
    kept = Update(policy, args, kept=True)
    found["acting"] = seconds(kept.act)[0]
    found["kept_bytes"] = PLENTY - kept.memory.free["host" if args.device == "cpu" else "device"]
    for turn in range(args.repeats):
        for name, update in (("kept", kept), ("recomputed", Update(policy, args, kept=False))):
            restore(policy, weights)
            spent, losses = seconds(partial(update.epoch, f"{name}, epoch {turn + 1}"))
            found[name].append({"seconds": spent, "losses": losses})
            print(f"{name}: {spent:.2f} s an epoch of {args.windows} windows", flush=True)
    best = {name: min(run["seconds"] for run in found[name]) for name in ("kept", "recomputed")}
    found["ratio"] = best["recomputed"] / best["kept"]
    return found


def trained(policy: Pi0Policy) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in policy.named_parameters() if p.requires_grad}


@torch.no_grad()
def restore(policy: Pi0Policy, weights: dict[str, Tensor]) -> None:
    """Restore these weights, and an optimizer that has not stepped yet."""
    for name, parameter in trained(policy).items():
        parameter.copy_(weights[name])
    policy.optimizer.state.clear()


def full_size_flops() -> dict[str, float]:
    """Count the floating-point operations of one window at full size."""
    with torch.device("meta"):
        model = Pi0ForCFGRL(Pi0CFGRLConfig())
        model.model.vlm.requires_grad_(False)
        inputs = example_inputs(model, 1, cameras=2, prompt_tokens=PALIGEMMA_PROMPT_TOKENS)
        with FlopCounterMode(display=False) as prefix_flops, torch.no_grad():
            prefix = encode_example(model, inputs)
        with FlopCounterMode(display=False) as expert_flops:
            example_loss(model, inputs, prefix).backward()
    prefix_count, expert_count = prefix_flops.get_total_flops(), expert_flops.get_total_flops()
    return {
        "prefix_forward": prefix_count,
        "expert_forward_and_backward": expert_count,
        "recomputed_to_kept": (prefix_count + expert_count) / expert_count,
    }


def main() -> None:
    parser = pi0_arguments(__doc__, "update_cost.json")
    parser.add_argument("--windows", type=int, default=64, help="of the epoch (%(default)s)")
    parser.add_argument("--step", type=int, default=32, help="windows a step (%(default)s)")
    parser.add_argument("--micro_batch", type=int, default=32, help="windows a pass (%(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="epochs each way (%(default)s)")
    args = parser.parse_args()
    policy = make_policy(args.size, args.device, args.seed)
    policy.set_training_mode(True)
    flops = full_size_flops()
    report = {
        "flops_of_a_window_at_full_size": flops,
        "gradients": compare_gradients(policy, args),
        "epoch": compare_epochs(policy, args),
    }
    keep(args, f"{args.size}, {args.device}", {"actions": CHUNK}, **report)
    print(f"an epoch recomputed takes {report['epoch']['ratio']:.1f} times one from kept prefixes")
    print(f"by operations at full size: {flops['recomputed_to_kept']:.1f} times")
    print(f"gradients: {report['gradients']}")


if __name__ == "__main__":
    main()
