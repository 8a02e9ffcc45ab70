"""Computes and stores normalisation statistics, in openpi's `norm_stats.json` format."""

import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cfgrl_gym.envs.libero import ACTION_DIM
from cfgrl_gym.json_files import read_json_object
from cfgrl_gym.wrappers.transforms import STD_EPSILON

STATE_DIM = 8  # end-effector position (3), axis-angle (3), gripper fingers (2)
_COMPUTE = "NormStats.compute(states, actions, std_floor=0.05)"
_FORMAT = '{"norm_stats": {"state": {"mean": [...], "std": [...]}, "actions": {...}}}'


@dataclass(frozen=True)
class Moments:
    """Holds the statistics of one vector, in its own units; the quantiles may be missing."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    q01: tuple[float, ...] | None = None
    q99: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "std", "q01", "q99"):
            value = getattr(self, name)
            if value is None and name in ("q01", "q99"):
                continue
            try:
                vector = tuple(float(x) for x in value)
            except OverflowError:  # an integer in JSON may have any length
                raise ValueError(f"{name} must be finite numbers") from None
            object.__setattr__(self, name, vector)
            if len(vector) != len(self.mean):
                raise ValueError(
                    f"{name} has {len(vector)} numbers and mean has {len(self.mean)}; "
                    "expected the same length"
                )
            if not np.isfinite(vector).all():
                raise ValueError(f"{name} must be finite numbers; got {list(vector)}")
        if min(self.std, default=0.0) < 0:
            raise ValueError(f"std must not be negative; got {list(self.std)}")
        if not any(std > STD_EPSILON for std in self.std):
            raise ValueError(
                f"std is 0 in all {len(self.std)} dimensions, as of data that never changes: what "
                "is normalised by it is no use to a policy"
            )
        if self.q01 and self.q99 and any(a > b for a, b in zip(self.q01, self.q99, strict=True)):
            raise ValueError(f"q01 {list(self.q01)} exceeds q99 {list(self.q99)}")


@dataclass(frozen=True)
class NormStats:
    """Holds statistics of the state (8 numbers) and of actions as the model sees them (7 numbers).

    "As the model sees them" means action - state, if the extra delta transform is used.

    >>> stats = NormStats.load("norm_stats.json")  # doctest: +SKIP
    """

    state: Moments
    actions: Moments

    def __post_init__(self) -> None:
        for name, size in (("state", STATE_DIM), ("actions", ACTION_DIM)):
            given = len(getattr(self, name).mean)
            if given != size:
                raise ValueError(f"{name} statistics have {given} numbers; expected {size}")

    @classmethod
    def identity(cls) -> "NormStats":
        """Return mean 0 and standard deviation 1, which leave all values as they are."""
        return cls(
            Moments((0.0,) * STATE_DIM, (1.0,) * STATE_DIM),
            Moments((0.0,) * ACTION_DIM, (1.0,) * ACTION_DIM),
        )

    @classmethod
    def compute(
        cls, states: np.ndarray, actions: np.ndarray, std_floor: float = 0.0
    ) -> "NormStats":
        """Compute the statistics of demonstrations.

        :param states: (N, 8), not normalised
        :param actions: (..., 7), as the model sees them (already minus the state, if the extra
            delta transform is used)
        :param std_floor: smallest standard deviation to return. Otherwise, in a dimension that
            hardly varies in the demonstrations (for example an orientation), normalisation would
            magnify small deviations.
        """
        if std_floor < 0:
            raise ValueError(f"std_floor must not be negative; got {std_floor}")
        moments = []
        for name, array, size in (("states", states, STATE_DIM), ("actions", actions, ACTION_DIM)):
            flat = np.asarray(array, dtype=np.float64)
            if flat.ndim < 2 or flat.shape[-1] != size or flat.size == 0:
                raise ValueError(
                    f"{name} has shape {flat.shape}; expected (N, {size}) with N of at least 1"
                )
            flat = flat.reshape(-1, size)
            if not np.isfinite(flat).all():
                raise ValueError(f"{name} holds NaN or infinite numbers; drop those samples first")
            std = np.maximum(flat.std(0), std_floor)
            vectors = (flat.mean(0), std, *np.quantile(flat, (0.01, 0.99), axis=0))
            try:
                moments.append(Moments(*map(tuple, vectors)))
            except ValueError as error:
                raise ValueError(f"{name}: {error}; give data of whole episodes") from error
            _warn_of_constants(moments[-1], name)
        return cls(*moments)

    @classmethod
    def load(cls, path: str | Path) -> "NormStats":
        """Read openpi's `norm_stats.json`; longer vectors are cut to the first 8 / 7 numbers.

        :param path: the file, or the folder that holds it
        :raises FileNotFoundError: there is no such file
        :raises ValueError: it isn't JSON or in openpi's format, or its numbers can't be statistics
        """
        path = Path(path)
        if path.is_dir():
            path = path / "norm_stats.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"norm stats file '{path}' does not exist; give the path of openpi's "
                "norm_stats.json for this checkpoint (in its assets folder), or compute one from "
                "demonstrations with NormStats.compute(states, actions).save(path)"
            )
        content = read_json_object(path, f"expected {_FORMAT}. Is it an unfinished download?")
        file = f"norm stats file '{path}'"
        stats = _member(content, "norm_stats", file, "the file")
        return cls(
            moments_of(_member(stats, "state", file, "norm_stats"), "state", STATE_DIM, file),
            moments_of(_member(stats, "actions", file, "norm_stats"), "actions", ACTION_DIM, file),
        )

    def save(self, path: str | Path) -> None:
        """Write the statistics in openpi's format to a file (`norm_stats.json` in a folder)."""
        path = Path(path)
        if path.is_dir():
            path = path / "norm_stats.json"
        content = {
            name: {key: vector for key, vector in asdict(moments).items() if vector is not None}
            for name, moments in (("state", self.state), ("actions", self.actions))
        }
        path.write_text(json.dumps({"norm_stats": content}, indent=2) + "\n", encoding="utf-8")


def _member(container: Any, key: str, file: str, where: str) -> Any:
    if not isinstance(container, dict) or key not in container:
        has = sorted(container) if isinstance(container, dict) else type(container).__name__
        raise ValueError(f"{file}: {where} has no '{key}' (it has {has}); expected {_FORMAT}")
    return container[key]


def moments_of(vectors: Any, name: str, size: int, where: str) -> Moments:
    """Build the statistics of the first `size` numbers of each vector.

    :param vectors: {"mean": [...], "std": [...]} and, if known, "q01" and "q99"
    :param name: name of the quantity, for error messages
    :param where: name of the file, for error messages
    :raises ValueError: a vector is missing, shorter than `size`, or can't be statistics
    """
    chosen: dict[str, tuple[float, ...]] = {}
    for key in ("mean", "std", "q01", "q99"):
        if key in ("q01", "q99") and (not isinstance(vectors, dict) or vectors.get(key) is None):
            continue
        vector = _member(vectors, key, where, name)
        if not isinstance(vector, list) or not all(_is_number(x) for x in vector):
            raise ValueError(f"{where}: {name}.{key} must be a list of numbers; got {vector!r}")
        if len(vector) < size:
            raise ValueError(
                f"{where}: {name}.{key} has {len(vector)} numbers; expected at least {size}. "
                "These are not statistics of LIBERO's state (8) and actions (7)"
            )
        chosen[key] = tuple(vector[:size])
    try:
        moments = Moments(**chosen)
    except ValueError as error:
        raise ValueError(f"{where}: {name}: {error}; compute it again: {_COMPUTE}") from error
    _warn_of_another_robot(vectors, f"{where}: {name}", size)
    _warn_of_constants(moments, f"{where}: {name}")
    return moments


def _warn_of_constants(moments: Moments, name: str) -> None:
    """Warn of dimensions that never changed in the data of the statistics.

    :param name: name of the quantity, and of its file
    """
    constant = [i for i, std in enumerate(moments.std) if std <= STD_EPSILON]
    if constant:
        warnings.warn(
            f"{name}: std is 0 in dimensions {constant}: a state that changes there reaches the "
            "model up to a million times too large, and an action is always its mean there. If "
            "the robot moves in them, set these std to 0.05, say, or compute the statistics again: "
            f"{_COMPUTE}",
            stacklevel=3,
        )


def _warn_of_another_robot(vectors: dict[str, list[float]], name: str, size: int) -> None:
    """Warn of further numbers than LIBERO's that aren't padding, which has mean 0."""
    mean = vectors["mean"]
    if any(mean[size:]):
        warnings.warn(
            f"{name} has {len(mean)} numbers, and those beyond the first {size} aren't padding: "
            f"statistics of another robot? The first {size} are used; for LIBERO's own take "
            f"{_COMPUTE}",
            stacklevel=3,
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
