"""Action chunks: several steps of any environment as one."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from cfgrl_gym.envs.arguments import LONGEST, check_action, check_int


class ActionChunk(gym.Wrapper[Any, np.ndarray, Any, np.ndarray], RecordConstructorArgs):
    """Execute `chunk_size` actions open loop in one `step`, ending early when the episode does.

    The reward is the sum over the executed steps. `info` is that of the last step executed (such as
    `unstable` of `Libero-v0`, which ends the episode), with `rewards` (float64) and `dones` (bool),
    one entry for each executed step, and `n_steps`, their number.
    Where the environment offers a settable attribute `skip_observations`, the chunk sets it to True
    for the steps whose observation nobody will see, and the environment may then return any.

    A video recorder around the chunks gets one frame for each of them, so `metadata["render_fps"]`
    is then the environment's rate divided by `chunk_size`, and the video has the right duration.
    For a video with a frame for every step, wrap the environment in the recorder before it is
    wrapped in chunks: `ActionChunk(RecordVideo(env, "videos"), 5)`. In a render mode that gives
    lists (`"rgb_array_list"`), `render` returns the frames of all steps, and the rate stays.

    :param env: environment with a Box action of shape (dim,)
    :param chunk_size: actions in a chunk, 1 to 10,000
    :param observation_stride: also give the observations after every so many steps inside a chunk,
        as `info["observations"]`, a list of (steps executed, observation); None for none
    :raises ValueError: another kind of action space, or a size out of its range

    Example:
        >>> import gymnasium as gym
        >>> env = ActionChunk(gym.make("Pendulum-v1"), chunk_size=5)
        >>> env.action_space.shape
        (5, 1)
        >>> _ = env.reset(seed=0)
        >>> _, reward, _, _, info = env.step(env.action_space.sample())
        >>> info["n_steps"], bool(np.isclose(info["rewards"].sum(), reward))
        (5, True)
    """

    def __init__(
        self, env: gym.Env, chunk_size: int, observation_stride: int | None = None
    ) -> None:
        RecordConstructorArgs.__init__(
            self, chunk_size=chunk_size, observation_stride=observation_stride
        )
        gym.Wrapper.__init__(self, env)
        space = env.action_space
        if not isinstance(space, spaces.Box) or len(space.shape) != 1:
            raise ValueError(f"ActionChunk needs a Box action space of shape (dim,); got {space}")
        self.chunk_size = check_int("chunk_size", chunk_size, 1, LONGEST)
        if observation_stride is not None:
            observation_stride = check_int("observation_stride", observation_stride, 1)
        self.observation_stride = observation_stride
        self._can_skip = env.has_wrapper_attr("skip_observations")
        low, high = (np.tile(bound, (self.chunk_size, 1)) for bound in (space.low, space.high))
        self.action_space = spaces.Box(low, high, dtype=space.dtype.type)  # type: ignore[union-attr, arg-type]
        mode, rate = env.render_mode, env.metadata.get("render_fps")
        if rate and mode not in (None, "human") and not mode.endswith("_list"):
            self.metadata = env.metadata | {"render_fps": rate / self.chunk_size}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Execute a chunk, (chunk_size, dim).

        :raises ValueError: wrong shape, NaN or infinity, or no numbers; nothing has been executed
            then
        """
        shape = self.action_space.shape
        assert shape is not None
        chunk = check_action(action, shape, "a chunk")
        rewards: list[float] = []
        dones: list[bool] = []
        observations: list[tuple[int, Any]] = []
        for number, single in enumerate(chunk, start=1):
            inside = number < self.chunk_size and self._is_observed(number)
            if self._can_skip:
                skip = number < self.chunk_size and not inside
                self.env.set_wrapper_attr("skip_observations", skip)
            obs, reward, terminated, truncated, info = self.env.step(single)
            rewards.append(float(reward))
            dones.append(terminated or truncated)
            if dones[-1]:
                break
            if inside:
                observations.append((number, obs))
        if self._can_skip:
            self.env.set_wrapper_attr("skip_observations", False)
        info = info | {
            "rewards": np.array(rewards),
            "dones": np.array(dones),
            "n_steps": len(rewards),
        }
        if self.observation_stride is not None:
            info["observations"] = observations
        return obs, sum(rewards), terminated, truncated, info

    def _is_observed(self, number: int) -> bool:
        return self.observation_stride is not None and number % self.observation_stride == 0
