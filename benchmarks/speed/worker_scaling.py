"""Chunks a second over 1, 2, 4, 8 workers, in processes and in Ray actors, as a ratio to one.

A worker has one environment. The kinds take turns, round by round, within one process; Ray is that
of this machine alone. The result also has the bytes of an observation and of a step's whole answer.

    python benchmarks/speed/worker_scaling.py    # about ten minutes
"""

import functools
import pickle
from collections.abc import Callable
from contextlib import ExitStack, closing
from statistics import median
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import VecEnv
from timing_common import (
    CHUNK,
    IMAGE_SIZE,
    arguments,
    chunked_env,
    random_actions,
    reset_alike,
    seconds,
    write_timing,
)

from cfgrl_gym import RayVecEnv, WorkerVecEnv
from cfgrl_gym.envs.rendering import processors

KINDS: dict[str, Any] = {"processes": WorkerVecEnv, "ray": RayVecEnv}


def built(kind: str, count: int, chunk_size: int) -> VecEnv:
    """Build a worker for each environment, and reset all to one benchmark state."""
    makers: list[Callable[[], gym.Env]] = [functools.partial(chunked_env, chunk_size)] * count
    env: VecEnv = KINDS[kind](makers, workers=count)
    reset_alike(env)
    return env


def sizes(env: VecEnv, chunk: np.ndarray) -> dict[str, Any]:
    """Count the bytes of one environment's observation and of its answer to a step."""
    observations, rewards, dones, infos = env.step(chunk)
    assert isinstance(observations, dict)
    first = {key: value[0] for key, value in observations.items()}
    return {
        "observation_bytes": sum(value.nbytes for value in first.values()),
        "of_each": {key: value.nbytes for key, value in first.items()},
        "step_pickled_bytes": len(pickle.dumps((first, rewards[0], dones[0], infos[0]), 5)),
    }


def speed(count: int, rounds: int, chunk_size: int) -> dict[str, Any]:
    """Time a chunk in all environments, round by round."""
    with ExitStack() as stack:
        envs = {
            kind: stack.enter_context(closing(built(kind, count, chunk_size))) for kind in KINDS
        }
        spent: dict[str, list[float]] = {kind: [] for kind in KINDS}
        order = list(KINDS)
        for number in range(-1, rounds):  # the first one makes render contexts
            chunk = np.stack([random_actions(chunk_size, number + 1).astype(np.float32)] * count)
            for kind in order:
                spent[kind].append(seconds(functools.partial(envs[kind].step, chunk)))
            order.append(order.pop(0))
        bytes_of_a_step = sizes(envs["processes"], chunk)
    return {
        "workers": count,
        "chunks_per_s": {kind: count / median(times[1:]) for kind, times in spent.items()},
        "round_s": spent,
        "bytes": bytes_of_a_step,
    }


def main() -> None:
    parser = arguments(__doc__, "worker_scaling.json")
    add = parser.add_argument
    add("--workers", type=int, nargs="+", default=[1, 2, 4, 8], help="from 1 (%(default)s)")
    add("--rounds", type=int, default=15, help="of each kind (%(default)s)")
    add("--chunk_size", type=int, default=CHUNK, help="control steps (%(default)s)")
    args = parser.parse_args()
    if args.workers[0] != 1:
        parser.error("--workers must begin with 1, which the ratios are to")
    runs: list[dict[str, Any]] = []
    for count in args.workers:
        runs.append(speed(count, args.rounds, args.chunk_size))
        rates, of_one = runs[-1]["chunks_per_s"], runs[0]["chunks_per_s"]
        runs[-1]["ratio_to_one"] = {kind: rate / of_one[kind] for kind, rate in rates.items()}
        for kind, rate in rates.items():
            ratio = runs[-1]["ratio_to_one"][kind]
            print(f"{count} workers, {kind}: {rate:.2f} chunks a second, {ratio:.2f} times one")
    print(f"cores: {processors()}; bytes: {runs[0]['bytes']}")
    write_timing(args.out, image_size=IMAGE_SIZE, chunk=args.chunk_size, runs=runs)


if __name__ == "__main__":
    main()
