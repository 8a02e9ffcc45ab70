"""Reads JSON files that may be damaged or hold something unexpected."""

import json
from pathlib import Path, PureWindowsPath
from typing import Any


def read_json_object(path: Path, remedy: str = "download it again") -> dict[str, Any]:
    """Read the object in a JSON file.

    :param remedy: what to do about a damaged file, for the error message
    :raises ValueError: it isn't JSON, or not an object
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise ValueError(f"'{path}' is not JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds a {type(content).__name__}, not an object; {remedy}")
    return content


def named_file(folder: Path, name: Any, named_in: str) -> Path:
    """Return the path of a file in a folder, as named by another file there.

    Only the name is checked: links in the folder itself, of which the hub's cache consists, are
    followed wherever they lead.

    :param named_in: the file that names it, for the error message
    :raises ValueError: the name leads out of the folder, or isn't a file name
    """
    if not isinstance(name, str) or not name.strip("./") or not name.isprintable():
        raise ValueError(f"'{folder / named_in}' names {name!r:.100}, which is no file's name")
    parts = name.replace("\\", "/").split("/")
    if parts[0] in ("", "~") or ".." in parts or PureWindowsPath(name).anchor:
        raise ValueError(
            f"'{folder / named_in}' names {name!r:.100}, which leads out of its folder: nothing "
            "there is read. Get the checkpoint again from somebody whom you trust"
        )
    return folder / name
