"""Several LIBERO environments in threads, in shared workers, and in a process each.

Chunks of 50 control steps a second, the kinds of vectorized environment in turns within one
process; then the memory of more of them, each kind in a process of its own.

    python benchmarks/speed/vec_envs.py    # about five minutes
"""

import argparse
import functools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv
from timing_common import (
    CHUNK,
    IMAGE_SIZE,
    MEMORY_ENVS,
    NO_LIMIT,
    process_tree,
    proportional_set_mib,
    random_actions,
    seconds,
    write_timing,
)

from cfgrl_gym import ThreadVecEnv, WorkerVecEnv

KINDS: dict[str, Any] = {
    "ThreadVecEnv": ThreadVecEnv,
    "WorkerVecEnv": WorkerVecEnv,
    "SubprocVecEnv": functools.partial(SubprocVecEnv, start_method="forkserver"),
}


def built(kind: str, count: int, chunk_size: int = CHUNK) -> VecEnv:
    """Environments of a kind, all at one benchmark state."""
    make = functools.partial(
        gym.make,
        "cfgrl_gym:LiberoChunked-v0",
        image_size=IMAGE_SIZE,
        chunk_size=chunk_size,
        max_episode_steps=NO_LIMIT,
    )
    env: VecEnv = KINDS[kind]([make] * count)
    env.set_options([{"init_state_id": 0}] * count)
    env.reset()
    return env


def speed(count: int, rounds: int) -> dict[str, Any]:
    """Seconds in which all environments step a chunk, round by round."""
    with ExitStack() as stack:
        envs = {kind: stack.enter_context(closing(built(kind, count))) for kind in KINDS}
        spent: dict[str, list[float]] = {kind: [] for kind in KINDS}
        order = list(KINDS)
        for number in range(-1, rounds):  # the first one makes render contexts
            chunk = random_actions(CHUNK, number + 1).astype(np.float32)
            for kind in order:
                step = functools.partial(envs[kind].step, np.stack([chunk] * count))
                spent[kind].append(seconds(step))
            order.append(order.pop(0))
    rates = {kind: count / median(times[1:]) for kind, times in spent.items()}
    return {"environments": count, "chunks_per_s": rates, "round_s": spent}


def memory(kind: str) -> list[float]:
    """MiB of this process and its descendants (Pss) while a kind's environments have stepped."""
    with closing(built(kind, MEMORY_ENVS, chunk_size=1)) as env:
        for action in random_actions(2, 0).astype(np.float32):
            env.step(np.broadcast_to(action, (MEMORY_ENVS, 1, 7)))
        return proportional_set_mib(process_tree(os.getpid()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="of each kind (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/vec_envs.json"))
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    held = {}
    for kind in KINDS:
        with ProcessPoolExecutor(1, spawn) as pool:
            held[kind] = pool.submit(memory, kind).result()
        print(f"memory of {MEMORY_ENVS}, {kind}: {sum(held[kind]):.0f} MiB", flush=True)
    speeds = []
    for count in (2, 4):
        speeds.append(speed(count, args.rounds))
        for kind, rate in speeds[-1]["chunks_per_s"].items():
            print(f"{count} environments, {kind}: {rate:.2f} chunks a second", flush=True)
    write_timing(
        args.out,
        image_size=IMAGE_SIZE,
        chunk=CHUNK,
        speed=speeds,
        memory={
            kind: {"environments": MEMORY_ENVS, "pss_mib": sum(sizes), "processes_mib": sizes}
            for kind, sizes in held.items()
        },
    )


if __name__ == "__main__":
    main()
