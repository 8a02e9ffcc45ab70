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

from jobs import Job, evaluation, run_jobs
from results import describe, result_json, results_of, seen_states, training_json, write_result
from safetensors.torch import load_file, save_file
from settings import START, parse_study, training_options

from cfgrl_gym.algorithms import CFGRL
from cfgrl_gym.algorithms.pi0.checkpoints.shipped import find_shipped
from cfgrl_gym.algorithms.pi0.condition import CONDITION_MODES
from cfgrl_gym.cli.reporting.runs import read_training

PART = "ablations"
SCALE = 2.0  # at which every cell is evaluated
BASELINE = "baseline"


def cells(groups: int, unconditional: Path) -> dict[str, dict[str, Any]]:
    """Return the options that differ from the baseline's, by the cell's name.

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
        # "bias" is the shipped policy's own; its language model knows no words for "text"
        if mode not in ("bias", "text")
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
    """Write the shipped policy without its condition: v_∅ alone."""
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
    task, iterations = study.main_task, max(1, study.iterations // 2)
    trainings = {}
    unconditional = unconditional_start(folder / "unconditional")
    for name, changed in cells(study.groups, unconditional).items():
        options = training_options(
            task, study.seeds[0], iterations, **{"groups": study.groups, "cfg_scale": 1.0} | changed
        )
        trainings[name] = Job(folder / name, options, CFGRL)
    unknown = set(study.cells) - set(trainings)
    if unknown:
        raise SystemExit(f"no such cells: {', '.join(unknown)}; known: {', '.join(trainings)}")
    wanted = {BASELINE, *(study.cells or trainings)}
    run_jobs([job for name, job in trainings.items() if name in wanted], study.jobs)
    trained = {name: job for name, job in trainings.items() if job.done}  # now or before
    evaluations = {
        name: evaluation(job.folder, job.folder / "eval", task, [SCALE], video=True)
        for name, job in trained.items()
    }
    action, baseline = "guidance=action", trained[BASELINE].folder
    evaluations[action] = evaluation(baseline, folder / action, task, [SCALE], guidance="action")
    run_jobs(list(evaluations.values()), study.jobs)
    rows = []
    for name, job in evaluations.items():
        run = read_training((trained.get(name) or trained[BASELINE]).folder, name)
        final = results_of([job])
        row = {"cell": name, "final": [result_json(result, seen_states(run)) for result in final]}
        rows.append(row | ({"run": training_json(run, final)} if name in trained else {}))
    write_result(study.results / f"{PART}.json", cells=rows)
    for row in rows:
        results = "  ".join(f"w = {r['cfg_scale']:g}: {describe(r)}" for r in row["final"])
        print(f"{row['cell']:>28}  {results}")


if __name__ == "__main__":
    main()
