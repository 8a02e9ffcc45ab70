"""Others that move the training's environments, and environments that don't begin alike or end."""

import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from cfgrl_envs import QueueEnv, SeedEnv, vec
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor

from cfgrl_gym import CFGRL, ThreadVecEnv, WorkerVecEnv

SMALL: dict[str, Any] = {
    "rloo_batch_size": 2,
    "groups_per_iteration": 2,
    "n_epochs": 1,
    "seed": 3,
    "policy_kwargs": {"net_arch": [8]},
    "device": "cpu",
}


def make(env: Any) -> CFGRL:
    return CFGRL("MlpPolicy", env, **SMALL)


@pytest.mark.parametrize("kind", [DummyVecEnv, ThreadVecEnv, SubprocVecEnv, WorkerVecEnv])
@pytest.mark.parametrize("wrap", [lambda env: env, VecMonitor])
def test_an_evaluation_in_the_training_s_environments_is_refused(
    kind: Any, wrap: Callable[..., Any]
) -> None:
    env = wrap(kind([QueueEnv] * 2))
    try:
        algorithm = make(env)
        for held in (env, algorithm.get_env()):
            with pytest.raises(RuntimeError, match="an environment of their own"):
                algorithm.learn(100, callback=EvalCallback(held, eval_freq=1, warn=False))
        algorithm.learn(1)  # nothing of it is left
        env.reset()
    finally:
        env.close()


def test_a_single_environment_that_is_also_used_for_evaluation_is_refused() -> None:
    env = SeedEnv()
    with pytest.raises(RuntimeError, match="an environment of their own"):
        make(env).learn(100, callback=EvalCallback(Monitor(env), eval_freq=1))
    env.reset()


@pytest.mark.parametrize("call", ["reset", "clear_queue"])
def test_calls_of_single_environments_are_refused_too(call: str) -> None:
    def callback(local: dict[str, Any], _: Any) -> bool:
        local["self"].get_env().env_method(call)
        return True

    with pytest.raises(RuntimeError, match="spoils"):
        make(vec(QueueEnv, 2)).learn(100, callback=callback)


def test_looking_at_the_environments_is_allowed_and_changes_nothing() -> None:
    seen = []

    def callback(local: dict[str, Any], _: Any) -> bool:
        seen.extend(local["self"].get_env().get_attr("position"))
        return True

    looked, plain = (make(vec(QueueEnv, 2)).learn(30, callback=c) for c in (callback, None))
    assert len(seen) > 10
    for a, b in zip(looked.policy.parameters(), plain.policy.parameters(), strict=True):
        assert np.array_equal(a.detach().numpy(), b.detach().numpy())


# Groups that don't begin alike, episodes that don't end -------------------------------------------


class IgnoresSeed(SeedEnv):
    luck = np.random.default_rng(0)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        observation, info = super().reset(seed=int(self.luck.integers(1000)))
        return observation, info


def messages(env: Any, steps: int = 1) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(env).learn(steps)
    return [str(each.message) for each in caught]


def test_a_group_whose_episodes_do_not_begin_alike_is_told() -> None:
    wanted = "began with different observations"
    assert any(wanted in text for text in messages(vec(IgnoresSeed, 2)))
    for env in (vec(SeedEnv, 2), vec(QueueEnv, 3), gym.make("Pendulum-v1", max_episode_steps=5)):
        assert not any(wanted in text for text in messages(env))


def test_an_episode_that_does_not_end_is_told() -> None:
    assert any("TimeLimit" in text for text in messages(vec(SeedEnv, 1, limit=1200)))
    assert not any("TimeLimit" in text for text in messages(vec(SeedEnv, 1, limit=1000)))
