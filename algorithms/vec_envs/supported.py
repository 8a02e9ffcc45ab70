"""Checks that CFGRL accepts an environment, and finds the tasks that it offers."""

from collections.abc import Sequence

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.preprocessing import check_for_nested_spaces
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecCheckNan,
    VecEnv,
    VecEnvWrapper,
    VecMonitor,
    VecVideoRecorder,
)

# Wrappers that leave observations and rewards unchanged.
TRANSPARENT_WRAPPERS = (VecMonitor, VecCheckNan, VecVideoRecorder)


def as_vec_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
    """Wrap an environment as SB3's `_wrap_env` does, but leave images (height, width, channel).

    :raises ValueError: for a wrapper that changes what CFGRL sees, or an action space other than
        a bounded Box (action_dim,) or (chunk, action_dim)
    """
    if not isinstance(env, VecEnv):
        single = env
        if monitor_wrapper and not is_wrapped(env, Monitor):
            if verbose >= 1:
                print("Wrapping the env with a `Monitor` wrapper")
            single = Monitor(env)
        if verbose >= 1:
            print("Wrapping the env in a DummyVecEnv.")
        env = DummyVecEnv([lambda: single])
    check_for_nested_spaces(env.observation_space)
    inner: VecEnv = env
    while isinstance(inner, VecEnvWrapper):
        if not isinstance(inner, TRANSPARENT_WRAPPERS):
            raise ValueError(
                "CFGRL resets single environments to a group's start, past any wrapper of the "
                f"vectorized environment; {type(inner).__name__} would not see that. Wrap each "
                "environment instead, e.g. in gymnasium.wrappers.FrameStackObservation"
            )
        inner = inner.venv
    space = env.action_space
    if not isinstance(space, spaces.Box) or len(space.shape) not in (1, 2):
        raise ValueError(
            "CFGRL needs a continuous action space, a Box (action_dim,) or (chunk, action_dim); "
            f"got {space}"
        )
    if not np.issubdtype(space.dtype, np.floating):  # type: ignore[arg-type]
        raise ValueError(
            f"CFGRL needs an action Box of real numbers, because its actions would be cut to whole "
            f"ones; got {space}. Wrap the environment in one that takes real numbers and rounds "
            "them, e.g. gymnasium.wrappers.TransformAction"
        )
    if not np.isfinite([space.low, space.high]).all():
        raise ValueError(f"CFGRL needs an action Box with finite bounds; got {space}")
    return env


def init_states(env: VecEnv) -> dict[int, Sequence[int] | None] | None:
    """Return the ids of each task's initial states, None for a task that starts from any seed.

    An environment without a queue of episodes starts from a reset seed: the result is None.

    :raises ValueError: if the environments offer different tasks
    """
    if not env.has_attr("queue_episode"):
        return None
    tasks = [tuple(ids) for ids in env.get_attr("task_ids")]
    if len(set(tasks)) > 1:
        raise ValueError(
            f"every environment must offer the same tasks, because any may run any group; got "
            f"{sorted(set(tasks))}"
        )
    return {task: env.env_method("init_state_ids", task, indices=[0])[0] for task in tasks[0]}
