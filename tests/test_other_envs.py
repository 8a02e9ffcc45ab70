"""The comparison outside LIBERO: its tasks, its starts, and that it takes up where it stopped."""

import json
import sys
from pathlib import Path

import numpy as np
import other_envs
import pytest
import torch
from methods import METHODS, Method
from other_envs import ELSEWHERE, options_of, summary
from small_tasks import TASKS, UprightAtTheEnd, demonstrations, make_envs, make_pendulum

from cfgrl_gym.algorithms.evaluation import wilson_interval


def run_script(folder: Path, *arguments: str) -> list[dict]:
    sys.argv = ["other_envs.py", "--results", str(folder), "--tasks", "bandit", *arguments]
    other_envs.main()
    return json.loads((folder / "other_envs.json").read_text())["runs"]


def test_a_stopped_study_goes_on_and_every_method_has_the_same_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    run = other_envs.run

    def spy(cell: dict, method: Method) -> dict:
        ran.append((cell["method"], cell["seed"]))
        return run(cell, method)

    monkeypatch.setattr(other_envs, "run", spy)
    run_script(tmp_path, "--small", "--methods", "DiffusionNFT")
    rows = run_script(tmp_path, "--small")
    assert sorted(ran) == sorted((name, 0) for name in ELSEWHERE)  # each once
    assert {row["method"]: row["options"] for row in rows} == {
        name: options_of("bandit", method) for name, method in ELSEWHERE.items()
    }
    budgets = {json.dumps([row["iterations"][-1][key] for key in COUNTS]) for row in rows}
    assert budgets == {json.dumps([512, 96])}  # 64 groups of 8; 12 epochs of 512 / 64 steps
    assert len({json.dumps(row["before"]) for row in rows}) == 1
    # The first episodes are those of the start, whoever collects them.
    assert len({row["iterations"][0]["mean_return"] for row in rows}) == 1
    scales = {row["method"]: [result["cfg_scale"] for result in row["after"]] for row in rows}
    assert scales == {name: list(method.scales) for name, method in ELSEWHERE.items()}


COUNTS = ("episodes", "optimizer_steps")


def test_a_training_whose_options_have_changed_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_script(tmp_path, "--small", "--methods", "CFGRL")
    monkeypatch.setitem(METHODS, "CFGRL", Method(options={"n_epochs": 1}))
    rows = run_script(tmp_path, "--small", "--methods", "CFGRL")
    assert [row["iterations"][0]["optimizer_steps"] for row in rows] == [96, 8]


def test_the_summary_pools_seeds_and_counts_a_shared_start_once() -> None:
    def row(method: str, seed: int, successes: int) -> dict:
        before = {"cfg_scale": 0.0, "successes": 1, "n_episodes": 10, "mean_return": -2.0}
        after = {**before, "successes": successes, "mean_return": float(successes)}
        return {
            "task": "bandit",
            "n_iterations": 2,
            "options": {},
            "method": method,
            "seed": seed,
            "before": before,
            "after": [after],
        }

    rows = [row("CFGRL", 0, 4), row("CFGRL", 1, 8), row("FilteredBC", 0, 5)]
    found = {row["method"]: row for row in summary(rows)}
    assert found["start"]["success_rate"] == 2 / 20
    assert found["CFGRL"]["success_rate"] == 12 / 20
    assert found["CFGRL"]["interval"] == wilson_interval(12, 20)
    assert found["CFGRL"]["success_rate_of_seeds"] == [0.4, 0.8]
    assert found["CFGRL"]["mean_return"] == 6.0
    assert found["FilteredBC"]["seeds"] == [0]


def test_the_pendulum_succeeds_if_it_stays_upright() -> None:
    env = make_pendulum(0)
    assert isinstance(env, UprightAtTheEnd)
    successes = []
    for push in (0.0, 2.0):  # on top it stays; pushed, it falls
        env.reset(seed=0)
        env.unwrapped.state = np.array([0.0, 0.0])  # type: ignore[attr-defined]
        truncated = False
        while not truncated:
            *_, truncated, info = env.step(np.array([push]))
        successes.append(info["is_success"])
    assert successes == [True, False]


def test_a_task_s_observations_are_normalised_and_its_actions_are_chunks() -> None:
    pytest.importorskip("gymnasium_robotics")
    for name, width in (("pendulum", 3), ("reach", 16)):
        env = make_envs(name)
        observations = env.reset()
        assert observations.shape == (TASKS[name].n_envs, width)
        assert np.abs(observations).max() < 10
        seen, actions = (np.concatenate(each) for each in demonstrations(name))
        assert len(seen) == len(actions)
        assert env.action_space.shape == (5, actions.shape[1])


def test_without_gymnasium_robotics_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    with pytest.raises(ImportError, match=r"pip install 'cfgrl-gym\[benchmarks\]'"):
        TASKS["reach"].make(0)


@pytest.fixture(autouse=True)
def restored_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` reads the command line and sets the number of threads."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    other_envs.start_of.cache_clear()
