"""What both sides of the timing have in common: sizes, actions, clocks, and a look at processes."""

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import psutil

from cfgrl_gym.cli.run_folder import versions
from cfgrl_gym.envs.render_backend import choose_backend
from cfgrl_gym.envs.rendering import processors

SIDES = ("libero", "here")
IMAGE_SIZE = 224
CHUNK = 50  # control steps
CONTROL_STEPS = 100  # of the measurement without images
PASSES = 5  # of that measurement within a process
IMAGES = 15  # of each camera
ROUNDS = 6  # chunks of each environment where several run at once
FREE_STEPS = 400  # control steps of each environment without observations
HELD_STEPS = 5  # control steps before memory is looked at
SETTLE_STEPS = 20
SETTLE_ACTION = np.array([0, 0, 0, 0, 0, 0, -1.0])
CAMERAS = ("agentview", "robot0_eye_in_hand")
SEED = 0  # LIBERO's evaluation seeds its environments so
MEMORY_ENVS = 8
NO_LIMIT = 10**6  # control steps of an episode


def random_actions(steps: int, seed: int) -> np.ndarray:
    """float64 (steps, 7), uniform: the arm moves about in the air."""
    return np.random.default_rng(seed).uniform(-1, 1, (steps, 7))


def downward_actions(steps: int, seed: int) -> np.ndarray:
    """float64 (steps, 7): the same with a push down to where there is something to touch."""
    from cfgrl_gym.envs.exactness import downward_actions

    return downward_actions(steps, seed)


ACTIONS = {"free": random_actions, "contact": downward_actions}


def seconds(work: Callable[[], Any]) -> float:
    began = perf_counter()
    work()
    return perf_counter() - began


def image_ms(render: Callable[[str], None]) -> dict[str, float]:
    """Median of each camera, the cameras in turns."""
    spent: dict[str, list[float]] = {camera: [] for camera in CAMERAS}
    for _ in range(IMAGES):
        for camera in CAMERAS:
            spent[camera].append(1000 * seconds(functools.partial(render, camera)))
    return {camera: float(np.median(times)) for camera, times in spent.items()}


def import_all() -> None:
    """What both sides need, so that constructing has nothing left to import."""
    from cfgrl_gym.envs import libero
    from cfgrl_gym.envs.installation import import_libero

    import_libero("benchmark")
    import_libero("envs.env_wrapper")
    assert libero


def process_tree(root: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    tree = [root]
    for pid in tree:
        tree += children.get(pid, [])
    return tree


def cpu_seconds() -> float:
    """User and system time of this process and its descendants."""
    ticks = 0
    for pid in process_tree(os.getpid()):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def proportional_set_mib(pids: list[int]) -> list[float]:
    """Pss of each process: its memory, what is shared counted in parts."""
    sizes = []
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    sizes.append(int(line.split()[1]) / 1024)
    return sizes


def hold() -> None:
    """Say that all is ready, and keep it until the parent closes stdin."""
    print(json.dumps({"ready": process_tree(os.getpid())}), file=sys.__stdout__, flush=True)
    sys.stdin.read()


def machine() -> dict[str, Any]:
    """What the numbers depend on, beside the versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return {
        "cpu": models[0] if models else "unknown",
        "cores": processors(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gl_backend": choose_backend(),
        "load_average": os.getloadavg(),
    }


def write_timing(out: Path, **content: Any) -> None:
    """Write a result file: command, versions, machine, and the content."""
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {"command": " ".join(["python", *sys.argv]), "versions": versions()}
    result = about | {"machine": machine()} | content
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(out)
