"""What a worker does, wherever it runs: it makes environments and answers requests about them.

A request is the name of a method of `Environments` with its arguments; the answer is a value, or
what the environment raised.
"""

import pickle
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import gymnasium as gym
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.vec_env.base_vec_env import CloudpickleWrapper
from stable_baselines3.common.vec_env.patch_gym import _patch_env

from cfgrl_gym.algorithms.vec_envs.next_starts import PlannedReset

STARTING_TIMEOUT = 300.0  # seconds, in addition, for what imports, compiles and builds
Answer = tuple[Literal["value", "raised"], Any]  # raised: the error and its traceback


class WorkerError(ConnectionError):
    """Raised when a worker process died, did not answer in time, or its environment raised."""


class StartError(WorkerError):
    """Raised when a worker process can't start, which trying again wouldn't change."""


def step_and_reset(env: gym.Env, action: Any) -> tuple[Any, Any, bool, dict[str, Any], Any]:
    """Step an environment as SB3's do, and reset it where the episode ends.

    :return: observation (after a reset its first), reward, done, info, and the reset's information
        or None
    """
    observation, reward, terminated, truncated, info = env.step(action)
    done, reset_info = terminated or truncated, None
    info = dict(info) | {"TimeLimit.truncated": truncated and not terminated}
    if done:
        info["terminal_observation"] = observation
        observation, reset_info = env.reset()
    return observation, reward, done, info, reset_info


class Environments:
    """The requests that a worker answers; indices count the environments within the worker."""

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]]) -> None:
        self.envs = [PlannedReset(_patch_env(make())) for make in env_fns]

    def spaces(self) -> tuple[gym.Space[Any], gym.Space[Any]]:
        return self.envs[0].observation_space, self.envs[0].action_space

    def step(self, actions: Mapping[int, Any]) -> dict[int, tuple[Any, ...]]:
        return {i: step_and_reset(self.envs[i], action) for i, action in actions.items()}

    def reset(self, how: Mapping[int, dict[str, Any]]) -> dict[int, tuple[Any, Any]]:
        """Reset environments with these keyword arguments; returns observations and infos."""
        return {index: self.envs[index].reset(**arguments) for index, arguments in how.items()}

    def call(self, index: int, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return self.envs[index].get_wrapper_attr(name)(*args, **kwargs)

    def is_wrapped(self, index: int, wrapper: type[gym.Wrapper]) -> bool:
        return is_wrapped(self.envs[index], wrapper)

    def close(self) -> None:
        for env in self.envs:
            env.close()


class Requests:
    """Answers requests one after another; the first one makes the environments.

    :param env_fns: functions that make the environments, `pickled`, so that what can't be imported
        here is an answer like any other error
    """

    def __init__(self, env_fns: bytes) -> None:
        self._env_fns = env_fns
        self._environments: Environments | None = None

    def answer(self, name: str, args: Sequence[Any]) -> Answer:
        """Call a method of `Environments`, and return what it returned or raised."""
        if name == "close" and self._environments is None:
            return "value", None
        try:
            if self._environments is None:
                self._environments = Environments(pickle.loads(self._env_fns).var)
            return "value", getattr(self._environments, name)(*args)
        except Exception as error:
            return "raised", (_portable(error), traceback.format_exc())


def _portable(error: Exception) -> Exception:
    """The error itself, or a RuntimeError with its message where it can't be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def pickled(env_fns: Sequence[Callable[[], gym.Env]]) -> bytes:
    """Pickle what makes a worker's environments.

    :raises ValueError: that can't be done
    """
    try:
        return pickle.dumps(CloudpickleWrapper(list(env_fns)))
    except Exception as error:
        raise ValueError(
            f"env_fns can't be sent to a worker process ({type(error).__name__}: {error}); let "
            "each function make for itself what can't be pickled (open files, locks, simulators)"
        ) from error


def content(answer: Answer, worker: str) -> Any:
    """Return the value that a worker answered with.

    :param worker: which one, for the message
    :raises Exception: what the environment raised, with the worker's traceback as its cause
    """
    kind, given = answer
    if kind == "raised":
        raised, text = given
        raise raised from WorkerError(f"in {worker}:\n{text}")
    return given
