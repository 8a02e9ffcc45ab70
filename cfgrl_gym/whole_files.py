"""Writes files and folders that appear complete or not at all, and computes files' hashes."""

import contextlib
import glob
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

LEFT_OVER_AFTER = 3600  # seconds: an older unfinished file was left by a process that was killed


def sha256(file: Path) -> str:
    """Compute the hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**24):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a file to write, which replaces `path` once the block ends without an error.

    Several processes may write the same file at once.
    """
    for unfinished in path.parent.glob(f".{glob.escape(path.name)}.*.new"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - unfinished.stat().st_mtime > LEFT_OVER_AFTER:
                unfinished.unlink()
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill, which replaces `path` once the block ends without an error.

    :param durable: write the folder and its files to the disk itself (fsync) before
    """
    new = path.with_name(f".{path.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        yield new
        if durable:
            for written in (*(file for file in new.iterdir() if file.is_file()), new):
                _sync(written)
        old = _set_aside(path) if path.exists() else None
        new.rename(path)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    if durable:
        _sync(path.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder without ever leaving a part of it under its name."""
    shutil.rmtree(_set_aside(path), ignore_errors=True)


def _set_aside(path: Path) -> Path:
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    return path.rename(old)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
