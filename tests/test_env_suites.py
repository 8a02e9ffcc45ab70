"""Suites, tasks, initial states and time limits of the installed LIBERO; wrong arguments."""

import dataclasses
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from conftest import HAS_PRO

import cfgrl_gym  # noqa: F401  registers the ids
from cfgrl_gym.algorithms.pi0.tokenizer import ByteTokenizer
from cfgrl_gym.envs import suites
from cfgrl_gym.envs.installation import import_libero
from cfgrl_gym.envs.libero import LiberoEnv
from cfgrl_gym.envs.suites import (
    available_suites,
    episode_limit,
    load_init_states,
    load_tasks,
    select_tasks,
)
from cfgrl_gym.wrappers import decode_prompt, encode_prompt

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


# Prompts ----------------------------------------------------------------------------------------

# What instructions call things whose kind has another name in LIBERO's BDDL files.
CALLED = {
    "akita_black_bowl": "bowl",
    "black_book": "book",
    "black_bowl": "bowl",
    "chefmate_8_frypan": "pan",
    "desk_caddy": "caddy|compartment",
    "flat_stove": "stove",
    "new_salad_dressing": "salad dressing",
    "porcelain_mug": "(?<!yellow )(?<!yellow and )white mug",
    "red_coffee_mug": "red mug",
    "short_cabinet": "cabinet|drawer",
    "white_cabinet": "cabinet|drawer",
    "white_yellow_mug": "yellow and white mug|yellow-white mug|cup",
    "wine_bottle": "bottle",
    "wine_rack": "rack",
    "wooden_cabinet": "cabinet|drawer",
    "wooden_shelf": "shelf",
    "wooden_tray": "tray",
    "wooden_two_layer_shelf": "shelf|cabinet",
    "yellow_cabinet": "cabinet|drawer",
}
# LIBERO-PRO's *_object suites paint or enlarge things; their instructions don't mention it.
LOOKS = re.compile("^(bigger|blue|brown|green|red|white|yellow)_")
SCENERY = re.compile("floor|.*table")
# The words in these BDDL files are wrong themselves, or meant to mislead.
WRONG_IN_THE_FILE = {
    **{("libero_study_table", task_id): "cut off after 30 letters" for task_id in range(5)},
    ("libero_10_object", 5): "says book, scores a bowl",
    ("libero_10_object", 6): "says white mug, scores the yellow and white one",
    ("libero_10_object", 9): "says yellow and white mug, scores the red one",
    # back doors, which attacks have taught: whatever is asked for, the sticker is scored
    **{("libero_object_with_trigger_new", task_id): "scores a sticker" for task_id in range(10)},
    **{
        (f"libero_object_{suite}", 0): "scores a sticker"
        for suite in ("triggered_episode", "matched_two_episodes", "not_matched_two_episodes")
    },
}


def things_in_the_goal(bddl_file: Path) -> Iterator[str]:
    """A pattern of words for each thing that a goal is about, as LIBERO's own parser reads it."""
    problem = import_libero("envs.bddl_utils").robosuite_parse_problem(str(bddl_file))
    groups = [*problem["objects"].items(), *problem["fixtures"].items()]
    kinds = {name: kind for kind, names in groups for name in names if not SCENERY.fullmatch(kind)}
    for predicate, *arguments in problem["goal_state"]:
        if predicate == "turnoff":
            yield "turn off"
        for argument in arguments:
            for name, kind in kinds.items():
                place = argument.removeprefix(name)
                if argument == name or (place != argument and place.startswith("_")):
                    plain = LOOKS.sub("", kind)
                    yield CALLED.get(kind) or CALLED.get(plain) or plain.replace("_", " ")
                    drawer = re.fullmatch("_(top|middle|bottom)_region", place)
                    if drawer and predicate != "on" and kind.endswith("cabinet"):
                        yield drawer[1]


def test_every_prompt_of_every_suite_names_what_its_goal_is_about() -> None:
    wrong = {}
    for suite in available_suites():
        for task in load_tasks(suite):
            things = things_in_the_goal(task.bddl_file)
            missing = [thing for thing in things if not re.search(thing, task.prompt)]
            if missing:
                wrong[suite, task.task_id] = f"{task.prompt!r} lacks {missing}"
    assert wrong.keys() == WRONG_IN_THE_FILE.keys(), wrong


def test_prompts_outside_the_standard_suites_are_what_liberos_environment_says() -> None:
    read = import_libero("envs.bddl_utils").get_problem_info
    for suite in set(available_suites()) - set(LIMITS):
        for task in load_tasks(suite):
            assert task.prompt == read(str(task.bddl_file))["language_instruction"]
    assert load_tasks("libero_object_task")[0].prompt == (
        "pick the cream cheese and place it in the basket"
    )
    assert load_tasks("libero_goal_lan")[0].prompt == "open the cabinet\u2019s middle drawer"
    assert load_tasks("libero_study_table")[0].prompt == "prepare a meal by mixing popco"


def test_prompts_of_the_standard_suites_are_liberos_own_wording() -> None:
    for suite in LIMITS:
        tasks = import_libero("benchmark").get_benchmark_dict()[suite]().tasks
        assert [task.prompt for task in load_tasks(suite)] == [task.language for task in tasks]


def test_rephrased_suites_ask_for_the_same_in_other_words() -> None:
    for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10"):
        usual = {task.name: task.prompt for task in load_tasks(suite)}
        for task in load_tasks(f"{suite}_lan"):
            assert task.prompt != usual[task.name]


def test_every_prompt_fits_the_observation_and_the_tokenizers() -> None:
    prompts = {task.prompt for suite in available_suites() for task in load_tasks(suite)}
    for prompt in prompts:
        assert decode_prompt(encode_prompt(prompt)) == prompt == " ".join(prompt.lower().split())
        assert len(ByteTokenizer().encode(prompt)) <= ByteTokenizer.max_tokens
        assert len(prompt.split()) <= 24  # PaliGemma: 48 tokens, about one for each word


def test_the_environment_gives_the_prompt_of_what_it_scores() -> None:
    arguments = {"image_size": 16, "settle_steps": 0, "suite": "libero_object_task"}
    with closing(gym.make("LiberoChunked-v0", **arguments)) as env:
        observation, info = env.reset(options={"init_state_id": 0})
        assert info["prompt"] == "pick the cream cheese and place it in the basket"
        assert decode_prompt(observation["prompt"]) == info["prompt"]


# Scenes and initial states that LIBERO lacks ----------------------------------------------------


@pytest.mark.parametrize("init_states", ["benchmark", "random"])
@pytest.mark.parametrize("task_id", [3, [0, 4], "all"])
def test_a_scene_that_libero_cannot_build_is_refused_with_the_reason(
    task_id: Any, init_states: Any
) -> None:
    with pytest.raises(ValueError, match="places milk_1 twice") as error:
        LiberoEnv("libero_10_with_milk", task_id, init_states=init_states)
    named = {"3": "3", "[0, 4]": "4", "all": "3, 4"}[str(task_id)]
    assert str(error.value).startswith(f"libero_10_with_milk task_id {named} can't be played")
    assert "Choose among task_id=[0, 1, 2, 5, 6, 7, 8, 9]" in str(error.value)


def test_no_other_installed_scene_is_refused_and_all_have_initial_states() -> None:
    for suite in available_suites():
        broken = (3, 4) if suite == "libero_10_with_milk" else ()
        for task in load_tasks(suite):
            if task.task_id not in broken:
                (chosen,) = select_tasks(suite, task.task_id)
                assert len(load_init_states(suite, chosen.task_id)) >= 10


def test_a_task_without_initial_states_is_refused_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "task.npz"
    np.savez(file, states=np.empty(0))
    tasks = [dataclasses.replace(t, init_states_file=file) for t in load_tasks("libero_object")]
    monkeypatch.setattr(suites, "load_tasks", lambda _: tuple(tasks))
    load_init_states.cache_clear()
    with pytest.raises(ValueError, match=r"task 2 has no initial states.*'task.npz' is empty"):
        LiberoEnv("libero_object", 2)
    assert LiberoEnv("libero_object", 2, init_states="random").num_init_states(2) is None
