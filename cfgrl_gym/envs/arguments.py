"""Checks what callers pass to an environment, before anything is changed."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

LARGEST_IMAGE = 4096  # pixels a side
LONGEST = 10_000  # control steps in a chunk or of settling, which take minutes


def is_int(value: Any) -> bool:
    """Tell whether a value is an integer, Python's or NumPy's, and not True or False."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Tell whether a value is a finite number, Python's or NumPy's, and not True or False."""
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    return number and bool(np.isfinite(value))


def check_int(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Return the value as an int.

    :raises ValueError: it isn't an integer in this range
    """
    if not is_int(value) or value < least or (most is not None and value > most):
        beyond = "" if most is None else f" and at most {most}"
        raise ValueError(f"{name} must be an int of at least {least}{beyond}; got {value!r:.100}")
    return int(value)


def as_list(name: str, value: Any, of: str) -> list[Any]:
    """List the elements of a list, tuple, range or one-dimensional array.

    :param of: what they should be, for the error message
    :raises ValueError: the value is something else
    """
    array = isinstance(value, np.ndarray) and value.ndim == 1
    if isinstance(value, (str, bytes)) or not (array or isinstance(value, Sequence)):
        raise ValueError(f"{name} must be {of}; got {value!r:.100}")
    return list(value)


def check_known(name: str, value: Any, known: Iterable[Any]) -> None:
    """Refuse a value that is not among the known ones.

    :raises ValueError: the value is unknown; the message lists the known ones
    """
    if not any(type(value) is type(one) and value == one for one in known):
        raise ValueError(f"{name} must be one of {tuple(known)}; got {value!r:.100}")


def check_action(action: Any, shape: tuple[int, ...], what: str = "an action") -> np.ndarray:
    """Return the action as an array of numbers, without changing its dtype.

    :raises ValueError: it has another shape, NaN or infinity, or isn't made of real numbers (text,
        truth values, times, complex, masked or structured arrays, objects)
    """
    try:
        array = np.asarray(action)
        masked = np.ma.is_masked(action)
    except Exception as error:  # ragged lists; an object's own __array__ may raise anything
        raise ValueError(
            f"{what} must be numbers of shape {shape}; got {type(action).__name__} ({error})"
        ) from error
    if array.dtype.kind not in "fiu" or masked:
        dtype = "a masked array" if masked else f"dtype {array.dtype}"
        raise ValueError(
            f"{what} must be numbers of shape {shape}; got {type(action).__name__}, {dtype}"
        )
    if array.shape != shape:
        raise ValueError(f"{what} must have shape {shape}; got {array.shape}")
    with np.errstate(over="ignore"):
        if not np.isfinite(array.astype(np.float64)).all():
            raise ValueError(f"{what} must be finite; it has NaN or infinity")
    return array
