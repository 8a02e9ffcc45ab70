"""Guards the environments of a running collection against resets and steps by other code."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from stable_baselines3.common.vec_env import VecEnv


@contextmanager
def left_alone(env: VecEnv) -> Iterator[None]:
    """Make resets and steps of these environments by other code fail inside the block.

    Otherwise, running episodes would silently go on from another state, as with an `EvalCallback`
    on the training's own environments. This guards the `VecEnv` itself and, where they are in this
    process, its single environments, because other code may hold these directly.

    :raises RuntimeError: in the call that would have reset or stepped them
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
