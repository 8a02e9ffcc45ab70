"""CFGRL against its controls on real LIBERO: success over episodes and over seconds.

Trainings start from the shipped policy and have the same budget of episodes: CFGRL, filtered
behaviour cloning, and advantage-weighted regression of the flow-matching loss (`controls.py`), with
several seeds on one task and one on others. Each is evaluated on all 50 benchmark states before
training and after every iteration; trainings start from the first 25 of them. Stopped, it goes on
where it was. Writes <results>/learning_curve.json and .png.

    python benchmarks/study/learning_curve.py --help
"""

from typing import Any

from study_results import (
    before_after,
    curve,
    describe,
    read_evaluation,
    read_training,
    save_figure,
    write_result,
)
from study_runs import ALGORITHMS, EvaluationOf, Training, evaluation_of, run_jobs
from study_settings import NOISE_SEEDS, Study, parse_study, training_options

PART = "learning_curve"
# Guidance while collecting, while the curve is measured, and what the end is evaluated at besides
# (a small study has the curve only): the controls act as v_∅ alone, w = 0.
COLLECTING = {"CFGRL": 1.0, "FilteredBC": 0.0, "AdvantageWeighted": 0.0}
CURVE = {"CFGRL": 2.0, "FilteredBC": 0.0, "AdvantageWeighted": 0.0}
AT_THE_END = {"CFGRL": (1.0, 2.0), "FilteredBC": (0.0,), "AdvantageWeighted": (0.0,)}
# Of CFGRL's policies, with as many episodes: the best w of `guidance_sweep.py`, which looks
# at the first seed of the main task only.
BEST = 3.0
COLOURS = {
    ("CFGRL", 2.0): "#0072B2",
    ("FilteredBC", 0.0): "#E69F00",
    ("AdvantageWeighted", 0.0): "#009E73",
}


def training(study: Study, algorithm: str, task: int, seed: int) -> Training:
    """The main task is evaluated half way too; the others, and a small study, before and after."""
    iterations = study.budget.iterations
    half_way = task == study.main_task and not study.small
    # The controls have no conditions to draw more or less often.
    changed = {} if algorithm == "CFGRL" else {"positive_share": None}
    options = training_options(
        task,
        seed,
        study.budget,
        cfg_scale=COLLECTING[algorithm],
        eval_every=max(1, iterations // 2) if half_way else iterations,
        eval_cfg_scale=CURVE[algorithm],
        **changed,
    )
    folder = study.folder / PART / f"{algorithm}-task{task}-seed{seed}"
    return Training(folder, algorithm, options, () if study.small else AT_THE_END[algorithm])


def trainings(study: Study) -> list[Training]:
    """Every training, those with several seeds first."""
    pairs = [(study.main_task, seed) for seed in study.seeds]
    pairs += [(task, study.seeds[0]) for task in study.other_tasks]
    return [training(study, a, task, seed) for task, seed in pairs for a in ALGORITHMS]


def at_the_best_scale(study: Study, trained: Training) -> list[EvaluationOf]:
    """CFGRL's policy at `BEST`, with two seeds of noise; nothing for others or a small study."""
    if study.small or trained.algorithm != "CFGRL":
        return []
    return [
        evaluation_of(
            trained.folder,
            trained.folder.with_name(f"{trained.folder.name}-w{BEST:g}-noise{seed}"),
            trained.options["task_id"],
            [BEST],
            seed=seed,
        )
        for seed in NOISE_SEEDS[:2]
    ]


def read(trained: Training, evaluations: list[EvaluationOf]) -> dict[str, Any]:
    run = read_training(trained.folder)
    for job in evaluations:
        run["final"] += read_evaluation(job.folder, run["options"])
    return run


def plot(runs: list[dict[str, Any]], study: Study) -> None:
    """A row for episodes and one for seconds, a column for each task."""
    from matplotlib import pyplot as plt

    tasks = [study.main_task, *study.other_tasks]
    figure, axes = plt.subplots(
        2, len(tasks), figsize=(3.6 * len(tasks), 6), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for column, task in enumerate(tasks):
        for row, (axis, label) in enumerate(
            (("episodes", "training episodes"), ("seconds", "training seconds (one core)"))
        ):
            ax = axes[row][column]
            for (name, w), colour in COLOURS.items():
                points = curve(runs, name, task, w)
                if not points:
                    continue
                x = [point[axis] for point in points]
                rate = [point["success_rate"] for point in points]
                low, high = zip(*(point["interval_95"] for point in points), strict=True)
                title = name if name != "CFGRL" else f"CFGRL, w = {w:g}"
                ax.plot(x, rate, marker="o", markersize=3, color=colour, label=title)
                ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            ax.set(xlabel=label, ylim=(0, 1))
            if column == 0:
                ax.set_ylabel("success rate (95% Wilson)")
        seeds = len(study.seeds) if task == study.main_task else 1
        axes[0][column].set_title(f"task {task}, {seeds} seed{'s' if seeds > 1 else ''}")
    axes[0][0].legend(fontsize=8)
    save_figure(figure, study.results / f"{PART}.png")


def summary(runs: list[dict[str, Any]], study: Study) -> list[dict[str, Any]]:
    """Before and after of each method on each task, and its mean over the tasks."""
    tasks = (study.main_task, *study.other_tasks)
    rows = []
    for name in ALGORITHMS:
        of_method = [run for run in runs if run["algorithm"] == name]
        last = [r for run in of_method for r in run["evaluations"][-1]["results"] + run["final"]]
        for w in sorted({result["cfg_scale"] for result in last}):
            of_tasks = [before_after(runs, name, task, w) for task in tasks]
            mean = sum(row["after"]["success_rate"] for row in of_tasks) / len(tasks)
            rows.append(
                {"algorithm": name, "cfg_scale": w, "mean_over_tasks": mean, "tasks": of_tasks}
            )
    return rows


def main() -> None:
    study = parse_study(__doc__)
    jobs = trainings(study)
    further = [at_the_best_scale(study, job) for job in jobs]
    run_jobs(jobs, study.jobs)
    run_jobs([evaluation for each in further for evaluation in each], study.jobs)
    runs = [read(*pair) for pair in zip(jobs, further, strict=True)]
    rows = summary(runs, study)
    write_result(study.results / f"{PART}.json", summary=rows, runs=runs)
    plot(runs, study)
    for row in rows:
        print(f"{row['algorithm']}, w = {row['cfg_scale']:g}: mean {row['mean_over_tasks']:.0%}")
        for task in row["tasks"]:
            before, after = describe(task["before"]), describe(task["after"])
            unseen = describe(task["after"]["unseen_states"])
            print(f"  task {task['task_id']}: {before} -> {after} (unseen states: {unseen})")


if __name__ == "__main__":
    main()
