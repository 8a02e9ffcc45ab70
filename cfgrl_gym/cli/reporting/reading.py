"""The files of a run folder, refused by name where they are damaged."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")


def refuse(file: Path, reason: str) -> ValueError:
    """The error for a file that can't be read."""
    return ValueError(
        f"'{file}' is damaged ({reason}); copy it again from where it was made, or leave this run "
        "out of the report"
    )


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML file with options."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise refuse(file, f"not YAML: {error}") from error
    if not isinstance(content, dict):
        raise refuse(file, "expected options with their values")
    return content


def read_json(file: Path, build: Callable[[Any], T]) -> T:
    """A JSON file, turned into what the caller needs.

    :param build: raises KeyError, TypeError, ValueError or AttributeError for other content
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
    """SB3's CSV log: the numbers of each row, without empty cells."""
    rows = []
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            reader = csv.reader(lines)
            names = next(reader, [])
            for cells in reader:
                if len(cells) != len(names):
                    reason = f"{len(cells)} cells where there are {len(names)} columns"
                    raise refuse(file, f"line {reader.line_num}: {reason}")
                rows.append(_numbers(names, cells, file, reader.line_num))
    except (UnicodeDecodeError, csv.Error) as error:
        raise refuse(file, f"not CSV: {error}") from error
    return tuple(rows)


def _numbers(names: list[str], cells: list[str], file: Path, line: int) -> dict[str, float]:
    row = {}
    for name, cell in zip(names, cells, strict=True):
        if not cell:
            continue
        try:
            row[name] = float(cell)
        except ValueError as error:
            raise refuse(file, f"line {line}, {name}: '{cell}' is no number") from error
    return row
