"""The main job on real LIBERO: CFGRL makes the shipped policy better, in minutes on a laptop.

`libero_tiny` is evaluated on all 50 benchmark states of one task, trained with CFGRL from the first
25 of them, and evaluated again, with and without guidance. Writes the run with its report.html to
<out>, and <results>/main_job.json (every episode, every iteration, seconds, versions) and .png.

    python benchmarks/study/main_job.py --help
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib
from study_results import describe, read_training, save_figure, write_result
from study_settings import MAIN_TASK, Budget, training_options

from cfgrl_gym.cli import report, train
from cfgrl_gym.cli.configs import ReportConfig, TrainConfig
from cfgrl_gym.cli.run_folder import choose_folder

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--task_id", type=int, default=MAIN_TASK, help="of libero_object (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--iterations", type=int, default=Budget.iterations, help="default: %(default)s")
    add("--groups", type=int, default=Budget.groups, help="of 8 episodes, each iteration")
    add("--cfg_scale", type=float, nargs="+", default=[1.0, 2.0], help="evaluated")
    add("--out", help="run folder, must be empty (default: runs/main_job-<date-time>)")
    add("--results", type=Path, default=Path("benchmarks/results"), help="for JSON and picture")
    args = parser.parse_args()
    args.out = choose_folder("main_job", args.out)
    return args


def plot(run: dict[str, Any], path: Path) -> None:
    """Success before and after; and of the training's episodes, with the loss."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    evaluations = [("before", run["evaluations"][0]), ("after", run["evaluations"][-1])]
    bars = [(when, r) for when, evaluation in evaluations for r in evaluation["results"]]
    for i, (when, r) in enumerate(bars):
        low, high = r["interval_95"]
        rate = r["success_rate"]
        left.bar(i, rate, color="#999999" if when == "before" else "#0072B2")
        left.errorbar(i, rate, yerr=[[rate - low], [high - rate]], color="black", capsize=4)
    left.set_xticks(range(len(bars)), [f"{when}\nw = {r['cfg_scale']:g}" for when, r in bars])
    left.set(ylim=(0, 1), ylabel="success rate", title="50 benchmark states (95% Wilson)")
    for key, label in (
        ("rollout/iteration_success_rate", "success of the training's episodes"),
        ("train/loss", "flow-matching loss"),
    ):
        points = [row[key] for row in run["iterations"] if key in row]
        right.plot(range(1, len(points) + 1), points, marker="o", label=label)
    right.set_xticks(range(1, len(run["iterations"]) + 1))
    right.set(xlabel="iteration", title="training", ylim=(0, None))
    right.legend()
    save_figure(figure, path)


def main() -> None:
    args = parse()
    budget = Budget(args.iterations, args.groups)
    options = training_options(
        args.task_id,
        args.seed,
        budget,
        cfg_scale=1.0,
        eval_every=args.iterations,
        eval_cfg_scale=args.cfg_scale,
        out=str(args.out),
    )
    folder = train.run(TrainConfig(**options))
    report.run(ReportConfig(runs=[str(folder)], out=str(folder / "report.html")))
    run = read_training(folder)
    for when, evaluation in zip(("before", "after"), run["evaluations"], strict=True):
        for result in evaluation["results"]:
            print(f"{when:>6}  w = {result['cfg_scale']:g}: {describe(result)}")
    write_result(args.results / "main_job.json", run=run)
    plot(run, args.results / "main_job.png")


if __name__ == "__main__":
    main()
