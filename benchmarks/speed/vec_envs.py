"""Several LIBERO environments in threads, in shared workers, and in a process each.

Memory first, each kind of vectorized environment in a process of its own, LIBERO's own
`OffScreenRenderEnv` in a process each beside them; then chunks a second, the kinds in turns within
one process. Chunks of thousands of steps show how physics alone scales.

    python benchmarks/speed/vec_envs.py    # about seven minutes
    LP_NUM_THREADS=0 python benchmarks/speed/vec_envs.py    # Mesa's renderer without own threads
"""

import functools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing
from statistics import median
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv
from timing_common import (
    CHUNK,
    IMAGE_SIZE,
    arguments,
    chunked_env,
    cpu_seconds,
    processes,
    pss_mib,
    random_actions,
    reset_alike,
    seconds,
    write_timing,
)

from cfgrl_gym import ThreadVecEnv, WorkerVecEnv
from cfgrl_gym.envs import libero
from cfgrl_gym.envs.plain_simulator import PlainSimulator

Processes = functools.partial(SubprocVecEnv, start_method="forkserver")
KINDS: dict[str, Any] = {
    "ThreadVecEnv": ThreadVecEnv,
    "WorkerVecEnv": WorkerVecEnv,
    "SubprocVecEnv": Processes,
}
LIBERO = "LIBERO, SubprocVecEnv"


def make(chunk_size: int, plain: bool = False) -> gym.Env:
    if plain:
        libero.build_simulator = lambda task, size, cameras, _: PlainSimulator(task, size, cameras)
    return chunked_env(chunk_size)


def built(kind: str, count: int, chunk_size: int) -> VecEnv:
    """Build environments of a kind and reset all to one benchmark state."""
    makers = [functools.partial(make, chunk_size, plain=kind == LIBERO)] * count
    env: VecEnv = KINDS.get(kind, Processes)(makers)
    reset_alike(env)
    return env


def speed(count: int, rounds: int, chunk_size: int) -> dict[str, Any]:
    """Time a chunk in all environments, round by round, with the processor time."""
    with ExitStack() as stack:
        envs = {
            kind: stack.enter_context(closing(built(kind, count, chunk_size))) for kind in KINDS
        }
        spent: dict[str, list[float]] = {kind: [] for kind in KINDS}
        cpu: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        order = list(KINDS)
        for number in range(-1, rounds):  # the first one makes render contexts
            chunk = random_actions(chunk_size, number + 1).astype(np.float32)
            for kind in order:
                before = cpu_seconds()
                step = functools.partial(envs[kind].step, np.stack([chunk] * count))
                spent[kind].append(seconds(step))
                cpu[kind] = cpu[kind] + cpu_seconds() - before if number >= 0 else 0.0
            order.append(order.pop(0))
    return {
        "environments": count,
        "chunks_per_s": {kind: count / median(times[1:]) for kind, times in spent.items()},
        "cpu_per_wall": {kind: cpu[kind] / sum(times[1:]) for kind, times in spent.items()},
        "round_s": spent,
    }


def memory(kind: str, count: int) -> dict[str, Any]:
    """Measure the MiB (Pss) of all processes when a kind's environments have stepped."""
    with closing(built(kind, count, chunk_size=1)) as env:
        for action in random_actions(2, 0).astype(np.float32):
            env.step(np.broadcast_to(action, (count, 1, 7)))
        sizes = [pss_mib(process) for process in processes()]
    return {"environments": count, "pss_mib": sum(sizes), "processes_mib": sizes}


def main() -> None:
    parser = arguments(__doc__, "vec_envs.json")
    add = parser.add_argument
    add("--n_envs", type=int, nargs="*", default=[1, 2, 4], help="for speed (%(default)s)")
    add("--held", type=int, default=8, help="environments for memory, 0 for none (%(default)s)")
    add("--rounds", type=int, default=15, help="of each kind (%(default)s)")
    add("--chunk_size", type=int, default=CHUNK, help="control steps (%(default)s)")
    args = parser.parse_args()
    held, speeds = {}, []
    for kind in (*KINDS, LIBERO) if args.held else ():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            held[kind] = pool.submit(memory, kind, args.held).result()
        print(f"memory of {args.held}, {kind}: {held[kind]['pss_mib']:.0f} MiB", flush=True)
    for count in args.n_envs:
        speeds.append(speed(count, args.rounds, args.chunk_size))
        for kind, rate in speeds[-1]["chunks_per_s"].items():
            print(f"{count} environments, {kind}: {rate:.2f} chunks a second", flush=True)
    write_timing(args.out, image_size=IMAGE_SIZE, chunk=args.chunk_size, speed=speeds, memory=held)


if __name__ == "__main__":
    main()
