"""Manages the folder of a command's results, which has all that is needed to repeat the run."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from cfgrl_gym.envs.installation import libero_distributions
from cfgrl_gym.whole_files import whole_file

CONFIG_FILE = "config.yaml"
POLICY_FOLDER = "policy"
CHECKPOINTS_FOLDER = "checkpoints"
MODEL_FILE = "model.zip"
VIDEO_FILE = "episode.mp4"
VERSIONS_FILE = "versions.json"
RESULT_FILE = "eval.json"  # of `cfgrl eval`
OUTCOMES_FILE = "episodes.jsonl"  # of `cfgrl eval`, as they come
EVALUATIONS_FILE = "evaluations.json"  # of a training
CSV_FILE, JSON_FILE = "progress.csv", "progress.json"
LOCK_FILE = ".lock"
_DISTRIBUTIONS = (
    "cfgrl-gym",
    "gymnasium",
    "numpy",
    "torch",
    "transformers",
    "stable-baselines3",
    "mujoco",
    "robosuite",
    "ray",
)


def choose_folder(command: str, out: str | None) -> Path:
    """Choose the folder that a run will write to, without creating it.

    :param out: the folder that the user asked for; None makes a name from the time
    :raises FileExistsError: it exists and isn't empty
    """
    if out is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        base = Path("runs") / f"{command}-{stamp}"
        folder, number = base, 2
        while folder.exists():
            folder, number = base.with_name(f"{base.name}-{number}"), number + 1
        return folder
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"'{folder}' is a file; choose another folder with --out")
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(
            f"folder '{folder}' is not empty, and nothing is overwritten; choose another with --out"
        )
    return folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder against other processes inside the block; the lock ends with the process.

    :raises FileExistsError: another process writes there
    """
    with (folder / LOCK_FILE).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise FileExistsError(
                f"process {file.read().strip()} is writing its run to '{folder}'; wait for it, end "
                "it, or choose another folder"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def create_folder(folder: Path, config: Any, **about: str) -> None:
    """Make the folder, with the configuration and the versions of packages.

    :param about: further facts about the run, stored with the versions
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(versions() | about, indent=2) + "\n"
    (folder / VERSIONS_FILE).write_text(text, encoding="utf-8")
    write_config(folder / CONFIG_FILE, config)


def write_config(path: Path, config: Any) -> None:
    """Write every option with its value, as a file for --config."""
    text = yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)
    with whole_file(path) as new:
        new.write_text(text, encoding="utf-8")


def installed(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those distributions that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def versions() -> dict[str, Any]:
    """Return packages, Python, machine and command line of this process."""
    return {
        "packages": installed((*_DISTRIBUTIONS, *libero_distributions())),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "command_line": sys.argv,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
