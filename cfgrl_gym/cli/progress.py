"""Progress bars with the time that is left, and a line for every iteration."""

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(description: str, total: int | None, unit: str) -> "tqdm[Any]":
    """A bar on stderr; in a log file it writes now and then instead of all the time."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(desc=description, total=total, unit=unit, dynamic_ncols=True, mininterval=interval)
