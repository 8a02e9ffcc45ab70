"""Tells each environment of a `VecEnv` what follows its episode: a planned start, or a rest."""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from cfgrl_gym.algorithms.groups import Start

UNTOLD = "untold"


class PlannedReset(gym.Wrapper[Any, Any, Any, Any]):
    """Makes the next reset of its environment the planned one, or lets the environment rest.

    A `VecEnv` resets an environment as soon as its episode is over, and steps all environments as
    long as it steps any. With this wrapper that automatic reset is the planned one, so that no
    second reset is needed; and a resting environment is neither reset nor stepped, so that no
    `Monitor` records episodes of it. A rest ends with the reset after it.
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self._planned: dict[str, Any] | None = None  # arguments of `Env.reset`
        self._rests_next = False
        self._rests = False
        self._last: Any = None  # observation

    def plan_reset(self, arguments: dict[str, Any] | None) -> None:
        """Plan the next reset by the keyword arguments of `Env.reset`; None: rest instead."""
        self._planned, self._rests_next = arguments, arguments is None

    def forget_plan(self) -> None:
        """Drop the plan and end a rest, so that the environment behaves as without this wrapper."""
        self._planned, self._rests_next, self._rests = None, False, False

    def rest(self) -> None:
        """Ignore all steps until the next reset."""
        self._rests = True

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset the environment as planned; for a rest, return the last observation again."""
        arguments = {"seed": seed, "options": options} | (self._planned or {})
        self._rests = self._rests_next
        self._planned, self._rests_next = None, False
        if self._rests:
            if self._last is None:
                self._last = self.observation_space.sample()  # any will do: no action depends on it
            return self._last, {}
        self._last, info = self.env.reset(**arguments)
        return self._last, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step the environment, unless it rests."""
        if self._rests:
            return self._last, 0.0, False, False, {}
        result = self.env.step(action)
        self._last = result[0]
        return result


class NextStarts:
    """Tells environments ahead of time what they begin next, by the method that each supports.

    The environments of a `RemoteVecEnv` are `PlannedReset`s; those of a `DummyVecEnv` and its
    subclasses are wrapped in `PlannedReset` until `release`. With any other `VecEnv`, environments
    that have `queue_episode` are told through it; others can't be told, and the collector resets
    them a second time. Neither of these can rest.

    :param env: the `VecEnv` of these environments
    """

    def __init__(self, env: VecEnv) -> None:
        self.env = env
        self._told: list[Start | str | None] = [UNTOLD] * env.num_envs
        self._inner = env.unwrapped
        self._bare: list[gym.Env] = []
        if isinstance(self._inner, DummyVecEnv):
            self._bare = self._inner.envs
            self._inner.envs = [PlannedReset(single) for single in self._bare]
        self.plans = env.has_attr("plan_reset")
        self._queues = not self.plans and env.has_attr("queue_episode")

    def tell(self, index: int, start: Start | None) -> None:
        """Tell environment `index` the start of its next episode; None: it rests."""
        before, self._told[index] = self._told[index], start
        if before == start:
            return
        arguments = None if start is None else start.reset_arguments()
        if self.plans:
            self.env.env_method("plan_reset", arguments, indices=[index])
        elif self._queues:
            self.env.env_method("clear_queue", indices=[index])
            if arguments is not None:
                self.env.env_method("queue_episode", indices=[index], **arguments["options"])
        else:
            self._told[index] = UNTOLD

    def begun(self, index: int) -> Start | None:
        """Return the start that environment `index`, which was just reset, was told, if any."""
        start, self._told[index] = self._told[index], UNTOLD
        return start if isinstance(start, Start) else None

    def rest(self, index: int) -> None:
        """Let an environment rest until it is reset."""
        if self.plans:
            self.env.env_method("rest", indices=[index])

    def forget(self, indices: Sequence[int] | None = None) -> None:
        """Withdraw what these environments were told; None: what all of them were told."""
        if self.plans:
            self.env.env_method("forget_plan", indices=indices)
        elif self._queues:
            self.env.env_method("clear_queue", indices=indices)
        for index in range(self.env.num_envs) if indices is None else indices:
            self._told[index] = UNTOLD

    def release(self) -> None:
        """Withdraw all that environments were told, and unwrap those that were wrapped here."""
        self.forget()
        if isinstance(self._inner, DummyVecEnv):
            self._inner.envs = self._bare
