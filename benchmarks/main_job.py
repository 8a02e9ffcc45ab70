"""The main job on real LIBERO: demonstrations, warm start, CFGRL, success before and after.

Uses the commands of `cfgrl` one after the other, on one task, at a scale for a laptop. Writes
<results>/main_job.json (every episode, every iteration, seconds, versions) and main_job.png.
Training starts from placements that LIBERO's sampler draws; evaluation from the benchmark's
initial states, so that no evaluated start was trained on.

    python benchmarks/main_job.py --help
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import matplotlib

from cfgrl_gym.cli import demos, eval, sft, train
from cfgrl_gym.cli.configs import DemosConfig, EvalConfig, SftConfig, TrainConfig
from cfgrl_gym.cli.run_folder import choose_folder, versions

matplotlib.use("Agg")
from matplotlib import pyplot as plt

IMAGE_SIZE = 112
HORIZON = 16  # control steps that the policy predicts and that are executed before it looks again
# Control steps of a training episode. Evaluation has LIBERO's 280; a success takes about 120, and
# a failure isn't mended later, so the rest would be time without a lesson.
TRAINING_LIMIT = 160


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--suite", default="libero_object")
    add("--task_id", type=int, default=0)
    add("--seed", type=int, default=0)
    add("--demos", type=int, default=40, help="demonstrations (default: %(default)s)")
    add("--sft_steps", type=int, default=600, help="warm start (default: %(default)s)")
    add("--timesteps", type=int, default=1300, help="chunks of CFGRL (default: %(default)s)")
    add("--episodes", type=int, default=20, help="evaluated each time (default: %(default)s)")
    add("--cfg_scale", type=float, nargs="+", default=[1.0, 1.5], help="evaluated after")
    add("--n_envs", type=int, default=2, help="environments (default: %(default)s)")
    add("--out", help="run folder, must be empty (default: runs/main_job-<date-time>)")
    add("--results", type=Path, default=Path("benchmarks/results"), help="for JSON and plot")
    args = parser.parse_args()
    args.out = choose_folder("main_job", args.out)
    return args


def evaluation(args: argparse.Namespace, policy: Path, scales: list[float], name: str) -> Any:
    config = EvalConfig(
        policy=str(policy),
        suite=args.suite,
        task_id=args.task_id,
        episodes=args.episodes,
        cfg_scale=scales,
        n_envs=args.n_envs,
        seed=args.seed,
        out=str(args.out / name),
    )
    return json.loads((eval.run(config) / eval.RESULT_FILE).read_text())["results"]


def iterations(folder: Path) -> list[dict[str, float]]:
    """What CFGRL logged, a dictionary for each iteration."""
    with (folder / "progress.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def plot(result: dict[str, Any], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    bars = [("before", r) for r in result["before"]] + [("after", r) for r in result["after"]]
    for i, (when, r) in enumerate(bars):
        low, high = r["interval_95"]
        rate = r["success_rate"]
        colour = "tab:gray" if when == "before" else "tab:green"
        left.bar(i, rate, color=colour)
        left.errorbar(i, rate, yerr=[[rate - low], [high - rate]], color="black", capsize=4)
    left.set_xticks(range(len(bars)), [f"{when}\nw = {r['cfg_scale']:g}" for when, r in bars])
    left.set(ylim=(0, 1), ylabel="success rate", title="benchmark initial states (95% Wilson)")
    rows = result["iterations"]
    for key, label in (
        ("rollout/success_rate", "success (rollouts, running)"),
        ("train/loss", "flow-matching loss"),
    ):
        points = [(i + 1, row[key]) for i, row in enumerate(rows) if key in row]
        right.plot(*zip(*points, strict=True), marker="o", label=label)
    right.set(xlabel="CFGRL iteration", title="training", ylim=(0, None))
    right.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    args = parse()
    seconds: dict[str, float] = {}

    def timed(name: str, work: Any) -> Any:
        print(f"--- {name.replace('_', ' ')}", flush=True)
        began = perf_counter()
        value = work()
        seconds[name] = round(perf_counter() - began, 1)
        return value

    demos_config = DemosConfig(
        suite=args.suite,
        task_id=args.task_id,
        demos=args.demos,
        image_size=IMAGE_SIZE,
        image_stride=4,
        seed=args.seed,
        out=str(args.out / "demos"),
    )
    files = timed("demonstrations", lambda: demos.run(demos_config))
    sft_config = SftConfig(
        demos=[str(file) for file in files],
        horizon=HORIZON,
        image_size=IMAGE_SIZE,
        patch_size=28,
        steps=args.sft_steps,
        seed=args.seed,
        out=str(args.out / "sft"),
    )
    started_from = timed("warm_start", lambda: sft.run(sft_config))
    before = timed("evaluation_before", lambda: evaluation(args, started_from, [1.0], "before"))
    train_config = TrainConfig(
        policy=str(started_from),
        suite=args.suite,
        task_id=args.task_id,
        init_states="random",
        n_envs=args.n_envs,
        total_timesteps=args.timesteps,
        max_episode_steps=TRAINING_LIMIT,
        groups_per_iteration=10,
        trainable="expert",
        learning_rate=3e-5,  # the warm start ended at 1e-4; more than that undoes it
        n_epochs=8,
        cfg_scale=1.0,
        seed=args.seed,
        out=str(args.out / "cfgrl"),
    )
    trained = timed("cfgrl", lambda: train.run(train_config))
    after = timed("evaluation_after", lambda: evaluation(args, trained, args.cfg_scale, "after"))

    result = {
        "command": " ".join(["python", *sys.argv]),
        **versions(),
        "arguments": {key: str(value) for key, value in vars(args).items()},
        "seconds": seconds | {"total": round(sum(seconds.values()), 1)},
        "before": before,
        "after": after,
        "iterations": iterations(trained),
    }
    args.results.mkdir(parents=True, exist_ok=True)
    file = args.results / "main_job.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, args.results / "main_job.png")
    print(f"{seconds}\n{file}, {args.results / 'main_job.png'}; runs and videos in {args.out}")


if __name__ == "__main__":
    main()
