"""Success over cfg_scale for one trained policy, with the guidance gap ‖v_1 - v_∅‖ beside it.

The policy is that of `learning_curve.py`'s CFGRL run on the main task with the first seed (which
is trained if it isn't there). Each value of w is evaluated on all 50 benchmark states with four
seeds of the sampling noise (--small: two). Writes <results>/guidance_sweep.json and .png.

    python benchmarks/study/guidance_sweep.py --help
"""

from pathlib import Path
from typing import Any

import learning_curve
from scipy.stats import binomtest
from study_results import describe, pool, read_evaluation, save_figure, write_result
from study_runs import EvaluationOf, evaluation_of, run_jobs
from study_settings import EVALUATION_SEED, NOISE_SEEDS, Study, parse_study

PART = "guidance_sweep"
SCALES = (0.0, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0)
SCALES_SMALL = (0.0, 1.0, 3.0)  # w = 2 is in the curve


def evaluation(study: Study, policy: Path, seed: int) -> EvaluationOf:
    return evaluation_of(
        policy,
        study.folder / PART / f"noise{seed}",
        study.main_task,
        SCALES_SMALL if study.small else SCALES,
        seed=seed,
        video=seed == EVALUATION_SEED,
    )


def sweep(jobs: list[EvaluationOf]) -> list[dict[str, Any]]:
    """Each w's results pooled over the seeds of the noise."""
    each = [read_evaluation(job.folder) for job in jobs]
    return [
        {"cfg_scale": results[0]["cfg_scale"], **pool(results), "by_noise_seed": list(results)}
        for results in zip(*each, strict=True)
    ]


def against_unguided(trained: list[dict[str, Any]]) -> None:
    """Add to each w how it compares with w = 0 on the same states with the same noise.

    The p-value is McNemar's exact one: of the episodes in which they differ, as many should go
    either way. It takes episodes as independent, and a w that was chosen for its rate flatters it.
    """
    (unguided,) = (point for point in trained if point["cfg_scale"] == 0)
    for point in trained:
        pairs = zip(point["by_noise_seed"], unguided["by_noise_seed"], strict=True)
        sets = [(set(a["successful_states"]), set(b["successful_states"])) for a, b in pairs]
        better, worse = sum(len(a - b) for a, b in sets), sum(len(b - a) for a, b in sets)
        p = binomtest(better, better + worse).pvalue if better + worse else 1.0
        point["against_w_0"] = {"only_here": better, "only_at_w_0": worse, "p_value": float(p)}


def plot(trained: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot as plt

    scales = [point["cfg_scale"] for point in trained]
    rates = [point["success_rate"] for point in trained]
    bars = [[abs(p["success_rate"] - p["interval_95"][i]) for p in trained] for i in (0, 1)]
    best = max(trained, key=lambda point: point["success_rate"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.errorbar(scales, rates, yerr=bars, marker="o", capsize=3, color="#0072B2")
    left.plot(best["cfg_scale"], best["success_rate"], "*", markersize=16, color="#D55E00")
    left.annotate(
        f"w = {best['cfg_scale']:g}",
        (best["cfg_scale"], best["success_rate"]),
        textcoords="offset points",
        xytext=(8, 8),
    )
    for axes in (left, right):
        axes.set_xscale("symlog", linthresh=1)
        whole = [w for w in scales if w == int(w)]  # others have no room
        axes.set_xticks(whole, [f"{w:g}" for w in whole])
        axes.minorticks_off()
    left.set(xlabel="cfg_scale w", ylabel="success rate (95% Wilson)", ylim=(0, 1))
    gaps = [point["guidance_gap"] for point in trained]
    right.plot(scales, gaps, marker="o", color="#009E73")
    right.set(xlabel="cfg_scale w", ylabel="‖v_1 - v_∅‖", ylim=(0, 1.2 * max(gaps)))
    save_figure(figure, path)


def main() -> None:
    study = parse_study(__doc__)
    training = learning_curve.training(study, "CFGRL", study.main_task, study.seeds[0])
    run_jobs([training], study.jobs)
    seeds = NOISE_SEEDS[:2] if study.small else NOISE_SEEDS
    jobs = [evaluation(study, training.folder, seed) for seed in seeds]
    run_jobs(jobs, study.jobs)
    trained = sweep(jobs)
    against_unguided(trained)
    write_result(
        study.results / f"{PART}.json",
        policy=training.folder.name,
        task_id=study.main_task,
        sweep=trained,
    )
    plot(trained, study.results / f"{PART}.png")
    for point in trained:
        p = point["against_w_0"]["p_value"]
        print(
            f"w = {point['cfg_scale']:<5g} {describe(point)}  gap {point['guidance_gap']:.4f}  "
            f"against w = 0: p = {p:.3f}"
        )


if __name__ == "__main__":
    main()
