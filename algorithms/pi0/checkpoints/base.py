"""The base of a fine-tuned policy: the checkpoint whose frozen weights are kept nowhere else."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cfgrl_gym.whole_files import sha256


@dataclass(frozen=True)
class BaseReference:
    """What a .zip keeps of its base.

    :param name: folder or hub name
    :param sha256: of each weight file, by file name
    """

    name: str
    sha256: dict[str, str]


@dataclass
class Base:
    """A checkpoint in use: its files as they were when their weights were read.

    :param name: folder or hub name
    :param files: its weight files
    """

    name: str
    files: Sequence[Path]
    _seen: list[tuple[int, int]] = field(init=False)
    _reference: BaseReference | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._seen = self._look()

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.files[0].parent.resolve()

    def _look(self) -> list[tuple[int, int]]:
        """Size and time of change of each file, (-1, -1) where it is gone."""
        stats = [file.stat() if file.is_file() else None for file in self.files]
        return [(stat.st_size, stat.st_mtime_ns) if stat else (-1, -1) for stat in stats]

    def reference(self) -> BaseReference | None:
        """Name and hashes; None if the files aren't those any more that the weights came from.

        The first call reads the files (13 GB at full size), later ones look at size and time.
        """
        if self._look() != self._seen:
            return None
        if self._reference is None:
            hashes = {file.name: sha256(file) for file in self.files}
            self._reference = BaseReference(self.name, hashes)
        return self._reference

    def verify(self, expected: BaseReference) -> None:
        """Make sure that these are the weights a .zip was saved with.

        :raises ValueError: other files, or other contents
        """
        hashes = {file.name: sha256(file) for file in self.files}
        if hashes == expected.sha256:
            self._reference = BaseReference(self.name, hashes)
            return
        raise ValueError(
            f"the base checkpoint '{self.name}' has changed since this was saved: its weights "
            f"have sha256 {_beginnings(hashes)}, but {_beginnings(expected.sha256)} is needed. "
            "What was trained belongs to those frozen weights: bring the old checkpoint back, or "
            "give its place: CFGRL.load(path, checkpoint=FOLDER)"
        )


def missing_base(expected: BaseReference, name: str, reason: Exception) -> FileNotFoundError:
    """The error for a base that isn't where it is looked for."""
    return FileNotFoundError(
        f"this was saved without the frozen weights of its base checkpoint, which was expected at "
        f"'{name}' ({reason}). If it is elsewhere now: CFGRL.load(path, checkpoint=NEW_FOLDER); "
        f"its weights have sha256 {_beginnings(expected.sha256)}"
    )


def _beginnings(hashes: dict[str, str]) -> str:
    return ", ".join(f"{digest[:12]}… ({name})" for name, digest in sorted(hashes.items()))
