"""Which images an observation has, of what quality, and when none is made."""

from contextlib import closing
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from conftest import SETTLE, assert_same_arrays
from gymnasium.utils.env_checker import check_env

import cfgrl_gym  # noqa: F401  # registers the environments
from cfgrl_gym.envs.libero import LiberoEnv

START = {"init_state_id": 2}
CAMERAS = ("agentview", "robot0_eye_in_hand")


@pytest.mark.parametrize("camera", CAMERAS)
def test_a_camera_that_is_not_asked_for_is_neither_seen_nor_drawn(
    can_env: LiberoEnv, camera: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, _ = can_env.reset(options=START)
    with closing(LiberoEnv(image_size=64, settle_steps=2, cameras=[camera])) as env:
        one, _ = env.reset(options=START)
        assert env.observation_space.contains(one)
        assert_same_arrays(
            one, {k: v for k, v in both.items() if not k.endswith("_image") or camera in k}
        )
        drawn: list[str] = []
        monkeypatch.setattr(
            "cfgrl_gym.envs.rendering.render",
            lambda *args: drawn.extend(args[3]) or [np.zeros((64, 64, 3), np.uint8)],
        )
        env.step(SETTLE)
        assert drawn == [camera]


def test_the_2_test_observation_has_the_cameras_that_there_are() -> None:
    env = gym.make(
        "LiberoChunked-v0", cameras=["agentview"], image_size=32, chunk_size=2, settle_steps=0
    )
    check_env(env.unwrapped, skip_render_check=True)
    observation, _ = env.reset(options=START)
    assert set(observation) == {"base_0_rgb", "state", "prompt"}
    env.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cameras": "agentview"}, "cameras must be a list of some of"),
        ({"cameras": []}, r"cameras must be a list of some of .* got none"),
        ({"cameras": ["frontview"]}, r"each of cameras must be one of .*'frontview'"),
        ({"image_quality": "best"}, r"image_quality must be one of .*'best'"),
    ],
)
def test_other_cameras_and_qualities_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LiberoEnv(**arguments)


def test_drafts_look_alike_and_change_nothing_else(can_env: LiberoEnv) -> None:
    wanted, _ = can_env.reset(options=START)
    with closing(LiberoEnv(image_size=64, settle_steps=2, image_quality="draft")) as env:
        draft, _ = env.reset(options=START)
    for key, value in wanted.items():
        if key.endswith("_image"):
            difference = np.abs(value.astype(int) - draft[key])
            assert 0 < difference.mean() < 8
        else:
            np.testing.assert_array_equal(draft[key], value)


def test_skipped_observations_repeat_the_last_one_until_the_episode_ends(
    can_env: LiberoEnv,
) -> None:
    first, _ = can_env.reset(options=START)
    first = {key: value.copy() for key, value in first.items()}
    can_env.max_episode_steps = 3
    action = np.array([0, 0, -1, 0, 0, 0, -1.0])
    can_env.skip_observations = True
    try:
        for _ in range(2):
            observation, *_ = can_env.step(action)
            assert_same_arrays(observation, first)
        observation, _, _, truncated, _ = can_env.step(action)
    finally:
        can_env.skip_observations = False
    assert truncated
    assert not np.array_equal(observation["robot0_eef_pos"], first["robot0_eef_pos"])
    assert not np.array_equal(observation["agentview_image"], first["agentview_image"])
