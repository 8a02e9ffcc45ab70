"""Workers that are killed while CFGRL collects: nothing is lost, nothing is counted twice."""

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from cfgrl_envs import QueueEnv
from stable_baselines3.common.vec_env import DummyVecEnv

from cfgrl_gym import CFGRL, RayVecEnv, WorkerVecEnv
from cfgrl_gym.algorithms.vec_envs.requests import WorkerError

pytestmark = pytest.mark.filterwarnings("ignore:worker", "ignore:in worker")


Kind = type[WorkerVecEnv] | type[RayVecEnv]


class SlowEnv(QueueEnv):
    """`QueueEnv` that takes its time, so that there is a moment to be killed at."""

    def step(self, action: np.ndarray) -> Any:
        time.sleep(0.04)
        return super().step(action)


class DoomedEnv(QueueEnv):
    """Ends its process in every episode of one start."""

    def step(self, action: np.ndarray) -> Any:
        if (self.task, self.start) == (0, 3):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


class Recorded(CFGRL):
    """Keeps the episodes that it learned from, iteration by iteration."""

    def label(self, groups: Any) -> Any:
        self.__dict__.setdefault("seen", []).append(groups)
        return super().label(groups)


def make(env: Any, **changed: Any) -> Recorded:
    arguments: dict[str, Any] = {
        "rloo_batch_size": 4,
        "groups_per_iteration": 5,
        "seed": 3,
        "n_epochs": 2,
        "batch_size": 16,
        "learning_rate": lambda progress: 1e-3 * progress,
        "policy_kwargs": {"net_arch": [32]},
        "device": "cpu",
    }
    return Recorded("MlpPolicy", env, **(arguments | changed))


@contextmanager
def killing(env: Any, moments: int, longest: float) -> Iterator[Callable[[], int]]:
    """Kill a random worker at so many random moments, while the block runs."""
    rng, over, killed = np.random.default_rng(5), threading.Event(), [0]

    def kill() -> None:
        while killed[0] < moments and not over.wait(rng.uniform(0, longest)):
            with suppress(ProcessLookupError):  # just being replaced
                os.kill(env.workers[int(rng.integers(len(env.workers)))].pid, signal.SIGKILL)
                killed[0] += 1

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield lambda: killed[0]
    finally:
        over.set()
        thread.join()


def assert_same(one: CFGRL, other: CFGRL) -> None:
    pairs = zip(one.policy.parameters(), other.policy.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    for name in ("num_timesteps", "_n_updates", "iteration"):
        assert getattr(one, name) == getattr(other, name), name
    assert vars(one.statistics) == vars(other.statistics)
    assert list(one.ep_info_buffer or ()) == list(other.ep_info_buffer or ())
    assert list(one.ep_success_buffer or ()) == list(other.ep_success_buffer or ())


@pytest.mark.parametrize("dynamic", [False, True])
def test_killed_workers_change_nothing(remote: Kind, dynamic: bool) -> None:
    options = {"enable_dynamic_sampling": dynamic}
    reference = make(DummyVecEnv([QueueEnv] * 4), **options).learn(10**6, max_iterations=6)
    moments = 20 if remote is WorkerVecEnv else 10  # an actor takes seconds to start
    env = remote([SlowEnv] * 4, workers=2, max_failures=1000)
    with killing(env, moments, longest=0.3) as killed:
        algorithm = make(env, **options).learn(10**6, max_iterations=6)
        count = killed()
    env.close()
    assert count == moments
    assert_same(reference, algorithm)
    for groups, expected in zip(algorithm.seen, reference.seen, strict=True):  # type: ignore[attr-defined]
        for group, known in zip(groups, expected, strict=True):
            assert len({episode.start for episode in group}) == 1
            assert [episode.member for episode in group] == [0, 1, 2, 3]
            for one, other in zip(group, known, strict=True):
                np.testing.assert_equal(one.rewards, other.rewards)
                for a, b in zip(one.chunks, other.chunks, strict=True):
                    np.testing.assert_equal(a.observation, b.observation)
                    np.testing.assert_equal(a.model_actions, b.model_actions)


def test_an_episode_that_ends_every_worker_ends_the_run_with_what_is_known() -> None:
    env = WorkerVecEnv([DoomedEnv] * 2, workers=2, max_failures=1000)
    with pytest.raises(
        WorkerError, match=r"(?s)task_id=0, init_state_id=3.*lost 10 times.*SIGKILL"
    ):
        make(env, enable_dynamic_sampling=False).learn(10**6, max_iterations=4)
    env.close()


def test_real_libero_goes_on_with_the_same_numbers(remote: Kind) -> None:
    arguments: dict[str, Any] = {
        "task_id": 8,
        "chunk_size": 16,
        "image_size": 112,
        "cameras": ["robot0_eye_in_hand"],
        "max_episode_steps": 48,
    }
    makers = [partial(gym.make, "cfgrl_gym:LiberoChunked-v0", **arguments)] * 2
    results = []
    for faults in ((), (signal.SIGKILL, signal.SIGSTOP)):
        vec_env = remote if faults else WorkerVecEnv
        env = vec_env(makers, workers=2, timeout=30)  # a stopped process is one that hangs
        algorithm = Recorded(
            "Pi0Policy",
            env,
            rloo_batch_size=2,
            groups_per_iteration=3,
            enable_dynamic_sampling=False,
            policy_kwargs={"checkpoint": "libero_tiny", "num_inference_steps": 2},
            seed=0,
            device="cpu",
        )
        due = dict(zip((2, 5), faults, strict=False))  # in the middle of episodes
        steps = itertools.count(1)

        def fault(_: Any, __: Any, env: Any = env, steps: Any = steps, due: Any = due) -> bool:
            step = next(steps)
            if step in due:
                os.kill(env.workers[0].pid, due.pop(step))
            return True

        results.append(algorithm.learn(10**6, callback=fault, max_iterations=1))
        assert not due
        env.close()
    assert_same(*results)
    assert [r.statistics.num_episodes for r in results] == [6, 6]
    one, other = (r.windows for r in results)
    assert one is not None
    assert other is not None
    for key in one.observations:
        np.testing.assert_array_equal(one.observations[key], other.observations[key])
    assert torch.equal(one.model_actions, other.model_actions)
    assert torch.equal(one.labels, other.labels)
