"""Which episodes run where, and from which start."""

from collections import Counter
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from cfgrl_envs import QueueEnv, SeedEnv, vec
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor

from cfgrl_gym.algorithms import MlpPolicy
from cfgrl_gym.algorithms.collector import Collector
from cfgrl_gym.algorithms.groups import Group, GroupPlan, Randomness, Start, seed_sequence
from cfgrl_gym.algorithms.start_schedule import StartSchedule

SEEDS = GroupPlan(tuple(Group(i, Start(seed=10 + i)) for i in range(3)), 4)
TASKS = GroupPlan(
    tuple(Group(i, Start(task_id=t, init_state_id=s)) for i, (t, s) in enumerate([(0, 3), (2, 7)])),
    4,
)


def noise_for(policy):
    def noise(group, member, chunk):
        seed = int(seed_sequence(0, group, member, chunk).generate_state(1)[0])
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(policy.horizon, policy.action_width, generator=generator)

    return noise


def collect(env, plan, cfg_scale=None):
    torch.manual_seed(0)
    policy = MlpPolicy(env.observation_space, env.action_space, lambda _: 1e-3, net_arch=[16])
    collector = Collector(env, policy, plan, noise_for(policy), cfg_scale)
    collector.reset()
    while len(collector.finished) < len(plan.groups) * plan.group_size:
        collector.step()
    collector.close()
    return collector


def test_all_episodes_of_a_group_start_from_its_seed():
    collector = collect(vec(SeedEnv, 2), SEEDS)
    for group in SEEDS.groups:
        expected, _ = SeedEnv().reset(seed=group.start.seed)
        episodes = collector.episodes(group.index)
        assert [episode.member for episode in episodes] == [0, 1, 2, 3]
        for episode in episodes:
            np.testing.assert_array_equal(episode.chunks[0].observation, expected)
        # The same start, but not the same episode.
        assert len({episode.total_reward for episode in episodes}) == 4


@pytest.mark.parametrize("n_envs", [1, 3, 5, 11])
def test_all_episodes_of_a_group_start_from_its_task_and_state(n_envs):
    groups = StartSchedule(Randomness(0), {0: range(5), 2: None}).draw(6, {})
    plan = GroupPlan(groups, 4)
    # Episodes differ in length, so that what is queued has to change while they run.
    collector = collect(vec(QueueEnv, n_envs, chunk=1, goal=1.0), plan)
    for group in plan.groups:
        episodes = collector.episodes(group.index)
        assert len(episodes) == 4
        for episode in episodes:
            task, start, _, time = episode.chunks[0].observation
            assert (task, time) == (group.start.task_id, 0)
            assert start == group.start.init_state_id % 10


@pytest.mark.parametrize("n_envs", [1, 3])
def test_the_autoreset_starts_the_planned_episode(n_envs):
    env = vec(QueueEnv, n_envs, goal=1.5)
    collect(env, TASKS)
    log = [entry for entries in env.env_method("reset_log") for entry in entries]
    # Four of each; where two end at once, the last start may be taken once more than is needed.
    planned = Counter((task, start) for task, start, _ in log)
    assert planned[0, 3] == 4
    assert 4 <= planned[2, 7] <= 3 + n_envs
    assert len(log) == planned.total() == sum(planned[key] for key in ((0, 3), (2, 7)))


def test_environments_in_other_vectors_are_told_by_their_queue():
    env = SubprocVecEnv([partial(QueueEnv, goal=1.5)] * 3)
    try:
        collect(env, TASKS)
        log = [entry for entries in env.env_method("reset_log") for entry in entries]
        assert Counter((t, s) for t, s, how in log if how == "queue")[0, 3] == 4
        assert not any(how == "options" for *_, how in log)
    finally:
        env.close()


def test_no_planned_start_is_left_behind():
    env = vec(QueueEnv, 3)
    policy = MlpPolicy(env.observation_space, env.action_space, lambda _: 1e-3)
    collector = Collector(env, policy, TASKS, noise_for(policy))
    collector.reset()
    collector.step()
    collector.close()
    env.reset()
    assert [log[-1][2] for log in env.env_method("reset_log")] == ["default"] * 3


@pytest.mark.parametrize(
    ("env_class", "plan", "arguments"),
    [(SeedEnv, SEEDS, {}), (QueueEnv, TASKS, {"goal": 1.2})],
)
def test_episodes_do_not_depend_on_how_many_environments_run_them(env_class, plan, arguments):
    reference = collect(vec(env_class, 1, **arguments), plan)
    for n_envs in (2, 3, 9):
        other = collect(vec(env_class, n_envs, **arguments), plan)
        for group in plan.groups:
            pairs = zip(reference.episodes(group.index), other.episodes(group.index), strict=True)
            for one, two in pairs:
                assert len(one.chunks) == len(two.chunks)
                for a, b in zip(one.chunks, two.chunks, strict=True):
                    # A matrix product rounds differently for another batch size.
                    np.testing.assert_allclose(a.actions, b.actions, atol=1e-5)
                    np.testing.assert_allclose(a.observation, b.observation, atol=1e-5)
                    np.testing.assert_allclose(a.rewards, b.rewards, atol=1e-5)


class BuildingEnv(QueueEnv):
    """Keeps the last four tasks that it was reset to, as `LiberoEnv` does; counts the others."""

    def __init__(self, **kwargs):
        super().__init__(tasks=tuple(range(10)), **kwargs)
        self.built_tasks: tuple[int, ...] = ()
        self.builds = 0

    def reset(self, *, seed=None, options=None):
        result = super().reset(seed=seed, options=options)
        self.builds += self.task not in self.built_tasks
        others = [task for task in self.built_tasks if task != self.task]
        self.built_tasks = (*others, self.task)[-4:]
        return result


@pytest.mark.parametrize("n_envs", [1, 4])
def test_tasks_stay_with_environments_that_have_built_them(n_envs):
    groups = StartSchedule(Randomness(0), dict.fromkeys(range(10))).draw(30, {})
    plan = GroupPlan(groups, 4)
    env = vec(BuildingEnv, n_envs, goal=1.5)
    kept = collect(env, plan)
    # In the plan's order each of the 30 groups would be built anew by every environment.
    assert 10 <= sum(env.get_attr("builds")) <= 10 + 2 * n_envs
    builds = sum(env.get_attr("builds"))
    collect(env, GroupPlan(groups[:4], 4))  # four tasks of the next iteration, all built
    assert sum(env.get_attr("builds")) - builds <= 4
    reference = collect(vec(QueueEnv, n_envs, goal=1.5), plan)  # says nothing of what it has built
    for group in groups:
        pairs = zip(kept.episodes(group.index), reference.episodes(group.index), strict=True)
        for one, two in pairs:
            np.testing.assert_array_equal(one.rewards, two.rewards)
            np.testing.assert_array_equal(one.chunks[0].actions, two.chunks[0].actions)


def test_keeping_a_task_runs_nothing_that_may_not_count():
    groups = [Group(i, Start(task_id=t, init_state_id=0)) for i, t in enumerate([0, 1, 0, 1, 0, 1])]
    plan = GroupPlan(tuple(groups), 2, needed=3, dynamic_sampling=True)
    env = vec(BuildingEnv, goal=100.0)  # no success: every group is discarded, one after another
    policy = MlpPolicy(env.observation_space, env.action_space, lambda _: 1e-3)
    collector = Collector(env, policy, plan, noise_for(policy))
    collector.reset()
    while len(collector.finished) < 6:
        collector.step()
        running = [e.group for e in collector.running if e is not None]
        assert set(running) <= plan.certain(collector.selection)
    collector.close()


def test_every_environment_is_busy_until_the_plan_runs_out_and_rests_then():
    env = vec(SeedEnv, 5)  # all its episodes have 4 steps, and the plan has 12 of them
    collector = collect(env, SEEDS)
    assert collector.control_steps == 12 * 4
    assert sorted(monitor.get_total_steps() for monitor in env.envs) == [8, 8, 8, 12, 12]


def test_what_is_recorded_is_what_the_environment_did():
    env = vec(QueueEnv, 2, goal=1.0)
    collector = collect(env, TASKS)
    for episode in collector.finished:
        actions = np.concatenate([chunk.actions for chunk in episode.chunks])
        position = episode.start.init_state_id / 10 + np.cumsum(actions)
        reached = position > 1.0
        steps = int(np.argmax(reached)) + 1 if reached.any() else 8
        assert len(actions) == steps  # executed, up to success or the limit of 8
        assert episode.success == episode.succeeded == bool(reached.any())
        np.testing.assert_array_equal(episode.rewards, reached[:steps])


def test_guidance_while_collecting_is_the_one_asked_for():
    env = vec(SeedEnv, 2)
    policy_s, high = (collect(env, SEEDS, w).episodes(0)[0].chunks[0] for w in (None, 50.0))
    assert not np.allclose(policy_s.model_actions, high.model_actions)


def test_subprocesses_and_a_monitor_of_the_vector_change_nothing():
    reference = collect(vec(QueueEnv, 2, observation_stride=1), TASKS)
    env = VecMonitor(SubprocVecEnv([lambda: QueueEnv(observation_stride=1)] * 2))
    try:
        other = collect(env, TASKS)
    finally:
        env.close()
    for group in TASKS.groups:
        pairs = zip(reference.episodes(group.index), other.episodes(group.index), strict=True)
        for one, two in pairs:
            np.testing.assert_array_equal(one.rewards, two.rewards)
            assert [sorted(c.observations) for c in one.chunks] == [
                sorted(c.observations) for c in two.chunks
            ]


def test_chunked_actions_need_the_chunks_rewards():
    class Silent(gym.Wrapper):
        def step(self, action):
            *rest, info = self.env.step(action)
            del info["rewards"]
            return *rest, info

    env = DummyVecEnv([lambda: Monitor(Silent(QueueEnv()))])
    with pytest.raises(ValueError, match="'rewards'"):
        collect(env, TASKS)


# The plan ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("finished", "dynamic", "expected"),
    [
        ({}, True, ([], [], False)),
        ({0: [1, 0], 1: [1]}, True, ([0], [], False)),
        ({0: [1, 1], 1: [1, 0]}, True, ([1], [0], False)),
        # The third group is ready, but the second comes first.
        ({0: [0, 1], 1: [1], 2: [1, 0]}, True, ([0], [], False)),
        ({0: [0, 1], 1: [0, 1], 2: [1, 0], 3: [1, 1]}, True, ([0, 1], [], True)),
        ({0: [0, 1], 1: [0, 0], 2: [1, 1], 3: [1, 1]}, True, ([0], [1, 2, 3], True)),
        ({0: [0, 0], 1: [1, 1]}, False, ([0, 1], [], True)),
    ],
)
def test_groups_are_kept_in_the_order_of_the_plan(finished, dynamic, expected):
    groups = tuple(Group(i, Start(seed=i)) for i in range(4))
    selection = GroupPlan(groups, 2, needed=2, dynamic_sampling=dynamic).select(finished)
    assert (selection.kept, selection.discarded, selection.complete) == expected
