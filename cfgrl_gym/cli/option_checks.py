"""What holds of the values of options of any command."""

import math
from dataclasses import dataclass, fields

LARGEST_SEED = 2**32 - 1  # NumPy's


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of the commands' configurations: numbers are finite, names are names.

    :raises ValueError: a value that no run could use
    """

    def __post_init__(self) -> None:
        for field in fields(self):
            given = getattr(self, field.name)
            for value in given if isinstance(given, list) else [given]:
                if isinstance(value, float) and not math.isfinite(value):
                    raise ValueError(f"{field.name} must be finite; got {value}")
                if isinstance(value, str) and "\0" in value:
                    raise ValueError(f"{field.name} must be without NUL characters; got {value!r}")
                if value == "" and field.name != "title":
                    raise ValueError(f"{field.name} must not be empty")
        for name in ("learning_rate", "max_grad_norm"):
            if getattr(self, name, 1) <= 0:
                raise ValueError(f"{name} must be more than 0; got {getattr(self, name)}")
        seed = getattr(self, "seed", 0)
        if not 0 <= seed <= LARGEST_SEED:
            raise ValueError(f"seed must be in 0 to {LARGEST_SEED}; got {seed}")


def at_least(least: int, **values: int | None) -> None:
    """:raises ValueError: one of the values is less."""
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
