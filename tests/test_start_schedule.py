"""Which starts a training visits, over all of its iterations."""

from collections import Counter

import pytest
from cfgrl_envs import QueueEnv, SeedEnv, vec

from cfgrl_gym.algorithms import CFGRL
from cfgrl_gym.algorithms.groups import Randomness
from cfgrl_gym.algorithms.start_schedule import StartSchedule

STATES = {0: range(3), 5: None, 7: [4, 9]}


def schedule(seed=1, states=STATES):
    return StartSchedule(Randomness(seed), states)


def starts(groups):
    return [group.start for group in groups]


def used(groups):
    return Counter(start.task_id for start in starts(groups))


def test_starts_follow_from_the_seed_and_all_come_before_any_comes_twice():
    groups = schedule().draw(12, {})
    assert groups == schedule().draw(12, {})
    assert groups != schedule(2).draw(12, {})
    assert [group.index for group in groups] == list(range(12))
    for i in range(0, 12, 3):
        assert {start.task_id for start in starts(groups)[i : i + 3]} == {0, 5, 7}
    of = {task: [s.init_state_id for s in starts(groups) if s.task_id == task] for task in STATES}
    assert set(of[0][:3]) == {0, 1, 2}
    assert set(of[7][:2]) == set(of[7][2:]) == {4, 9}
    assert len(set(of[5])) == 4


@pytest.mark.parametrize("sizes", [[5, 1, 4, 2], [1] * 12, [7, 5]])
@pytest.mark.parametrize("states", [STATES, {3: range(50)}, None])
def test_iterations_of_any_size_go_on_where_the_last_one_ended(sizes, states):
    whole = schedule(states=states).draw(12, {})
    parts, before = [], Counter()
    for size in sizes:
        part = schedule(states=states).draw(size + 3, before)[:size]  # three are never decided
        parts += starts(part)
        before += used(part)
    assert parts == starts(whole)


def test_without_tasks_starts_are_reset_seeds():
    groups = schedule(states=None).draw(5, {})
    assert len({group.start.seed for group in groups}) == 5
    assert groups[0].start.reset_arguments() == {"seed": groups[0].start.seed}


def test_a_curriculum_prefers_tasks_whose_success_is_uncertain():
    states = dict.fromkeys(range(5), range(10))
    successes = {
        0: [True] * 50,
        1: [False] * 50,
        2: [True, False] * 25,
        3: [True] * 40 + [False] * 10,
    }  # task 4 was never tried
    groups = schedule(states=states).draw(1000, {}, successes)
    share = {task: count / 1000 for task, count in used(groups).items()}
    variance = {
        task: rate * (1 - rate)
        for task, rate in {0: 51 / 52, 1: 1 / 52, 2: 26 / 52, 3: 41 / 52, 4: 1 / 2}.items()
    }
    for task in states:
        expected = 0.04 + 0.8 * variance[task] / sum(variance.values())
        assert share[task] == pytest.approx(expected, abs=0.003)
    # Any part of it has these shares, and the states still take turns.
    assert used(groups[:100])[4] == pytest.approx(100 * share[4], abs=2)
    of_4 = [start.init_state_id for start in starts(groups) if start.task_id == 4]
    assert set(of_4[:10]) == set(of_4[10:20]) == set(range(10))
    again = schedule(states=states).draw(600, used(groups[:400]), successes)
    assert starts(again) == starts(groups)[400:]


def make(env, **arguments):
    options = {"rloo_batch_size": 2, "n_epochs": 1, "policy_kwargs": {"net_arch": [8]}, "seed": 0}
    return CFGRL("MlpPolicy", env, **options | {"groups_per_iteration": 2} | arguments)


def started(model):
    """Record the starts of the groups that each iteration decides."""
    decided = []
    collect = model.run_plan

    def run_plan(collector, env, callback):
        going_on = collect(collector, env, callback)
        decided.extend(sorted({(e.group, e.start) for e in collector.decided}, key=lambda g: g[0]))
        return going_on

    model.run_plan = run_plan
    return decided


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_training_takes_every_state_before_any_comes_again(dynamic, tmp_path):
    """Also after it was saved and loaded, and whichever groups an iteration discards."""
    env = vec(QueueEnv, 2, goal=1.2, tasks=(0,))
    model = make(env, enable_dynamic_sampling=dynamic, groups_per_iteration=3)
    decided = started(model)
    model.learn(10**6, max_iterations=2)
    model.save(tmp_path / "model")
    loaded = CFGRL.load(tmp_path / "model", env=env)
    more = started(loaded)
    loaded.learn(10**6, max_iterations=3, reset_num_timesteps=False)
    visited = [start.init_state_id for _, start in (*decided, *more)]
    assert len(visited) >= 10
    for i in range(0, len(visited) - 4, 5):
        assert set(visited[i : i + 5]) == set(range(5))
    assert loaded.statistics.groups == {0: len(visited)}


def test_seeds_do_not_come_again_in_later_iterations():
    model = make(vec(SeedEnv, 2), enable_dynamic_sampling=False)
    decided = started(model)
    model.learn(10**6, max_iterations=4)
    assert len({start.seed for _, start in decided}) == 8


def test_a_curriculum_needs_several_tasks():
    for env in (vec(SeedEnv), vec(QueueEnv, tasks=(2,))):
        with pytest.raises(ValueError, match=r"curriculum .* several tasks"):
            make(env, curriculum=True).learn(1)
    with pytest.raises(ValueError, match="curriculum must be one of True, False"):
        make(vec(QueueEnv), curriculum="yes")


def test_a_training_with_a_curriculum_visits_and_resumes_by_its_successes(tmp_path):
    """Task 0 always succeeds, from any state of it; task 2 sometimes does."""

    class Unequal(QueueEnv):
        def reset(self, *, seed=None, options=None):
            result = super().reset(seed=seed, options=options)
            self.goal = -100.0 if self.task == 0 else 1.3
            return result

    env = vec(Unequal, 2)
    arguments = {"curriculum": True, "enable_dynamic_sampling": False, "groups_per_iteration": 8}
    arguments["rloo_batch_size"] = 6
    model = make(env, **arguments)
    model.learn(10**6, max_iterations=4)
    groups = model.statistics.groups
    assert groups.total() == 32
    assert groups[2] > 20 > groups[0] > 3
    half = make(env, **arguments)
    half.learn(10**6, max_iterations=2)
    half.save(tmp_path / "model")
    loaded = CFGRL.load(tmp_path / "model", env=env)
    loaded.learn(10**6, max_iterations=2, reset_num_timesteps=False)
    assert loaded.statistics.groups == groups
