"""From run folders to numbers: reading, pooling over seeds, and the study's result files."""

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cfgrl_gym.algorithms.evaluation import wilson_interval
from cfgrl_gym.cli.eval import RESULT_FILE
from cfgrl_gym.cli.evaluations import EVALUATIONS_FILE
from cfgrl_gym.cli.run_folder import CONFIG_FILE, versions


def read_training(folder: Path) -> dict[str, Any]:
    """A finished training: options, iterations, and evaluations with every episode's outcome."""
    config = yaml.safe_load((folder / CONFIG_FILE).read_text())
    about = json.loads((folder / "versions.json").read_text())
    with (folder / "progress.csv").open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    run: dict[str, Any] = {
        "name": folder.name,
        "algorithm": about["algorithm"],
        "options": config,
        "iterations": rows,
        "evaluations": [],
        "final": [],
    }
    if (folder / EVALUATIONS_FILE).is_file():
        content = json.loads((folder / EVALUATIONS_FILE).read_text())
        for evaluation in content["evaluations"]:
            results = [short_result(result, config) for result in evaluation["results"]]
            run["evaluations"].append(evaluation | {"results": results})
    if (folder / "eval" / RESULT_FILE).is_file():
        run["final"] += read_evaluation(folder / "eval", config)
    return run


def read_evaluation(folder: Path, trained: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """The results of a `cfgrl eval` folder, one for each cfg_scale.

    :param trained: options of the training behind the policy, which say what it started from
    """
    content = json.loads((folder / RESULT_FILE).read_text())
    return [short_result(result, trained or {}) for result in content["results"]]


def short_result(result: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    """A result with its episodes as {initial state: success}, and the rate on unseen states."""
    seen = trained.get("init_states")
    seen = seen if isinstance(seen, list) else []
    unseen = [e["success"] for e in result["episodes"] if e["init_state_id"] not in seen]
    short = {key: value for key, value in result.items() if key not in ("episodes", "tasks")}
    short["successful_states"] = [e["init_state_id"] for e in result["episodes"] if e["success"]]
    if seen and unseen:
        short["unseen_states"] = rate(sum(unseen), len(unseen))
    return short


def rate(successes: int, episodes: int) -> dict[str, Any]:
    """A success rate with its 95% Wilson interval."""
    return {
        "successes": successes,
        "n_episodes": episodes,
        "success_rate": successes / episodes,
        "interval_95": list(wilson_interval(successes, episodes)),
    }


def pool(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several results as one, on all states and on the unseen ones."""
    pooled = rate(sum(r["successes"] for r in results), sum(r["n_episodes"] for r in results))
    unseen = [r["unseen_states"] for r in results if "unseen_states" in r]
    if unseen:
        pooled["unseen_states"] = pool(unseen)
    gaps = [r["guidance_gap"] for r in results if "guidance_gap" in r]
    if gaps:
        pooled["guidance_gap"] = sum(gaps) / len(gaps)
    return pooled


def curve(
    runs: Sequence[dict[str, Any]], algorithm: str, task: int, cfg_scale: float
) -> list[dict[str, Any]]:
    """Evaluation after evaluation, pooled over the seeds of one method on one task.

    :return: rates with `episodes` and `seconds` (means) and `seeds`; empty: there are no such runs
    """
    chosen = [
        run["evaluations"]
        for run in runs
        if run["algorithm"] == algorithm and run["options"]["task_id"] == task
    ]
    points = []
    for evaluations in zip(*chosen, strict=True):
        results = [r for e in evaluations for r in e["results"] if r["cfg_scale"] == cfg_scale]
        if not results:
            return []
        means = {
            key: sum(e[key] for e in evaluations) / len(evaluations)
            for key in ("episodes", "seconds", "iteration")
        }
        points.append(pool(results) | means | {"seeds": len(results)})
    return points


def before_after(
    runs: Sequence[dict[str, Any]], algorithm: str, task: int, cfg_scale: float
) -> dict[str, Any]:
    """All there is of one method on one task at one w, before and after training, seeds pooled.

    After it are the curve's last evaluation and those at the end, with other noise.
    """
    before, after, seeds = [], [], 0
    for run in runs:
        if run["algorithm"] == algorithm and run["options"]["task_id"] == task:
            seeds += 1
            before += run["evaluations"][0]["results"]
            after += run["evaluations"][-1]["results"] + run["final"]
    return {
        "algorithm": algorithm,
        "cfg_scale": cfg_scale,
        "task_id": task,
        "seeds": seeds,
        # The start at the w of the curve: what the method began as.
        "before": pool(before),
        "after": pool([r for r in after if r["cfg_scale"] == cfg_scale]),
    }


def describe(point: dict[str, Any]) -> str:
    """A rate as people read it: 62% [48, 74] of 50."""
    low, high = point["interval_95"]
    return (
        f"{point['success_rate']:.0%} [{100 * low:.0f}, {100 * high:.0f}] of {point['n_episodes']}"
    )


def write_result(path: Path, **content: Any) -> None:
    """Write a result file: command, versions, machine, and the content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"command": " ".join(["python", *sys.argv]), "versions": versions()}
    path.write_text(json.dumps(about | content, indent=1) + "\n")
    print(path)


def save_figure(figure: Any, path: Path) -> None:
    """Write a picture."""
    figure.savefig(path, dpi=110)
    print(path)
