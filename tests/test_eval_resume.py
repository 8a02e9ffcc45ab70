"""`cfgrl eval`: killed, interrupted and taken up again, as processes of their own."""

import json
import os
import signal
from pathlib import Path

import pytest
from cfgrl_processes import cfgrl, wait_until

from cfgrl_gym.algorithms.evaluation import EpisodeOutcome
from cfgrl_gym.cli.outcome_log import OutcomeLog

EVAL = (
    "eval --policy libero_tiny --task_id [5,8] --episodes 4 --n_envs 2 --max_episode_steps 48 "
    "--num_inference_steps 2 --cfg_scale [0,2] --video false --seed 3"
)
OUTCOME = EpisodeOutcome(8, 3, True, 1.0, 96, False, 0.25)


def lines(run: Path) -> list[str]:
    file = run / "episodes.jsonl"
    return file.read_text().splitlines() if file.is_file() else []


def test_an_evaluation_that_is_interrupted_twice_equals_an_uninterrupted_one(
    tmp_path: Path,
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = cfgrl(*EVAL.split(), "--out", str(whole))
    assert done.wait(300) == 0, done.communicate()

    first = cfgrl(*EVAL.split(), "--out", str(parts))
    wait_until(lambda: len(lines(parts)) >= 1 + 3, first)
    first.kill()
    first.wait()
    with (parts / "episodes.jsonl").open("a") as file:
        file.write('{"cfg_scale": 0.0, "ind')  # as a kill in the middle of a write leaves it

    second = cfgrl("eval", "--resume", str(parts), start_new_session=True)
    wait_until(lambda: len(lines(parts)) >= 1 + 9, second)  # in the second cfg_scale
    os.killpg(second.pid, signal.SIGINT)
    assert second.wait(120) == 128 + signal.SIGINT
    said = second.communicate()[1]
    assert f"go on with: cfgrl eval --resume {parts}" in said
    assert "Traceback" not in said
    before = lines(parts)

    last = cfgrl("eval", "--resume", str(parts))
    assert last.wait(300) == 0, last.communicate()
    assert lines(parts)[: len(before)] == before
    assert sorted(lines(parts)) == sorted(lines(whole))  # each episode once
    assert len(lines(parts)) == 1 + 2 * 2 * 4
    for file in ("eval.json", "progress.json"):
        assert (parts / file).read_text() == (whole / file).read_text()
    results = json.loads((whole / "eval.json").read_text())["results"]
    assert [len(result["episodes"]) for result in results] == [8, 8]
    assert list(results[0]["tasks"]) == ["5", "8"]


def test_options_beside_resume_and_other_folders_are_refused(tmp_path: Path) -> None:
    for words, expected in (
        ([str(tmp_path)], f"no run to resume: '{tmp_path / 'config.yaml'}' does not exist"),
        ([str(tmp_path), "--seed", "1"], "only --vec_env, --ray_address can be given, not --seed"),
    ):
        process = cfgrl("eval", "--resume", *words)
        assert process.wait(120) == 2
        assert expected in process.communicate()[1]


def test_a_log_of_outcomes_gives_back_what_was_added(tmp_path: Path) -> None:
    file = tmp_path / "episodes.jsonl"
    log = OutcomeLog(file, "a1")
    log.adding(1.5)(7, OUTCOME)
    assert OutcomeLog(file, "a1").known(1.5) == {7: OUTCOME}
    assert OutcomeLog(file, "a1").known(1.0) == {}
    with pytest.raises(ValueError, match="began with another policy"):
        OutcomeLog(file, "b2")


@pytest.mark.parametrize(
    "line", ["[]", "{}", "\x00", '{"cfg_scale": 1, "index": 0, "outcome": {"success": true}}']
)
def test_a_damaged_log_of_outcomes_is_refused(tmp_path: Path, line: str) -> None:
    file = tmp_path / "episodes.jsonl"
    OutcomeLog(file, "a1")
    with file.open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(ValueError, match="is damaged"):
        OutcomeLog(file, "a1")


@pytest.mark.parametrize("first", ["[]", "7", "{}", "\x00"])
def test_so_is_one_whose_first_line_is_damaged(tmp_path: Path, first: str) -> None:
    file = tmp_path / "episodes.jsonl"
    file.write_text(first + "\n")
    with pytest.raises(ValueError, match="is damaged"):
        OutcomeLog(file, "a1")
    assert file.read_text() == first + "\n"
