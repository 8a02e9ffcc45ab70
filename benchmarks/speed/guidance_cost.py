"""What guidance costs: seconds of one chunk with one branch and with two, in turns.

    python benchmarks/speed/guidance_cost.py                # tiny: seconds
    python benchmarks/speed/guidance_cost.py --size full    # a quarter of an hour on 2 CPU cores
    python benchmarks/speed/guidance_cost.py --size full --compile   # on a GPU: with CUDA graphs

A chunk is one observation to 50 actions in 10 denoising steps, two cameras, random weights. The
full size computes in bfloat16. Results of each size and device stand side by side in the file.
"""

from functools import partial
from statistics import median
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

from cfgrl_gym.algorithms.flow import NULL, POSITIVE, euler, guide
from cfgrl_gym.algorithms.pi0 import Pi0Policy

W = 1.5
UNGUIDED, GUIDED = "w=1", "w=1.5, both branches in one pass"
TWO_PASSES, NOTHING_SHARED = "w=1.5, two passes on one prefix", "w=1.5, two passes, two prefixes"
VARIANTS = (UNGUIDED, GUIDED, TWO_PASSES, NOTHING_SHARED)


@torch.no_grad()
def time_chunk(policy: Pi0Policy, obs: Any, noise: Tensor, variant: str) -> dict[str, float]:
    """Return the seconds that each part of a chunk takes."""
    spent_inputs, inputs = seconds(lambda: policy.encode_observation(obs))
    branches = (NULL, POSITIVE)
    spent_prefix, prefixes = seconds(lambda: policy.encode_prefixes(inputs, branches))
    others = prefixes
    if variant == NOTHING_SHARED:
        again, others = seconds(lambda: policy.encode_prefixes(inputs, branches))
        spent_prefix += again

    def velocities(x: Tensor, t: Tensor) -> Tensor:
        of = partial(policy.velocities, inputs, x, t)
        if variant == UNGUIDED:
            return of((POSITIVE,), prefixes)[0]
        if variant == GUIDED:
            v_null, v_positive = of(branches, prefixes)
        else:
            v_null, v_positive = of((NULL,), prefixes)[0], of((POSITIVE,), others)[0]
        return guide(v_null, v_positive, W)

    spent, _ = seconds(lambda: euler(velocities, noise, policy.num_inference_steps))
    return {
        "inputs": spent_inputs,
        "prefix": spent_prefix,
        "denoising": spent,
        "chunk": spent_inputs + spent_prefix + spent,
    }


def measure(policy: Pi0Policy, args: Any, batch: int) -> dict[str, Any]:
    """Time all variants in turns; the first round warms up and doesn't count."""
    obs = make_observation(policy, batch, args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    shape = (batch, policy.horizon, policy.action_width)
    noise = torch.randn(shape, generator=generator).to(policy.device)
    runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for turn in range(args.repeats + 1):
        for variant in VARIANTS:
            with precision(policy, args.size):
                spent = time_chunk(policy, obs, noise, variant)
            if turn:
                runs[variant].append(spent)
    medians = {
        variant: {part: median(run[part] for run in of) for part in of[0]}
        for variant, of in runs.items()
    }
    one = medians[UNGUIDED]["chunk"]
    ratios = {variant: medians[variant]["chunk"] / one for variant in VARIANTS}
    for variant, parts in medians.items():
        print(
            f"batch {batch}, {variant:34} {1000 * parts['chunk']:9.1f} ms (prefix "
            f"{1000 * parts['prefix']:.1f}, denoising {1000 * parts['denoising']:.1f}), "
            f"{ratios[variant]:.2f} of w=1",
            flush=True,
        )
    return {"batch": batch, "median_seconds": medians, "to_unguided": ratios, "runs": runs}


def main() -> None:
    parser = pi0_arguments(__doc__, "guidance_cost.json")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count (%(default)s)")
    compiled = "compile the denoising steps with torch"
    parser.add_argument("--compile", dest="compiled", action="store_true", help=compiled)
    args = parser.parse_args()
    policy = make_policy(args.size, args.device, args.seed, compile_denoising=args.compiled)
    policy.set_training_mode(False)
    settings = {
        "parameters": sum(p.numel() for p in policy.model.parameters()),
        "precision": "bfloat16" if args.size == "full" else "float32",
        "actions": CHUNK,
        "cameras": len(policy.cameras),
        "denoising_steps": policy.num_inference_steps,
    }
    name = f"{args.size}, {args.device}" + (", compiled" if args.compiled else "")
    batches = [measure(policy, args, batch) for batch in args.batch]
    keep(args, name, settings, batches=batches)


if __name__ == "__main__":
    main()
