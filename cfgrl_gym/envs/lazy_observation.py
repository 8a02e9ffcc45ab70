"""LIBERO's observation dictionary with images that are rendered when they are read."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


class LazyObservation(OrderedDict[str, np.ndarray]):
    """Is a dictionary some of whose values are computed when they are first read, and then kept.

    Reading any of them later gives what it would have given at once. Pickled or copied, it is an
    ordinary `OrderedDict` with all values.

    :param values: in their order; of those that are lazy, None
    :param lazy: functions that compute the others
    """

    def __init__(
        self, values: Mapping[str, Any], lazy: Mapping[str, Callable[[], np.ndarray]]
    ) -> None:
        self._lazy: dict[str, Callable[[], np.ndarray]] = {}
        super().__init__(values)
        self._lazy |= lazy

    def __getitem__(self, key: str) -> Any:
        if key in self._lazy:
            super().__setitem__(key, self._lazy[key]())
            del self._lazy[key]
        return super().__getitem__(key)

    def __setitem__(self, key: str, value: Any) -> None:
        self._lazy.pop(key, None)
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self._lazy.pop(key, None)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401

    def pop(self, key: str, *default: Any) -> Any:
        if key in self:
            self[key]
        return super().pop(key, *default)

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def popitem(self, last: bool = True) -> tuple[str, Any]:
        key = next(reversed(self) if last else iter(self))
        return key, self.pop(key)

    def values(self) -> Any:
        return self._whole().values()

    def items(self) -> Any:
        return self._whole().items()

    def copy(self) -> "OrderedDict[str, Any]":  # type: ignore[override]
        return self._whole()

    __copy__ = copy

    def __eq__(self, other: object) -> bool:
        return dict(self._whole()) == other

    __hash__ = None  # type: ignore[assignment]

    def __or__(self, other: Any) -> Any:
        return self.copy() | other

    def __ror__(self, other: Any) -> Any:
        return other | self.copy()

    def __repr__(self) -> str:
        return repr(self.copy())

    def __reduce__(self) -> Any:
        return OrderedDict, (list(self.items()),)

    def _whole(self) -> "OrderedDict[str, Any]":
        """Compute all that is still lazy."""
        return OrderedDict((key, self[key]) for key in self)
