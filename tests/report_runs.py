"""Run folders made by hand, as `cfgrl train` and `cfgrl eval` write them."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imageio
import numpy as np
import yaml

from cfgrl_gym.cli.configs import EvalConfig, TrainConfig
from cfgrl_gym.cli.run_folder import write_config

COLUMNS = (
    "time/iterations",
    "rollout/success_rate",
    "rollout/episodes",
    "rollout/iteration_success_rate",
    "rollout/groups_kept",
    "rollout/groups_discarded",
    "rollout/positive_share",
    "time/time_elapsed",
    "time/seconds_simulation",
    "time/seconds_inference",
    "time/seconds_update",
    "train/loss",
    "train/grad_norm",
    "train/dropout_rate",
    "train/dropout_count",
    "train/conditioned_count",
    "train/guidance_gap",
)


def rate(successes: int, episodes: int) -> dict[str, Any]:
    """The counts of a rate. What the report can compute is wrong on purpose."""
    return {
        "success_rate": -1.0,
        "interval_95": [-1.0, -1.0],
        "successes": successes,
        "n_episodes": episodes,
    }


def result(
    cfg_scale: float, tasks: dict[int, tuple[int, int]], gap: float | None = None, noise: int = 0
) -> dict[str, Any]:
    """One cfg_scale's part of eval.json.

    :param tasks: successes and episodes of each
    :param noise: results with other noise have episodes of other lengths
    """
    episodes = [
        {
            "task_id": task,
            "init_state_id": number,
            "success": number < successes,
            "episode_return": float(number < successes),
            "control_steps": 100 + number + noise,
        }
        for task, (successes, count) in tasks.items()
        for number in range(count)
    ]
    totals = [sum(column) for column in zip(*tasks.values(), strict=True)]
    content = {
        "cfg_scale": cfg_scale,
        **rate(*totals),
        "tasks": {str(task): rate(*counts) for task, counts in tasks.items()},
        "episodes": episodes,
    }
    return content if gap is None else content | {"guidance_gap": gap}


def make_run(folder: Path, config: Any, algorithm: str | None = None) -> Path:
    """A folder with config.yaml and versions.json."""
    folder.mkdir(parents=True)
    write_config(folder / "config.yaml", config)
    versions: dict[str, Any] = {
        "packages": {"torch": "2.0"},
        "started": "2026-01-02T03:04:05+00:00",
    }
    if algorithm is not None:
        versions["algorithm"] = algorithm
    (folder / "versions.json").write_text(json.dumps(versions))
    return folder


def make_evaluation(
    folder: Path,
    results: Sequence[dict[str, Any]],
    policy: str = "runs/sft",
    suite: str = "libero_object",
    videos: Sequence[str] = (),
    **options: Any,
) -> Path:
    """A folder of `cfgrl eval`."""
    make_run(folder, EvalConfig(policy=policy, suite=suite, **options))
    content = {"policy": policy, "suite": suite, "results": list(results)}
    (folder / "eval.json").write_text(json.dumps(content))
    for name in videos:
        make_video(folder / f"{name}.mp4")
    return folder


def make_training(
    folder: Path,
    rows: Sequence[dict[str, Any]] = ({"time/iterations": 1, "train/loss": 0.5},),
    evaluations: Sequence[tuple[int, int, float, Sequence[dict[str, Any]]]] = (),
    algorithm: str | None = "CFGRL",
    **options: Any,
) -> Path:
    """A folder of `cfgrl train`.

    :param evaluations: iteration, episodes, seconds, results
    """
    options = {"policy": "runs/sft", "out": str(folder)} | options
    make_run(folder, TrainConfig(**options), algorithm)
    with (folder / "progress.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    if evaluations:
        entries = [
            {
                "iteration": iteration,
                "episodes": episodes,
                "timesteps": episodes * 10,
                "control_steps": episodes * 160,
                "seconds": seconds,
                "results": list(results),
            }
            for iteration, episodes, seconds, results in evaluations
        ]
        content = {"suite": options.get("suite", "libero_object"), "evaluations": entries}
        (folder / "evaluations.json").write_text(json.dumps(content))
    return folder


def make_video(path: Path, frames: int = 40, size: tuple[int, int] = (64, 96)) -> None:
    """Frames that get brighter from black to white."""
    shades = np.linspace(0, 255, frames).astype(np.uint8)
    images = [np.full((*size, 3), shade, np.uint8) for shade in shades]
    imageio.mimwrite(path, images, fps=20)  # type: ignore[arg-type]


def edit_config(folder: Path, **options: Any) -> None:
    """Change, add, or with ... remove options of a run."""
    file = folder / "config.yaml"
    config = yaml.safe_load(file.read_text()) | options
    config = {name: value for name, value in config.items() if value is not ...}
    file.write_text(yaml.safe_dump(config))
