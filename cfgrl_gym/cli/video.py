"""A video of one episode."""

from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import imageio
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv

from cfgrl_gym.algorithms.evaluation import evaluate
from cfgrl_gym.algorithms.groups import Start
from cfgrl_gym.algorithms.policies import FlowPolicy
from cfgrl_gym.cli.environments import ENVIRONMENT


class _KeepFrames(gym.Wrapper[Any, Any, Any, Any]):
    """Collects a frame for every control step of the first episode."""

    def __init__(self, env: gym.Env[Any, Any], frames: list[np.ndarray]) -> None:
        super().__init__(env)
        self.frames = frames
        self.over = False

    def reset(self, **arguments: Any) -> Any:
        result = super().reset(**arguments)
        self._keep()
        return result

    def step(self, action: Any) -> Any:
        result = super().step(action)
        self._keep()
        self.over = self.over or result[2] or result[3]
        return result

    def _keep(self) -> None:
        frames: Any = self.env.render()
        if not self.over:
            self.frames += frames


def record_episode(
    policy: FlowPolicy,
    arguments: dict[str, Any],
    start: Start,
    path: Path,
    cfg_scale: float | None,
    seed: int,
) -> bool:
    """Run one episode, as `evaluate` runs it, and write it as a video.

    :param arguments: of `LiberoChunked-v0`
    :param path: ends in .mp4
    :return: whether it succeeded
    """
    frames: list[np.ndarray] = []
    arguments = arguments | {"render_mode": "rgb_array_list"}
    make = partial(gym.make, ENVIRONMENT, **arguments)
    env = DummyVecEnv([lambda: _KeepFrames(make(), frames)])
    try:
        evaluation = evaluate(policy, env, [start], cfg_scale=cfg_scale, seed=seed)
    finally:
        env.close()
    imageio.mimwrite(path, frames, fps=20)  # type: ignore[arg-type]
    print(f"video: {path}")
    return evaluation.episodes[0].success
