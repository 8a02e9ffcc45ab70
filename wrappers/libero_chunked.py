"""`LiberoChunked-v0`: LIBERO as PI0 sees it and acts on it."""

from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec

from cfgrl_gym.envs.libero import LiberoEnv
from cfgrl_gym.wrappers.action_chunk import ActionChunk
from cfgrl_gym.wrappers.libero_observation import TwoTestObservation


class LiberoChunked(ActionChunk):
    """The outermost wrapper of `LiberoChunked-v0`."""

    @property
    def spec(self) -> EnvSpec | None:  # type: ignore[override]
        """The entry point applies the wrappers inside, so they are not listed for `gym.make`."""
        return self.unwrapped.spec


def make_libero_chunked(
    chunk_size: int = 50, observation_stride: int | None = None, **libero: Any
) -> gym.Env:
    """`Libero-v0` with the 2-test observation and action chunks.

    :param chunk_size: actions executed open loop in one step
    :param observation_stride: see `ActionChunk`
    :param libero: the arguments of `LiberoEnv`
    """
    return LiberoChunked(TwoTestObservation(LiberoEnv(**libero)), chunk_size, observation_stride)
