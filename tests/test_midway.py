"""Groups that continue from the middle of episodes, on an environment whose moments are numbers."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from cfgrl_envs import QueueEnv, vec
from stable_baselines3.common.vec_env import DummyVecEnv

from cfgrl_gym.algorithms import CFGRL
from cfgrl_gym.algorithms.collector import Collector, Episode
from cfgrl_gym.algorithms.groups import Group, GroupPlan, Randomness, Start
from cfgrl_gym.algorithms.midway import FIRST_CHUNKS, midway_plan


class MomentEnv(QueueEnv):
    """A `QueueEnv` from whose moments (task, start, position, time) an episode can go on."""

    gives = False

    def give_snapshots(self, enabled: bool) -> None:
        self.gives = enabled

    def _with_snapshot(self, info: dict[str, Any]) -> dict[str, Any]:
        moment = (self.task, self.start, self.position, self.time)
        return info | ({"snapshot": moment} if self.gives else {})

    def reset(self, *, seed=None, options=None):
        if options and "snapshot" in options:
            self.task, self.start, self.position, self.time = options["snapshot"]
            self.resets.append((self.task, self.start, "snapshot"))
            return self._observe(), self._with_snapshot({})
        observation, info = super().reset(seed=seed, options=options)
        return observation, self._with_snapshot(info)

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        over = terminated or truncated
        return (
            observation,
            reward,
            terminated,
            truncated,
            info if over else self._with_snapshot(info),
        )


def algorithm(n_envs: int = 3, midway_groups: int = 4, **options: Any) -> CFGRL:
    env = DummyVecEnv([lambda: MomentEnv(chunk=2, limit=12, goal=1.5)] * n_envs)
    options = {
        "rloo_batch_size": 4,
        "groups_per_iteration": 6,
        "enable_dynamic_sampling": False,
        "n_epochs": 1,
        "seed": 0,
        "device": "cpu",
        "policy_kwargs": {"net_arch": [8]},
    } | options
    return CFGRL("MlpPolicy", env, midway_groups=midway_groups, **options)


class Seen:
    """Keeps the collectors of a training, through the callbacks' locals."""

    def __init__(self) -> None:
        self.collectors: list[Collector] = []

    def __call__(self, given: dict[str, Any], _: Any) -> bool:
        if given["collector"] not in self.collectors:
            self.collectors.append(given["collector"])
        return True


def learned(**options: Any) -> tuple[CFGRL, Collector, Collector]:
    model, seen = algorithm(**options), Seen()
    model.learn(1, callback=seen)
    first, midway = seen.collectors
    return model, first, midway


def test_groups_continue_from_moments_of_mixed_groups_and_only_mixed_ones_are_kept() -> None:
    model, first, midway = learned()
    moments: dict[Any, Episode] = {}
    for group in first.kept:
        if len({episode.total_reward for episode in group}) > 1:
            for episode in group:
                for chunk, after in itertools.pairwise(episode.chunks[: FIRST_CHUNKS + 1]):
                    moments[chunk.snapshot] = (episode, after)
    assert len(midway.plan.groups) == 4
    assert midway.plan.groups[0].index == len(first.plan.groups)  # noise of their own
    began = [midway.episodes(group.index) for group in midway.plan.groups]
    for group, episodes in zip(midway.plan.groups, began, strict=True):
        source, after = moments[group.start.snapshot]
        assert group.start.init_state_id == source.start.init_state_id
        for episode in episodes:
            np.testing.assert_array_equal(episode.chunks[0].observation, after.observation)
        assert len({episode.chunks[0].actions.tobytes() for episode in episodes}) > 1
    kept = [e for e in began if len({episode.total_reward for episode in e}) > 1]
    assert midway.kept == kept
    assert len(kept) > 0
    both = [*first.decided, *midway.decided]
    assert model.statistics.num_episodes == len(both)
    assert model.statistics.num_control_steps == sum(len(e.rewards) for e in both)
    assert model.num_timesteps == sum(len(e.chunks) for e in both)
    counted = sum(len(done) for done in model.statistics.recent.values())
    assert counted == len(first.decided)  # success is that of whole episodes


def test_only_the_chunk_after_the_moment_is_learned_from_by_that_groups_advantage() -> None:
    model, first, midway = learned()
    assert model.windows is not None
    ordinary = sum(len(episode.chunks) for group in first.kept for episode in group)
    continued = [episode for group in midway.kept for episode in group]
    added = model.windows[torch.arange(ordinary, len(model.windows))]
    assert len(added) == len(continued)  # one chunk of each
    for row, episode, label in zip(
        added.observations, continued, added.labels.tolist(), strict=True
    ):
        np.testing.assert_array_equal(row, episode.chunks[0].observation)
        assert label == (1 if episode.succeeded else -1)


def test_the_number_of_environments_changes_nothing() -> None:
    weights = []
    for n_envs in (1, 4):
        model = algorithm(n_envs)
        model.learn(1)
        weights.append([p.detach().clone() for p in model.policy.parameters()])
    for one, four in zip(*weights, strict=True):
        torch.testing.assert_close(one, four, rtol=1e-4, atol=1e-6)


def test_without_moments_in_doubt_there_are_no_such_groups() -> None:
    plan = GroupPlan((Group(0, Start(task_id=0, init_state_id=0)),), 2)
    model = algorithm(1, 0)
    noise = Randomness.of(0).noise(0, (2, 1))
    env = DummyVecEnv([lambda: MomentEnv(chunk=2, limit=4, goal=100.0)])  # nobody succeeds
    collector = Collector(env, model.policy, plan, noise, snapshots=True)
    collector.reset()
    while not collector.selection.complete:
        collector.step()
    collector.close()
    assert collector.kept[0][0].chunks[0].snapshot is not None
    assert midway_plan(np.random.default_rng(0), plan, collector.kept, 3).groups == ()
    assert not env.envs[0].gives  # asked for while collecting only


def test_an_environment_without_snapshots_is_refused() -> None:
    model = algorithm(1)
    model.set_env(vec(QueueEnv, chunk=2, limit=12, goal=1.5))
    with pytest.raises(ValueError, match=r"give_snapshots\(enabled\).*midway_groups=0"):
        model.learn(1)
    with pytest.raises(ValueError, match="midway_groups must be 0"):
        algorithm(1, -1)
