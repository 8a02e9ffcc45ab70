"""Finds the policies that come with the package, by name."""

from pathlib import Path

from cfgrl_gym.whole_files import sha256

# Tiny PI0s. libero_tiny succeeds sometimes; libero_modes was fitted to demonstrations of several
# objects for each instruction. A file in the folder of each says how it was made.
SHIPPED = ("libero_tiny", "libero_modes")


def find_shipped(checkpoint: str | Path) -> str:
    """Return the folder of a shipped policy, or the name itself if no such policy is shipped.

    An existing folder of that name takes precedence.

    :raises ValueError: a file of the shipped policy differs from its checksum
    """
    name = str(checkpoint)
    if name in SHIPPED and not Path(name).is_dir():
        folder = Path(__file__).parent.parent / name
        for line in (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
            expected, _, file = line.partition("  ")
            if not (folder / file).is_file() or sha256(folder / file) != expected:
                raise ValueError(
                    f"'{folder / file}' is not the file that cfgrl-gym ships; install cfgrl-gym "
                    "again"
                )
        return str(folder)
    return name
