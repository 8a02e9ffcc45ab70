"""Finds run folders and reads them into typed values: trainings and evaluations.

An error about a damaged file names it.
"""

import csv
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from cfgrl_gym.cli.reporting.rates import VELOCITY, Episode, Rate, Result, Setting
from cfgrl_gym.cli.run_folder import (
    CONFIG_FILE,
    CSV_FILE,
    EVALUATIONS_FILE,
    RESULT_FILE,
    VERSIONS_FILE,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Evaluation:
    """Holds an evaluation during a training; iteration 0 is before the training.

    :param episodes: training episodes so far
    :param seconds: training time so far
    """

    iteration: int
    episodes: int
    seconds: float
    results: tuple[Result, ...]


@dataclass(frozen=True, eq=False)
class Run:
    """Holds what every run folder has; `name` distinguishes it from the report's other runs."""

    folder: Path
    name: str
    config: dict[str, Any]
    versions: dict[str, Any]
    videos: tuple[Path, ...]

    @property
    def seed(self) -> Any:
        return self.config.get("seed")

    @property
    def guidance(self) -> str:
        return str(self.config.get("guidance", VELOCITY))


@dataclass(frozen=True, eq=False)
class Training(Run):
    """Holds a folder of `cfgrl train`; `rows` is the log, with a row for each iteration."""

    rows: tuple[dict[str, float], ...]
    evaluations: tuple[Evaluation, ...]

    @property
    def algorithm(self) -> str:
        return str(self.versions.get("algorithm", "CFGRL"))

    def column(self, name: str) -> list[float]:
        """Return the values of a column, in the rows that have one."""
        return [row[name] for row in self.rows if name in row]

    def ends(self, name: str) -> tuple[float, float] | None:
        """Return the first and the last value of a column."""
        values = self.column(name)
        return (values[0], values[-1]) if values else None

    def total(self, name: str) -> int:
        """Sum a column of counts."""
        return round(sum(self.column(name)))

    @property
    def dropped(self) -> Rate | None:
        """Return the share of conditions that were dropped; None if the log doesn't count them."""
        uses = self.total("train/conditioned_count")
        return Rate(self.total("train/dropout_count"), uses) if uses else None

    @property
    def dropped_as_asked(self) -> bool | None:
        """Return whether dropout_prob is in the interval of the share that was dropped."""
        asked = self.config.get("dropout_prob")
        if self.dropped is None or asked is None or self.config.get("null_rate") is not None:
            return None
        return self.dropped.contains(asked)

    @property
    def episodes(self) -> int | None:
        """Return the number of finished training episodes; None if it wasn't logged."""
        logged = self.column("rollout/episodes")
        if logged:
            return round(logged[-1])
        return self.evaluations[-1].episodes if self.evaluations else None


@dataclass(frozen=True, eq=False)
class EvaluationRun(Run):
    """Holds a folder of `cfgrl eval`."""

    policy: str
    suite: str
    results: tuple[Result, ...]


@dataclass(frozen=True)
class Runs:
    """Holds all that a report is made from; `left_out` are runs with nothing to show, and why."""

    trainings: tuple[Training, ...]
    evaluations: tuple[EvaluationRun, ...]
    left_out: tuple[str, ...]


def find_runs(folders: Sequence[str]) -> Runs:
    """Read every training and evaluation in these folders and below them.

    :raises FileNotFoundError: a folder doesn't exist
    :raises ValueError: there are no runs, or a file is damaged; the message names it
    """
    found: dict[Path, None] = {}
    for text in folders:
        root = Path(text)
        if not root.exists():
            raise FileNotFoundError(f"run folder '{root}' does not exist; give --runs a folder")
        if not root.is_dir():
            raise ValueError(f"'{root}' is a file; --runs takes folders of runs")
        found.update(dict.fromkeys(_run_folders(root)))
    common = os.path.commonpath([folder.parent for folder in found]) if found else ""
    trainings, evaluations, left_out = [], [], []
    for folder in found:
        name = folder.relative_to(common).as_posix()
        config = read_yaml(folder / CONFIG_FILE)
        if (folder / RESULT_FILE).is_file():
            evaluations.append(read_evaluation(folder, name))
        elif "total_timesteps" in config:
            training = read_training(folder, name)
            if training.rows or training.evaluations:
                trainings.append(training)
            else:
                left_out.append(f"{name}: a training without a finished iteration")
        elif "init_states" in config:
            left_out.append(f"{name}: an evaluation without {RESULT_FILE}")
    if not trainings and not evaluations:
        where = ", ".join(f"'{text}'" for text in folders)
        unfinished = f" (unfinished: {'; '.join(left_out)})" if left_out else ""
        raise ValueError(
            f"no runs in {where}{unfinished}: expected folders that `cfgrl train` or `cfgrl eval` "
            f"wrote, with {CONFIG_FILE} and {CSV_FILE} or {RESULT_FILE}; give --runs such folders"
        )
    return Runs(tuple(trainings), tuple(evaluations), tuple(left_out))


def _run_folders(root: Path) -> Iterable[Path]:
    for place, folders, files in os.walk(root.resolve()):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if CONFIG_FILE in files:
            yield Path(place)


def read_training(folder: Path, name: str) -> Training:
    """Read a folder of `cfgrl train`, whose training may be unfinished.

    :raises ValueError: a file is damaged
    """
    run = _read_run(folder, name)
    table, file = folder / CSV_FILE, folder / EVALUATIONS_FILE

    def evaluations(content: Any) -> list[Evaluation]:
        suite = str(content["suite"])
        return [
            Evaluation(
                iteration=int(part["iteration"]),
                episodes=int(part["episodes"]),
                seconds=float(part["seconds"]),
                results=_results(
                    part, suite, run.guidance, f"{name}, iteration {part['iteration']}"
                ),
            )
            for part in content["evaluations"]
        ]

    measured = read_json(file, evaluations) if file.is_file() else []
    return Training(
        **vars(run),
        rows=read_table(table) if table.is_file() else (),
        evaluations=tuple(sorted(measured, key=lambda evaluation: evaluation.iteration)),
    )


def read_evaluation(folder: Path, name: str) -> EvaluationRun:
    """Read a folder of `cfgrl eval`.

    :raises ValueError: a file is damaged
    """
    run = _read_run(folder, name)

    def build(content: Any) -> EvaluationRun:
        policy, suite = str(content["policy"]), str(content["suite"])
        results = _results(content, suite, run.guidance, name)
        return EvaluationRun(**vars(run), policy=policy, suite=suite, results=results)

    return read_json(folder / RESULT_FILE, build)


def _read_run(folder: Path, name: str) -> Run:
    file = folder / VERSIONS_FILE
    versions = read_json(file, lambda content: dict(content.items())) if file.is_file() else {}
    videos = tuple(sorted(folder.glob("*.mp4")))
    return Run(folder, name, read_yaml(folder / CONFIG_FILE), versions, videos)


def _results(content: Any, suite: str, guidance: str, source: str) -> tuple[Result, ...]:
    if not content["results"]:
        raise ValueError("there are no results in it")
    results = []
    for part in content["results"]:
        tasks = {int(task): _rate(counts) for task, counts in sorted(part["tasks"].items())}
        gap = part.get("guidance_gap")
        episodes = tuple(
            Episode(e["task_id"], e["init_state_id"], bool(e["success"]), e["control_steps"])
            for e in part["episodes"]
        )
        results.append(
            Result(
                setting=Setting(suite, tuple(tasks), guidance),
                cfg_scale=float(part["cfg_scale"]),
                rate=_rate(part),
                tasks=tasks,
                guidance_gap=None if gap is None else float(gap),
                episodes=episodes,
                sources=(source,),
            )
        )
    return tuple(results)


def _rate(content: Any) -> Rate:
    successes, episodes = content["successes"], content["n_episodes"]
    if not isinstance(successes, int) or not isinstance(episodes, int):
        raise ValueError("successes and n_episodes must be whole numbers")
    return Rate(successes, episodes)


# Files -------------------------------------------------------------------------------------------


def refuse(file: Path, reason: str) -> ValueError:
    """Make the error for a file that can't be read."""
    return ValueError(
        f"'{file}' is damaged ({reason}); copy it again from where it was made, or leave this run "
        "out of the report"
    )


def read_yaml(file: Path) -> dict[str, Any]:
    """Read a YAML file with options."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise refuse(file, f"not YAML: {error}") from error
    if not isinstance(content, dict):
        raise refuse(file, "expected options with their values")
    return content


def read_json(file: Path, build: Callable[[Any], T]) -> T:
    """Read a JSON file and convert its content.

    :param build: converts the content; raises KeyError, TypeError, ValueError or AttributeError if
        it is unexpected
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise refuse(file, f"not JSON: {error}") from error
    try:
        return build(content)
    except KeyError as error:
        raise refuse(file, f"{error} is missing") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise refuse(file, str(error)) from error


def read_table(file: Path) -> tuple[dict[str, float], ...]:
    """Read SB3's CSV log: the numbers of each row, without empty cells."""
    rows = []
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            reader = csv.reader(lines)
            names = next(reader, [])
            for cells in reader:
                line = f"line {reader.line_num}"
                if len(cells) != len(names):
                    reason = f"{len(cells)} cells where there are {len(names)} columns"
                    raise refuse(file, f"{line}: {reason}")
                row: dict[str, float] = {}
                for name, cell in zip(names, cells, strict=True):
                    try:
                        row |= {name: float(cell)} if cell else {}
                    except ValueError as error:
                        raise refuse(file, f"{line}, {name}: '{cell}' is no number") from error
                rows.append(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise refuse(file, f"not CSV: {error}") from error
    return tuple(rows)
