"""Reports a run's progress on the terminal, and in files that a resumed run continues.

The files are progress.csv, progress.json and TensorBoard's events. What was logged after the
checkpoint that a run resumes from will be logged again, so it is removed: the JSON lines and the
events are cut to the length that they had, and the CSV is rewritten from the JSON, because its
older rows change when a column is added.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import (
    CSVOutputFormat,
    JSONOutputFormat,
    KVWriter,
    Logger,
    TensorBoardOutputFormat,
)
from tqdm import tqdm

from cfgrl_gym.cli.run_folder import CSV_FILE, JSON_FILE

_EVENTS = "events.out.tfevents*"
# The values shown on the terminal; the files have all of them.
_LINE = {
    "success": "rollout/success_rate",
    "kept": "rollout/groups_kept",
    "discarded": "rollout/groups_discarded",
    "loss": "train/loss",
    "gap": "train/guidance_gap",
}


def progress_bar(
    description: str, total: int | None, unit: str, shown: bool = True, initial: int = 0
) -> "tqdm[Any]":
    """Make a progress bar on stderr, which is written less often if that is a log file.

    :param initial: what was done before
    """
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(
        desc=description,
        total=total,
        initial=initial,
        unit=unit,
        dynamic_ncols=True,
        mininterval=interval,
        disable=not shown,
    )


class IterationLine(KVWriter):
    """Writes a line for every iteration, above the progress bar."""

    def write(
        self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0
    ) -> None:
        shown = [f"{n} {key_values[key]:.4g}" for n, key in _LINE.items() if key in key_values]
        tqdm.write(f"step {step}: " + ", ".join(shown))

    def close(self) -> None:
        """Do nothing, since no file is open."""


class _AppendingJSON(JSONOutputFormat):
    """Writes SB3's JSON lines, and appends them to an existing file."""

    def __init__(self, file: Path) -> None:
        self.file = file.open("a", encoding="utf-8")


def open_logs(folder: Path, *more: KVWriter) -> Logger:
    """Open the logger of a run, which appends to the folder's files.

    :param more: other output formats besides the files
    """
    csv = CSVOutputFormat(str(folder / CSV_FILE))
    if (folder / JSON_FILE).is_file():
        for line in (folder / JSON_FILE).read_text(encoding="utf-8").splitlines():
            csv.write(json.loads(line), {})
    events = TensorBoardOutputFormat(str(folder))
    return Logger(str(folder), [csv, _AppendingJSON(folder / JSON_FILE), events, *more])


def log_sizes(folder: Path, loggers: Sequence[Logger]) -> dict[str, int]:
    """Return the size in bytes of every file that is only appended to.

    :param loggers: the loggers that write there
    """
    for logger in loggers:
        for output in logger.output_formats:
            if isinstance(output, TensorBoardOutputFormat) and output.writer is not None:
                output.writer.flush()
    files = [folder / JSON_FILE, *folder.glob(_EVENTS)]
    return {file.name: file.stat().st_size for file in files if file.is_file()}


def cut_logs(folder: Path, sizes: dict[str, Any]) -> None:
    """Cut the files to the length that they had, and delete those that didn't exist."""
    for file in [folder / JSON_FILE, *folder.glob(_EVENTS)]:
        if file.name in sizes:
            with file.open("r+b") as stream:
                stream.truncate(min(int(sizes[file.name]), file.stat().st_size))
        elif file.is_file():
            file.unlink()
