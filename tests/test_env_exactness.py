"""The environment against LIBERO's own `OffScreenRenderEnv`: bit for bit, images included."""

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
from conftest import (
    INIT_STATE,
    SETTLE_STEPS,
    STEPS,
    Recorded,
    downward_actions,
    libero_reference,
)

from cfgrl_gym.envs.libero import LiberoEnv

CAMERAS = ("agentview_image", "robot0_eye_in_hand_image")


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoEnv]:
    with closing(LiberoEnv("libero_object", 0, image_size=128, settle_steps=SETTLE_STEPS)) as env:
        yield env


def assert_equals_recorded(env: LiberoEnv, recorded: Recorded) -> None:
    observation, info = env.reset(options={"init_state_id": INIT_STATE})
    for step in range(STEPS + 1):
        if step:
            observation, _, _, _, info = env.step(downward_actions(STEPS)[step - 1])
        np.testing.assert_array_equal(env.sim_state(), recorded.states[step], f"step {step}")
        assert info["success"] == recorded.successes[step]
        # robosuite also gives concatenations of its keys ("object-state"), nothing else
        theirs = {key for key in recorded.observations[step] if not key.endswith("-state")}
        assert set(observation) == theirs
        for key in theirs:
            given, wanted = observation[key], recorded.observations[step][key]
            np.testing.assert_array_equal(given, wanted, f"step {step}, {key}")


def test_the_recorded_episode_has_contacts_and_changing_images(recorded: Recorded) -> None:
    assert max(recorded.contacts) > recorded.contacts[0] + 3
    for camera in CAMERAS:
        first, last = recorded.observations[0][camera], recorded.observations[-1][camera]
        assert (first != last).mean() > 0.02


def test_states_success_and_every_observation_equal_liberos_at_every_step(
    env: LiberoEnv, recorded: Recorded
) -> None:
    assert_equals_recorded(env, recorded)


def test_an_episode_after_three_others_still_equals_liberos_fresh_environment(
    env: LiberoEnv, recorded: Recorded
) -> None:
    for episode in range(3):
        env.reset(options={"init_state_id": 10 + episode})
        env.skip_observations = True
        for action in downward_actions(30, seed=episode + 1):
            env.step(action)
        env.skip_observations = False
    assert_equals_recorded(env, recorded)


@pytest.mark.parametrize(
    ("suite", "task_id"),
    [
        ("libero_spatial", 4),  # a bowl in a drawer
        ("libero_goal", 0),  # open a drawer
        ("libero_10", 2),  # a stove's knob and a pot
        ("libero_90", 38),
        ("libero_goal_swap", 7),  # LIBERO-PRO
    ],
)
def test_physics_placement_and_fixtures_equal_liberos(suite: str, task_id: int) -> None:
    actions = downward_actions(60, seed=task_id)
    with (
        libero_reference(suite, task_id, images=False) as libero,
        closing(LiberoEnv(suite, task_id, image_size=16, settle_steps=0)) as env,
    ):
        env.reset(options={"init_state_id": 1})  # an episode before, which must leave no trace
        env.skip_observations = True
        for action in -actions[:10]:
            env.step(action)

        wanted = libero.start(init_state=libero.init_states[5])
        observation, _ = env.reset(options={"init_state_id": 5})
        model = libero.env.sim.model
        for name in ("body_pos", "body_quat"):
            np.testing.assert_array_equal(
                getattr(env.simulator.model, name), getattr(model, name), name
            )
        for step in range(len(actions) + 1):
            if step:
                wanted, _, done, _ = libero.env.step(actions[step - 1])
                observation, _, success, _, _ = env.step(actions[step - 1])
                assert success == done
            np.testing.assert_array_equal(env.sim_state(), libero.env.get_sim_state(), f"{step}")
            compared = [key for key in observation if key not in CAMERAS]
            assert len(compared) > 10
            for key in compared:
                np.testing.assert_array_equal(observation[key], wanted[key], f"{step}, {key}")


@pytest.mark.parametrize(("suite", "task_id"), [("libero_spatial", 4), ("libero_goal", 0)])
def test_random_placement_equals_a_fresh_libero_seeded_so(suite: str, task_id: int) -> None:
    with (
        libero_reference(suite, task_id, images=False) as libero,
        closing(LiberoEnv(suite, task_id, 16, settle_steps=0, init_states="random")) as env,
    ):
        libero.start(seed=7)
        for seed in (11, 7):  # an earlier placement must leave no trace
            env.reset(options={"init_state_id": seed})
        np.testing.assert_array_equal(env.sim_state(), libero.env.get_sim_state())
        np.testing.assert_array_equal(env.simulator.model.body_pos, libero.env.sim.model.body_pos)
