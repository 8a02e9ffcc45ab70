"""Run folders as typed values: trainings and evaluations, found below the folders given."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfgrl_gym.cli.reporting.rates import Rate
from cfgrl_gym.cli.reporting.reading import read_json, read_table, read_yaml
from cfgrl_gym.cli.run_folder import CONFIG_FILE

RESULT_FILE, EVALUATIONS_FILE, TABLE_FILE = "eval.json", "evaluations.json", "progress.csv"
VERSIONS_FILE = "versions.json"
VELOCITY = "velocity"  # the guidance of a run that says nothing of it


@dataclass(frozen=True)
class Setting:
    """What success was measured on; rates of different settings aren't compared."""

    suite: str
    tasks: tuple[int, ...]
    guidance: str = VELOCITY

    def __str__(self) -> str:
        how = "" if self.guidance == VELOCITY else f", guidance {self.guidance}"
        if len(self.tasks) == 1:
            return f"{self.suite} task {self.tasks[0]}{how}"
        if len(self.tasks) <= 4:
            return f"{self.suite} tasks {', '.join(map(str, self.tasks))}{how}"
        return f"{self.suite}, {len(self.tasks)} tasks{how}"


@dataclass(frozen=True)
class Episode:
    """How one evaluated episode went."""

    task_id: int
    init_state_id: int
    success: bool
    control_steps: int


@dataclass(frozen=True)
class Result:
    """Success of one policy at one cfg_scale."""

    cfg_scale: float
    rate: Rate
    tasks: dict[int, Rate]
    guidance_gap: float | None
    episodes: tuple[Episode, ...]


@dataclass(frozen=True)
class Checkup:
    """An evaluation in the course of a training; iteration 0 is before it."""

    iteration: int
    episodes: int
    seconds: float
    results: tuple[Result, ...]


@dataclass(frozen=True, eq=False)
class Run:
    """What every run folder has. `name` tells it from the others of the report."""

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
    """A folder of `cfgrl train`. `rows`: the log, an iteration each."""

    rows: tuple[dict[str, float], ...]
    evaluated_suite: str
    evaluations: tuple[Checkup, ...]

    @property
    def algorithm(self) -> str:
        return str(self.versions.get("algorithm", "CFGRL"))

    def setting(self, tasks: Iterable[int]) -> Setting:
        """Of its evaluations, on these tasks."""
        return Setting(self.evaluated_suite, tuple(tasks), self.guidance)

    def column(self, name: str) -> list[float]:
        """The values of a column, in the rows that have one."""
        return [row[name] for row in self.rows if name in row]


@dataclass(frozen=True, eq=False)
class EvaluationRun(Run):
    """A folder of `cfgrl eval`."""

    policy: str
    suite: str
    results: tuple[Result, ...]

    def setting(self, tasks: Iterable[int]) -> Setting:
        """Of its results, on these tasks."""
        return Setting(self.suite, tuple(tasks), self.guidance)


@dataclass(frozen=True)
class Runs:
    """All that a report is made from. `left_out`: run folders with nothing to show, and why."""

    trainings: tuple[Training, ...]
    evaluations: tuple[EvaluationRun, ...]
    left_out: tuple[str, ...]


def find_runs(folders: Sequence[str]) -> Runs:
    """Read every training and evaluation in these folders and below them.

    :raises FileNotFoundError: no such folder
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
    trainings, evaluations, left_out = [], [], []
    for folder, name in _names(list(found)).items():
        config = read_yaml(folder / CONFIG_FILE)
        common = (folder, name, config, _versions(folder), tuple(sorted(folder.glob("*.mp4"))))
        if (folder / RESULT_FILE).is_file():
            evaluations.append(EvaluationRun(*common, *read_json(folder / RESULT_FILE, _evaluated)))
        elif "total_timesteps" in config:
            table, checkups = folder / TABLE_FILE, folder / EVALUATIONS_FILE
            rows = read_table(table) if table.is_file() else ()
            suite = str(config.get("suite", "?"))
            measured: tuple[Checkup, ...] = ()
            if checkups.is_file():
                suite, measured = read_json(checkups, _checkups)
            if rows or measured:
                trainings.append(Training(*common, rows, suite, measured))
            else:
                left_out.append(f"{name}: a training without a finished iteration")
        elif "init_states" in config:
            left_out.append(f"{name}: an evaluation without {RESULT_FILE}")
    if not trainings and not evaluations:
        where = ", ".join(f"'{text}'" for text in folders)
        unfinished = f" (unfinished: {'; '.join(left_out)})" if left_out else ""
        raise ValueError(
            f"no runs in {where}{unfinished}: expected folders that `cfgrl train` or `cfgrl eval` "
            f"wrote, with {CONFIG_FILE} and {TABLE_FILE} or {RESULT_FILE}; give --runs such folders"
        )
    return Runs(tuple(trainings), tuple(evaluations), tuple(left_out))


def _run_folders(root: Path) -> Iterable[Path]:
    for place, folders, files in os.walk(root.resolve()):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if CONFIG_FILE in files:
            yield Path(place)


def _names(folders: list[Path]) -> dict[Path, str]:
    if not folders:
        return {}
    common = Path(os.path.commonpath([folder.parent for folder in folders]))
    return {folder: folder.relative_to(common).as_posix() for folder in folders}


def _versions(folder: Path) -> dict[str, Any]:
    file = folder / VERSIONS_FILE
    return read_json(file, lambda content: dict(content.items())) if file.is_file() else {}


def _rate(content: Any) -> Rate:
    successes, episodes = content["successes"], content["n_episodes"]
    if not isinstance(successes, int) or not isinstance(episodes, int):
        raise ValueError("successes and n_episodes must be whole numbers")
    return Rate(successes, episodes)


def _result(content: Any) -> Result:
    gap = content.get("guidance_gap")
    return Result(
        cfg_scale=float(content["cfg_scale"]),
        rate=_rate(content),
        tasks={int(task): _rate(part) for task, part in sorted(content["tasks"].items())},
        guidance_gap=None if gap is None else float(gap),
        episodes=tuple(
            Episode(e["task_id"], e["init_state_id"], bool(e["success"]), e["control_steps"])
            for e in content["episodes"]
        ),
    )


def _results(content: Any) -> tuple[Result, ...]:
    results = tuple(map(_result, content["results"]))
    if not results:
        raise ValueError("there are no results in it")
    return results


def _evaluated(content: Any) -> tuple[str, str, tuple[Result, ...]]:
    return str(content["policy"]), str(content["suite"]), _results(content)


def _checkups(content: Any) -> tuple[str, tuple[Checkup, ...]]:
    checkups = [
        Checkup(int(e["iteration"]), int(e["episodes"]), float(e["seconds"]), _results(e))
        for e in content["evaluations"]
    ]
    return str(content["suite"]), tuple(sorted(checkups, key=lambda c: c.iteration))
