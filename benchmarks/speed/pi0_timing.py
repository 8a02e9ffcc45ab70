"""Policies of stated sizes on random weights, observations for them, and clocks: what the timings
of PI0 have in common. Random weights take as much time and memory as trained ones."""

import argparse
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from cfgrl_gym.algorithms.pi0 import Pi0CFGRLConfig, Pi0Policy
from cfgrl_gym.algorithms.pi0.presets import TinySizes
from cfgrl_gym.cli.environments import libero_spaces
from cfgrl_gym.cli.run_folder import versions
from cfgrl_gym.wrappers.prompt import encode_prompt

SIZES = ("tiny", "full")
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
    """Random images and states, one prompt for all."""
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
    """Wall-clock seconds, the GPU's work included, and what `work` returned."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - began, result


def machine(device: str) -> dict[str, Any]:
    """What the numbers depend on."""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {"device": name, "torch_threads": torch.get_num_threads(), **versions()}


def arguments(description: str | None, result: str, sizes: bool = True) -> argparse.ArgumentParser:
    """The options that every timing has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if sizes:
        parser.add_argument("--size", choices=SIZES, default="tiny", help="of PI0 (%(default)s)")
        parser.add_argument(
            "--device",
            choices=("cpu", "cuda"),
            default="cuda" if torch.cuda.is_available() else "cpu",
            help="(%(default)s)",
        )
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results") / result)
    return parser


def keep(out: Path, name: str, report: dict[str, Any]) -> None:
    """Put a report into the file under its name; what other runs put there stays."""
    reports = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    reports[name] = report
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
