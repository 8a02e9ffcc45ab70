"""The memory of each rank in an update of PI0, with FSDP and without, beside what is planned.

A PI0 of 0.1 B parameters, all trained, with a moving average, on the CPU: how much more resident
memory a process has at the peak of its second update than before it had a policy. The optimizer's
state, which on GPUs is on the first rank's host between updates, is in the same memory here, so
that the first rank has more than is planned for a device. And what is planned for the full size,
with gradient checkpointing, which was not measured.

    python benchmarks/speed/fsdp_memory.py   # Linux; minutes, and 10 GiB of memory
"""

import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gymnasium import spaces
from memory import full_model
from timing_common import arguments, write_json

from cfgrl_gym.algorithms import CFGRL
from cfgrl_gym.algorithms.memory.device import GIB, size_of
from cfgrl_gym.algorithms.memory.plan import saved_by_sharing, size_of_copy
from cfgrl_gym.algorithms.pi0 import TinySizes
from cfgrl_gym.algorithms.pi0.memory import estimate_update
from cfgrl_gym.algorithms.windows import blank_windows
from cfgrl_gym.cli.run_folder import versions

RANKS = (1, 2, 4, 8)  # at full size
KINDS = ((1, False), (2, False), (2, True), (4, True))  # ranks, fsdp
SIZES = {"hidden_size": 768, "num_layers": 4, "num_heads": 8, "mlp_ratio": 4}
CHUNK, IMAGE_SIZE, WINDOWS = 10, 112, 4  # of each rank
EVERY = 0.002  # seconds between two looks at the memory
# So that glibc gives freed tensors back, which it otherwise keeps as it sees fit.
os.environ["MALLOC_MMAP_THRESHOLD_"] = "100000"


class Spaces(gym.Env):
    """Has the spaces that the policy is made for; nothing is collected here."""

    observation_space = spaces.Dict(
        {
            "base_0_rgb": spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8),
            "state": spaces.Box(-np.inf, np.inf, (8,), np.float32),
            "prompt": spaces.Box(0, 255, (32,), np.uint8),
        }
    )
    action_space = spaces.Box(-1, 1, (CHUNK, 7), np.float32)


class Peak:
    """Keeps the most resident memory that this process had since it was last asked."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._highest = 0
        threading.Thread(target=self._look, daemon=True).start()

    def now(self) -> int:
        return int(self._process.memory_info().rss)

    def take(self) -> int:
        highest, self._highest = self._highest, 0
        return highest

    def _look(self) -> None:
        while True:
            self._highest = max(self._highest, self.now())
            threading.Event().wait(EVERY)


def rank_main(rank: int, size: int, fsdp: bool, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if size > 1:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    peak = Peak()
    before = peak.now()
    options: Any = {"fsdp": fsdp, "n_epochs": 1, "batch_size": 1, "seed": 0, "device": "cpu"}
    options["gradient_accumulation_steps"] = WINDOWS * size
    policy_kwargs = {"sizes": TinySizes(**SIZES), "trainable": "all"}
    model = CFGRL("Pi0Policy", Spaces(), policy_kwargs=policy_kwargs, **options)
    model.learn(0)
    policy = model.policy
    plan = policy.plan_update(1, 2**60)
    assert plan.needed is not None
    model.windows = model.replay.add(blank_windows(policy, WINDOWS))
    held = 0
    for _ in range(2):
        held = peak.now() - before
        peak.take()
        model.train()
    results.put(
        {
            "rank": rank,
            "parameters": size_of(policy.parameters()) // 4,
            "gib_of_parameters": size_of(policy.parameters()) / GIB,
            "gib_before_update": held / GIB,
            "gib_at_peak": (peak.take() - before) / GIB,
            "gib_planned": (plan.needed - _saved(policy, size_of_copy(policy), size) * fsdp) / GIB,
        }
    )
    if size > 1:
        dist.destroy_process_group()


def _saved(module: Any, copied: int, ranks: int) -> int:
    return saved_by_sharing(module, module.fsdp_units(), copied, ranks)


def planned_at_full_size() -> list[dict[str, float]]:
    """Return the planned memory of PI0 with all of it trained, without FSDP and with it."""
    model = full_model("all", checkpointing=True)
    whole = estimate_update(model, 1, cameras=2, average=True)
    copied = whole.weights + whole.optimizer + whole.average
    sizes = {n: (whole.total - _saved(model, copied, n) * (n > 1)) / GIB for n in RANKS}
    return [{"ranks": n, "gib": gib} for n, gib in sizes.items()]


def measure(size: int, fsdp: bool) -> list[dict[str, Any]]:
    """Run an update on so many ranks, and return what each used."""
    with tempfile.TemporaryDirectory() as folder:
        results = mp.get_context("spawn").SimpleQueue()
        store = f"file://{Path(folder, 'store')}"
        mp.spawn(rank_main, (size, fsdp, store, results), nprocs=size)
        return sorted((results.get() for _ in range(size)), key=lambda each: each["rank"])


def main() -> None:
    args = arguments(__doc__, "fsdp_memory.json").parse_args()
    rows = []
    for size, fsdp in KINDS:
        ranks = measure(size, fsdp)
        rows.append({"ranks": size, "fsdp": fsdp, "each": ranks})
        for each in ranks:
            of = f"{size} rank(s){', fsdp' * fsdp}, rank {each['rank']}"
            print(f"{of}: {each['gib_at_peak']:.2f} GiB, planned {each['gib_planned']:.2f}")
    full = planned_at_full_size()
    print(*(f"full size, {row['ranks']} rank(s): {row['gib']:.1f} GiB" for row in full), sep="\n")
    about = {"command": " ".join(["python", *sys.argv]), "versions": versions()}
    write_json(
        args.out,
        about | {"sizes": SIZES, "windows_of_a_rank": WINDOWS, "runs": rows, "full_size": full},
    )


if __name__ == "__main__":
    main()
