"""Policies that come with the package and are asked for by name."""

from pathlib import Path

# libero_tiny: a tiny PI0 that succeeds sometimes. What it is and how it was made stands beside it.
SHIPPED = ("libero_tiny",)


def find_shipped(checkpoint: str | Path) -> str:
    """The folder of a shipped policy, or what was asked for: a folder there is comes first."""
    name = str(checkpoint)
    if name in SHIPPED and not Path(name).is_dir():
        return str(Path(__file__).parent / name)
    return name
