"""Keeping others' hands off the environments that a collection runs in."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from stable_baselines3.common.vec_env import VecEnv


@contextmanager
def left_alone(env: VecEnv) -> Iterator[None]:
    """Refuse, inside the block, to reset or step these environments.

    Episodes that are under way would go on from elsewhere, without a word: an `EvalCallback` on
    the training's own environments does that. Refused are the vector itself and, where they are in
    this process, the single environments, which others may hold without their vector.

    :raises RuntimeError: in the call that would have moved them
    """
    vector: Any = env.unwrapped
    singles = [single.unwrapped for single in getattr(vector, "envs", ())]
    with ExitStack() as stack:
        for holder, name in (
            *((vector, name) for name in ("reset", "step_async")),
            *((single, name) for single in singles for name in ("reset", "step")),
        ):
            stack.enter_context(_replaced(holder, name, _refuse))
        call = vector.env_method
        stack.enter_context(_replaced(vector, "env_method", lambda *a, **k: _checked(call, a, k)))
        yield


def _refuse(*_: Any, **__: Any) -> Any:
    raise RuntimeError(
        "CFGRL is in the middle of episodes in these environments; whoever resets or steps them "
        "now spoils what it learns from. Give callbacks an environment of their own, e.g. "
        "EvalCallback(make_vec_env(...)), not the one that the model trains in"
    )


def _checked(call: Callable[..., Any], arguments: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = kwargs.get("method_name", arguments[0] if arguments else None)
    moving = ("reset", "step", "queue_episode", "clear_queue")
    return _refuse() if name in moving else call(*arguments, **kwargs)


@contextmanager
def _replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    """Shadow a method on the object itself."""
    own = vars(holder).get(name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(holder, name)
        else:
            setattr(holder, name, own)
