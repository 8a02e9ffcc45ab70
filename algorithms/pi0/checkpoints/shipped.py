"""Policies that come with the package and are asked for by name."""

from pathlib import Path

from cfgrl_gym.whole_files import sha256

# libero_tiny: a tiny PI0 that succeeds sometimes. What it is and how it was made stands beside it.
SHIPPED = ("libero_tiny",)


def find_shipped(checkpoint: str | Path) -> str:
    """The folder of a shipped policy, or what was asked for: a folder there is comes first.

    :raises ValueError: the shipped policy isn't as it was shipped
    """
    name = str(checkpoint)
    if name in SHIPPED and not Path(name).is_dir():
        folder = Path(__file__).parent.parent / name
        _check(folder)
        return str(folder)
    return name


def _check(folder: Path) -> None:
    """7 MB, compared in milliseconds."""
    for line in (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
        expected, _, file = line.partition("  ")
        if not (folder / file).is_file() or sha256(folder / file) != expected:
            raise ValueError(
                f"'{folder / file}' is not the file that cfgrl-gym ships; install cfgrl-gym again"
            )
