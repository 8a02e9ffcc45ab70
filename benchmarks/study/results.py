"""The study's result files: what `cfgrl report` reads from run folders, as JSON."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs import Job

from cfgrl_gym.cli.reporting.rates import Rate, Result
from cfgrl_gym.cli.reporting.runs import Training, read_evaluation
from cfgrl_gym.cli.run_folder import versions


def results_of(jobs: Sequence[Job]) -> list[Result]:
    """Read the results of evaluations, in order."""
    return [r for job in jobs for r in read_evaluation(job.folder, job.folder.name).results]


def seen_states(training: Training) -> list[int]:
    """Return the initial states that a training started from, where its options list them."""
    given = training.config.get("init_states")
    return given if isinstance(given, list) else []


def result_json(result: Result, seen: Sequence[int] = ()) -> dict[str, Any]:
    """Write a result as JSON, with the rate on unseen states and, of one policy, its successes."""
    unseen = [e.success for e in result.episodes if e.init_state_id not in seen]
    content = {"cfg_scale": result.cfg_scale, **result.rate.as_json()}
    if result.guidance_gap is not None:
        content["guidance_gap"] = result.guidance_gap
    if len(result.sources) == 1:
        content["successful_states"] = [e.init_state_id for e in result.episodes if e.success]
    if seen and unseen:
        content["unseen_states"] = Rate(sum(unseen), len(unseen)).as_json()
    return content


def training_json(training: Training, final: Sequence[Result]) -> dict[str, Any]:
    """Write a finished training as JSON: options, log, and every evaluation.

    :param final: evaluations of its policy at the end
    """
    seen = seen_states(training)
    return {
        "name": training.name,
        "algorithm": training.algorithm,
        "options": training.config,
        "iterations": training.rows,
        "evaluations": [
            {
                "iteration": evaluation.iteration,
                "episodes": evaluation.episodes,
                "seconds": evaluation.seconds,
                "results": [result_json(result, seen) for result in evaluation.results],
            }
            for evaluation in training.evaluations
        ],
        "final": [result_json(result, seen) for result in final],
    }


def describe(content: dict[str, Any]) -> str:
    """Write a rate for people: 62% (31 of 50, 95% interval 48% to 74%)."""
    return str(Rate(content["successes"], content["n_episodes"]))


def read_rows(path: Path, key: str) -> list[dict[str, Any]]:
    """Read the rows that earlier calls wrote under this key; none if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8"))[key] if path.is_file() else []


def is_there(wanted: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether one of these rows has all that is wanted, such as a method and its options."""
    return any(wanted.items() <= row.items() for row in rows)


def write_result(path: Path, **content: Any) -> None:
    """Write a result file: command, versions, machine, and the content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"command": " ".join(["python", *sys.argv]), "versions": versions()}
    path.write_text(json.dumps(about | content, indent=1) + "\n", encoding="utf-8")
    print(path)
