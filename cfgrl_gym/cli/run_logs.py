"""progress.csv, progress.json and TensorBoard's events, which a resumed run goes on with.

What was logged after the checkpoint that a run resumes from will be logged again, so it is cut off:
the JSON lines and the events to the length that they had, and the CSV is written anew from the
JSON, because its older rows change when a column is added.
"""

import json
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

CSV_FILE, JSON_FILE = "progress.csv", "progress.json"
_EVENTS = "events.out.tfevents*"


class _AppendingJSON(JSONOutputFormat):
    """SB3's, after the lines that are there."""

    def __init__(self, file: Path) -> None:
        self.file = file.open("a", encoding="utf-8")


def open_logs(folder: Path, *more: KVWriter) -> Logger:
    """The logger of a run, which goes on where the folder's files end.

    :param more: other formats beside the files
    """
    csv = CSVOutputFormat(str(folder / CSV_FILE))
    if (folder / JSON_FILE).is_file():
        for line in (folder / JSON_FILE).read_text(encoding="utf-8").splitlines():
            csv.write(json.loads(line), {})
    events = TensorBoardOutputFormat(str(folder))
    return Logger(str(folder), [csv, _AppendingJSON(folder / JSON_FILE), events, *more])


def log_sizes(folder: Path, loggers: Sequence[Logger]) -> dict[str, int]:
    """Bytes of every file that is only ever appended to.

    :param loggers: those that write there
    """
    for logger in loggers:
        for output in logger.output_formats:
            if isinstance(output, TensorBoardOutputFormat) and output.writer is not None:
                output.writer.flush()
    files = [folder / JSON_FILE, *folder.glob(_EVENTS)]
    return {file.name: file.stat().st_size for file in files if file.is_file()}


def cut_logs(folder: Path, sizes: dict[str, Any]) -> None:
    """Have the files as long as they were, and those that weren't there gone."""
    for file in [folder / JSON_FILE, *folder.glob(_EVENTS)]:
        if file.name in sizes:
            with file.open("r+b") as stream:
                stream.truncate(min(int(sizes[file.name]), file.stat().st_size))
        elif file.is_file():
            file.unlink()
