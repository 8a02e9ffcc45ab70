"""Videos of chunked environments by the ordinary recorders: all frames, or the right duration."""

from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import imageio.v3 as imageio
import numpy as np
import pytest
from gymnasium.envs.classic_control.pendulum import PendulumEnv
from gymnasium.utils.save_video import save_video
from gymnasium.wrappers import RecordVideo, RenderCollection, TimeLimit
from gymnasium.wrappers.vector import RecordVideo as VectorRecordVideo
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecVideoRecorder

from cfgrl_gym.algorithms import ThreadVecEnv, WorkerVecEnv
from cfgrl_gym.wrappers import ActionChunk

STEPS = 40  # of an episode of Pendulum
RATE = 30  # Pendulum's frames a second
EVERY: dict[str, Any] = {"episode_trigger": lambda _: True}


class DrawnPendulum(PendulumEnv):
    """Pendulum as grey images that brighten with each step, drawn without pygame."""

    steps = 0

    def reset(self, **arguments: Any) -> Any:
        self.steps = 0
        return super().reset(**arguments)

    def step(self, action: np.ndarray) -> Any:
        self.steps += 1
        return super().step(action)

    def render(self) -> Any:
        return np.full((64, 64, 3), 5 * self.steps, np.uint8)


def pendulum(mode: str | None = "rgb_array") -> gym.Env:
    return TimeLimit(DrawnPendulum(render_mode=mode), STEPS)


def chunked_pendulum(chunk_size: int) -> gym.Env:
    return ActionChunk(pendulum(), chunk_size)


def play(env: gym.Env) -> int:
    """Run an episode; returns its number of steps."""
    steps, over = 0, False
    with closing(env):
        env.reset(seed=0)
        while not over:
            _, _, terminated, truncated, info = env.step(env.action_space.sample())
            steps += info.get("n_steps", 1)
            over = terminated or truncated
    return steps


def read_video(folder: Path) -> tuple[np.ndarray, float]:
    """The frames of the only video in a folder, and their rate."""
    (file,) = folder.glob("*.mp4")
    rate = imageio.immeta(file, plugin="FFMPEG")["fps"]
    return imageio.imread(file, plugin="FFMPEG"), rate


def assert_shows(video: tuple[np.ndarray, float], frames: int, rate: float) -> None:
    """So many frames, of which MoviePy loses the last one where the duration is rounded down."""
    assert len(video[0]) in (frames - 1, frames)
    assert video[1] == pytest.approx(rate, abs=0.01)  # MoviePy writes two decimals


# Any chunked environment ------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 4, 20])
def test_a_recorder_around_the_chunks_gives_a_frame_for_each_and_the_right_duration(
    chunk_size: int, tmp_path: Path
) -> None:
    env = RecordVideo(chunked_pendulum(chunk_size), str(tmp_path / "videos"), **EVERY)
    assert play(env) == STEPS
    assert_shows(read_video(tmp_path / "videos"), 1 + STEPS // chunk_size, rate=RATE / chunk_size)


@pytest.mark.parametrize("chunk_size", [4, 20])
def test_a_recorder_inside_the_chunks_gives_a_frame_for_every_step(
    chunk_size: int, tmp_path: Path
) -> None:
    recorder = RecordVideo(pendulum(), str(tmp_path / "videos"), **EVERY)
    assert play(ActionChunk(recorder, chunk_size)) == STEPS
    frames, rate = read_video(tmp_path / "videos")
    assert_shows((frames, rate), 1 + STEPS, RATE)
    brightness = frames.mean((1, 2, 3))
    np.testing.assert_allclose(brightness, 5 * np.arange(len(frames)), atol=3)  # in their order


def test_save_video_writes_the_frames_of_every_step_in_list_mode(tmp_path: Path) -> None:
    env = ActionChunk(RenderCollection(pendulum()), 20)
    assert play(env) == STEPS
    frames: Any = env.render()
    assert len(frames) == 1 + STEPS
    save_video(frames, str(tmp_path / "videos"), fps=env.metadata["render_fps"], **EVERY)
    assert_shows(read_video(tmp_path / "videos"), 1 + STEPS, RATE)


@pytest.mark.parametrize("kind", [DummyVecEnv, SubprocVecEnv, WorkerVecEnv, ThreadVecEnv])
def test_sb3s_recorder_gives_the_right_duration(kind: type[VecEnv], tmp_path: Path) -> None:
    inner = kind([partial(chunked_pendulum, 4)] * 2)  # type: ignore[call-arg]
    env = VecVideoRecorder(inner, str(tmp_path / "videos"), lambda step: step == 0, video_length=9)
    with closing(env):
        env.reset()
        for _ in range(9):
            env.step(np.zeros((2, 4, 1), np.float32))
    frames, rate = read_video(tmp_path / "videos")
    assert_shows((frames, rate), 10, rate=RATE / 4)
    assert frames.shape[1:] == (128, 64, 3)  # both environments, one above the other


def test_gymnasiums_vector_recorder_gives_the_right_duration(tmp_path: Path) -> None:
    vector = gym.vector.SyncVectorEnv([partial(chunked_pendulum, 4)] * 2)
    env = VectorRecordVideo(vector, str(tmp_path / "videos"), **EVERY)
    with closing(env):
        env.reset()
        for _ in range(STEPS // 4):
            env.step(np.zeros((2, 4, 1), np.float32))
    assert_shows(read_video(tmp_path / "videos"), 1 + STEPS // 4, rate=RATE / 4)


def test_the_rate_changes_only_where_a_chunk_is_one_frame() -> None:
    def rate(make: Callable[[], gym.Env]) -> Any:
        return ActionChunk(make(), 5).metadata["render_fps"]

    assert rate(pendulum) == RATE / 5
    assert rate(lambda: pendulum(None)) == RATE
    assert rate(lambda: pendulum("human")) == RATE  # the environment draws each step itself
    assert rate(lambda: RenderCollection(pendulum())) == RATE
    assert pendulum().metadata["render_fps"] == RATE  # the environment's own is as it was


# LIBERO -----------------------------------------------------------------------------------------

CHUNK, LIMIT = 16, 48  # control steps: 2.4 s
LIBERO: dict[str, Any] = {
    "id": "cfgrl_gym:LiberoChunked-v0",
    "chunk_size": CHUNK,
    "max_episode_steps": LIMIT,
    "image_size": 32,
    "settle_steps": 1,
}


@pytest.mark.libero
def test_libero_is_recorded_inside_the_chunks_with_all_frames(tmp_path: Path) -> None:
    record = partial(RecordVideo, video_folder=str(tmp_path / "videos"), **EVERY)
    env = gym.make(**LIBERO, render_mode="rgb_array", step_wrappers=[record])
    assert env.metadata["render_fps"] == 20 / CHUNK
    assert play(env) == LIMIT
    frames, rate = read_video(tmp_path / "videos")
    assert_shows((frames, rate), 1 + LIMIT, rate=20)
    for frame in frames:  # 256 pixels a side, and something to see
        assert frame.shape == (256, 256, 3)
        assert frame.std() > 20
    moved = np.abs(np.diff(frames.astype(int), axis=0)).mean((1, 2, 3))
    assert np.median(moved) > 0.1  # the arm moves in frames inside a chunk too


@pytest.mark.libero
def test_libero_is_recorded_around_the_chunks_with_the_right_duration(tmp_path: Path) -> None:
    env = gym.make(**LIBERO, render_mode="rgb_array")
    assert play(RecordVideo(env, str(tmp_path / "videos"), **EVERY)) == LIMIT
    assert_shows(read_video(tmp_path / "videos"), 1 + LIMIT // CHUNK, rate=20 / CHUNK)


@pytest.mark.libero
def test_liberos_frames_in_list_mode_are_saved_with_the_right_rate(tmp_path: Path) -> None:
    with closing(gym.make(**LIBERO, render_mode="rgb_array_list")) as env:
        env.reset(seed=0)
        for _ in range(LIMIT // CHUNK):
            env.step(env.action_space.sample())
        frames: Any = env.render()
        save_video(frames, str(tmp_path / "videos"), fps=env.metadata["render_fps"], **EVERY)
    assert len(frames) == 1 + LIMIT
    assert_shows(read_video(tmp_path / "videos"), 1 + LIMIT, rate=20)


@pytest.mark.libero
def test_wrappers_of_steps_are_applied_in_order_and_kept_in_the_spec() -> None:
    wrappers = [partial(TimeLimit, max_episode_steps=7), gym.wrappers.RecordEpisodeStatistics]
    env = gym.make(**LIBERO, step_wrappers=wrappers)
    assert "<RecordEpisodeStatistics<TimeLimit<LiberoEnv" in str(env)
    assert env.spec is not None
    assert str(gym.make(env.spec)) == str(env)
    assert env.metadata["render_fps"] == 20  # nothing is rendered


@pytest.mark.libero
@pytest.mark.parametrize(
    ("wrappers", "message"),
    [
        (TimeLimit, "step_wrappers must be a list of functions that wrap Libero-v0; got <class"),
        (["RecordVideo"], "each of step_wrappers must be a function.*'RecordVideo' gave None"),
        ([lambda _: 3], "gave 3"),
    ],
)
def test_wrappers_of_steps_that_wrap_nothing_are_refused(wrappers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gym.make(**LIBERO, step_wrappers=wrappers)
