"""Identifies a fine-tuned policy's base: the checkpoint whose frozen weights a .zip leaves out."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cfgrl_gym.whole_files import sha256


class BaseCheckpoint:
    """Holds a checkpoint in use, with the sizes and times of its files when they were read.

    :param name: folder or hub name
    :param files: its weight files
    """

    def __init__(self, name: str, files: Sequence[Path]) -> None:
        self.name = name
        self.files = files
        self.folder = files[0].parent.resolve()
        self._when_read = self._sizes_and_times()
        self._hashes: dict[str, str] | None = None

    def _sizes_and_times(self) -> list[tuple[int, int]]:
        """Return size and modification time of each file, (-1, -1) if it is gone."""
        stats = [file.stat() if file.is_file() else None for file in self.files]
        return [(stat.st_size, stat.st_mtime_ns) if stat else (-1, -1) for stat in stats]

    def hashes(self) -> dict[str, str] | None:
        """Compute the SHA-256 of each file, by file name; None if a file was changed since.

        The first call reads the files (13 GB at full size); later ones check size and time.
        """
        if self._sizes_and_times() != self._when_read:
            return None
        if self._hashes is None:
            self._hashes = {file.name: sha256(file) for file in self.files}
        return self._hashes

    def verify(self, expected: Mapping[str, str]) -> None:
        """Check that these are the weights with which a .zip was saved.

        :param expected: what `hashes` returned then
        :raises ValueError: the files, or their contents, differ
        """
        hashes = self.hashes()
        if hashes != expected:
            raise ValueError(
                f"the base checkpoint '{self.name}' has changed since this was saved: its weights "
                f"have sha256 {shortened(hashes or {})}, but {shortened(expected)} is needed. "
                "What was trained belongs to those frozen weights: restore the old checkpoint, "
                "or say where it is: CFGRL.load(path, checkpoint=FOLDER)"
            )


def shortened(hashes: Mapping[str, str]) -> str:
    """Format hashes for an error message."""
    return ", ".join(f"{digest[:12]}… ({name})" for name, digest in sorted(hashes.items()))
