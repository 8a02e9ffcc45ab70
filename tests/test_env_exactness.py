"""The environment against LIBERO's own `OffScreenRenderEnv`: bit for bit, images included."""

import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from conftest import (
    HAS_PRO,
    INIT_STATE,
    SETTLE_STEPS,
    STEPS,
    Recorded,
    Reference,
    assert_same_arrays,
    downward_actions,
    libero_reference,
)
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from cfgrl_gym import ThreadVecEnv
from cfgrl_gym.demos.expert import ExpertUnavailableError, PickPlaceExpert
from cfgrl_gym.envs.fast_simulator import FastSimulator
from cfgrl_gym.envs.libero import LiberoEnv

CAMERAS = ("agentview_image", "robot0_eye_in_hand_image")
TASKS = [
    ("libero_spatial", 4),  # a bowl in a drawer
    ("libero_object", 0),
    ("libero_goal", 0),  # open a drawer
    ("libero_10", 2),  # a stove's knob and a pot
    ("libero_90", 38),
    *([("libero_goal_swap", 7)] if HAS_PRO else []),
]
LONG, SHORT = 300, 20  # control steps
EPISODE_STATE, PLACEMENT_SEED = 5, 7


# One task at every step, images included ----------------------------------------------------------


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoEnv]:
    with closing(LiberoEnv("libero_object", 0, image_size=128, settle_steps=SETTLE_STEPS)) as env:
        yield env


def liberos_keys(observation: dict[str, Any]) -> set[str]:
    """robosuite also gives concatenations of its keys ("object-state"), nothing else."""
    return {key for key in observation if not key.endswith("-state")}


def test_the_recorded_episode_has_contacts_and_changing_images(recorded: Recorded) -> None:
    assert max(recorded.contacts) >= recorded.contacts[0] + 3
    for camera in CAMERAS:
        first, last = recorded.observations[0][camera], recorded.observations[-1][camera]
        assert (first != last).mean() > 0.02


def test_states_success_and_every_observation_equal_liberos_at_every_step(
    env: LiberoEnv, recorded: Recorded
) -> None:
    observation, info = env.reset(options={"init_state_id": INIT_STATE})
    for step in range(STEPS + 1):
        if step:
            observation, _, _, _, info = env.step(recorded.actions[step - 1])
        np.testing.assert_array_equal(env.sim_state(), recorded.states[step], f"step {step}")
        assert info["success"] == recorded.successes[step]
        assert set(observation) == liberos_keys(recorded.observations[step])
        for key, given in observation.items():
            wanted = recorded.observations[step][key]
            np.testing.assert_array_equal(given, wanted, f"step {step}, {key}")


# A task of every suite, longer --------------------------------------------------------------------


@dataclass(frozen=True)
class LiberosEpisodes:
    """Three episodes in one LIBERO environment, 64-px images at the end of each."""

    suite: str
    task_id: int
    placed: Recorded  # where the sampler of a fresh build puts things
    pushing: Recorded  # random actions with a push downward
    expert: Recorded | None  # the scripted expert where it knows the goal, then pushing

    def environment(self, **arguments: Any) -> LiberoEnv:
        """Without settle steps, so that the first step from an initial state is compared too."""
        return LiberoEnv(self.suite, self.task_id, image_size=64, settle_steps=0, **arguments)


def expert_in(libero: Reference) -> PickPlaceExpert:
    env = libero.env.env
    model, data = env.sim.model._model, env.sim.data._data
    task = SimpleNamespace(name="")
    simulator = SimpleNamespace(robosuite_env=env, model=model, data=data, task=task)
    return PickPlaceExpert(cast(Any, simulator))


def expert_actions(libero: Reference) -> Iterator[np.ndarray]:
    """The expert's until LIBERO says success and the hand is off, then pushes."""
    expert = expert_in(libero)  # runs when the first action is asked for, after the reset
    left = 10
    while left:
        yield expert.act()
        left -= libero.env.check_success()
    yield from downward_actions(LONG)


@pytest.fixture(scope="module", params=TASKS, ids=[f"{suite}-{task}" for suite, task in TASKS])
def liberos(request: pytest.FixtureRequest) -> LiberosEpisodes:
    suite, task_id = request.param
    with libero_reference(suite, task_id, images=False, image_size=64) as libero:
        placed = libero.play(downward_actions(SHORT), SHORT, seed=PLACEMENT_SEED)
        state = libero.init_states[EPISODE_STATE]
        pushing = libero.play(downward_actions(LONG, task_id), LONG, init_state=state)
        try:
            expert_in(libero)
        except ExpertUnavailableError:
            expert = None
        else:
            expert = libero.play(expert_actions(libero), LONG, init_state=state)
    return LiberosEpisodes(suite, task_id, placed, pushing, expert)


def assert_plays_like(env: LiberoEnv, record: Recorded, init_state_id: int) -> None:
    """Every state, success and observation, and the images at the end."""
    env.reset(options={"init_state_id": init_state_id})
    simulator = env.simulator
    assert isinstance(simulator, FastSimulator)
    for name, places in zip(("body_pos", "body_quat"), record.places, strict=True):
        np.testing.assert_array_equal(getattr(simulator.model, name), places, name)
    for step, wanted in enumerate(record.observations):
        # Not env.step: the episode goes on after a success.
        success = simulator.advance(record.actions[step - 1]) if step else False
        np.testing.assert_array_equal(simulator.state(), record.states[step], f"step {step}")
        assert success == record.successes[step], f"step {step}"
        given = simulator.observe()
        assert {*given, *CAMERAS} == {*liberos_keys(wanted), *CAMERAS}
        for key, value in given.items():
            np.testing.assert_array_equal(value, wanted[key], f"step {step}, {key}")
    for key, image in simulator.images().items():
        assert image.shape == (64, 64, 3)
        assert image.tobytes() == record.observations[-1][key].tobytes(), key


def test_liberos_episodes_have_contacts_and_a_success(liberos: LiberosEpisodes) -> None:
    for record in (liberos.pushing, liberos.expert):
        if record is not None:
            assert len(record.actions) == LONG
            assert record.contacts[0] == 0
            assert np.count_nonzero(record.contacts) > 30
    assert max(liberos.pushing.contacts) >= 3
    if liberos.suite == "libero_object":
        assert liberos.expert is not None
        assert any(liberos.expert.successes)


def test_a_fresh_environment_equals_liberos_for_300_steps(liberos: LiberosEpisodes) -> None:
    with closing(liberos.environment()) as env:
        assert_plays_like(env, liberos.pushing, EPISODE_STATE)


def test_it_still_does_after_five_other_episodes(liberos: LiberosEpisodes) -> None:
    with closing(liberos.environment()) as env:
        for episode in range(5):
            env.reset(options={"init_state_id": 10 + episode})
            for action in downward_actions(30 + episode, seed=100 + episode):
                env.simulator.advance(action)
            env.simulator.images()
        assert_plays_like(env, liberos.pushing, EPISODE_STATE)
        if liberos.expert is not None:
            assert_plays_like(env, liberos.expert, EPISODE_STATE)


def test_random_placement_equals_a_fresh_libero_seeded_so(liberos: LiberosEpisodes) -> None:
    with closing(liberos.environment(init_states="random")) as env:
        env.reset(options={"init_state_id": 11})  # an earlier placement must leave no trace
        env.simulator.advance(downward_actions(1)[0])
        assert_plays_like(env, liberos.placed, PLACEMENT_SEED)


# Several environments -----------------------------------------------------------------------------

LIMITS = (5, 7)  # control steps of an episode in the first environment, and in the second
QUEUES = ((3, 7, 11), (5, 9))  # initial states
VEC_STEPS = 13  # the queues hold no more


def one_of_two(index: int) -> LiberoEnv:
    return LiberoEnv(
        "libero_goal", 0, image_size=32, max_episode_steps=LIMITS[index], settle_steps=2
    )


def vec_actions() -> np.ndarray:
    """float64 (steps, 2, 7)"""
    return np.stack([downward_actions(VEC_STEPS, seed) for seed in (1, 2)], axis=1)


@pytest.fixture(scope="module")
def alone() -> list[list[dict[str, np.ndarray]]]:
    """Each environment by itself: observations and state, the last ones of an episode too."""
    played: list[list[dict[str, np.ndarray]]] = []
    for index, queue in enumerate(QUEUES):
        rows = []
        with closing(one_of_two(index)) as env:
            for init_state_id in queue:
                env.queue_episode(0, init_state_id)
            observation, _ = env.reset()
            rows.append({**observation, "state": env.sim_state()})
            for action in vec_actions()[:, index]:
                observation, reward, terminated, truncated, _ = env.step(action)
                row = {"reward": np.float32(reward), "done": np.array(terminated or truncated)}
                if row["done"]:
                    row |= {f"last {key}": value for key, value in observation.items()}
                    observation, _ = env.reset()
                rows.append({**row, **observation, "state": env.sim_state()})
        played.append(rows)
    return played


@pytest.mark.parametrize(
    "vectorise",
    [partial(SubprocVecEnv, start_method="forkserver"), ThreadVecEnv],
    ids=["processes", "threads"],
)
def test_two_environments_at_once_equal_each_alone(
    vectorise: Any, alone: list[list[dict[str, np.ndarray]]]
) -> None:
    assert sum(bool(row.get("done")) for rows in alone for row in rows) == 3
    env: VecEnv
    with closing(vectorise([partial(one_of_two, index) for index in range(2)])) as env:
        for index, queue in enumerate(QUEUES):
            for init_state_id in queue:
                env.env_method("queue_episode", 0, init_state_id, indices=[index])
        extra: list[dict[str, Any]] = [{}, {}]
        observations = env.reset()
        for step in range(VEC_STEPS + 1):
            if step:
                observations, rewards, dones, infos = env.step(vec_actions()[step - 1])
                for index, info in enumerate(infos):
                    last = info.get("terminal_observation", {})
                    extra[index] = {"reward": rewards[index], "done": dones[index]}
                    extra[index] |= {f"last {key}": value for key, value in last.items()}
            states = env.env_method("sim_state")
            for index in range(2):
                given = {key: value[index] for key, value in observations.items()}
                given |= {**extra[index], "state": states[index]}
                assert_same_arrays(given, alone[index][step])


def checksums(model: Any) -> dict[str, int]:
    """Of every array of a `mujoco.MjModel`."""
    arrays = {}
    for prefix, owner in (("", model), ("opt.", model.opt), ("stat.", model.stat)):
        for name in dir(owner):
            value = getattr(owner, name)
            if isinstance(value, np.ndarray):
                arrays[prefix + name] = zlib.crc32(np.ascontiguousarray(value).view(np.uint8))
    return arrays


@pytest.mark.parametrize(("suite", "task_id"), [("libero_object", 0), ("libero_10", 2)])
def test_environments_of_a_task_share_one_model_that_stays_as_it_is(
    suite: str, task_id: int
) -> None:
    with (
        closing(LiberoEnv(suite, task_id, image_size=16, settle_steps=2)) as one,
        closing(LiberoEnv(suite, task_id, image_size=16, settle_steps=2)) as two,
    ):
        one.reset(options={"init_state_id": 0})
        model = one.simulator.model
        before = checksums(model)
        assert len(before) > 300
        for episode in range(3):
            for env in (one, two):
                env.reset(options={"init_state_id": 2 * episode + (env is two)})
                assert env.simulator.model is model
                env.skip_observations = True  # steps without images are quick
            for action in downward_actions(60, seed=episode):
                one.step(action)
                two.step(-action)
        after = checksums(model)
        changed = {name for name in before if before[name] != after[name]}
        # An environment's own colours are in the model while its images are drawn.
        assert changed <= {"geom_rgba", "site_rgba"}
