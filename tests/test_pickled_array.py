"""LIBERO's pickled states: an array of numbers is read, and no pickle runs anything."""

import functools
import operator
import os
import pickle
import pickletools
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from gymnasium import spaces
from test_trust import Calls

from cfgrl_gym.envs.pickled_array import read_pickled_array


def assembled(*parts: Any) -> bytes:
    """A pickle of opcodes by name, each with its argument's bytes."""
    codes = {op.name: op.code.encode("latin1") for op in pickletools.opcodes}
    return b"".join(codes[p] if isinstance(p, str) else p for p in parts)


def text(value: str) -> tuple[str, bytes]:
    return "SHORT_BINUNICODE", bytes([len(value)]) + value.encode()


def named(module: str, name: str) -> tuple[Any, ...]:
    return *text(module), *text(name), "STACK_GLOBAL"


START = ("PROTO", b"\5")
# (None, {"sample": 1}), the state of an object with slots: setattr, on a class just as well
ONTO_CLASS = ("NONE", "EMPTY_DICT", *text("sample"), "BININT1", b"\1", "SETITEM", "TUPLE2", "BUILD")
ARRAY = np.arange(12.0).reshape(3, 4)


def changed(state: Callable[[Any], Any]) -> bytes:
    """An array's pickle with another state."""

    class Other:
        def __reduce__(self) -> Any:
            function, arguments, own = ARRAY.__reduce__()
            return function, arguments, state(own)

    return pickle.dumps(Other(), protocol=2)


ATTACKS: dict[str, Callable[[Path], bytes]] = {
    "os.system": lambda mark: pickle.dumps(Calls(os.system, f"touch {mark}")),
    "posix via protocol 0": lambda mark: pickle.dumps(Calls(os.mkdir, str(mark)), protocol=0),
    "exec": lambda mark: pickle.dumps(Calls(exec, f"open({str(mark)!r}, 'w')")),
    "getattr": lambda mark: pickle.dumps(Calls(getattr, deque, "__init__")),
    "attrgetter": lambda mark: pickle.dumps(operator.attrgetter("__init__.__globals__")),
    "partial": lambda mark: pickle.dumps(functools.partial(os.mkdir, str(mark))),
    "a function's code": lambda mark: cloudpickle.dumps(lambda _: mark.touch()),
    "copyreg": lambda mark: assembled(*START, *named("copyreg", "_reconstructor"), "STOP"),
    "a dotted name": lambda mark: assembled(
        *START, *named("collections", "deque.__init__"), "STOP"
    ),
    "an extension's number": lambda mark: assembled(*START, "EXT1", b"\1", "STOP"),
    "a persistent id": lambda mark: assembled(*START, *text("x"), "BINPERSID", "STOP"),
    "attributes of a class": lambda mark: assembled(
        *START, *named("gymnasium.spaces.box", "Box"), *ONTO_CLASS, "STOP"
    ),
    "a new object": lambda mark: assembled(
        *START, *named("pathlib", "Path"), "EMPTY_TUPLE", "NEWOBJ", "STOP"
    ),
    "a call of what is only named": lambda mark: assembled(
        *START, *named("torch.optim.adam", "Adam"), "EMPTY_TUPLE", "REDUCE", "STOP"
    ),
    "torch in pickle": lambda mark: pickle.dumps(torch.zeros(2).untyped_storage()),
    # NumPy's dtype of objects, told that it holds none: bytes would become pointers.
    "pointers": lambda mark: pickle.dumps(np.dtype("O"), 5).replace(b"K?", b"K\0"),
    "an array of pointers": lambda mark: changed(
        lambda own: (*own[:2], np.dtype("O"), False, bytes(96))
    ),
    "an array of objects": lambda mark: pickle.dumps(np.array([Calls(os.mkdir, str(mark))], "O")),
    "an array of texts": lambda mark: pickle.dumps(np.array([["a", "b"]])),
    "more than the bytes": lambda mark: changed(lambda own: (own[0], (3, 400), *own[2:])),
    "a negative size": lambda mark: changed(lambda own: (own[0], (-3, -4), *own[2:])),
    "bytes of another size": lambda mark: assembled(*START, "BYTEARRAY8", bytes([9] * 8), "STOP"),
    "numpy's loader": lambda mark: pickle.dumps(Calls(np.load, str(mark), None, True)),
    "numbers alone": lambda mark: pickle.dumps([1.0, 2.0]),
    "nothing": lambda mark: b"",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_could_run_code_or_is_no_array_is_refused_and_has_not_run(
    attack: str, tmp_path: Path
) -> None:
    mark, sample = tmp_path / "it_ran", spaces.Box.sample
    with pytest.raises(ValueError, match="no pickled array of numbers"):
        read_pickled_array(ATTACKS[attack](mark))
    assert not mark.exists()
    assert spaces.Box.sample is sample


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("dtype", ["<f8", ">f8", "<f4", "<i8", "|u1"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_read_as_they_are(protocol: int, dtype: str, order: Any) -> None:
    array = np.asarray(ARRAY, dtype=dtype, order=order)
    for content in (
        pickle.dumps(array, protocol),
        pickle.dumps(array, protocol).replace(b"numpy._core.", b"numpy.core.")  # NumPy 1's
        if protocol == 2
        else pickle.dumps(array, protocol),
    ):
        read = read_pickled_array(content)
        np.testing.assert_array_equal(read, array)
        assert read.dtype == array.dtype
        assert read.flags.writeable


def test_numpys_shared_dtypes_stay_as_they_are() -> None:
    read_pickled_array(pickle.dumps(ARRAY.astype(">f8"), 2))
    assert np.dtype("f8").byteorder == "="
