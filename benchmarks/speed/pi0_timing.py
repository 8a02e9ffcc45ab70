"""What the timings of PI0 share: policies with random weights, observations, clocks, result files.

Random weights take as much time and memory as trained ones.
"""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from time import perf_counter
from typing import Any

import numpy as np
import torch
from timing_common import arguments, write_json

from cfgrl_gym.algorithms.pi0 import Pi0CFGRLConfig, Pi0Policy
from cfgrl_gym.algorithms.pi0.presets import TinySizes
from cfgrl_gym.cli.environments import libero_spaces
from cfgrl_gym.cli.run_folder import versions
from cfgrl_gym.wrappers.prompt import encode_prompt

CHUNK = 50
# With <bos> and newline 48 tokens of the byte-level tokenizer: as many as PI0 pads its prompts to.
PROMPT = "pick up the soup and place it in a basket now!"


def make_policy(size: str, device: str, seed: int, **kwargs: Any) -> Pi0Policy:
    """A policy in training mode "expert" as a run would have it: VLM frozen, at full size in
    bfloat16; the rest float32. Full size takes 13 GB of host memory while it is made."""
    full = size == "full"
    policy = Pi0Policy(
        *libero_spaces(224 if full else TinySizes().image_size, CHUNK),
        lambda _: 1e-4,
        model_config=Pi0CFGRLConfig().to_dict() if full else None,
        vlm_dtype="bfloat16" if full else "float32",
        trainable="expert",
        seed=seed,
        **kwargs,
    )
    return policy.to(device)


def make_observation(policy: Pi0Policy, batch: int, seed: int) -> dict[str, np.ndarray]:
    """Make a batch of random images and states with one prompt."""
    rng = np.random.default_rng(seed)
    shape = (batch, policy.image_size, policy.image_size, 3)
    obs = {name: rng.integers(0, 256, shape, dtype=np.uint8) for name in policy.cameras}
    obs["state"] = rng.normal(size=(batch, 8)).astype(np.float32)
    obs["prompt"] = np.tile(encode_prompt(PROMPT), (batch, 1))
    return obs


def precision(policy: Pi0Policy, size: str) -> AbstractContextManager[Any]:
    """bfloat16 for the full size on any device: on a GPU the policy's own choice, and the CPU gets
    the same, so that its ratios are those of one precision."""
    if policy.device.type == "cpu":
        return torch.autocast("cpu", torch.bfloat16, enabled=size == "full")
    return policy.autocast()


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the wall-clock seconds of `work`, the GPU's included, and its result."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - began, result


def pi0_arguments(description: str | None, result: str) -> argparse.ArgumentParser:
    """Make the command line of a timing of PI0 alone: its size, the device, the seed."""
    parser = arguments(description, result)
    parser.add_argument(
        "--size", choices=("tiny", "full"), default="tiny", help="of PI0 (%(default)s)"
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    return parser


def keep(args: argparse.Namespace, name: str, settings: dict[str, Any], **content: Any) -> None:
    """Put a report into the result file under its name; what other runs put there stays.

    :param settings: what the numbers depend on, beside the options
    """
    device = getattr(args, "device", "cpu")
    reports = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    reports[name] = {
        "command": " ".join(["python", *sys.argv]),
        "settings": {**vars(args), "out": str(args.out), **settings},
        "machine": {
            "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
            "torch_threads": torch.get_num_threads(),
            **versions(),
        },
        **content,
    }
    write_json(args.out, reports)
