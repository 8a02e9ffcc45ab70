"""Seconds of an iteration with and without the update beside the next collection (`overlap`).

Runs of `cfgrl train` from libero_tiny, without and with in turns, for each number of environments;
torch has one thread in each process. Where simulation and update need the same cores, as here, the
gain is what simulation leaves idle.

    python benchmarks/speed/overlap.py    # about fifteen minutes on 2 cores
"""

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from timing_common import arguments, write_timing
from train_runs import train


def main() -> None:
    parser = arguments(__doc__, "overlap.json")
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of the trainings (%(default)s)")
    add("--n_envs", type=int, nargs="+", default=[1, 2], help="(%(default)s)")
    add("--groups", type=int, default=4, help="of 4 episodes, each iteration (%(default)s)")
    add("--iterations", type=int, default=3, help="that count, of each run (%(default)s)")
    add("--rounds", type=int, default=2, help="runs of each kind (%(default)s)")
    args = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for n_envs in args.n_envs:
                for overlap in (False, True):
                    iterations = train(
                        Path(folder, f"{n_envs}-{overlap}-{number}"),
                        threads=1,
                        n_envs=n_envs,
                        groups_per_iteration=args.groups,
                        max_iterations=1 + args.iterations,
                        overlap=str(overlap).lower(),
                        seed=args.seed,
                    )
                    runs.append({"n_envs": n_envs, "overlap": overlap, "iterations": iterations})

    def seconds(n_envs: int, overlap: bool, part: str) -> float:
        kind = [r for r in runs if r["n_envs"] == n_envs and r["overlap"] == overlap]
        return median(i[part] for run in kind for i in run["iterations"])

    results = []
    for n_envs in args.n_envs:
        without, beside = (seconds(n_envs, overlap, "whole") for overlap in (False, True))
        update = seconds(n_envs, False, "seconds_update")
        result = {"n_envs": n_envs, "without": without, "with": beside, "update": update}
        results.append(result | {"ratio": beside / without})
        print(
            f"{n_envs} environments: {without:.1f} s an iteration, of which the update takes "
            f"{update:.1f}; with overlap {beside:.1f} s, {beside / without:.2f} times as long"
        )
    write_timing(args.out, settings=vars(args) | {"out": None}, results=results, runs=runs)


if __name__ == "__main__":
    main()
