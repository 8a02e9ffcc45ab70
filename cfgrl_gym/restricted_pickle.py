"""Reading pickled data without running code: only what a fixed list of names can build.

A pickle is a program that calls whatever it names. Here every name is looked up in a table of exact
(module, name) pairs, nothing is imported for a file, and for each of them it is fixed whether it
may be called, made empty and filled, or only mentioned. NumPy's own helpers are replaced: dtypes
and generators as they are can be brought to read any memory or to call any of the other names.
"""

import io
import math
import pickle
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.random import PCG64, Generator
from numpy.random.bit_generator import SeedSequence

Name = tuple[str, str]  # module, name in it


class ForbiddenNameError(ValueError):
    """A pickle names something that is not on the list.

    :param name: "module.name"
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"it names {name}, which is not on the list of what may be read")
        self.name = name


@dataclass(frozen=True)
class Allowed:
    """What a pickle may name.

    :param calls: functions, and classes that take their contents as arguments
    :param classes: classes whose instances are made empty and get a dictionary of attributes
    :param values: what may be mentioned, but neither called nor changed
    :param fills: for instances of other classes, what gives them their state
    """

    calls: Mapping[Name, Callable[..., Any]] = field(default_factory=dict)
    classes: Mapping[Name, type] = field(default_factory=dict)
    values: Mapping[Name, Any] = field(default_factory=dict)
    fills: Mapping[type, Callable[[Any, Any], None]] = field(default_factory=dict)

    def __or__(self, other: "Allowed") -> "Allowed":
        return Allowed(
            {**self.calls, **other.calls},
            {**self.classes, **other.classes},
            {**self.values, **other.values},
            {**self.fills, **other.fills},
        )


def read_pickle(content: bytes, allowed: Allowed) -> Any:
    """The object that a pickle describes.

    :raises ForbiddenNameError: it needs something that is not allowed; nothing of it has run
    :raises ValueError: it is damaged
    """
    try:
        return _Reader(content, allowed).load()
    except ForbiddenNameError:
        raise
    except Exception as error:  # damaged bytes can fail in any opcode
        raise ValueError(f"damaged pickle ({error!r})") from error


# What Python's pickler writes for such values, in protocols 2 to 5.
_OPCODES = """
    PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4
    BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8
    EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE
    GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD
"""
_CONTAINERS = (list, dict, set, OrderedDict, deque)


# The standard library's reader in Python, because the one in C can't be told what BUILD may change
# (attributes of classes, for one) and finds registered extensions without asking `find_class`.
_Python: Any = pickle._Unpickler


class _Reader(_Python):  # type: ignore[misc]
    def __init__(self, content: bytes, allowed: Allowed) -> None:
        super().__init__(io.BytesIO(content))
        self._size = len(content)
        self._allowed = allowed
        self._named = {**allowed.values, **allowed.classes, **allowed.calls}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._named[module, name]
        except KeyError:
            raise ForbiddenNameError(f"{module}.{name}") from None

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        called = self.stack[-1]
        if not any(called is known for known in self._allowed.calls.values()):
            raise ForbiddenNameError(f"a call of {_title(called)}")
        self.stack[-1] = called(*arguments)

    def load_newobj(self) -> None:
        arguments = self.stack.pop()
        kind = self.stack.pop()
        if arguments or not any(kind is known for known in self._allowed.classes.values()):
            raise ForbiddenNameError(f"a new {_title(kind)} of {arguments!r:.50}")
        self.append(kind.__new__(kind))

    def load_build(self) -> None:
        state = self.stack.pop()
        instance = self.stack[-1]
        for kind, fill in self._allowed.fills.items():
            if isinstance(instance, kind):
                fill(instance, state)
                return
        if type(instance) not in self._allowed.classes.values():
            raise ForbiddenNameError(f"changed attributes of {_title(instance)}")
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise ValueError(f"the state of a {type(instance).__name__} must be a dictionary")
        kind = type(instance)
        if hasattr(kind, "__setstate__"):
            kind.__setstate__(instance, state)
        else:
            instance.__dict__.update(state)

    def load_bytearray8(self) -> None:
        size = int.from_bytes(self.read(8), "little")
        if size > self._size:  # before so much memory is asked for
            raise ValueError(f"{size} bytes in a pickle of {self._size}")
        self.append(bytearray(self.read(size)))

    def _into_container(self, container: Any, load: Callable[[Any], None]) -> None:
        if type(container) not in _CONTAINERS:
            raise ForbiddenNameError(f"items put into {_title(container)}")
        load(self)

    def load_append(self) -> None:
        self._into_container(self.stack[-2], _Python.load_append)

    def load_setitem(self) -> None:
        self._into_container(self.stack[-3], _Python.load_setitem)

    def load_appends(self) -> None:
        self._into_container(self.metastack[-1][-1], _Python.load_appends)

    def load_setitems(self) -> None:
        self._into_container(self.metastack[-1][-1], _Python.load_setitems)

    def load_additems(self) -> None:
        self._into_container(self.metastack[-1][-1], _Python.load_additems)

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {}


for _opcode in _OPCODES.split():
    _code = getattr(pickle, _opcode)[0]
    _load = _Python.dispatch[_code]
    _Reader.dispatch[_code] = getattr(_Reader, _load.__name__)


def _title(value: Any) -> str:
    kind = value if isinstance(value, type) or callable(value) else type(value)
    return f"{kind.__module__}.{getattr(kind, '__qualname__', kind)}"


# NumPy ------------------------------------------------------------------------------------------


def _dtype(text: str, align: bool = False, copy: bool = False) -> np.dtype:
    """A plain number's dtype, and always a copy: NumPy's own are shared by everybody."""
    if np.dtype(text).kind not in "biufc":
        raise ForbiddenNameError(f"a numpy.dtype of {text!r:.50}")
    return np.dtype(text, False, True)  # type: ignore[call-overload, no-any-return]


def _fill_dtype(dtype: Any, state: Any) -> None:
    """The byte order. The rest of the state could make pointers of a file's bytes."""
    version, order, *rest = state
    if version not in (3, 4) or order not in "<>|=" or rest not in _PLAIN:
        raise ForbiddenNameError("a numpy.dtype with fields, sizes or flags of its own")
    dtype.__setstate__(state)


_PLAIN = ([None, None, None, -1, -1, 0], [None, None, None, -1, -1, 0, None])


def _frombuffer(content: Any, dtype: Any, shape: Any, order: str, axis_order: Any = None) -> Any:
    array = np.frombuffer(content, dtype=_plain(dtype)).copy()
    if axis_order is None:
        return array.reshape(shape, order=order)  # type: ignore[call-overload]
    return array.reshape(shape, order="C").transpose(axis_order)


def _array_to_fill(kind: Any, shape: Any, code: Any) -> np.ndarray:
    if kind is not np.ndarray or shape != (0,):
        raise ForbiddenNameError(f"an array of {_title(kind)} and shape {shape!r:.50}")
    return np.empty(0)


def _fill_array(array: np.ndarray, state: Any) -> None:
    version, shape, dtype, fortran, content = state
    if not isinstance(content, bytes) or len(content) != math.prod(shape) * _plain(dtype).itemsize:
        raise ValueError(f"an array of shape {shape!r:.50} with other contents")
    array.__setstate__((version, shape, dtype, fortran, content))  # type: ignore[attr-defined]


def _scalar(dtype: Any, content: bytes) -> Any:
    (value,) = np.frombuffer(content, dtype=_plain(dtype))
    return value


def _plain(dtype: Any) -> np.dtype:
    if not isinstance(dtype, np.dtype):
        raise ValueError(f"{dtype!r:.50} is no dtype")
    return dtype


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":  # how protocol 2 writes bytes
        raise ForbiddenNameError(f"the encoding {encoding!r:.50}")
    return text.encode("latin1")


def _bit_generator(kind: Any) -> PCG64:
    if kind is not PCG64 and kind != "PCG64":
        raise ForbiddenNameError(f"a random bit generator {kind!r:.50}")
    return PCG64(0)


def _fill_bit_generator(bit_generator: PCG64, state: Any) -> None:
    # NumPy 2 adds the SeedSequence, from which only `spawn` would draw.
    bit_generator.state = state[0] if isinstance(state, tuple) else state


def _generator(bit_generator: Any, _: Any = None) -> Generator:
    made = bit_generator if isinstance(bit_generator, PCG64) else _bit_generator(bit_generator)
    return Generator(made)


def _fill_generator(generator: Generator, state: Any) -> None:
    if state is not None:  # before NumPy 2
        generator.bit_generator.state = state


def _no_seed_sequence(*_: Any) -> SeedSequence:
    """A generator's state says all that it draws; what it was seeded with is not needed."""
    return SeedSequence(0)


def _under_both_names(calls: Mapping[Name, Callable[..., Any]]) -> dict[Name, Callable[..., Any]]:
    """NumPy 1 has numpy.core where NumPy 2 has numpy._core."""
    old = {(m.replace("numpy._core", "numpy.core"), name): f for (m, name), f in calls.items()}
    return {**calls, **old}


NUMBERS = Allowed(
    calls=_under_both_names(
        {
            ("numpy", "dtype"): _dtype,
            ("numpy._core.multiarray", "_reconstruct"): _array_to_fill,
            ("numpy._core.multiarray", "scalar"): _scalar,
            ("numpy._core.numeric", "_frombuffer"): _frombuffer,
            ("_codecs", "encode"): _encode,
        }
    ),
    values={("numpy", "ndarray"): np.ndarray},
    fills={np.dtype: _fill_dtype, np.ndarray: _fill_array},
)
GENERATORS = Allowed(
    calls={
        ("numpy.random._pickle", "__generator_ctor"): _generator,
        ("numpy.random._pickle", "__bit_generator_ctor"): _bit_generator,
        ("numpy.random.bit_generator", "__pyx_unpickle_SeedSequence"): _no_seed_sequence,
    },
    values={
        ("numpy.random._pcg64", "PCG64"): PCG64,
        ("numpy.random.bit_generator", "SeedSequence"): SeedSequence,
    },
    fills={
        PCG64: _fill_bit_generator,
        Generator: _fill_generator,
        SeedSequence: lambda *_: None,
    },
)
