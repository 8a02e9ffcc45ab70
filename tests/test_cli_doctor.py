"""`cfgrl doctor`: right about this machine, and unshaken by what it tries."""

import importlib.metadata
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cfgrl_gym.cli import main
from cfgrl_gym.cli.doctor import check
from cfgrl_gym.cli.doctor_checks import CHECKS, find
from cfgrl_gym.envs import exactness
from cfgrl_gym.envs.control_loop import SamplingClock
from cfgrl_gym.envs.exactness import Difference, ExactnessReport, compare, first_difference, play
from cfgrl_gym.envs.fast_simulator import FastSimulator
from cfgrl_gym.envs.plain_simulator import PlainSimulator
from cfgrl_gym.envs.suites import load_init_states, select_tasks
from cfgrl_gym.envs.upstream import UnknownUpstreamError


def test_all_is_well_where_the_tests_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert [entry["name"] for entry in report["checks"]] == list(CHECKS)
    assert all(entry["ok"] and entry["detail"] for entry in report["checks"])


def test_a_problem_is_named_with_its_fix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MUJOCO_GL", "bogus")
    monkeypatch.setattr("cfgrl_gym.cli.doctor.CHECKS", {"python": None, "rendering": None})
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok ")
    assert lines[1].startswith("problem  rendering")
    assert "bogus" in lines[1]
    assert "fix:" in lines[2]
    assert lines[-1] == "1 of 2 checks found a problem"


@pytest.mark.parametrize(
    ("script", "said"),
    [("kill -SEGV $$", "signal 11"), ("echo dead >&2; exit 3", "status 3: dead"), ("true", "0")],
)
def test_a_check_that_dies_is_reported(
    script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    diagnosis = check("rendering")
    assert not diagnosis.ok
    assert said in diagnosis.detail
    assert diagnosis.fix


def test_a_check_that_cannot_start_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    assert not check("disk").ok


def test_a_simulator_that_libero_excludes_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """MuJoCo 4, which pip takes where it is asked for after LIBERO."""
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "4.0.0" if name == "mujoco" else version(name)
    )
    finding = find("libero")
    assert not finding.ok
    assert "mujoco 4.0.0" in finding.detail
    assert re.fullmatch(r"pip install 'mujoco\S*<[34]\S*'", finding.fix)


# Exactness ----------------------------------------------------------------------------------------

ACTIONS = exactness.downward_actions(6)
PICTURED = {0, 6}
Patch = pytest.MonkeyPatch


def test_the_simulator_is_held_against_liberos(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cfgrl_gym.cli.doctor.CHECKS", {})
    suites = {"libero_object": 0, "libero_nowhere": 0}
    monkeypatch.setattr("cfgrl_gym.cli.doctor.EXACTNESS_TASKS", suites)
    assert main(["doctor", "--exactness", "--json"]) == 0
    compared, missing = json.loads(capsys.readouterr().out)["checks"]
    assert compared["name"] == "exactness:libero_object"
    assert compared["detail"].startswith("equal bit for bit: task 0, 200 steps, again after 2 ")
    assert "36 observations at each step, 12 images, up to " in compared["detail"]
    assert "up to 0 contacts" not in compared["detail"]
    assert missing["ok"]
    assert missing["detail"].startswith("not compared: ")


def test_a_difference_is_a_problem_with_its_place_and_a_fix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for key, remedy in (("qvel", "compiled models"), ("agentview_image", "MUJOCO_GL=osmesa")):
        report = ExactnessReport(200, 2, 36, 12, 9, Difference("later", 41, key, 0.00125))
        monkeypatch.setattr(exactness, "compare", lambda *_, report=report, **__: report)
        finding = find("exactness:libero_goal")
        assert not finding.ok
        wanted = f"{key} differs by up to 0.0013 from LIBERO's at step 41 of the later episode"
        assert finding.detail.startswith(wanted)
        assert remedy in finding.fix


def test_liberos_own_speed_is_no_problem_but_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> None:
        raise UnknownUpstreamError("robosuite has another MjSim.step")

    monkeypatch.setattr(exactness, "compare", unknown)
    finding = find("exactness:libero_goal")
    assert finding.ok
    assert "LIBERO's own, at its own speed" in finding.detail
    assert "robosuite has another MjSim.step" in finding.detail


@pytest.fixture(scope="module")
def liberos() -> list[exactness.Moment]:
    with closing(PlainSimulator(select_tasks("libero_object", 0)[0], 32)) as plain:
        return list(play(plain, load_init_states("libero_object", 0)[0], ACTIONS, PICTURED))


@pytest.fixture(scope="module")
def built() -> Iterator[FastSimulator]:
    with closing(FastSimulator(select_tasks("libero_object", 0)[0], 32)) as fast:
        yield fast


def nothing(fast: FastSimulator, patch: Patch) -> None:
    pass


def gain_one_bit_up(fast: FastSimulator, patch: Patch) -> None:
    reset = fast.robosuite_env.robots[0].reset

    def wrong(**arguments: Any) -> None:
        reset(**arguments)
        controller = fast.robosuite_env.robots[0].controller
        controller.kp = np.nextafter(controller.kp, np.inf)

    patch.setattr(fast.robosuite_env.robots[0], "reset", wrong)


def quicker_gripper(fast: FastSimulator, patch: Patch) -> None:
    gripper = fast.robosuite_env.robots[0].gripper
    patch.setattr(gripper, "__class__", type("Quick", (type(gripper),), {"speed": 0.011}))


def observed_one_substep_early(fast: FastSimulator, patch: Patch) -> None:
    right = SamplingClock.control_step
    patch.setattr(SamplingClock, "control_step", lambda clock, count: right(clock, count) - 1)


def success_at_once(fast: FastSimulator, patch: Patch) -> None:
    patch.setattr(fast.robosuite_env, "_check_success", lambda: True)


def one_pixel_brighter(fast: FastSimulator, patch: Patch) -> None:
    right = fast.images

    def wrong() -> dict[str, np.ndarray]:
        images = {key: image.copy() for key, image in right().items()}
        images["robot0_eye_in_hand_image"][3, 5, 1] ^= 1
        return images

    patch.setattr(fast, "images", wrong)


def no_joint_velocities(fast: FastSimulator, patch: Patch) -> None:
    right = fast.observe

    def wrong() -> dict[str, np.ndarray]:
        return {key: value for key, value in right().items() if key != "robot0_joint_vel"}

    patch.setattr(fast, "observe", wrong)


@pytest.mark.parametrize(
    ("sabotage", "keys", "least", "most"),
    [
        (nothing, None, 0, 0),
        (gain_one_bit_up, ("qpos", "qvel"), 1e-20, 1e-6),
        (quicker_gripper, ("qpos",), 1e-6, 1e-2),
        (observed_one_substep_early, ("robot0_joint_pos",), 1e-6, 1e-2),
        (success_at_once, ("success",), 1, 1),
        (one_pixel_brighter, ("robot0_eye_in_hand_image",), 1, 1),
        (no_joint_velocities, ("robot0_joint_vel",), np.inf, np.inf),
    ],
)
def test_the_comparison_finds_what_is_wrong(
    sabotage: Callable[[FastSimulator, Patch], None],
    keys: tuple[str, ...] | None,
    least: float,
    most: float,
    liberos: list[exactness.Moment],
    built: FastSimulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sabotage(built, monkeypatch)
    state = load_init_states("libero_object", 0)[0]
    difference = first_difference(liberos, play(built, state, ACTIONS, PICTURED), "first")
    if keys is None:
        assert difference is None
        return
    assert difference is not None
    assert difference.key in keys
    assert least <= difference.size <= most
    assert difference.step <= 1


def test_a_trace_that_earlier_episodes_leave_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = FastSimulator.reset
    resets = []

    def leaking(fast: FastSimulator, seed: int, init_state: np.ndarray | None) -> None:
        right(fast, seed, init_state)
        resets.append(init_state)
        if init_state is not None and sum(state is not None for state in resets) > 2:
            fast.data.qvel[0] += 1e-12

    monkeypatch.setattr(FastSimulator, "reset", leaking)
    report = compare(select_tasks("libero_object", 0)[0], ACTIONS, others=1, image_size=32)
    assert report.difference is not None
    assert (report.difference.episode, report.difference.step) == ("later", 0)
    assert report.difference.key == "qvel"
    assert report.difference.size == pytest.approx(1e-12)
    assert (report.steps, report.others, report.images) == (6, 1, 12)
    with pytest.raises(ValueError, match=r"\(steps, 7\)"):
        compare(select_tasks("libero_object", 0)[0], ACTIONS[:, :6])
