"""Small environments for the tests of CFGRL, how to make vectors of them, and what is logged."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.logger import KVWriter
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv


class QueueEnv(gym.Env):
    """A point on a line, with LiberoChunked-v0's interface of tasks, starts, chunks and infos.

    The point starts at init_state_id / 10 and moves by the action, in [-1, 1] a control step; it
    succeeds, with reward 1, once beyond `goal`. The observation is (task, start, position, time).
    """

    def __init__(
        self,
        chunk: int = 3,
        limit: int = 8,
        goal: float = 1.0,
        tasks: tuple[int, ...] = (0, 2),
        observation_stride: int | None = None,
    ) -> None:
        self.chunk, self.limit, self.goal, self.task_ids = chunk, limit, goal, tasks
        self.observation_stride = observation_stride
        self.observation_space = spaces.Box(-100, 100, (4,), np.float32)
        self.action_space = spaces.Box(-1, 1, (chunk, 1), np.float32)
        self.queue: list[dict[str, Any]] = []
        self.resets: list[tuple[int, int, str]] = []  # (task, start, by what)

    def init_state_ids(self, task_id: int) -> range | None:
        return range(5) if task_id == 0 else None

    def queue_episode(self, task_id: int | None = None, init_state_id: int | None = None) -> None:
        self.queue.append({"task_id": task_id, "init_state_id": init_state_id})

    def clear_queue(self) -> None:
        self.queue.clear()

    def reset_log(self) -> list[tuple[int, int, str]]:
        return self.resets

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        start, how = {"task_id": 99, "init_state_id": 0}, "default"
        if options:
            start, how = options, "options"
        elif self.queue:
            start, how = self.queue.pop(0), "queue"
        self.task, self.start = start["task_id"], start["init_state_id"]
        self.resets.append((self.task, self.start, how))
        self.position, self.time = (self.start % 10) / 10, 0
        return self._observe(), {}

    def _observe(self):
        parts = [self.task, self.start % 10, self.position, self.time]
        return np.array(parts, dtype=np.float32)

    def step(self, action):
        rewards, dones, inside = [], [], []
        for offset, a in enumerate(action[:, 0]):
            stride = self.observation_stride
            if stride and offset and offset % stride == 0:
                inside.append((offset, self._observe()))
            self.position += float(a)
            self.time += 1
            success = self.position > self.goal
            rewards.append(float(success))
            dones.append(success or self.time >= self.limit)
            if dones[-1]:
                break
        info = {
            "success": success,
            "is_success": success,
            "task_id": self.task,
            "init_state_id": self.start,
            "rewards": np.array(rewards),
            "dones": np.array(dones),
            "n_steps": len(rewards),
        }
        if self.observation_stride:
            info["observations"] = inside
        truncated = self.time >= self.limit and not success
        return self._observe(), sum(rewards), bool(success), truncated, info


class SeedEnv(gym.Env):
    """Starts at a point that the reset seed decides; the reward is minus the distance to 0."""

    def __init__(self, limit: int = 4) -> None:
        self.limit = limit
        self.observation_space = spaces.Box(-10, 10, (2,), np.float32)
        self.action_space = spaces.Box(-0.5, 0.5, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.uniform(-1, 1, 2)
        self.time = 0
        return self.position.astype(np.float32), {}

    def step(self, action):
        self.position = self.position + action
        self.time += 1
        reward = -float(np.linalg.norm(self.position))
        return self.position.astype(np.float32), reward, False, self.time >= self.limit, {}


def vec(env_class: type[gym.Env], n_envs: int = 1, **kwargs: Any) -> DummyVecEnv:
    """`n_envs` monitored environments in one process."""
    return DummyVecEnv([lambda: Monitor(env_class(**kwargs))] * n_envs)


class Rows(KVWriter):
    """Keeps each line of a log."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: Any, step: int = 0) -> None:
        self.rows.append(dict(key_values))

    def close(self) -> None:
        pass
