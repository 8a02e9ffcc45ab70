"""Reads the normalisation statistics that LeRobot and openpi store with their checkpoints."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cfgrl_gym.json_files import named_file, read_json_object
from cfgrl_gym.wrappers.norm_stats import ACTION_DIM, STATE_DIM, NormStats, moments_of

STATS_FILE = "norm_stats.json"
# LeRobot: names of the features; statistics are "<feature>.mean" and so on.
_FEATURES = {"state": ("observation.state", STATE_DIM), "actions": ("action", ACTION_DIM)}
PREPROCESSOR = "policy_preprocessor.json"
_PROCESSORS = (PREPROCESSOR, "policy_postprocessor.json")
# LeRobot before it had processors: the model's own buffers, with underscores for dots.
_OLD_BUFFERS = {
    "state": ("normalize_inputs.buffer_observation_state",),
    "actions": ("unnormalize_outputs.buffer_action", "normalize_targets.buffer_action"),
}
_VECTORS = ("mean", "std", "q01", "q99")
OLD_BUFFER_PREFIXES = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")


def openpi_stats(folder: Path) -> NormStats | None:
    """Read openpi's assets/<asset id>/norm_stats.json; None if there is none.

    :raises ValueError: there are several
    """
    found = sorted((folder / "assets").rglob(STATS_FILE))
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found)
        raise ValueError(
            f"checkpoint '{folder}' has {len(found)} norm_stats.json: {names}; pass norm_stats= "
            "the path of the one that belongs to your robot"
        )
    return NormStats.load(found[0]) if found else None


def lerobot_stats(folder: Path, weights: Sequence[Path]) -> NormStats | None:
    """Read the statistics in LeRobot's processors, or in the weights of older versions.

    :raises ValueError: they have the wrong length, or are damaged
    """
    files = _state_files(folder)
    vectors = {part: _read(files, [feature]) for part, (feature, _) in _FEATURES.items()}
    if not any(vectors.values()):
        vectors = {
            part: _read(weights, [f"{prefix}{name}" for name in names for prefix in ("", "model.")])
            for part, names in _OLD_BUFFERS.items()
        }
    if not any(vectors.values()):
        return None
    where = f"statistics of checkpoint '{folder}'"
    state, actions = (
        moments_of(vectors[part], feature, size, where)
        for part, (feature, size) in _FEATURES.items()
    )
    return NormStats(state, actions)


def processor_steps(folder: Path, name: str) -> list[dict[str, Any]]:
    """Read the steps of one of LeRobot's processors; an empty list if the folder lacks its file.

    :raises ValueError: the file is damaged
    """
    if not (folder / name).is_file():
        return []
    steps = read_json_object(folder / name).get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ValueError(f"'{folder / name}' is damaged (no list of steps); download it again")
    return steps


def _state_files(folder: Path) -> list[Path]:
    files = []
    for name in _PROCESSORS:
        for step in processor_steps(folder, name):
            state = step.get("state_file")
            if not state:
                continue
            file = named_file(folder, state, name)
            if not file.is_file():
                raise FileNotFoundError(
                    f"'{folder / name}' names {state}, which isn't there; download it, or pass "
                    "norm_stats="
                )
            files.append(file)
    return files


def _read(files: Sequence[Path], names: Sequence[str]) -> dict[str, list[float]]:
    """Read the vectors "<name>.mean" and so on; if one occurs several times, the last counts."""
    found: dict[str, list[float]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                present = set(tensors.keys())
                for name, key in product(names, _VECTORS):
                    if f"{name}.{key}" in present:
                        vector = tensors.get_tensor(f"{name}.{key}").to(torch.float64).flatten()
                        # Older versions wrote infinity where no statistics had been set.
                        if not vector.isinf().all():
                            found[key] = vector.tolist()
        except SafetensorError as error:
            raise ValueError(f"'{file}' can't be read ({error}); download it again") from error
    return found
