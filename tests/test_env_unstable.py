"""Physics that blow up end their episode, say so, and leave no trace in the next one."""

import re
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from conftest import SETTLE, assert_same_arrays, downward_actions
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.vec_env import DummyVecEnv

from cfgrl_gym import CFGRL
from cfgrl_gym.envs import fast_simulator, libero
from cfgrl_gym.envs.fast_simulator import FastSimulator
from cfgrl_gym.envs.libero import LiberoEnv
from cfgrl_gym.envs.plain_simulator import PlainSimulator
from cfgrl_gym.envs.suites import load_init_states
from cfgrl_gym.envs.upstream import UnknownUpstreamError

SMALL: dict[str, Any] = {"image_size": 16, "settle_steps": 0}
CAN = "alphabet_soup_1_joint0"
START, STEPS = 6, 24
Fault = Callable[[Any], None]


def nan_velocities(data: Any) -> None:
    data.qvel[:] = np.nan


def nan_joint(data: Any) -> None:
    data.qpos[0] = np.nan  # of the arm, which the controller reads


def nan_object(data: Any) -> None:
    data.joint(CAN).qpos[:] = np.nan


def diverging(data: Any) -> None:
    data.qvel[:] = 1e9


def endless_force(data: Any) -> None:
    data.joint(CAN).qfrc_applied[:] = np.inf


def thrown(data: Any) -> None:
    data.joint(CAN).qpos[0] = 1e3


FAULTS: list[tuple[Fault, str]] = [
    (nan_velocities, r"MuJoCo met NaN.* qvel\[0\]"),
    (nan_joint, r"MuJoCo met NaN.* qpos\[0\]"),
    (nan_object, r"MuJoCo met NaN.* qpos\["),
    (diverging, r"huge number in qacc\["),
    (endless_force, r"infinity or a huge number in qacc\["),
    (thrown, f"'{CAN}' is at .* more than 20 m away"),
]


def played(env: LiberoEnv) -> Iterator[dict[str, np.ndarray]]:
    """State and observation after the reset and every step; images after the reset and the last."""
    observation, info = env.reset(options={"init_state_id": START})
    yield observation | {"state": env.sim_state()}
    for number, action in enumerate(downward_actions(STEPS), 1):
        env.skip_observations = number < STEPS
        observation, *_, info = env.step(action)
        assert info["unstable"] is False
        assert "unstable_reason" not in info
        seen = env.simulator.observe() if env.skip_observations else observation
        yield seen | {"state": env.sim_state()}


def assert_plays_as(env: LiberoEnv, fresh: list[dict[str, np.ndarray]]) -> None:
    for given, wanted in zip(played(env), fresh, strict=True):
        assert_same_arrays(given, wanted)


def blow_up(env: LiberoEnv, fault: Fault, reason: str) -> None:
    """Into an episode, with a fault of the physics, and out of it again."""
    env.reset(options={"init_state_id": 2})
    for action in downward_actions(2, seed=1):
        sound, *_ = env.step(action)
    fault(env.simulator.data)
    observation, reward, terminated, truncated, info = env.step(np.full(7, 0.5))
    assert (reward, terminated, truncated) == (0.0, False, True)
    assert info["success"] is info["is_success"] is False
    assert info["unstable"] is True
    assert re.search(reason, info["unstable_reason"])
    assert observation in env.observation_space
    assert_same_arrays(observation, sound)
    with pytest.raises(ResetNeeded):
        env.step(SETTLE)


@pytest.fixture(scope="module")
def fresh() -> list[dict[str, np.ndarray]]:
    """The first episode of an environment in which nothing ever went wrong."""
    with closing(LiberoEnv(**SMALL)) as env:
        return list(played(env))


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoEnv]:
    with closing(LiberoEnv(**SMALL, render_mode="rgb_array")) as env:
        yield env


@pytest.mark.parametrize(
    ("fault", "reason"), FAULTS, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_blow_up_ends_the_episode_and_the_next_is_a_fresh_environments(
    env: LiberoEnv,
    fresh: list[dict[str, np.ndarray]],
    fault: Fault,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    blow_up(env, fault, reason)
    assert isinstance(env.simulator, FastSimulator)
    assert env.render().shape == (256, 256, 3)
    if hasattr(mujoco, "MjLogConfig"):
        assert not list(tmp_path.iterdir())  # MuJoCo's own log, for example
    assert_plays_as(env, fresh)


def test_several_blow_ups_in_a_row_leave_no_trace(
    env: LiberoEnv, fresh: list[dict[str, np.ndarray]]
) -> None:
    for fault, reason in FAULTS[::-1]:
        blow_up(env, fault, reason)
    assert_plays_as(env, fresh)


def test_liberos_own_simulation_ends_and_recovers_alike(
    fresh: list[dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: Any) -> None:
        raise UnknownUpstreamError("changed for a test")

    monkeypatch.setattr(fast_simulator, "check_upstream", unknown)
    monkeypatch.setattr(fast_simulator, "_warned", True)
    with closing(LiberoEnv(**SMALL)) as env:
        # Here robosuite reads the NaN of a joint before MuJoCo can: its linear algebra raises.
        raising = (nan_joint, r"position of joint 'robot0_joint1' is \[nan\] \(LinAlgError: ")
        for fault, reason in (raising, FAULTS[3]):
            blow_up(env, fault, reason)
        assert isinstance(env.simulator, PlainSimulator)
        assert_plays_as(env, fresh)


def test_a_chunk_ends_where_the_physics_do() -> None:
    with closing(gym.make("LiberoChunked-v0", chunk_size=8, **SMALL)) as env:
        env.reset(options={"init_state_id": START})
        chunk = np.zeros((8, 7), np.float32)
        sound, *_, info = env.step(chunk)
        assert (info["unstable"], info["n_steps"]) == (False, 8)
        # Up and away: nothing that MuJoCo would warn of.
        env.unwrapped.simulator.data.joint(CAN).qvel[2] = 600  # type: ignore[attr-defined]
        observation, reward, terminated, truncated, info = env.step(chunk)
        assert (reward, terminated, truncated) == (0.0, False, True)
        assert (info["unstable"], info["is_success"], info["n_steps"]) == (True, False, 2)
        assert info["dones"].tolist() == [False, True]
        assert "more than 20 m" in info["unstable_reason"]
        assert observation in env.observation_space
        assert_same_arrays(observation, sound)
        env.reset(options={"init_state_id": START})
        assert env.step(chunk)[4]["unstable"] is False


def test_what_falls_or_is_knocked_far_away_is_no_blow_up(env: LiberoEnv) -> None:
    env.reset(options={"init_state_id": START})
    can = env.simulator.data.joint(CAN)
    env.skip_observations = True
    for place in ([2.0, 2.0, 3.0], [-15.0, 15.0, 1.0]):
        can.qpos[:3] = place
        for _ in range(25):
            *_, truncated, info = env.step(SETTLE)
            assert (truncated, info["unstable"]) == (False, False)
        assert can.qpos[2] < 0.1  # on the floor
    env.skip_observations = False


def test_a_joint_can_be_too_fast_before_mujoco_complains(env: LiberoEnv) -> None:
    env.reset(options={"init_state_id": START})
    data = env.simulator.data
    for speed in (1e3, -1e3):
        data.joint("robot0_joint3").qvel = speed
        assert env.simulator.fault() is None
    for speed in (1e5, -1e5, np.nan):
        data.joint("robot0_joint3").qvel = speed
        assert "'robot0_joint3'" in str(env.simulator.fault())


def test_buffers_that_were_full_are_no_blow_up(env: LiberoEnv) -> None:
    env.reset(options={"init_state_id": START})
    for kind in (mujoco.mjtWarning.mjWARN_CONTACTFULL, mujoco.mjtWarning.mjWARN_CNSTRFULL):
        env.simulator.data.warning[kind].number = 3
    assert env.step(SETTLE)[4]["unstable"] is False


def test_poses_that_are_not_numbers_can_be_drawn(env: LiberoEnv) -> None:
    env.reset(options={"init_state_id": START})
    simulator = env.simulator
    simulator.data.qpos[:] = np.nan
    mujoco.mj_kinematics(simulator.model, simulator.data)
    mujoco.mj_camlight(simulator.model, simulator.data)
    assert np.isnan(simulator.data.geom_xpos).any()
    assert env.render().shape == (256, 256, 3)


# The arm at 1e3 rad/s is only too fast when it moves: in the settle steps.
@pytest.mark.parametrize(
    ("index", "value", "steps"), [(1, np.nan, 0), (10, 1e3, 0), (-1, 1e9, 0), (59, 1e3, 1)]
)
def test_a_start_that_blows_up_is_refused_by_name(
    env: LiberoEnv,
    fresh: list[dict[str, np.ndarray]],
    monkeypatch: pytest.MonkeyPatch,
    index: int,
    value: float,
    steps: int,
) -> None:
    states = load_init_states("libero_object", 0).copy()
    states[3, index] = value
    monkeypatch.setattr(libero, "load_init_states", lambda *_: states)
    env.reset(options={"init_state_id": START})
    monkeypatch.setattr(env, "settle_steps", steps)
    message = r"libero_object task 0 .*benchmark state 3: its physics blow up .* settle steps: "
    with pytest.raises(RuntimeError, match=message):
        env.reset(options={"init_state_id": 3})
    monkeypatch.undo()
    with pytest.raises(ResetNeeded):
        env.step(SETTLE)
    assert_plays_as(env, fresh)


class Fragile(gym.Wrapper[Any, Any, Any, Any]):
    """The hand's position alone; the physics of the second episode blow up in its second step."""

    def __init__(self, env: LiberoEnv) -> None:
        super().__init__(env)
        self.observation_space = spaces.Box(-10, 10, (3,), np.float32)
        self.episode = self.steps = 0

    def reset(self, **arguments: Any) -> tuple[np.ndarray, dict[str, Any]]:
        self.episode, self.steps = self.episode + 1, 0
        observation, info = self.env.reset(**arguments)
        return observation["robot0_eef_pos"].astype(np.float32), info

    def step(self, action: Any) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        self.steps += 1
        if (self.episode, self.steps) == (2, 2):
            nan_velocities(self.unwrapped.simulator.data)  # type: ignore[attr-defined]
        observation, *rest = self.env.step(action)
        return observation["robot0_eef_pos"].astype(np.float32), *rest


class Log(KVWriter):
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: Any, key_excluded: Any, step: int = 0) -> None:
        self.rows.append(dict(key_values))


def test_a_training_counts_the_episode_as_a_failure_and_reports_it() -> None:
    made = LiberoEnv(**SMALL, cameras=["agentview"], max_episode_steps=4)
    with closing(DummyVecEnv([lambda: Fragile(made)])) as env:
        algorithm = CFGRL(
            "MlpPolicy", env, rloo_batch_size=2, groups_per_iteration=1, batch_size=4, seed=0,
            enable_dynamic_sampling=False,
            device="cpu", policy_kwargs={"net_arch": [8]},
        )  # fmt: skip
        log = Log()
        algorithm.set_logger(Logger(folder=None, output_formats=[log]))
        algorithm.learn(max_iterations=2, total_timesteps=10**6)
    assert [row["rollout/unstable_episodes"] for row in log.rows] == [1, 0]
    assert [row["rollout/success_rate"] for row in log.rows] == [0, 0]
    assert log.rows[0]["rollout/control_steps"] == 4 + 2
