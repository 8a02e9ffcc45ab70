"""Files that are there whole or not at all, and known by their hash."""

import hashlib
from pathlib import Path


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def replace_file(path: Path, text: str) -> None:
    """Write a file that takes the place of `path` only when it is complete."""
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
