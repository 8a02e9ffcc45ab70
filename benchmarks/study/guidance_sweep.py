"""Success over cfg_scale for one trained policy, with the guidance gap ‖v_1 - v_∅‖ beside it.

The policy is that of `learning_curve.py`'s CFGRL run on the main task with the first seed (which
is trained if it isn't there). Each value of w is evaluated on all 50 benchmark states with four
seeds of the sampling noise (--small: two). Writes <results>/guidance_sweep.json and .png.

    python benchmarks/study/guidance_sweep.py --help
"""

from typing import Any

import learning_curve
from jobs import evaluation, run_jobs
from results import describe, result_json, results_of, write_result
from settings import EVALUATION_SEED, NOISE_SEEDS, parse_study
from tables import mcnemar

from cfgrl_gym.algorithms import CFGRL
from cfgrl_gym.cli.reporting.comparison import Sweep
from cfgrl_gym.cli.reporting.figures import save_picture
from cfgrl_gym.cli.reporting.plots import Palette, sweep_plot
from cfgrl_gym.cli.reporting.rates import Result, pool

PART = "guidance_sweep"
SCALES = (0.0, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0)
SCALES_SMALL = (0.0, 1.0, 3.0)  # w = 2 is in the curve


def against_unguided(guided: Result, unguided: Result) -> dict[str, Any]:
    """Compare a w with w = 0 on the same states with the same noise.

    The p-value is McNemar's exact one: of the episodes in which they differ, as many should go
    either way. It takes episodes as independent, and a w that was chosen for its rate flatters it.
    """
    pairs = [
        (a.success, b.success) for a, b in zip(guided.episodes, unguided.episodes, strict=True)
    ]
    better, worse = pairs.count((True, False)), pairs.count((False, True))
    return {"only_here": better, "only_at_w_0": worse, "p_value": mcnemar(better, worse)}


def main() -> None:
    study = parse_study(__doc__)
    trained = learning_curve.training(study, CFGRL, study.main_task, study.seeds[0])
    run_jobs([trained], study.jobs)
    jobs = [
        evaluation(
            trained.folder,
            study.folder / PART / f"noise{seed}",
            study.main_task,
            SCALES_SMALL if study.small else SCALES,
            seed=seed,
            video=seed == EVALUATION_SEED,
        )
        for seed in (NOISE_SEEDS[:2] if study.small else NOISE_SEEDS)
    ]
    run_jobs(jobs, study.jobs)
    by_noise = [tuple(results_of([job])) for job in jobs]
    by_scale = list(zip(*by_noise, strict=True))
    policy = trained.folder.name
    sweep = Sweep(policy, None, tuple(map(pool, by_scale)), tuple(by_noise))
    (unguided,) = (point for point in sweep.points if point.cfg_scale == 0)
    rows = [
        {
            **result_json(point),
            "by_noise_seed": [result_json(result) for result in results],
            "against_w_0": against_unguided(point, unguided),
        }
        for point, results in zip(sweep.points, by_scale, strict=True)
    ]
    file = study.results / f"{PART}.json"
    write_result(file, policy=policy, task_id=study.main_task, sweep=rows)
    save_picture(sweep_plot(sweep, Palette([])), file.with_suffix(".png"))
    for row in rows:
        p, gap = row["against_w_0"]["p_value"], row["guidance_gap"]
        where = f"w = {row['cfg_scale']:<5g}"
        print(f"{where} {describe(row)}  gap {gap:.4f}  against w = 0: p = {p:.3f}")


if __name__ == "__main__":
    main()
