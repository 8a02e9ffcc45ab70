"""Where the fast simulator can't be sure to be exact, LIBERO itself is used, and says so once."""

import warnings
from collections.abc import Iterator
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import assert_same_arrays, downward_actions

from cfgrl_gym.envs import fast_simulator, upstream
from cfgrl_gym.envs.control_loop import ControlLoop
from cfgrl_gym.envs.fast_simulator import FastSimulator, build_simulator
from cfgrl_gym.envs.installation import import_libero
from cfgrl_gym.envs.libero import LiberoEnv
from cfgrl_gym.envs.plain_simulator import PlainSimulator
from cfgrl_gym.envs.suites import select_tasks
from cfgrl_gym.envs.upstream import UnknownUpstreamError

TASK = select_tasks("libero_object", 0)[0]


@pytest.fixture(autouse=True)
def _not_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_simulator, "_warned", False)


def played(env: LiberoEnv) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """State and observation of an episode's first steps, of the second episode."""
    env.reset(options={"init_state_id": 1})
    observation, _ = env.reset(options={"init_state_id": 4})
    yield env.sim_state(), observation
    for action in downward_actions(4):
        observation, *_ = env.step(action)
        yield env.sim_state(), observation


def test_a_changed_robosuite_means_liberos_own_speed_and_the_same_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import_libero("envs.env_wrapper")
    from robosuite.models.grippers.panda_gripper import PandaGripper

    original = PandaGripper.format_action

    def format_action(self: Any, action: Any) -> Any:  # the same, but who could tell
        return original(self, action)

    with closing(LiberoEnv(image_size=32, settle_steps=1)) as env:
        fast = list(played(env))
        assert isinstance(env.simulator, FastSimulator)
    monkeypatch.setattr(PandaGripper, "format_action", format_action)
    with closing(LiberoEnv(image_size=32, settle_steps=1)) as env:
        with pytest.warns(UserWarning, match=r"own speed: .*PandaGripper\.format_action"):
            plain = list(played(env))
        assert isinstance(env.simulator, PlainSimulator)
        assert env.simulator.frame().shape == (256, 256, 3)
    for (state, observation), (other_state, other) in zip(fast, plain, strict=True):
        np.testing.assert_array_equal(state, other_state)
        assert_same_arrays(observation, other)


@pytest.mark.parametrize(
    ("data", "model"), [({}, {"M_rowadr": 0}), ({"M": 0}, {})], ids=["3.3.3", "3.3.5"]
)
def test_a_mujoco_without_what_the_control_loop_reads_is_noticed(
    data: dict[str, int], model: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {name: digests[0] for name, digests in upstream.KNOWN.items()}
    monkeypatch.setattr(upstream, "digests", lambda *_: known)
    sim = SimpleNamespace(
        data=SimpleNamespace(_data=SimpleNamespace(**data)),
        model=SimpleNamespace(_model=SimpleNamespace(**model)),
    )
    with pytest.raises(UnknownUpstreamError, match="MuJoCo is older"):
        upstream.check_upstream(SimpleNamespace(sim=sim), object)


def test_another_controller_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    import_libero("envs.env_wrapper")
    from robosuite.controllers.osc import OperationalSpaceController

    original = OperationalSpaceController.__init__

    def initialize(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs | {"uncouple_pos_ori": False})

    monkeypatch.setattr(OperationalSpaceController, "__init__", initialize)
    with pytest.raises(UnknownUpstreamError, match="uncoupling is False"):
        FastSimulator(TASK, 16)


def test_a_machine_that_rounds_otherwise_is_noticed_and_the_warning_comes_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = ControlLoop.advance

    def advance(self: ControlLoop, action: np.ndarray) -> bool:
        return original(self, action * (1 + 1e-15))

    monkeypatch.setattr(ControlLoop, "advance", advance)
    monkeypatch.setattr(FastSimulator, "_checked", False)
    with pytest.raises(UnknownUpstreamError, match="different results on this machine"):
        FastSimulator(TASK, 16)
    made = []
    monkeypatch.setattr(fast_simulator, "PlainSimulator", lambda *args: made.append(args))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build_simulator(TASK, 16)
        build_simulator(TASK, 16)
    assert len(made) == 2
    assert len([w for w in caught if "own speed" in str(w.message)]) == 1
