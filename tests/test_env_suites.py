"""Suites, tasks, initial states and time limits of the installed LIBERO; wrong arguments."""

from typing import Any

import pytest
from conftest import HAS_PRO

from cfgrl_gym.envs.libero import LiberoEnv
from cfgrl_gym.envs.suites import (
    available_suites,
    episode_limit,
    load_init_states,
    load_tasks,
    select_tasks,
)

LIMITS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}


def test_the_130_tasks_of_libero_are_there_with_their_files() -> None:
    counts = {}
    for suite in LIMITS:
        tasks = load_tasks(suite)
        counts[suite] = len(tasks)
        assert [task.task_id for task in tasks] == list(range(len(tasks)))
        assert len({task.name for task in tasks}) == len(tasks)
        for task in tasks:
            assert task.bddl_file.is_file()
    assert counts == dict.fromkeys(LIMITS, 10) | {"libero_90": 90}


def test_tasks_come_in_the_benchmarks_order() -> None:
    assert [task.prompt for task in load_tasks("libero_object")][:3] == [
        "pick up the alphabet soup and place it in the basket",
        "pick up the cream cheese and place it in the basket",
        "pick up the salad dressing and place it in the basket",
    ]


@pytest.mark.skipif(not HAS_PRO, reason="the installed LIBERO has no LIBERO-PRO suites")
def test_libero_pro_suites_have_the_limit_of_the_suite_they_alter() -> None:
    pro = [name for name in available_suites() if name not in LIMITS]
    assert {"libero_goal_swap", "libero_object_swap", "libero_spatial_task"} <= set(pro)
    assert episode_limit("libero_goal_swap") == 300
    assert episode_limit("libero_10_task") == 520
    for suite, limit in LIMITS.items():
        assert episode_limit(suite) == limit
        assert LiberoEnv(suite).max_episode_steps == limit
        assert LiberoEnv(suite, max_episode_steps=7).max_episode_steps == 7


def test_tasks_have_50_initial_states_that_nobody_can_change() -> None:
    for suite in LIMITS:
        states = load_init_states(suite, 9)
        assert states.shape[0] == 50
        assert len({row.tobytes() for row in states}) > 40
    with pytest.raises(ValueError, match="read-only"):
        states[0] = 0


def test_tasks_named_twice_count_once_in_the_order_given() -> None:
    assert [task.task_id for task in select_tasks("libero_object", [3, 1, 3])] == [3, 1]


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ({"suite": "libero_objects"}, ["'libero_objects' is unknown", "mean 'libero_object'"]),
        ({"suite": "libero_golas"}, ["'libero_goal'", "Known: "]),
        ({"suite": "zzz"}, ["Known: libero_", "libero_90"]),
        ({"task_id": 10}, ["task_id 10", "0 to 9", "pick up the alphabet soup"]),
        ({"task_id": -1}, ["task_id -1", "0 to 9"]),
        ({"task_id": [0, 12]}, ["task_id 12", "'libero_object'"]),
        ({"task_id": True}, ["task_id True"]),
        ({"task_id": []}, ["empty"]),
        ({"task_id": "every"}, ["'all'", "'every'"]),
        ({"init_states": "fixed"}, ["'benchmark' or 'random'", "'fixed'"]),
        ({"init_states": [3, 50]}, ["50 benchmark states (0 to 49)", "got [50]"]),
        ({"init_states": []}, ["some of the 50 benchmark states", "got none"]),
        ({"render_mode": "human"}, ["rgb_array", "'human'"]),
        ({"image_size": 0}, ["image_size", "at least 8"]),
        ({"image_size": 64.0}, ["image_size", "64.0"]),
        ({"max_episode_steps": 0}, ["max_episode_steps", "at least 1"]),
        ({"settle_steps": -1}, ["settle_steps", "at least 0"]),
    ],
)
def test_wrong_arguments_are_refused_with_what_is_known(
    arguments: dict[str, Any], messages: list[str]
) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the parts are matched below
        LiberoEnv(**arguments)
    for message in messages:
        assert message in str(error.value)
