"""Files of a checkpoint that another of its files names."""

from pathlib import Path, PureWindowsPath
from typing import Any


def member(folder: Path, name: Any, named_in: str) -> Path:
    """The file of this name in a folder.

    Only the name is judged: links in the folder itself, as the hub's cache is made of, are
    followed wherever they lead.

    :param named_in: the file that names it, for the error message
    :raises ValueError: the name leads out of the folder, or is none
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
