"""Fetches files of other projects from the hub, and handles errors when these are damaged."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download


def fetch(what: str, name: str, files: Sequence[str], remedy: str) -> Path:
    """Download files of a hub repository and return the folder they are in.

    :param what: and `remedy`: parts of the error message
    :raises FileNotFoundError: there is no such repository, no permission, or no network
    """
    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{what} '{name}' is no local folder and could not be had from the hub ({reason}). "
            f"{remedy}"
        ) from error


@contextmanager
def refuse(
    problem: str,
    remedy: str = "download the checkpoint again",
    but: tuple[type[Exception], ...] = (MemoryError,),
) -> Iterator[None]:
    """Turn errors inside the block into a ValueError that states the problem.

    transformers and tokenizers raise errors of every kind when a file is damaged.

    :param but: kinds of errors that are passed on unchanged
    """
    try:
        yield
    except but:
        raise
    except Exception as error:
        raise ValueError(f"{problem} ({error!r:.300}); {remedy}") from error
