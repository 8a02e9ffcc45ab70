"""Every method with equal episodes and equal optimizer steps, on tasks that none was tuned on.

First `--tune`: each method with each of a few settings, on a task that isn't compared. Then,
without it, the methods with the settings of `methods.py` on the compared tasks, with several seeds.
A training is 16 iterations of 64 episodes, evaluated at its end on all 50 benchmark states; its own
episodes show how success rises on the way.

Results are in <results>/comparison.json (with --tune: tuning.json), a row for each training as soon
as it is done. What has a row there isn't run again, on another machine neither, so the comparison
can be made in pieces. The whole of it is 12 trainings of each method; --small tries each once.

    python benchmarks/study/comparison.py --help
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import Job, evaluation, run_jobs
from methods import CONTROLS, METHODS, SETTINGS, TRAINED_ALIKE
from results import is_there, read_rows, result_json, results_of, write_result
from settings import GROUPS, new_parser, training_options
from tables import against, method_table

from cfgrl_gym.cli.reporting.rates import Rate
from cfgrl_gym.cli.reporting.runs import read_training

TUNED_ON = ("libero_object", 8)
COMPARED_ON = (("libero_object", 0), ("libero_object", 5), ("libero_object", 6), ("libero_goal", 6))
ITERATIONS, ITERATIONS_TUNING = 16, 8
SEEDS = 3
# Control steps of an episode while collecting; evaluations have LIBERO's own 280 and 300.
STEPS = {"libero_object": 160, "libero_goal": 200}
# Columns of a training's log that a row keeps, for each iteration.
KEPT = {
    "rollout/iteration_success_rate": "success_rate",
    "rollout/episodes": "episodes",
    "rollout/control_steps": "control_steps",
    "rollout/positive_share": "positive_share",
    "train/n_updates": "optimizer_steps",
    "train/guidance_gap": "guidance_gap",
    "train/loss": "loss",
}


@dataclass(frozen=True)
class Cell:
    """One training: a method with a setting, a task and a seed."""

    method: str
    setting: str
    suite: str
    task: int
    seed: int

    def job(self, folder: Path, iterations: int, groups: int) -> Job:
        """Return its evaluation, which comes after its training."""
        method = METHODS[self.method]
        name = f"{self.method}-{self.setting}-{self.suite}{self.task}-seed{self.seed}"
        run = folder / name.replace(" ", "_")
        changed = method.options | method.policy_options | SETTINGS[self.setting]
        options = training_options(
            self.task,
            self.seed,
            iterations,
            groups,
            suite=self.suite,
            max_episode_steps=STEPS[self.suite],
            **{"cfg_scale": 1.0} | changed,
        )
        training = Job(run, options, method.algorithm)
        return evaluation(
            run, run / "eval", self.task, method.scales, after=training, suite=self.suite
        )


def wanted(cell: Cell, job: Job) -> dict[str, Any]:
    """Return what identifies a training's row: the cell, and the options that it is made with."""
    assert job.after is not None
    options = {k: v for k, v in job.after.options.items() if k != "init_states"}
    return vars(cell) | {"options": options}


def row(cell: Cell, job: Job) -> dict[str, Any]:
    """Return what the result file keeps of a finished training."""
    assert job.after is not None
    training = read_training(job.after.folder, job.after.folder.name)
    iterations = [
        {name: line[column] for column, name in KEPT.items() if column in line}
        for line in training.rows
    ]
    final = [result_json(result) for result in results_of([job])]
    return wanted(cell, job) | {"iterations": iterations, "final": final}


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows, and what they say: each method's table, and paired with the best control."""
    table = method_table(rows)
    rates = {
        (line["method"], float(w)): successes / episodes
        for line in table
        if line["method"] in CONTROLS
        for w, (successes, episodes) in line["final"].items()
    }
    compared = rates and "tuning" not in file.name
    pairs = against(rows, max(rates, key=rates.__getitem__)) if compared else []
    write_result(file, methods=table, against_best_control=pairs, trainings=rows)


def cells(args: argparse.Namespace) -> list[Cell]:
    """List what is wanted, the first seeds first."""
    methods = args.methods or [name for name in METHODS if name not in TRAINED_ALIKE]
    if args.tune:
        return [Cell(m, s, *TUNED_ON, 0) for s in args.settings or SETTINGS for m in methods]
    setting = next(iter(SETTINGS))
    return [
        Cell(method, setting, *task, seed)
        for seed in range(args.seeds)
        for task in COMPARED_ON[: 1 if args.small else None]
        for method in methods
    ]


def main() -> None:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--tune", action="store_true", help="try each method's settings on the task for it")
    add(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        help="only these (default: all that differ in training)",
    )
    add("--settings", nargs="+", choices=list(SETTINGS), help="with --tune, only these")
    add("--seeds", type=int, default=SEEDS, help="default: %(default)s")
    add("--iterations", type=int, help=f"default: {ITERATIONS}; with --tune {ITERATIONS_TUNING}")
    add("--groups", type=int, default=GROUPS, help="of 8 episodes, each iteration")
    add("--small", action="store_true", help="one task, one seed, 2 iterations of 2 groups")
    add("--jobs", type=int, default=2, help="trainings at the same time (default: %(default)s)")
    add("--study", type=Path, default=Path("runs/comparison"), help="run folders")
    folder = "for the JSON (default: benchmarks/results; --small: the folder small in it)"
    add("--results", type=Path, help=folder)
    args = parser.parse_args()
    if args.small:
        args.seeds, args.iterations, args.groups = 1, 2, 2
    args.results = args.results or Path("benchmarks/results", "small" if args.small else "")
    file = args.results / ("tuning.json" if args.tune else "comparison.json")
    iterations = args.iterations or (ITERATIONS_TUNING if args.tune else ITERATIONS)
    rows = read_rows(file, "trainings")
    jobs = {cell.job(args.study / file.stem, iterations, args.groups): cell for cell in cells(args)}
    jobs = {job: cell for job, cell in jobs.items() if not is_there(wanted(cell, job), rows)}

    def keep(job: Job) -> None:
        rows.append(row(jobs[job], job))
        write(file, rows)

    for job in jobs:
        if job.done:  # by a call that was stopped before it could keep the row
            keep(job)
    run_jobs(list(jobs), args.jobs, keep)
    for line in method_table(rows):
        at_w = "  ".join(f"w = {w}: {Rate(*counts)}" for w, counts in line["final"].items())
        print(f"{line['method']:>16} {line['setting']:>22} ({line['trainings']}): {at_w}")


if __name__ == "__main__":
    main()
