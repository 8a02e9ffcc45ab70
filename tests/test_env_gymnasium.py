"""Both ids in the tools people use: env checkers, vector environments, SB3, PPO, video."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium as gym
import imageio.v3 as imageio
import numpy as np
import pytest
import stable_baselines3.common.env_checker as sb3_checker
from conftest import Finished, assert_same_arrays
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from gymnasium.wrappers import RecordVideo
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

import cfgrl_gym  # noqa: F401  registers the ids
from cfgrl_gym.envs.libero import LiberoEnv

SMALL = {"image_size": 64, "settle_steps": 1}
CHUNKED = SMALL | {"chunk_size": 3, "max_episode_steps": 6}
CHUNK_LIMIT = 2  # chunks in an episode of CHUNKED

# Gymnasium's remark on any environment that is not bare, as those of gym.make never are.
WRAPPED = "is different from the unwrapped version"


def messages_of(check: Callable[..., None], env: gym.Env) -> list[str]:
    """Every warning that a checker gives; its complaints are warnings or assertions."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(env)
    return [str(warning.message) for warning in caught]


def test_libero_passes_both_env_checkers_without_a_warning() -> None:
    with closing(gym.make("Libero-v0", **SMALL).unwrapped) as env:
        assert messages_of(sb3_checker.check_env, env) == []
        assert messages_of(gymnasium_check_env, env) == []


def test_libero_chunked_passes_both_env_checkers_but_for_being_wrapped() -> None:
    with closing(gym.make("LiberoChunked-v0", **CHUNKED)) as env:
        assert messages_of(sb3_checker.check_env, env) == []
        (only,) = messages_of(gymnasium_check_env, env)
        assert WRAPPED in only


def test_made_environments_declare_autoreset_frame_rate_and_no_foreign_time_limit() -> None:
    for name in ("Libero-v0", "LiberoChunked-v0"):
        env = gym.make(name)
        assert env.metadata["render_fps"] == 20
        assert env.metadata["autoreset_mode"] == gym.vector.AutoresetMode.DISABLED
        assert env.spec is not None
        assert env.spec.max_episode_steps is None  # it would count chunks
        assert isinstance(env.unwrapped, LiberoEnv)
    assert env.action_space == gym.spaces.Box(-1, 1, (50, 7), np.float32)
    assert env.observation_space["base_0_rgb"].shape == (224, 224, 3)


def test_an_environment_can_be_made_again_from_its_spec() -> None:
    env = gym.make("LiberoChunked-v0", **CHUNKED)
    assert env.spec is not None
    again = gym.make(env.spec)
    assert again.action_space == env.action_space
    assert again.observation_space == env.observation_space
    assert str(again) == str(env)


# Gymnasium's vector environments ---------------------------------------------------------------

VECTOR_SCRIPT = """
import gymnasium as gym, numpy as np
import cfgrl_gym

def run(mode):
    env = gym.make_vec("LiberoChunked-v0", num_envs=2, vectorization_mode=mode, chunk_size=3,
                       max_episode_steps=6, image_size=32, settle_steps=1)
    rows = [env.reset(seed=[4, 5])[0]]
    rng = np.random.default_rng(0)
    for _ in range(3):  # the third begins the next episode: Gymnasium's next-step autoreset
        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        obs, rewards, terminated, truncated, info = env.step(action)
        rows.append(obs | {"truncated": truncated, "n_steps": info.get("n_steps", np.zeros(2))})
    env.close()
    return rows

if __name__ == "__main__":
    # asynchronous first: its workers are forked, and must be before anything is rendered here
    for number, (one, two) in enumerate(zip(run("async"), run("sync"))):
        for key in one:
            assert one[key].shape[0] == 2, key
            assert np.array_equal(one[key], two[key]), (number, key)
        if number:
            print(one["truncated"].tolist(), one["n_steps"].tolist())
"""


def test_make_vec_gives_the_same_episodes_sync_and_async(
    run_python: Callable[..., Finished],
) -> None:
    done = run_python(VECTOR_SCRIPT)
    assert done.code == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["[False, False] [3, 3]", "[True, True] [3, 3]"]
    assert done.stdout.split("\n")[2].startswith("[False, False]")
    assert "Traceback" not in done.stderr


# Stable-Baselines3 -----------------------------------------------------------------------------


def two_envs(kind: type[VecEnv]) -> VecEnv:
    # "module:id", so that a worker process, which imports nothing of ours, finds the id
    name = "cfgrl_gym:LiberoChunked-v0"
    return make_vec_env(name, n_envs=2, vec_env_cls=kind, env_kwargs=CHUNKED)


@pytest.fixture(scope="module")
def dummy() -> Iterator[VecEnv]:
    with closing(two_envs(DummyVecEnv)) as env:
        yield env


def queued_episodes(env: VecEnv) -> list[dict[str, Any]]:
    """What both environments give over an episode from initial states 3 and 8, and the next."""
    rng = np.random.default_rng(1)
    for index, state in ((0, 3), (1, 8)):
        for _ in range(2):
            env.env_method("queue_episode", init_state_id=state, indices=index)
    rows: list[dict[str, Any]] = [dict(env.reset())]  # type: ignore[arg-type]
    for number in range(1, CHUNK_LIMIT + 2):
        observation, rewards, dones, infos = env.step(rng.uniform(-1, 1, (2, 3, 7)))
        assert [info["init_state_id"] for info in infos] == [3, 8]
        assert [info["n_steps"] for info in infos] == [3, 3]
        assert dones.tolist() == [number == CHUNK_LIMIT] * 2
        rows.append(dict(observation) | {"rewards": rewards})  # type: ignore[arg-type]
        if number == CHUNK_LIMIT:
            assert all(info["TimeLimit.truncated"] for info in infos)
            assert all(info["episode"]["l"] == CHUNK_LIMIT for info in infos)
    return rows


def test_sb3_environments_run_queued_episodes_alike_in_one_process_and_in_several(
    dummy: VecEnv,
) -> None:
    here = queued_episodes(dummy)
    for key in ("state", "base_0_rgb"):  # the same start, and so the same first observation
        np.testing.assert_array_equal(here[CHUNK_LIMIT][key], here[0][key])
    assert (here[0]["state"][0] != here[0]["state"][1]).any()
    with closing(two_envs(SubprocVecEnv)) as workers:
        for one, two in zip(here, queued_episodes(workers), strict=True):
            assert_same_arrays(one, two)


def test_ppo_with_multi_input_policy_completes_an_update() -> None:
    env = make_vec_env(
        "LiberoChunked-v0",
        n_envs=1,
        env_kwargs=SMALL | {"chunk_size": 5, "max_episode_steps": 20},
    )
    with closing(env):
        model = PPO("MultiInputPolicy", env, n_steps=8, batch_size=4, n_epochs=1, seed=0)
        before = {name: value.clone() for name, value in model.policy.state_dict().items()}
        model.learn(8)
        assert model.num_timesteps == 8
        assert len(model.ep_info_buffer) == 2  # 4 chunks of 5 steps each
        after = model.policy.state_dict()
        assert any((after[name] != value).any() for name, value in before.items())
        assert all(value.isfinite().all() for value in after.values())


# Rendering for people --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "steps"),
    [
        ("Libero-v0", SMALL | {"max_episode_steps": 6}, 6),
        ("LiberoChunked-v0", CHUNKED, CHUNK_LIMIT),
    ],
)
def test_record_video_writes_a_playable_file_with_a_frame_for_each_step(
    name: str, arguments: dict[str, Any], steps: int, tmp_path: Path
) -> None:
    folder = tmp_path / "videos"
    env: gym.Env = gym.make(name, render_mode="rgb_array", **arguments)
    with closing(RecordVideo(env, str(folder), episode_trigger=lambda _: True)) as env:
        env.reset(seed=0)
        truncated = False
        while not truncated:
            _, _, _, truncated, _ = env.step(env.action_space.sample())
    (file,) = folder.glob("*.mp4")
    frames = imageio.imread(file, plugin="FFMPEG")
    assert frames.shape == (steps + 1, 256, 256, 3)
    for frame in frames:
        assert frame.mean() > 20
        assert frame.std() > 20


def test_list_mode_collects_an_upright_frame_for_every_control_step_of_a_chunk() -> None:
    listed = SMALL | {"chunk_size": 4, "max_episode_steps": 6, "render_mode": "rgb_array_list"}
    with closing(gym.make("LiberoChunked-v0", **listed)) as env:
        start = {"init_state_id": 0}
        actions = np.random.default_rng(2).uniform(-1, 1, (2, 4, 7)).astype(np.float32)
        env.reset(options=start)
        assert len(env.render()) == 1
        env.step(actions[0])
        frames = env.render()
        assert len(frames) == 4
        assert env.render() == []
        env.step(actions[1])
        assert len(env.render()) == 2  # cut short by the limit

        # the same frames, drawn one at a time from the simulator
        env.reset(options=start)
        for frame, action in zip(frames, actions[0], strict=True):
            env.unwrapped.step(action)
            alone = env.unwrapped.simulator.frame()
            np.testing.assert_array_equal(frame, alone)
        # Upright, where the raw image (OpenGL: first row at the bottom) stands on its head.
        simulator = env.unwrapped.simulator
        (raw,) = simulator._render(simulator.data, ("agentview",), 256)
        np.testing.assert_array_equal(alone, np.flipud(raw))
