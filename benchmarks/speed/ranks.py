"""Seconds of an iteration on 1 and 2 ranks, with as many environments and threads in all.

Each run is `torchrun -m cfgrl_gym train` from libero_tiny; both sizes take turns. A run's first
iteration compiles and builds, so it doesn't count. Without GPUs nothing is gained by ranks but
inference and update on several cores, which threads have as well: this is what sharing costs.

    python benchmarks/speed/ranks.py    # about ten minutes on 2 cores
"""

import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from timing_common import arguments, write_timing
from train_runs import train

from cfgrl_gym.envs.rendering import processors

LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def main() -> None:
    parser = arguments(__doc__, "ranks.json")
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of the trainings (%(default)s)")
    add("--sizes", type=int, nargs="+", default=[1, 2], help="from 1 (%(default)s)")
    add("--n_envs", type=int, default=8, help="on all ranks together (%(default)s)")
    add("--groups", type=int, default=8, help="of 4 episodes, each iteration (%(default)s)")
    add("--iterations", type=int, default=3, help="that count, of each run (%(default)s)")
    add("--rounds", type=int, default=2, help="runs of each size (%(default)s)")
    args = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for size in args.sizes:
                iterations = train(
                    Path(folder, f"{size}-{number}"),
                    threads=max(1, processors() // size),
                    command=(*LAUNCHER, str(size), "-m", "cfgrl_gym"),
                    n_envs=args.n_envs // size,
                    groups_per_iteration=args.groups,
                    max_iterations=1 + args.iterations,
                    seed=args.seed,
                )
                runs.append({"ranks": size, "iterations": iterations})
    of_size = {
        size: median(i["whole"] for run in runs if run["ranks"] == size for i in run["iterations"])
        for size in args.sizes
    }
    ratios = {str(size): seconds / of_size[args.sizes[0]] for size, seconds in of_size.items()}
    for size, seconds in of_size.items():
        print(f"{size} ranks: {seconds:.1f} s an iteration, {ratios[str(size)]:.2f} times one's")
    write_timing(
        args.out, settings=vars(args) | {"out": None}, seconds=of_size, ratios=ratios, runs=runs
    )


if __name__ == "__main__":
    main()
