"""ThreadVecEnv: SB3's DummyVecEnv, but all environments at once."""

import threading
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from cfgrl_gym import ThreadVecEnv
from cfgrl_gym.algorithms.vec_envs import thread_vec_env


class Meeting(gym.Env[np.ndarray, np.ndarray]):
    """A step that ends only when every other environment is in one too."""

    observation_space = spaces.Box(-1, 1, (1,))
    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, barrier: threading.Barrier, fails: bool = False) -> None:
        self.barrier, self.fails, self.steps = barrier, fails, 0

    def reset(self, **_: Any) -> tuple[np.ndarray, dict[str, Any]]:
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.barrier.wait(timeout=10)
        self.steps += 1
        if self.fails:
            raise RuntimeError("the arm fell off")
        return np.zeros(1, np.float32), 0.0, False, False, {}


def played(env: VecEnv) -> list[Any]:
    """All that 300 random steps give, ends of episodes included."""
    env.seed(3)
    seen: list[Any] = [env.reset(), env.reset_infos]
    rng = np.random.default_rng(0)
    for _ in range(300):
        obs, rewards, dones, infos = env.step(rng.integers(0, 2, env.num_envs))
        seen += [obs, rewards, dones, infos]
    env.close()
    return seen


def test_it_gives_what_dummy_vec_env_gives() -> None:
    makers = [lambda: gym.make("CartPole-v1", max_episode_steps=30)] * 3
    threads, dummy = played(ThreadVecEnv(makers)), played(DummyVecEnv(makers))
    assert sum(done.sum() for done in dummy[4::4]) > 20
    for one, other in zip(threads, dummy, strict=True):
        np.testing.assert_equal(one, other)


def test_steps_run_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_vec_env, "processors", lambda: 3)
    barrier = threading.Barrier(3)
    env = ThreadVecEnv([lambda: Meeting(barrier)] * 3)
    env.reset()
    env.step(np.zeros((3, 1), np.float32))  # one after another, the first would wait for ever
    env.close()


def test_an_error_is_raised_when_the_others_have_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_vec_env, "processors", lambda: 2)
    barrier = threading.Barrier(2)
    env = ThreadVecEnv([lambda: Meeting(barrier, fails=True), lambda: Meeting(barrier)])
    env.reset()
    with pytest.raises(RuntimeError, match="the arm fell off"):
        env.step(np.zeros((2, 1), np.float32))
    assert env.get_attr("steps") == [1, 1]
    env.close()
    env.close()  # twice does no harm
