"""CFGRL against its controls on real LIBERO: success over episodes and over seconds.

Trainings start from the shipped policy and have the same budget of episodes: CFGRL, filtered
behaviour cloning, and advantage-weighted regression of the flow-matching loss (`controls.py`), with
several seeds on one task and one on others. Each is evaluated on all 50 benchmark states before
training and after every iteration; trainings start from the first 25 of them. Stopped, it goes on
where it was. Writes <results>/learning_curve.json and .png.

    python benchmarks/study/learning_curve.py --help
"""

from argparse import Namespace
from typing import Any

from controls import AdvantageWeighted, FilteredBC
from jobs import Job, evaluation, run_jobs
from results import describe, result_json, results_of, seen_states, training_json, write_result
from settings import NOISE_SEEDS, parse_study, training_options

from cfgrl_gym.algorithms import CFGRL
from cfgrl_gym.cli.reporting.curves import learning_curves
from cfgrl_gym.cli.reporting.figures import save_picture
from cfgrl_gym.cli.reporting.methods import Method
from cfgrl_gym.cli.reporting.plots import Palette, curve_plot
from cfgrl_gym.cli.reporting.rates import Result, pool
from cfgrl_gym.cli.reporting.runs import Training, read_training

PART = "learning_curve"
ALGORITHMS = (CFGRL, FilteredBC, AdvantageWeighted)
# CFGRL's guidance while collecting, while the curve is measured, and what the end is evaluated at
# besides (a small study has the curve only).
COLLECTING, CURVE, AT_THE_END = 1.0, 2.0, (1.0, 2.0)
# Of CFGRL's policies, with as many episodes: the best w of `guidance_sweep.py`, which looks
# at the first seed of the main task only.
BEST = 3.0
Outcome = tuple[Training, list[Result]]  # a training, and evaluations of its policy at the end


def guidance(algorithm: type[CFGRL], cfg_scale: float) -> float:
    """Return the guidance scale, 0 for the controls, which act as v_∅ alone."""
    return cfg_scale if algorithm is CFGRL else 0.0


def training(study: Namespace, algorithm: type[CFGRL], task: int, seed: int) -> Job:
    """Make a training job; a whole study's main task is also evaluated half way."""
    half_way = task == study.main_task and not study.small
    # The controls have no conditions to draw more or less often.
    changed = {} if algorithm is CFGRL else {"positive_share": None}
    options = training_options(
        task,
        seed,
        study.iterations,
        study.groups,
        cfg_scale=guidance(algorithm, COLLECTING),
        eval_every=max(1, study.iterations // 2) if half_way else study.iterations,
        eval_cfg_scale=guidance(algorithm, CURVE),
        **changed,
    )
    folder = study.folder / PART / f"{algorithm.__name__}-task{task}-seed{seed}"
    return Job(folder, options, algorithm)


def trainings(study: Namespace) -> list[Job]:
    """List every training, those with several seeds first."""
    pairs = [(study.main_task, seed) for seed in study.seeds]
    pairs += [(task, study.seeds[0]) for task in study.other_tasks]
    return [training(study, a, task, seed) for task, seed in pairs for a in ALGORITHMS]


def evaluations(study: Namespace, trained: Job) -> list[Job]:
    """List the evaluations at a training's end: CFGRL's at `BEST` too, with two noise seeds."""
    folder, task = trained.folder, trained.options["task_id"]
    if study.small or trained.algorithm is None:
        return []
    scales = sorted({guidance(trained.algorithm, w) for w in AT_THE_END})
    jobs = [evaluation(folder, folder / "eval", task, scales, video=True)]
    for seed in NOISE_SEEDS[:2] if trained.algorithm is CFGRL else ():
        further = folder.with_name(f"{folder.name}-w{BEST:g}-noise{seed}")
        jobs.append(evaluation(folder, further, task, [BEST], seed=seed))
    return jobs


def summary(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """Pool before and after of each method at each w on each task, with the mean over the tasks."""
    rows = []
    for algorithm in dict.fromkeys(training.algorithm for training, _ in outcomes):
        by_task: dict[int, list[Outcome]] = {}
        for training, final in outcomes:
            if training.algorithm == algorithm:
                # The curve's last evaluation and those at the end have different noise.
                after = [*training.evaluations[-1].results, *final]
                by_task.setdefault(training.config["task_id"], []).append((training, after))
        every = [r for of_task in by_task.values() for _, after in of_task for r in after]
        for w in sorted({result.cfg_scale for result in every}):
            tasks = [before_after(of_task, w) for of_task in by_task.values()]
            mean = sum(row["after"]["success_rate"] for row in tasks) / len(tasks)
            rows.append(
                {"algorithm": algorithm, "cfg_scale": w, "mean_over_tasks": mean, "tasks": tasks}
            )
    return rows


def before_after(outcomes: list[Outcome], cfg_scale: float) -> dict[str, Any]:
    """Pool the seeds of one method on one task: before at the curve's w, after at this one."""
    training, _ = outcomes[0]
    before = [r for trained, _ in outcomes for r in trained.evaluations[0].results]
    after = [r for _, results in outcomes for r in results if r.cfg_scale == cfg_scale]
    seen = seen_states(training)
    return {
        "algorithm": training.algorithm,
        "task_id": training.config["task_id"],
        "seeds": len(outcomes),
        "before": result_json(pool(before), seen),
        "after": result_json(pool(after), seen),
    }


def plot(outcomes: list[Outcome], study: Namespace) -> None:
    """Draw a row for each task, over episodes and over seconds."""
    trained = [training for training, _ in outcomes]
    methods = [
        Method(name, {}, (), tuple(t for t in trained if t.algorithm == name))
        for name in dict.fromkeys(training.algorithm for training in trained)
    ]
    for number, figure in enumerate(curve_plot(learning_curves(methods), Palette(methods))):
        save_picture(figure, study.results / f"{PART}{number or ''}.png")


def main() -> None:
    study = parse_study(__doc__)
    jobs = trainings(study)
    at_the_end = [evaluations(study, job) for job in jobs]
    run_jobs(jobs, study.jobs)
    run_jobs([evaluation for each in at_the_end for evaluation in each], study.jobs)
    outcomes = [
        (read_training(job.folder, job.folder.name), results_of(each))
        for job, each in zip(jobs, at_the_end, strict=True)
    ]
    rows = summary(outcomes)
    runs = [training_json(*outcome) for outcome in outcomes]
    write_result(study.results / f"{PART}.json", summary=rows, runs=runs)
    plot(outcomes, study)
    for row in rows:
        print(f"{row['algorithm']}, w = {row['cfg_scale']:g}: mean {row['mean_over_tasks']:.0%}")
        for task in row["tasks"]:
            before, after = describe(task["before"]), describe(task["after"])
            unseen = describe(task["after"]["unseen_states"])
            print(f"  task {task['task_id']}: {before} -> {after}; unseen states: {unseen}")


if __name__ == "__main__":
    main()
