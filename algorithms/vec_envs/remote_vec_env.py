"""Environments in workers outside this process that are replaced when they fail."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import (
    VecEnvIndices,
    VecEnvObs,
    VecEnvStepReturn,
)
from stable_baselines3.common.vec_env.subproc_vec_env import _stack_obs

from cfgrl_gym.algorithms.vec_envs.requests import StartError, WorkerError

LOST = "episode_lost"  # key of `info`: how the episode's worker failed


class RemoteWorker(Protocol):
    """The parent's side of a worker, which answers requests for `requests.Environments`."""

    def ask(self, name: str, *args: Any) -> None:
        """Send a request; fetch its answer with `answer` before the next one."""

    def answer(self) -> Any:
        """Wait for the answer to the last request.

        :raises StartError: the worker can't start
        :raises WorkerError: the worker died or hung
        :raises Exception: what the environment raised, with the worker's traceback as its cause
        """

    def restart(self) -> None:
        """Replace the worker by a new one with new environments."""

    def close(self) -> None:
        """End the worker; safe to call twice."""


def number_of_workers(workers: int | None, num_envs: int, room: int) -> int:
    """Return the number of workers; None: as many as there is room for, and have an environment.

    :raises ValueError: it is out of range
    """
    count = min(room, num_envs) if workers is None else workers
    if not 1 <= count <= num_envs:
        raise ValueError(f"workers must be from 1 to the {num_envs} env_fns; got {workers}")
    return count


class RemoteVecEnv(VecEnv):
    """A `VecEnv` whose workers are replaced when they die, hang or raise: what these share.

    The episodes that were running in the worker are over then, with nothing to learn from their
    end: the next `step` returns done, reward 0 and the reason in `info["episode_lost"]`, with the
    first observation of the next episode. (`CFGRL` runs such an episode again.) A worker steps
    several environments one after another, which share compiled models and render contexts.

    :param workers: environment i is number i // len(workers) of worker i % len(workers)
    :param num_envs: number of environments
    :param max_failures: how often in a row a worker may fail without a step in between
    :raises StartError: the workers can't start
    :raises Exception: what an environment raises when it is made
    """

    workers: Sequence[RemoteWorker]

    def __init__(self, workers: Sequence[RemoteWorker], num_envs: int, max_failures: int) -> None:
        self.workers = workers
        self.max_failures = max_failures
        self.closed = False
        self._failures = [0] * len(workers)
        self._lost: dict[int, str] = {}  # environments whose episode is over, and why
        self._attributes: list[tuple[int, str, Any]] = []  # set by the user, for replacements
        self._last: list[Any] = [None] * num_envs  # observations
        self._actions: np.ndarray = np.empty(0)
        try:
            for worker in workers:
                worker.ask("spaces")
            offered = [self._answer(number, "spaces") for number in range(len(workers))]
            super().__init__(num_envs, *offered[0])
            (self.metadata,) = self.get_attr("metadata", 0)  # VecVideoRecorder reads its rate
        except StartError as error:
            self.close()
            raise error.with_traceback(None) from None  # its message says it all
        except BaseException:
            self.close()
            raise

    # Requests ---------------------------------------------------------------------------------

    def _place(self, index: int) -> tuple[int, int]:
        """Which worker has this environment, and its number there."""
        return index % len(self.workers), index // len(self.workers)

    def _replace(self, number: int, error: BaseException) -> None:
        """A new worker in place of one that failed; its running episodes are lost.

        :raises WorkerError: it has failed too often, or can't start
        """
        if isinstance(error, StartError):
            raise error
        self._failures[number] += 1
        reason = str(error.__cause__ if isinstance(error.__cause__, WorkerError) else error)
        if self._failures[number] >= self.max_failures:
            raise WorkerError(
                f"a worker failed {self._failures[number]} times in a row, the last time so: "
                f"{reason}"
            ) from error
        warnings.warn(f"{reason}; its episodes are run again in a new one", stacklevel=2)
        worker = self.workers[number]
        worker.restart()
        for index in range(number, len(self._last), len(self.workers)):
            self._lost.setdefault(index, reason)
        for index, name, value in self._attributes:
            holder, place = self._place(index)
            if holder == number:
                self._request(number, "call", place, "set_wrapper_attr", (name, value), {})

    def _reset(self, how: dict[int, dict[str, Any]]) -> None:
        """Reset environments, each with its keyword arguments, in all workers at once."""
        while how:
            for index, answer in self._in_all_workers("reset", how):
                self._last[index], self.reset_infos[index] = answer
                self._lost.pop(index, None)
                del how[index]

    def _in_all_workers(self, name: str, what: dict[int, Any]) -> Iterator[tuple[int, Any]]:
        """Send all workers their part of a request and yield the answer for each environment.

        A worker that fails is replaced; its environments are left out.
        """
        asked: dict[int, list[int]] = {}
        for index in what:
            asked.setdefault(self._place(index)[0], []).append(index)
        for number, indices in asked.items():
            self.workers[number].ask(name, {self._place(i)[1]: what[i] for i in indices})
        for number, indices in asked.items():
            try:
                answers = self.workers[number].answer()
            except Exception as error:
                self._replace(number, error)
                continue
            if name == "step":
                self._failures[number] = 0
            yield from ((index, answers[self._place(index)[1]]) for index in indices)

    def _each(self, indices: VecEnvIndices, name: str, *args: Any) -> list[Any]:
        """Ask environments one after another; whatever they raise is raised here."""
        places = [self._place(index) for index in self._get_indices(indices)]
        return [self._request(number, name, place, *args) for number, place in places]

    def _request(self, number: int, name: str, *args: Any) -> Any:
        self.workers[number].ask(name, *args)
        return self._answer(number, name, *args)

    def _answer(self, number: int, name: str, *args: Any) -> Any:
        """A worker's answer to this request; one that dies over it is replaced and asked again."""
        while True:
            try:
                return self.workers[number].answer()
            except WorkerError as error:
                self._replace(number, error)
                self.workers[number].ask(name, *args)

    # VecEnv -----------------------------------------------------------------------------------

    def reset(self) -> VecEnvObs:
        how: dict[int, dict[str, Any]] = {}
        for index in range(self.num_envs):
            options = {"options": self._options[index]} if self._options[index] else {}
            how[index] = {"seed": self._seeds[index], **options}
        self._reset(how)
        self._reset_seeds()
        self._reset_options()
        return _stack_obs(self._last, self.observation_space)

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        rewards, dones = np.zeros(self.num_envs, np.float32), np.zeros(self.num_envs, bool)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        running = {i: self._actions[i] for i in range(self.num_envs) if i not in self._lost}
        for index, answer in self._in_all_workers("step", running):
            self._last[index], rewards[index], dones[index], infos[index], reset_info = answer
            if dones[index]:
                self.reset_infos[index] = reset_info
        lost = dict(self._lost)
        for index, reason in lost.items():
            dones[index] = True
            last = {"terminal_observation": self._last[index], "TimeLimit.truncated": True}
            infos[index] = {LOST: reason, **last}
        self._reset({index: {} for index in lost})
        return _stack_obs(self._last, self.observation_space), rewards, dones, infos

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **kwargs: Any
    ) -> list[Any]:
        results = []
        for index in self._get_indices(indices):
            results += self._each(index, "call", method_name, method_args, kwargs)
            if method_name == "reset":
                self._last[index] = results[-1][0]
                self._lost.pop(index, None)
        return results

    def has_attr(self, attr_name: str) -> bool:
        return all(self.env_method("has_wrapper_attr", attr_name))

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return self.env_method("get_wrapper_attr", attr_name, indices=indices)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        self.env_method("set_wrapper_attr", attr_name, value, indices=indices)
        self._attributes += [(i, attr_name, value) for i in self._get_indices(indices)]

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None
    ) -> list[bool]:
        return self._each(indices, "is_wrapped", wrapper_class)

    def get_images(self) -> list[np.ndarray | None]:
        return self.env_method("render") if self.render_mode == "rgb_array" else [None]

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            for worker in self.workers:
                worker.close()
