"""Runs `cfgrl train` from libero_tiny for the timings of whole iterations, and reads its log."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

COLUMNS = ("seconds_simulation", "seconds_inference", "seconds_update", "time_elapsed")
COMMAND = (sys.executable, "-m", "cfgrl_gym")


def train(
    folder: Path, *, threads: int, command: Sequence[str] = COMMAND, **options: Any
) -> list[dict[str, float]]:
    """Train, and return the seconds of each iteration but the first, which compiles and builds.

    :param folder: the run folder
    :param threads: of torch, in each process
    :param command: what runs `cfgrl`
    :param options: of `cfgrl train`
    """
    options = {
        "policy": "libero_tiny",
        "task_id": 8,
        "rloo_batch_size": 4,
        "enable_dynamic_sampling": "false",
        "max_episode_steps": 160,
        "video": "false",
        "device": "cpu",
        "out": folder,
    } | options
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run([*command, "train", *words], env=environment, check=True)
    lines = [json.loads(line) for line in (folder / "progress.json").read_text().splitlines()]
    # With overlap there is one more, for the last update.
    lines = [line for line in lines if "rollout/groups_kept" in line]
    seconds = [{name: float(line.get(f"time/{name}", 0)) for name in COLUMNS} for line in lines]
    return [
        after | {"whole": after["time_elapsed"] - before["time_elapsed"]}
        for before, after in pairwise(seconds)
    ]
