"""Two workers for 2,000 chunks over mixed tasks: does anything grow, does anything change?

The first and the last 100 episodes start from one initial state with the same actions; in between
are episodes of six tasks, in turn and all of them in both workers, so that an environment, which
keeps four simulators, closes one and builds another for nearly every episode. Every episode's
observations and rewards are hashed; memory (proportional set size) and open files of all processes
are noted every 20 chunks. Writes <out> and says whether memory and files stayed
within 5% of their median after the warm-up, and whether the 200 episodes are equal bit for bit.

    python benchmarks/speed/soak.py --help
"""

import hashlib
import itertools
import statistics
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import psutil
from scipy.stats import linregress
from timing_common import arguments, pss_mib, write_timing
from tqdm import tqdm

from cfgrl_gym import WorkerVecEnv

SUITE, TASKS, STATES = "libero_object", (0, 1, 2, 5, 6, 8), range(50)
SAME = (8, 3)  # task and state of the first and last episodes
CHUNK, CHUNKS_OF_EPISODE = 16, 2
WORKERS = 2
SAME_EPISODES = 100
TOLERANCE = 0.05
SAMPLE_EVERY = 20  # chunks


def starts(count: int) -> list[tuple[int, int]]:
    """List `count` starts: the same one, then mixed ones, then the same one again.

    From state to state the tasks move on by one, and with them the worker that gets each.
    """
    rounds = ((np.roll(TASKS, -state).tolist(), state) for state in STATES)
    turns = itertools.cycle([(task, state) for tasks, state in rounds for task in tasks])
    mixed = itertools.islice(turns, count - 2 * SAME_EPISODES)
    return [SAME] * SAME_EPISODES + list(mixed) + [SAME] * SAME_EPISODES


def actions(start: tuple[int, int]) -> np.ndarray:
    """Draw an episode's actions, (CHUNKS_OF_EPISODE, CHUNK, 7), from its start alone."""
    shape = (CHUNKS_OF_EPISODE, CHUNK, 7)
    return np.random.default_rng(start).uniform(-1, 1, shape).astype(np.float32)


def sample(env: WorkerVecEnv, chunks: int) -> dict[str, Any]:
    workers = {f"worker {n}": psutil.Process(w.pid) for n, w in enumerate(env.workers)}
    of_each = {
        name: {"pss_mib": pss_mib(process), "files": process.num_fds()}
        for name, process in {"trainer": psutil.Process(), **workers}.items()
    }
    return {"chunks": chunks, "processes": of_each}


def hash_row(digest: Any, observation: dict[str, np.ndarray], row: int) -> None:
    for key in sorted(observation):
        digest.update(np.ascontiguousarray(observation[key][row]).tobytes())


def run(env: WorkerVecEnv, total: int) -> tuple[dict[int, str], list[dict[str, Any]]]:
    """Run the chunks; returns the hash of every episode by its number, and the samples."""
    planned = starts(total // CHUNKS_OF_EPISODE)
    hashes: dict[int, str] = {}
    samples = []
    env.set_options([{"task_id": t, "init_state_id": s} for t, s in planned[:WORKERS]])
    observation: Any = env.reset()
    with tqdm(total=total, unit="chunk") as bar:
        for number in range(0, len(planned), WORKERS):
            now = planned[number : number + WORKERS]
            then = planned[number + WORKERS :][:WORKERS] or [SAME] * WORKERS  # no random ones
            for worker, (task, state) in enumerate(then):
                env.env_method("queue_episode", task, state, indices=[worker])
            digests = [hashlib.sha256() for _ in now]
            for worker, digest in enumerate(digests):
                hash_row(digest, observation, worker)
            for chunk in range(CHUNKS_OF_EPISODE):
                observation, _, dones, infos = env.step(
                    np.stack([actions(start)[chunk] for start in now])
                )
                for worker, digest in enumerate(digests):
                    digest.update(infos[worker]["rewards"].tobytes())
                    if not dones[worker]:
                        hash_row(digest, observation, worker)
                        continue
                    last = infos[worker]["terminal_observation"]
                    hash_row(digest, {key: value[None] for key, value in last.items()}, 0)
                bar.update(len(now))
                if bar.n % SAMPLE_EVERY == 0:
                    samples.append(sample(env, bar.n))
            assert dones.all()
            hashes |= {number + worker: d.hexdigest() for worker, d in enumerate(digests)}
    return hashes, samples


def steadiness(samples: list[dict[str, Any]], warm: int) -> list[dict[str, Any]]:
    """Tell how far each process's numbers went from their median after the warm-up."""
    after = [s for s in samples if s["chunks"] > warm]
    rows = []
    for name in after[0]["processes"]:
        for what in ("pss_mib", "files"):
            values = [s["processes"][name][what] for s in after]
            middle = statistics.median(values)
            worst = max(abs(value - middle) for value in values) / middle
            first, last = statistics.mean(values[:10]), statistics.mean(values[-10:])
            rows.append(
                {
                    "process": name,
                    "what": what,
                    "median": middle,
                    "least": min(values),
                    "most": max(values),
                    "farthest_from_median": worst,
                    "last_ten_to_first_ten": last / first,
                    "within_5_percent": worst <= TOLERANCE,
                }
            )
    return rows


def growth(samples: list[dict[str, Any]], warm: int, total: int) -> list[dict[str, Any]]:
    """Of each worker's memory while tasks come and go: MiB an episode, by a straight line."""
    last = total - CHUNKS_OF_EPISODE * SAME_EPISODES
    mixed = [s for s in samples if warm < s["chunks"] <= last]
    episodes = [s["chunks"] / CHUNKS_OF_EPISODE / WORKERS for s in mixed]  # of one worker
    rows = []
    for name in (f"worker {number}" for number in range(WORKERS)):
        line = linregress(episodes, [s["processes"][name]["pss_mib"] for s in mixed])
        slope, error = float(line.slope), float(line.stderr)
        rows.append({"process": name, "mib_an_episode": slope, "standard_error": error})
    return rows


def main() -> None:
    parser = arguments(__doc__, "soak.json")
    parser.add_argument("--chunks", type=int, default=2000, help="of all workers (%(default)s)")
    args = parser.parse_args()
    make = partial(
        gym.make,
        "cfgrl_gym:LiberoChunked-v0",
        suite=SUITE,
        task_id=list(TASKS),
        image_size=112,
        chunk_size=CHUNK,
        max_episode_steps=CHUNK * CHUNKS_OF_EPISODE,
    )
    env = WorkerVecEnv([make] * WORKERS, workers=WORKERS)
    try:
        hashes, samples = run(env, args.chunks)
    finally:
        env.close()
    # Warm: every task has been built, and each has come several times.
    warm = CHUNKS_OF_EPISODE * (SAME_EPISODES + 6 * WORKERS * len(TASKS))
    rows = steadiness(samples, warm)
    first = [hashes[i] for i in range(SAME_EPISODES)]
    last = [hashes[i] for i in sorted(hashes)[-SAME_EPISODES:]]
    equal = first == last and len(set(first)) == 1
    write_timing(
        args.out,
        chunks=args.chunks,
        warm_up_chunks=warm,
        same_episodes_equal=equal,
        distinct_episodes=len(set(hashes.values())),
        steadiness=rows,
        growth=growth(samples, warm, args.chunks),
        samples=samples,
    )
    for row in rows:
        print(
            f"{row['process']:>9} {row['what']:>8}: median {row['median']:.0f}, {row['least']:.0f} "
            f"to {row['most']:.0f}, last to first {row['last_ten_to_first_ten']:.3f}"
        )
    print(f"first and last {SAME_EPISODES} episodes of one state equal bit for bit: {equal}")


if __name__ == "__main__":
    main()
