"""Which class LIBERO builds for a BDDL file's problem: its own, or one in its place."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cfgrl_gym.envs.installation import import_libero


class Builder:
    """Stands in LIBERO's registry in the place of a problem's class.

    :param problem: the class
    :param build: called with it and LIBERO's arguments
    """

    def __init__(self, problem: type, build: Callable[..., Any]) -> None:
        self.problem, self._build = problem, build

    def __call__(self, *arguments: Any, **kwargs: Any) -> Any:
        return self._build(self.problem, *arguments, **kwargs)


def replace(by: Callable[[type], Any]) -> dict[str, Any]:
    """Have LIBERO build every problem by what `by` makes of its own class; return what did so."""
    registry = import_libero("envs.env_wrapper").TASK_MAPPING
    before = dict(registry)
    for name, registered in before.items():
        registry[name] = by(registered.problem if isinstance(registered, Builder) else registered)
    return before


@contextmanager
def replaced(by: Callable[[type], Any]) -> Iterator[None]:
    """Have it so inside the block."""
    before = replace(by)
    try:
        yield
    finally:
        import_libero("envs.env_wrapper").TASK_MAPPING.update(before)
