"""What others count while CFGRL collects: monitors, recorders, callbacks."""

import csv
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import imageio
import numpy as np
import pytest
from cfgrl_envs import QueueEnv, SeedEnv
from gymnasium.wrappers import RecordVideo
from stable_baselines3.common.callbacks import StopTrainingOnMaxEpisodes
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor

from cfgrl_gym import CFGRL, ThreadVecEnv, WorkerVecEnv

VECTORS = [DummyVecEnv, ThreadVecEnv, WorkerVecEnv]
ENVIRONMENTS = [partial(QueueEnv, goal=1.2), SeedEnv]


def learn(env: Any, callback: Any = None, **changed: Any) -> CFGRL:
    """One iteration of one group of four episodes, unless changed."""
    arguments: dict[str, Any] = {
        "rloo_batch_size": 4,
        "groups_per_iteration": 1,
        "enable_dynamic_sampling": False,
        "n_epochs": 1,
        "seed": 3,
        "policy_kwargs": {"net_arch": [8]},
        "device": "cpu",
    }
    algorithm = CFGRL("MlpPolicy", env, **(arguments | changed))
    return algorithm.learn(10**6, callback, max_iterations=3)


def rows(file: Path) -> list[dict[str, str]]:
    with file.open() as text:
        next(text)  # a comment with the time
        return list(csv.DictReader(text))


@pytest.mark.parametrize("make", ENVIRONMENTS)
@pytest.mark.parametrize("kind", VECTORS)
def test_monitors_count_the_episodes_that_were_learned_from(
    kind: Any, make: Any, tmp_path: Path
) -> None:
    def monitored(index: int) -> gym.Env:
        return Monitor(make(), str(tmp_path / str(index)))

    env = VecMonitor(kind([partial(monitored, i) for i in range(8)]), str(tmp_path / "vector"))
    try:
        algorithm = learn(env)
    finally:
        env.close()
    episodes = algorithm.statistics.num_episodes
    assert episodes == 12
    single = [row for i in range(8) for row in rows(tmp_path / f"{i}.monitor.csv")]
    assert len(single) == len(rows(tmp_path / "vector.monitor.csv")) == episodes
    assert sum(int(row["l"]) for row in single) == algorithm.num_timesteps


@pytest.mark.parametrize("make", ENVIRONMENTS)
@pytest.mark.parametrize("kind", [*VECTORS, SubprocVecEnv])
def test_callbacks_see_the_ends_of_these_episodes_only(kind: Any, make: Any) -> None:
    class Count(StopTrainingOnMaxEpisodes):
        def _on_step(self) -> bool:
            ends = [info for info in self.locals["infos"] if "terminal_observation" in info]
            assert len(ends) == sum(self.locals["dones"])
            return super()._on_step()

    env = kind([make] * 8)
    callback = Count(max_episodes=100)
    try:
        algorithm = learn(env, callback)
    finally:
        env.close()
    assert callback.n_episodes == algorithm.statistics.num_episodes == 12


@pytest.mark.parametrize("make", ENVIRONMENTS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_strict_monitor_is_never_reset_before_its_episode_ends(make: Any, dynamic: bool) -> None:
    env = Monitor(make(), allow_early_resets=False)
    algorithm = learn(env, enable_dynamic_sampling=dynamic, groups_per_iteration=2)
    assert algorithm.iteration == 3
    assert len(env.get_episode_rewards()) == algorithm.statistics.num_episodes


class Pictured(SeedEnv):
    """With a picture of the time since the reset."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    render_mode = "rgb_array"

    def render(self) -> np.ndarray:
        return np.full((16, 16, 3), 10 * self.time, np.uint8)


def test_recorded_videos_are_the_episodes(tmp_path: Path) -> None:
    def recorded(index: int) -> gym.Env:
        return RecordVideo(Pictured(), str(tmp_path / str(index)), lambda episode: True)

    env = DummyVecEnv([partial(recorded, i) for i in range(2)])
    algorithm = learn(env)
    env.close()
    videos = list(tmp_path.rglob("*.mp4"))
    assert len(videos) == algorithm.statistics.num_episodes == 12
    for video in videos:
        assert len(imageio.mimread(video)) == 5  # the first observation's, and four steps'
