"""Which episode a reset starts, how episodes end, and what an environment refuses."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from conftest import SETTLE, assert_same_arrays, downward_actions
from gymnasium.error import ResetNeeded

from cfgrl_gym.demos.expert import PickPlaceExpert
from cfgrl_gym.envs.libero import LiberoEnv


def starts(env: LiberoEnv, resets: int, **kwargs: Any) -> list[tuple[int, int]]:
    """(task, initial state) of so many resets; the arguments are for the first."""
    chosen = []
    for number in range(resets):
        _, info = env.reset(**(kwargs if number == 0 else {}))
        chosen.append((info["task_id"], info["init_state_id"]))
    return chosen


# One task ---------------------------------------------------------------------------------------


def test_queued_episodes_run_first_in_first_out_then_drawn_ones(can_env: LiberoEnv) -> None:
    drawn = starts(can_env, 4, seed=3)
    for state in (11, 5, 40):
        can_env.queue_episode(init_state_id=state)
    assert starts(can_env, 3, seed=3) == [(0, 11), (0, 5), (0, 40)]
    # The queue doesn't shift what is drawn after it.
    assert starts(can_env, 1) == drawn[3:]


def test_options_override_the_queue_and_leave_it_alone(can_env: LiberoEnv) -> None:
    can_env.queue_episode(task_id=0, init_state_id=7)
    assert starts(can_env, 2, options={"init_state_id": 2, "task_id": 0}) == [(0, 2), (0, 7)]
    can_env.queue_episode(init_state_id=7)
    can_env.clear_queue()
    assert starts(can_env, 1, seed=3) == starts(can_env, 1, seed=3)


def test_draws_from_the_same_seed_repeat_and_from_another_differ(can_env: LiberoEnv) -> None:
    drawn = starts(can_env, 5, seed=1)
    assert starts(can_env, 5, seed=1) == drawn
    assert starts(can_env, 5, seed=2) != drawn
    assert len(set(drawn)) > 1
    assert all(0 <= state < 50 for _, state in drawn)


def test_every_reset_to_one_start_gives_the_same_bits(can_env: LiberoEnv) -> None:
    start = {"init_state_id": 9}
    first, _ = can_env.reset(options=start)
    state = can_env.sim_state()
    for episode in range(3):
        for action in downward_actions(4, seed=episode):
            can_env.step(action)
        again, _ = can_env.reset(options=start)
        np.testing.assert_array_equal(can_env.sim_state(), state)
        assert_same_arrays(first, again)
    can_env.reset(options={"init_state_id": 10})
    assert (can_env.sim_state() != state).any()


def test_sim_state_is_time_then_qpos_then_qvel(can_env: LiberoEnv) -> None:
    can_env.reset(options={"init_state_id": 0})
    data = can_env.simulator.data
    state = can_env.sim_state()
    assert state.dtype == np.float64
    assert state[0] == data.time
    np.testing.assert_array_equal(state[1 : 1 + data.qpos.size], data.qpos)
    np.testing.assert_array_equal(state[1 + data.qpos.size :], data.qvel)


def test_random_placements_follow_their_id(can_env: LiberoEnv) -> None:
    can_env.init_states = "random"
    placements = []
    for seed in (2**31 - 1, 5, 2**31 - 1):
        _, info = can_env.reset(options={"init_state_id": seed})
        assert info["init_state_id"] == seed
        placements.append(can_env.sim_state())
    np.testing.assert_array_equal(placements[0], placements[2])
    assert (placements[0] != placements[1]).any()
    assert can_env.num_init_states(0) is None
    with pytest.raises(ValueError, match=r"init_state_id must be in 0 to 2147483647"):
        can_env.reset(options={"init_state_id": 2**31})


def test_episodes_are_drawn_from_the_listed_states_alone(can_env: LiberoEnv) -> None:
    assert can_env.init_state_ids(0) == range(50)
    can_env.init_states = (7, 40)
    assert can_env.init_state_ids(0) == (7, 40)
    drawn = [can_env.reset(seed=0 if i == 0 else None)[1]["init_state_id"] for i in range(12)]
    assert set(drawn) == {7, 40}
    _, info = can_env.reset(options={"init_state_id": 3})  # one that is asked for may be another
    assert info["init_state_id"] == 3
    other = can_env.sim_state()
    can_env.init_states = "benchmark"
    can_env.reset(options={"init_state_id": 3})
    np.testing.assert_array_equal(can_env.sim_state(), other)


@pytest.mark.parametrize("init_states", ["benchmark", "random"])
def test_numpys_global_generator_is_left_as_it_was(can_env: LiberoEnv, init_states: str) -> None:
    can_env.init_states = init_states
    np.random.seed(77)  # noqa: NPY002
    wanted = np.random.random(3)  # noqa: NPY002
    np.random.seed(77)  # noqa: NPY002
    can_env.reset(seed=0)
    can_env.step(SETTLE)
    np.testing.assert_array_equal(np.random.random(3), wanted)  # noqa: NPY002


def test_time_limit_truncates_and_a_step_after_it_is_refused(can_env: LiberoEnv) -> None:
    can_env.max_episode_steps = 3
    can_env.reset(seed=0)
    flags = [can_env.step(SETTLE)[2:4] for _ in range(3)]
    assert flags == [(False, False), (False, False), (False, True)]
    state = can_env.sim_state()
    with pytest.raises(ResetNeeded, match=r"call reset\(\)"):
        can_env.step(SETTLE)
    np.testing.assert_array_equal(can_env.sim_state(), state)
    can_env.reset()
    assert can_env.step(SETTLE)[3] is False  # the count starts again


def test_settle_steps_take_no_part_in_the_time_limit(can_env: LiberoEnv) -> None:
    can_env.reset(options={"init_state_id": 0})
    settled = can_env.sim_state()
    period = 1 / 20
    can_env.settle_steps, before = 0, can_env.settle_steps
    try:
        can_env.reset(options={"init_state_id": 0})
        raw = can_env.sim_state()
        assert settled[0] - raw[0] == pytest.approx(before * period)
        for _ in range(before):  # by hand, the same
            can_env.step(SETTLE)
        np.testing.assert_array_equal(can_env.sim_state(), settled)
    finally:
        can_env.settle_steps = before


def test_success_terminates_with_reward_1(can_env: LiberoEnv) -> None:
    can_env.reset(options={"init_state_id": 0})
    can_env.skip_observations = True
    try:
        expert = PickPlaceExpert(can_env.simulator)
        terminated = truncated = False
        steps = 0
        while not (terminated or truncated):
            observation, reward, terminated, truncated, info = can_env.step(expert.act())
            steps += 1
            assert info["success"] is info["is_success"] is terminated
            assert reward == float(terminated)
    finally:
        can_env.skip_observations = False
    assert terminated
    assert not truncated
    assert 60 < steps < 280
    # The last observation is drawn even where images are skipped.
    drawn = can_env.simulator.images()
    np.testing.assert_array_equal(observation["agentview_image"], drawn["agentview_image"])
    basket = can_env.simulator.robosuite_env.sim.data.get_body_xpos("basket_1_main")
    assert np.linalg.norm((observation["alphabet_soup_1_pos"] - basket)[:2]) < 0.1
    with pytest.raises(ResetNeeded):
        can_env.step(SETTLE)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros(6), r"shape \(7,\); got \(6,\)"),
        (np.zeros((1, 7)), r"shape \(7,\); got \(1, 7\)"),
        (np.full(7, np.nan), "NaN"),
        (np.array([0, 0, np.inf, 0, 0, 0, 0]), "infinity"),
        (["up"] * 7, "numbers"),
    ],
)
def test_a_wrong_action_is_refused_before_anything_moves(
    can_env: LiberoEnv, action: Any, message: str
) -> None:
    can_env.reset(options={"init_state_id": 0})
    state = can_env.sim_state()
    with pytest.raises(ValueError, match=message):
        can_env.step(action)
    np.testing.assert_array_equal(can_env.sim_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_id": 1}, r"task_id 1 is not one of this environment's tasks \(0,\)"),
        ({"task_id": "0"}, "task_id must be an int"),
        ({"init_state_id": 50}, "init_state_id must be in 0 to 49; got 50"),
        ({"init_state_id": -1}, "init_state_id must be in 0 to 49; got -1"),
        ({"init_state_id": 1.5}, "init_state_id must be an int"),
        ({"init_state_id": True}, "init_state_id must be an int"),
        ({"init_state": 3}, r"\['init_state'\] unknown; use 'task_id' and 'init_state_id'"),
    ],
)
def test_wrong_episodes_are_refused_with_the_remedy(
    can_env: LiberoEnv, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        can_env.reset(options=options)
    if "init_state" not in options:
        with pytest.raises(ValueError, match=message):
            can_env.queue_episode(**options)


# Several tasks ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_tasks() -> Iterator[LiberoEnv]:
    with closing(LiberoEnv("libero_goal", [8, 2], image_size=16, settle_steps=0)) as env:
        yield env


def test_with_several_tasks_each_episode_draws_one(two_tasks: LiberoEnv) -> None:
    assert two_tasks.task_ids == (8, 2)
    prompts = {8: "put the bowl on the plate", 2: "put the wine bottle on top of the cabinet"}
    tasks = []
    for number in range(8):
        observation, info = two_tasks.reset(seed=0 if number == 0 else None)
        assert observation in two_tasks.observation_space
        assert info["prompt"] == prompts[info["task_id"]]
        tasks.append(info["task_id"])
    assert set(tasks) == {8, 2}
    assert [task for task, _ in starts(two_tasks, 8, seed=0)] == tasks
    two_tasks.queue_episode(task_id=2)
    assert starts(two_tasks, 1)[0][0] == 2


def test_switching_tasks_and_back_repeats_the_episode(two_tasks: LiberoEnv) -> None:
    states = []
    for task in (8, 2, 8):
        two_tasks.reset(options={"task_id": task, "init_state_id": 4})
        for action in downward_actions(5):
            observation, *_ = two_tasks.step(action)
        assert observation in two_tasks.observation_space
        states.append(two_tasks.sim_state())
    np.testing.assert_array_equal(states[0], states[2])
    assert not np.array_equal(states[0], states[1])


def test_an_environment_says_which_tasks_it_has_built_the_last_used_one_last() -> None:
    with closing(LiberoEnv("libero_object", "all", image_size=16, settle_steps=0)) as env:
        assert env.built_tasks == ()
        for task in (0, 1, 2, 3):
            env.reset(options={"task_id": task})
        env.reset(options={"task_id": 1})
        assert env.built_tasks == (0, 2, 3, 1)
        simulator = env.simulator
        env.reset(options={"task_id": 4})
        assert env.built_tasks == (2, 3, 1, 4)
        env.reset(options={"task_id": 1})
        assert env.simulator is simulator
        assert env.built_tasks == (2, 3, 4, 1)


def test_all_means_every_task_of_the_suite_and_the_objects_they_share() -> None:
    every = LiberoEnv("libero_object", "all")
    assert every.task_ids == tuple(range(10))
    one = LiberoEnv("libero_object", 0)
    shared = {key for key in every.observation_space if key.endswith("_1_pos")}
    # The basket stands in all ten scenes; each leaves out some of the groceries.
    assert "basket_1_pos" in shared
    assert shared < {key for key in one.observation_space if key.endswith("_1_pos")}


def test_what_needs_a_built_simulator_says_to_reset_first() -> None:
    env = LiberoEnv("libero_object", 0, render_mode="rgb_array")
    with pytest.raises(ResetNeeded, match="first"):
        env.sim_state()
    with pytest.raises(ResetNeeded, match=r"reset\(\)"):
        env.step(SETTLE)
    with pytest.raises(ResetNeeded, match=r"reset\(\)"):
        env.render()
    with pytest.raises(ValueError, match="render_mode"):
        LiberoEnv("libero_object", 0).render()
    env.close()
    env.close()
