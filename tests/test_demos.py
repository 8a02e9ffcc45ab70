"""Scripted demonstrations: they replay in LIBERO's own environment; files are read with care."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import libero_reference

from cfgrl_gym.demos.expert import ExpertUnavailableError
from cfgrl_gym.demos.files import (
    Demonstration,
    DemonstrationFileError,
    read_demonstrations,
    write_demonstrations,
)
from cfgrl_gym.demos.recording import RecordingConfig, demonstration_path, record, save

CONFIG = RecordingConfig(
    "libero_object", 0, demos=2, image_size=32, image_stride=10, seed=0, workers=1
)
PROMPT = "pick up the alphabet soup and place it in the basket"
OTHERS = ["cream_cheese_1", "milk_1"]  # in the same scene
BDDL_WORDS = "pick the alphabet soup and place it in the basket"  # in the BDDL file


@pytest.fixture(scope="module")
def demos() -> list[Demonstration]:
    return list(record(CONFIG))


@pytest.fixture(scope="module")
def demo_file(demos: list[Demonstration], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = demonstration_path(tmp_path_factory.mktemp("demos"), "libero_object", 0)
    save(path, demos, CONFIG)
    return path


# Recording --------------------------------------------------------------------------------------


def test_every_demonstration_replays_to_success_in_liberos_own_environment(
    demos: list[Demonstration],
) -> None:
    assert len(demos) == 2
    with libero_reference("libero_object", 0, images=False) as libero:
        for demo in demos:
            observation = libero.start(init_state=demo.states[0])
            for step, action in enumerate(demo.actions):
                state = libero.env.get_sim_state()
                np.testing.assert_array_equal(state, demo.states[step], f"step {step}")
                for ours, theirs in (
                    (demo.ee_pos, "robot0_eef_pos"),
                    (demo.gripper_states, "robot0_gripper_qpos"),
                    (demo.joint_states, "robot0_joint_pos"),
                ):
                    np.testing.assert_array_equal(ours[step], observation[theirs])
                observation, _, done, _ = libero.env.step(action)
                assert done == (step == len(demo.actions) - 1)


def test_demonstrations_vary_and_stay_within_the_action_box(demos: list[Demonstration]) -> None:
    one, two = demos
    assert (one.states[0] != two.states[0]).any()
    for demo in demos:
        assert np.abs(demo.actions).max() <= 1
        assert demo.prompt == PROMPT
        assert 50 < len(demo.actions) <= 280
        assert set(demo.actions[:, 6]) == {-1, 1}
        assert demo.agentview_rgb.shape == (len(demo.actions), 32, 32, 3)
        drawn = np.flatnonzero(demo.images_rendered)
        np.testing.assert_array_equal(drawn, np.arange(0, len(demo.actions), 10))
        np.testing.assert_array_equal(demo.agentview_rgb[9], demo.agentview_rgb[0])
        assert (demo.agentview_rgb[10] != demo.agentview_rgb[0]).any()


def test_equal_seeds_give_equal_demonstrations(demos: list[Demonstration]) -> None:
    (again,) = record(dataclasses.replace(CONFIG, demos=1))
    for field in dataclasses.fields(Demonstration):
        ours, theirs = getattr(again, field.name), getattr(demos[0], field.name)
        np.testing.assert_array_equal(ours, theirs, field.name)


@pytest.fixture(scope="module")
def of_others() -> list[Demonstration]:
    """The expert picks a flat and a tall object which the task doesn't name."""
    return list(record(dataclasses.replace(CONFIG, objects=OTHERS, cameras=["agentview"])))


def test_the_expert_brings_the_chosen_objects_and_not_the_tasks(
    of_others: list[Demonstration],
) -> None:
    assert len(of_others) == len(OTHERS)
    assert (of_others[0].actions[:60] != of_others[1].actions[:60]).any()
    with libero_reference("libero_object", 0, images=False) as libero:
        in_basket = {
            name: ["in", name, "basket_1_contain_region"] for name in ("alphabet_soup_1", *OTHERS)
        }
        for demo, chosen in zip(of_others, OTHERS, strict=True):
            assert demo.prompt == PROMPT
            libero.start(init_state=demo.states[0])
            for action in demo.actions:
                placed = {n: libero.env.env._eval_predicate(goal) for n, goal in in_basket.items()}
                assert not any(placed.values())
                _, _, done, _ = libero.env.step(action)
                assert not done
            placed = {n: libero.env.env._eval_predicate(goal) for n, goal in in_basket.items()}
            assert placed == {name: name == chosen for name in in_basket}


def test_only_the_cameras_that_were_asked_for_are_rendered(of_others: list[Demonstration]) -> None:
    for demo in of_others:
        assert demo.agentview_rgb.any()
        assert not demo.eye_in_hand_rgb.any()
        assert demo.eye_in_hand_rgb.shape == demo.agentview_rgb.shape


def test_an_object_that_is_not_in_the_scene_is_refused_with_those_that_are() -> None:
    config = dataclasses.replace(CONFIG, objects=["butter_1", "ketchup_1"])
    with pytest.raises(ExpertUnavailableError, match=r"'ketchup_1'.*alphabet_soup_1, .*milk_1"):
        next(record(config))
    with pytest.raises(ExpertUnavailableError, match=r"'basket_1'.*can pick alphabet_soup_1, "):
        next(record(dataclasses.replace(CONFIG, objects="basket_1")))


def test_a_task_that_is_no_pick_and_place_is_refused() -> None:
    config = RecordingConfig("libero_goal", 7, demos=1, image_size=16, workers=1)
    with pytest.raises(ExpertUnavailableError, match=r"turn_?on.*libero_object"):
        next(record(config))


@pytest.mark.parametrize(
    "wrong", [{"demos": 0}, {"image_stride": 0}, {"perturbed": 1.5}, {"cameras": ["wrist"]}]
)
def test_wrong_recording_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        next(record(dataclasses.replace(CONFIG, **wrong)))


# Files ------------------------------------------------------------------------------------------


def test_files_have_liberos_layout(demo_file: Path, demos: list[Demonstration]) -> None:
    assert demo_file.name == PROMPT.replace(" ", "_") + "_demo.hdf5"
    assert demo_file.parent.name == "libero_object"
    with h5py.File(demo_file) as file:
        data = file["data"]
        assert json.loads(data.attrs["problem_info"])["language_instruction"] == PROMPT
        assert data.attrs["num_demos"] == 2
        assert data.attrs["total"] == sum(len(demo.actions) for demo in demos)
        assert sorted(data) == ["demo_0", "demo_1"]
        for number, demo in enumerate(demos):
            group, length = data[f"demo_{number}"], len(demo.actions)
            assert group.attrs["num_samples"] == length
            shapes = {
                "actions": (7,),
                "obs/agentview_rgb": (32, 32, 3),
                "obs/eye_in_hand_rgb": (32, 32, 3),
                "obs/ee_pos": (3,),
                "obs/ee_ori": (3,),
                "obs/ee_states": (6,),
                "obs/gripper_states": (2,),
                "obs/joint_states": (7,),
            }
            for key, shape in shapes.items():
                assert group[key].shape == (length, *shape), key
            assert group["states"].shape[0] == length
            for key in ("rewards", "dones"):
                assert group[key][:].tolist() == [0] * (length - 1) + [1]


def test_what_is_written_is_read_back(demo_file: Path, demos: list[Demonstration]) -> None:
    for given, wanted in zip(read_demonstrations(demo_file), demos, strict=True):
        for field in dataclasses.fields(Demonstration):
            ours, theirs = getattr(given, field.name), getattr(wanted, field.name)
            np.testing.assert_array_equal(ours, theirs, field.name)
        assert given.state.dtype == np.float32
        joined = np.hstack([wanted.ee_pos, wanted.ee_ori, wanted.gripper_states])
        np.testing.assert_allclose(given.state, joined, rtol=1e-6)


def write_liberos_own(
    path: Path, lengths: tuple[int, ...] = (4, 3), words: str = "open the box", bddl: str = ""
) -> None:
    """A file as LIBERO's `create_dataset.py` writes it."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_name"] = "Libero_Floor_Manipulation"
        data.attrs["problem_info"] = json.dumps(
            {"problem_name": "libero_floor", "language_instruction": list(f'"{words}"')}
        )
        data.attrs["bddl_file_name"] = bddl
        for number, length in enumerate(lengths):
            group = data.create_group(f"demo_{number}")
            group.create_dataset("actions", data=rng.uniform(-1, 1, (length, 7)))
            group.create_dataset("states", data=rng.normal(size=(length, 20)))
            group.create_dataset("robot_states", data=rng.normal(size=(length, 9)))
            for key in ("rewards", "dones"):
                group.create_dataset(key, data=np.zeros(length, np.uint8))
            obs = group.create_group("obs")
            for key, width in (
                ("gripper_states", 2),
                ("joint_states", 7),
                ("ee_states", 6),
                ("ee_pos", 3),
                ("ee_ori", 3),
            ):
                obs.create_dataset(key, data=rng.normal(size=(length, width)))
            for key in ("agentview_rgb", "eye_in_hand_rgb"):
                pixels = rng.integers(0, 256, (length, 16, 16, 3), dtype=np.uint8)
                obs.create_dataset(key, data=pixels)


@pytest.fixture
def libero_file(tmp_path: Path) -> Path:
    path = tmp_path / "open_the_box_demo.hdf5"
    write_liberos_own(path)
    return path


def test_liberos_own_files_are_read(libero_file: Path) -> None:
    demos = read_demonstrations(str(libero_file))
    with h5py.File(libero_file) as file:
        for number, demo in enumerate(demos):
            group = file[f"data/demo_{number}"]
            np.testing.assert_array_equal(demo.actions, group["actions"])
            np.testing.assert_array_equal(demo.states, group["states"])
            for key in ("agentview_rgb", "eye_in_hand_rgb", "ee_pos", "ee_ori", "joint_states"):
                np.testing.assert_array_equal(getattr(demo, key), group["obs"][key])
            assert demo.images_rendered.all()
            assert demo.prompt == "open the box"
    assert [len(demo.actions) for demo in demos] == [4, 3]


@pytest.mark.parametrize(
    ("place", "bddl", "words", "prompt"),
    [  # LIBERO's files have the BDDL file's words, the standard suites' environments its name's
        ("libero_object/{}_demo.hdf5", "", BDDL_WORDS, PROMPT),
        ("moved.hdf5", "x/libero_object/{}.bddl", BDDL_WORDS, PROMPT),
        ("libero_object_swap/{}_demo.hdf5", "", BDDL_WORDS, None),
        (
            "libero_object_task/{}_demo.hdf5",
            "{}.bddl",
            "pick the cream cheese and place it in the basket",
            None,
        ),
        ("libero_object/{}_demo.hdf5", "", "bring me my soup", None),
        ("moved.hdf5", "{}.bddl", BDDL_WORDS, None),
    ],
)
def test_prompts_of_liberos_own_files_are_worded_as_the_environments_are(
    place: str, bddl: str, words: str, prompt: str | None, tmp_path: Path
) -> None:
    name = PROMPT.replace(" ", "_")
    path = tmp_path / place.format(name)
    path.parent.mkdir(exist_ok=True)
    write_liberos_own(path, lengths=(2,), words=words, bddl=bddl.format(name))
    (demo,) = read_demonstrations(path)
    assert demo.prompt == (prompt or words)


def test_demonstrations_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "many.hdf5"
    write_liberos_own(path, lengths=tuple(range(1, 13)))
    lengths = [len(demo.actions) for demo in read_demonstrations(path)]
    assert lengths == list(range(1, 13))  # not demo_0, demo_1, demo_10, ...


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DemonstrationFileError, match=r"nowhere\.hdf5: no such file"):
        read_demonstrations(tmp_path / "nowhere.hdf5")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.99])
def test_a_truncated_file_is_recognised(demo_file: Path, tmp_path: Path, share: float) -> None:
    content = demo_file.read_bytes()
    path = tmp_path / "cut.hdf5"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DemonstrationFileError, match=r"cut\.hdf5.*truncated"):
        read_demonstrations(path)


def delete(key: str) -> Callable[[Any], None]:
    return lambda file: file.__delitem__(f"data/demo_1/{key}")


def replace(key: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], None]:
    def edit(file: Any) -> None:
        value = change(file[f"data/demo_1/{key}"][:])
        del file[f"data/demo_1/{key}"]
        file[f"data/demo_1/{key}"] = value

    return edit


def with_nan(values: np.ndarray) -> np.ndarray:
    values[1, 0] = np.nan
    return values


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (delete("actions"), "demo_1 lacks actions"),
        (delete("obs"), "demo_1 lacks obs, "),
        (delete("obs/ee_ori"), "demo_1 lacks obs/ee_ori"),
        (delete("obs/agentview_rgb"), "demo_1 lacks obs/agentview_rgb"),
        (lambda file: file.__delitem__("data"), r"no data/demo_\* group"),
        (lambda file: file["data"].attrs.__delitem__("problem_info"), "language_instruction"),
        (lambda file: file["data"].attrs.__setitem__("problem_info", "{"), "must be JSON"),
        (lambda file: file["data"].attrs.__setitem__("problem_info", "[1]"), "must be JSON"),
        (lambda file: file.move("data/demo_1", "data/demo_last"), "demo_last"),
        (replace("obs/ee_pos", lambda a: a[:-1]), r"obs/ee_pos \(2, 3\), expected \(3, 3\)"),
        (replace("obs/eye_in_hand_rgb", lambda a: a[1:]), r"obs/eye_in_hand_rgb \(2, 16"),
        (replace("obs/agentview_rgb", lambda a: a[..., 0]), "obs/agentview_rgb"),
        (replace("obs/agentview_rgb", lambda a: a / 255), "must be uint8"),
        (replace("actions", lambda a: a[:, :6]), r"actions \(3, 6\), expected \(3, 7\)"),
        (replace("actions", lambda a: a[:0]), "demo_1"),
        (replace("actions", with_nan), "NaN"),
        (replace("obs/gripper_states", with_nan), "NaN"),
        (lambda file: file.__setitem__("data/demo_1/obs/images_rendered", [True]), "images_rend"),
    ],
)
def test_files_that_lack_something_are_refused_with_its_name(
    libero_file: Path, edit: Callable[[Any], None], message: str
) -> None:
    with h5py.File(libero_file, "a") as file:
        edit(file)
    with pytest.raises(DemonstrationFileError, match=message) as error:
        read_demonstrations(libero_file)
    assert str(libero_file) in str(error.value)


def test_a_failed_write_leaves_the_older_file_and_nothing_else(libero_file: Path) -> None:
    before = libero_file.read_bytes()
    good = read_demonstrations(libero_file)
    broken = dataclasses.replace(good[1], ee_ori=None)
    with pytest.raises((TypeError, ValueError)):
        write_demonstrations(
            libero_file, [good[0], broken], problem="Libero_Floor", bddl_file=Path("box.bddl")
        )
    assert libero_file.read_bytes() == before
    assert list(libero_file.parent.iterdir()) == [libero_file]
    write_demonstrations(libero_file, good[1:], problem="Libero_Floor", bddl_file=Path("box.bddl"))
    assert [len(demo.actions) for demo in read_demonstrations(libero_file)] == [3]
