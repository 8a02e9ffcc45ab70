"""What the timings share: options, sizes, actions, clocks, memory, and the result file."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import psutil

IMAGE_SIZE = 224
CHUNK = 50  # control steps
PASSES = 5  # of a measurement without images, within a process
NO_LIMIT = 10**6  # control steps of an episode


def arguments(description: str | None, result: str | None = None) -> argparse.ArgumentParser:
    """Make a command line whose help shows a script's docstring as it is.

    :param result: name of the script's result file; None: it prints its result
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if result is not None:
        out = Path("benchmarks/results", result)
        parser.add_argument("--out", type=Path, default=out, help="(%(default)s)")
    return parser


def add_task(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a task and the actions on it."""
    parser.add_argument("--suite", default="libero_object", help="(%(default)s)")
    parser.add_argument("--task-id", "--task_id", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the actions (%(default)s)")


def chunked_env(chunk_size: int) -> Any:
    """Make `LiberoChunked-v0` without a limit of steps, for the first task of libero_object."""
    import gymnasium as gym

    return gym.make(
        "cfgrl_gym:LiberoChunked-v0",
        image_size=IMAGE_SIZE,
        chunk_size=chunk_size,
        max_episode_steps=NO_LIMIT,
    )


def reset_alike(env: Any) -> None:
    """Reset all environments of a `VecEnv` to one benchmark state."""
    env.set_options([{"init_state_id": 0}] * env.num_envs)
    env.reset()


def random_actions(steps: int, seed: int) -> np.ndarray:
    """Draw uniform actions, float64 (steps, 7), with which the arm moves about in the air."""
    return np.random.default_rng(seed).uniform(-1, 1, (steps, 7))


def seconds(work: Callable[[], Any]) -> float:
    began = perf_counter()
    work()
    return perf_counter() - began


def processes() -> list[psutil.Process]:
    """List this process and its descendants."""
    this = psutil.Process()
    return [this, *this.children(recursive=True)]


def cpu_seconds() -> float:
    """Sum the user and system time of this process and its descendants."""
    spent = 0.0
    for process in processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            spent += times.user + times.system
    return spent


def pss_mib(process: psutil.Process) -> float:
    """Return the proportional set size: a process's memory, what is shared counted in parts."""
    return float(process.memory_full_info().pss / 2**20)


def write_timing(out: Path, **content: Any) -> None:
    """Write a result file: command, versions, machine, and the content."""
    from cfgrl_gym.cli.run_folder import versions
    from cfgrl_gym.envs.render_backend import GlContext
    from cfgrl_gym.envs.rendering import processors

    cpus = [s for s in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in s]
    with GlContext(IMAGE_SIZE):  # chooses PyOpenGL's platform, so that comes after it
        from OpenGL import GL

        renderer = GL.glGetString(GL.GL_RENDERER).decode()
    machine = {
        "cpu": cpus[0].split(":")[1].strip() if cpus else "unknown",
        "cores": processors(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gl_backend": os.environ["MUJOCO_GL"],
        "gl_renderer": renderer,
        "load_average": os.getloadavg(),
    }
    about = {"command": " ".join(["python", *sys.argv]), "versions": versions(), "machine": machine}
    write_json(out, about | content)


def write_json(out: Path, content: dict[str, Any]) -> None:
    """Write a result file and print its name."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(out)
