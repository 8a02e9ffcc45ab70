"""JSON files that may be anything: damaged, or somebody else's."""

import json
from pathlib import Path
from typing import Any


def read_json_object(path: Path, remedy: str = "download it again") -> dict[str, Any]:
    """The object in a JSON file.

    :param remedy: what to do about a damaged one, for the error message
    :raises ValueError: not JSON, or no object
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise ValueError(f"'{path}' is not JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds a {type(content).__name__}, not an object; {remedy}")
    return content
