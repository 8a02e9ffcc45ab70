"""Reads the array in a pickle without running the pickle's code.

A pickle is a program that calls whatever it names. Here every name stands for an inert `_Call`,
which records its arguments and does nothing else; then the array is made from that record, if it
consists of plain numbers.
"""

import io
import math
import pickle
import pickletools
from typing import Any

import numpy as np


class _Call:
    """Records a name in a pickle, or a call of it."""

    def __init__(self, name: str, arguments: tuple[Any, ...] | None = None) -> None:
        self.name, self.arguments, self.state = name, arguments, None

    def __call__(self, *arguments: Any) -> "_Call":
        return _Call(self.name, arguments)

    def __setstate__(self, state: Any) -> None:
        self.state = state


# The standard library's reader in Python: the one in C can be made to fill the memory.
_Python: Any = pickle._Unpickler


class _Reader(_Python):  # type: ignore[misc]
    def find_class(self, module: str, name: str) -> _Call:
        return _Call(f"{module}.{name}".replace("numpy.core.", "numpy._core."))  # NumPy 1's


def read_pickled_array(content: bytes) -> np.ndarray:
    """Read the array of numbers in a pickle of protocol 2 to 5.

    :raises ValueError: it is damaged, or holds anything else
    """
    try:
        # The number of an extension is looked up without asking `find_class`.
        if any(opcode.name.startswith("EXT") for opcode, _, _ in pickletools.genops(content)):
            raise ValueError("a pickle with extensions")
        return _array(_Reader(io.BytesIO(content)).load())
    except Exception as error:  # damaged bytes can fail in any opcode
        raise ValueError(f"no pickled array of numbers ({error!r:.200})") from error


def _array(made: Any) -> np.ndarray:
    """Make the array from what NumPy's pickles call and set, as in its `ndarray.__reduce__`."""
    order: Any
    if made.name == "numpy._core.multiarray._reconstruct":
        _, shape, dtype, fortran, numbers = made.state
        order = "F" if fortran else "C"
    elif made.name == "numpy._core.numeric._frombuffer":
        numbers, dtype, shape, order = made.arguments
    else:
        raise ValueError(f"it names {made.name}")
    if isinstance(numbers, _Call):
        if numbers.name != "_codecs.encode" or numbers.arguments[1] != "latin1":  # type: ignore[index]
            raise ValueError(f"it names {numbers.name}")
        numbers = numbers.arguments[0].encode("latin1")  # type: ignore[index]
    kind = np.dtype(dtype.arguments[0])
    if dtype.name != "numpy.dtype" or kind.kind not in "fiu" or kind.itemsize > 8:
        raise ValueError(f"its type is {dtype.arguments!r:.50}")
    if dtype.state is not None:
        kind = kind.newbyteorder(dtype.state[1])
    if len(numbers) != math.prod(shape) * kind.itemsize:
        raise ValueError(f"{len(numbers)} bytes for the shape {shape!r:.50}")
    return np.frombuffer(numbers, kind).reshape(tuple(shape), order=order).copy()
