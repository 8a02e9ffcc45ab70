"""What each choice of the method is worth: one option changed at a time, each cell a training.

All cells train on the main task with one seed and half the iterations of `learning_curve.py`; the
first is that script's CFGRL with nothing changed, whose condition is a bias. Other condition modes
start from the shipped policy's v_∅ with a fresh condition. Stopped, it goes on where it was. Writes
<results>/ablations.json, of all cells that are done.

    python benchmarks/study/ablations.py --help
"""

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from study_results import describe, read_evaluation, read_training, write_result
from study_runs import DONE_FILE, Training, evaluation_of, run_jobs
from study_settings import START, Budget, parse_study, training_options

from cfgrl_gym.algorithms.pi0.checkpoints.shipped import find_shipped
from cfgrl_gym.algorithms.pi0.condition import CONDITION_MODES

PART = "ablations"
SCALE = 2.0  # at which every cell is evaluated
BASELINE = "baseline"


def cells(groups: int, unconditional: Path) -> dict[str, dict[str, Any]]:
    """Options that differ from the baseline's, by the cell's name.

    :param groups: the baseline's, of K = 8
    """
    options: dict[str, dict[str, Any]] = {BASELINE: {}}
    options |= {f"dropout_prob={p:g}": {"dropout_prob": p} for p in (0.0, 0.05, 0.2)}
    options |= {
        f"label_source={source}": {"label_source": source}
        for source in ("window_rloo", "window_return")
    }
    options |= {
        f"condition_mode={mode}": {"policy": str(unconditional), "condition_mode": mode}
        for mode in CONDITION_MODES
        if mode != "bias"  # the shipped policy's own
    }
    options["negatives=zero"] = {"negatives": "zero"}
    options |= {
        f"K={k}": {"rloo_batch_size": k, "groups_per_iteration": groups * 8 // k} for k in (2, 4)
    }
    # As many groups tried as the baseline has; those with equal returns are not learned from.
    options["dynamic_sampling"] = {
        "enable_dynamic_sampling": True,
        "early_stop_percentage": 1.0,
        "max_groups_tried": groups,
    }
    # Of a mixed group, only successes where at most half of the other episodes succeeded.
    options["label_threshold=0.4"] = {"label_threshold": 0.4}
    options |= {f"learning_rate={lr:g}": {"learning_rate": lr} for lr in (2.5e-4, 1e-3)}
    options["positive_share=None"] = {"positive_share": None}
    options["rollout_cfg_scale=2"] = {"cfg_scale": 2.0}
    options["replay_iterations=0"] = {"replay_iterations": 0}
    return options


def unconditional_start(folder: Path) -> Path:
    """The shipped policy without its condition: v_∅ alone."""
    source = Path(find_shipped(START))
    if not folder.is_dir():
        new = folder.with_name(f".{folder.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(source, new)
        file = new / "model.safetensors"
        weights = load_file(file)
        kept = {name: w for name, w in weights.items() if not name.startswith("condition.")}
        save_file(kept, file, metadata={"format": "pt"})
        new.rename(folder)
    return folder


def main() -> None:
    study = parse_study(__doc__)
    folder = study.folder / PART
    folder.mkdir(parents=True, exist_ok=True)
    budget = Budget(max(1, study.budget.iterations // 2), study.budget.groups)
    unconditional = unconditional_start(folder / "unconditional")
    trainings = {
        name: Training(
            folder / name,
            "CFGRL",
            training_options(
                study.main_task, study.seeds[0], budget, **({"cfg_scale": 1.0} | changed)
            ),
            sweep=(SCALE,),
        )
        for name, changed in cells(budget.groups, unconditional).items()
    }
    unknown = set(study.cells) - set(trainings)
    if unknown:
        raise SystemExit(f"no such cells: {', '.join(unknown)}; known: {', '.join(trainings)}")
    wanted = {BASELINE, *(study.cells or trainings)}
    run_jobs([t for name, t in trainings.items() if name in wanted], study.jobs)
    action = evaluation_of(
        trainings[BASELINE].folder,
        folder / "guidance=action",
        study.main_task,
        [SCALE],
        guidance="action",
    )
    run_jobs([action], study.jobs)
    rows = []
    for name, training in trainings.items():
        if not (training.folder / DONE_FILE).is_file():
            continue  # not asked for, now or before
        run = read_training(training.folder)
        rows.append({"cell": name, "final": run["final"], "run": run})
    options = rows[0]["run"]["options"]
    rows.append({"cell": action.folder.name, "final": read_evaluation(action.folder, options)})
    write_result(study.results / f"{PART}.json", cells=rows)
    for row in rows:
        results = "  ".join(f"w={r['cfg_scale']:g}: {describe(r)}" for r in row["final"])
        print(f"{row['cell']:>28}  {results}")


if __name__ == "__main__":
    main()
