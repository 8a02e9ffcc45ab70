"""A bandit whose best policies can be worked out: one action, rewarded with a known probability."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


def reward_probability(action: np.ndarray) -> np.ndarray:
    """q(a) of `BanditEnv`: rises from about 0.1 to 0.9, half way at a = 0.4."""
    return 0.1 + 0.8 / (1 + np.exp(-4 * (np.asarray(action) - 0.4)))


class BanditEnv(gym.Env):
    """One step, one action a in [-2, 2]: reward 1 with probability q(a), else 0.

    The reward's luck has a generator of its own, with another seed in each environment, so that
    the K episodes of a group, which start from one reset seed, don't share it.
    """

    def __init__(self, luck: int) -> None:
        self.luck = np.random.default_rng(luck)
        self.observation_space = spaces.Box(-1, 1, (1,), np.float32)
        self.action_space = spaces.Box(-2, 2, (1,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward = float(self.luck.random() < reward_probability(action[0]))
        return np.zeros(1, np.float32), reward, True, False, {"is_success": reward > 0}
