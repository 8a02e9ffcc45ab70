"""Action chunks, the 2-test observation and prompts."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from conftest import Recorded, assert_same_arrays, downward_actions
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from cfgrl_gym.envs.libero import LiberoEnv
from cfgrl_gym.wrappers import ActionChunk, TwoTestObservation, decode_prompt, encode_prompt

# Action chunks, any environment -----------------------------------------------------------------


class Countdown(gym.Env):
    """Reward n at the n-th step; the fifth ends the episode; says which actions it was given."""

    observation_space = spaces.Box(0, 100, (1,), np.float32)
    action_space = spaces.Box(np.array([-1, -2]), np.array([1, 3]), dtype=np.float64)

    def __init__(self, ends_by: str = "terminated") -> None:
        self.ends_by = ends_by
        self.given: list[np.ndarray] = []
        self.time = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.given.clear()
        self.time = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> Any:
        self.given.append(action)
        self.time += 1
        over = self.time == 5
        observation = np.full(1, self.time, np.float32)
        flags = (over and self.ends_by == "terminated", over and self.ends_by == "truncated")
        return observation, float(self.time), *flags, {"time": self.time}


def test_a_chunks_reward_is_the_sum_of_its_steps() -> None:
    env = ActionChunk(Countdown(), 3)
    env.reset()
    chunk = np.arange(6.0).reshape(3, 2) / 10
    observation, reward, terminated, truncated, info = env.step(chunk)
    assert (observation.item(), reward, terminated, truncated) == (3, 1 + 2 + 3, False, False)
    assert info["rewards"].tolist() == [1, 2, 3]
    assert info["rewards"].dtype == np.float64
    assert info["dones"].tolist() == [False, False, False]
    assert info["dones"].dtype == bool
    assert (info["n_steps"], info["time"]) == (3, 3)
    assert "observations" not in info
    np.testing.assert_array_equal(env.unwrapped.given, chunk)


@pytest.mark.parametrize("ends_by", ["terminated", "truncated"])
def test_a_chunk_stops_where_the_episode_ends(ends_by: str) -> None:
    env = ActionChunk(Countdown(ends_by), 3)
    env.reset()
    env.step(np.zeros((3, 2)))
    observation, reward, terminated, truncated, info = env.step(np.ones((3, 2)))
    assert (observation.item(), reward) == (5, 4 + 5)
    assert (terminated, truncated) == (ends_by == "terminated", ends_by == "truncated")
    assert info["rewards"].tolist() == [4, 5]
    assert info["dones"].tolist() == [False, True]
    assert info["n_steps"] == 2
    assert len(env.unwrapped.given) == 5


def test_the_chunks_space_repeats_the_bounds_of_each_dimension() -> None:
    space = ActionChunk(Countdown(), 4).action_space
    assert space == spaces.Box(np.array([[-1, -2]] * 4), np.array([[1, 3]] * 4), dtype=np.float64)


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (np.zeros((2, 2)), r"shape \(3, 2\); got \(2, 2\)"),
        (np.zeros(6), r"got \(6,\)"),
        (np.zeros((1, 3, 2)), r"got \(1, 3, 2\)"),
        (np.array([[0, 0], [0, 0], [0, np.nan]]), "NaN"),
        (np.array([[0, 0], [0, -np.inf], [0, 0]]), "infinity"),
    ],
)
def test_a_wrong_chunk_is_refused_before_any_step(chunk: np.ndarray, message: str) -> None:
    env = ActionChunk(Countdown(), 3)
    env.reset()
    with pytest.raises(ValueError, match=message):
        env.step(chunk)
    assert env.unwrapped.given == []


@pytest.mark.parametrize("size", [0, -1, 2.5, "5"])
def test_sizes_below_one_are_refused(size: Any) -> None:
    with pytest.raises(ValueError, match="chunk_size must be an int of at least 1"):
        ActionChunk(Countdown(), size)
    with pytest.raises(ValueError, match="observation_stride must be an int of at least 1"):
        ActionChunk(Countdown(), 3, observation_stride=size)


@pytest.mark.parametrize("name", ["CartPole-v1", "FrozenLake-v1"])
def test_only_vectors_of_numbers_can_be_chunked(name: str) -> None:
    with pytest.raises(ValueError, match="Box action space"):
        ActionChunk(gym.make(name), 3)


@pytest.mark.parametrize("stride", [1, 2, 3, None])
def test_pendulum_in_chunks_equals_pendulum_step_by_step(stride: int | None) -> None:
    single = gym.make("Pendulum-v1")
    chunked = ActionChunk(gym.make("Pendulum-v1"), 5, observation_stride=stride)
    first, _ = single.reset(seed=4)
    np.testing.assert_array_equal(chunked.reset(seed=4)[0], first)
    actions = np.random.default_rng(0).uniform(-2, 2, (40, 5, 1)).astype(np.float32)
    for chunk in actions:  # Pendulum's limit of 200 ends the last chunk
        seen, rewards = [], []
        for number, action in enumerate(chunk, start=1):
            wanted, reward, _, over, _ = single.step(action)
            rewards.append(reward)
            if stride is not None and number % stride == 0 and number < len(chunk):
                seen.append((number, wanted))
        observation, total, _, truncated, info = chunked.step(chunk)
        np.testing.assert_array_equal(observation, wanted)
        np.testing.assert_array_equal(info["rewards"], np.array(rewards, dtype=np.float64))
        assert total == pytest.approx(sum(rewards))
        assert truncated == over
        if stride is not None:
            assert [number for number, _ in info["observations"]] == [n for n, _ in seen]
            for (_, given_obs), (_, wanted_obs) in zip(info["observations"], seen, strict=True):
                np.testing.assert_array_equal(given_obs, wanted_obs)
    assert over


# Action chunks, LIBERO --------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [None, 2])
def test_libero_in_chunks_equals_libero_step_by_step(
    can_env: LiberoEnv, stride: int | None
) -> None:
    can_env.max_episode_steps = 9  # ends inside the second chunk
    actions = downward_actions(12, seed=8).reshape(2, 6, 7)
    start = {"init_state_id": 21}

    can_env.reset(options=start)
    singles, states = [], []
    for action in actions.reshape(-1, 7)[:9]:
        observation, _, _, truncated, _ = can_env.step(action)
        singles.append(observation)
        states.append(can_env.sim_state())
    assert truncated
    assert (singles[5]["agentview_image"] != singles[8]["agentview_image"]).any()

    env = ActionChunk(can_env, 6, observation_stride=stride)
    env.reset(options=start)
    for chunk, end, inside in ((actions[0], 6, (2, 4)), (actions[1], 9, (8,))):
        observation, _, _, truncated, info = env.step(chunk)
        np.testing.assert_array_equal(can_env.sim_state(), states[end - 1])
        assert_same_arrays(observation, singles[end - 1])  # images included
        assert truncated == (end == 9)
        begun = 0 if end == 6 else 6
        assert info["n_steps"] == end - begun
        if stride is not None:
            assert [begun + n for n, _ in info["observations"]] == list(inside)
            for number, between in info["observations"]:
                assert_same_arrays(between, singles[begun + number - 1])
    assert can_env.skip_observations is False


# The 2-test observation -------------------------------------------------------------------------


class Replay(gym.Env):
    """Gives recorded raw observations one after the other."""

    action_space = spaces.Box(-1, 1, (7,), np.float32)

    def __init__(self, observations: list[dict[str, np.ndarray]], prompt: str = "go") -> None:
        self.observations, self.prompt = observations, prompt
        self.observation_space = spaces.Dict(
            {
                key: spaces.Box(0, 255, value.shape, np.uint8)
                if value.dtype == np.uint8
                else spaces.Box(-np.inf, np.inf, value.shape, np.float64)
                for key, value in observations[0].items()
            }
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        return self.observations[0], {"prompt": self.prompt}

    def step(self, action: np.ndarray) -> Any:
        self.time += 1
        return self.observations[self.time], 0.0, False, False, {"prompt": self.prompt}


def script_image(raw: np.ndarray) -> np.ndarray:
    """`2_test_pi0_on_libero.py` and its environment, operation by operation."""
    from_environment = np.flipud(raw).transpose(2, 0, 1)  # upright, (C, H, W)
    in_script = from_environment[:, :, ::-1]  # "BGR to RGB"
    return in_script.transpose(1, 2, 0)


def script_state(raw: dict[str, np.ndarray]) -> np.ndarray:
    import robosuite.utils.transform_utils as robosuite_transforms  # once a back end is chosen

    return np.concatenate(
        [
            raw["robot0_eef_pos"],
            robosuite_transforms.quat2axisangle(raw["robot0_eef_quat"].copy()),
            raw["robot0_gripper_qpos"],
        ]
    )


def test_observations_equal_the_reference_scripts_on_recorded_ones(recorded: Recorded) -> None:
    env = TwoTestObservation(Replay(recorded.observations, "pick up the soup"))
    observation, _ = env.reset()
    for step, raw in enumerate(recorded.observations):
        if step:
            observation, *_ = env.step(np.zeros(7))
        assert set(observation) == {"base_0_rgb", "left_wrist_0_rgb", "state", "prompt"}
        wanted = script_image(raw["agentview_image"])
        np.testing.assert_array_equal(observation["base_0_rgb"], wanted)
        wanted = script_image(raw["robot0_eye_in_hand_image"])
        np.testing.assert_array_equal(observation["left_wrist_0_rgb"], wanted)
        assert observation["state"].dtype == np.float32
        np.testing.assert_allclose(observation["state"], script_state(raw), rtol=1e-6, atol=1e-9)
        assert bytes(observation["prompt"]).rstrip(b"\0") == b"pick up the soup"
        assert observation["base_0_rgb"].flags.c_contiguous
        assert observation in env.observation_space


def test_images_are_turned_by_half_and_red_stays_red() -> None:
    raw = np.zeros((6, 8, 3), dtype=np.uint8)
    raw[0, 0] = (250, 20, 3)  # red, in robosuite's first row and column
    raw[5, 1] = (1, 30, 240)  # blue
    values = {
        "agentview_image": raw,
        "robot0_eye_in_hand_image": raw.copy(),
        "robot0_eef_pos": np.arange(3.0),
        "robot0_eef_quat": np.array([0, 0, 1.0, 0]),
        "robot0_gripper_qpos": np.array([0.01, -0.01]),
    }
    observation, _ = TwoTestObservation(Replay([values])).reset()
    for slot in ("base_0_rgb", "left_wrist_0_rgb"):
        image = observation[slot]
        assert image[5, 7].tolist() == [250, 20, 3]
        assert image[0, 6].tolist() == [1, 30, 240]
        assert np.count_nonzero(image) == 6
    np.testing.assert_allclose(observation["state"], [0, 1, 2, 0, 0, np.pi, 0.01, -0.01], atol=1e-6)


def test_an_environment_without_liberos_keys_is_refused() -> None:
    with pytest.raises(ValueError, match=r"agentview_image.*wrap Libero-v0"):
        TwoTestObservation(gym.make("Pendulum-v1"))


# Prompts ----------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)


@given(TEXT)
def test_prompts_survive_the_round_trip(text: str) -> None:
    encoded = encode_prompt(text)
    assert encoded.dtype == np.uint8
    assert encoded.shape == (256,)
    assert decode_prompt(encoded) == text


def test_prompts_are_zero_padded_utf8() -> None:
    assert encode_prompt("é π", size=8).tolist() == [0xC3, 0xA9, 0x20, 0xCF, 0x80, 0, 0, 0]
    assert encode_prompt("abc", size=3).tolist() == [97, 98, 99]


def test_prompts_that_cannot_be_encoded_are_refused() -> None:
    with pytest.raises(ValueError, match="4 bytes long, at most 3 fit"):
        encode_prompt("ééa"[:2], size=3)
    with pytest.raises(ValueError, match=r"U\+0000"):
        encode_prompt("a\0b")


def test_bytes_that_are_no_prompt_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 256\); decode row by row"):
        decode_prompt(np.zeros((2, 256), np.uint8))
    with pytest.raises(UnicodeDecodeError):
        decode_prompt(np.array([0xFF, 0xFE, 0], np.uint8))
