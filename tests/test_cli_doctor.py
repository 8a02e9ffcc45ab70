"""`cfgrl doctor`: right about this machine, and unshaken by what it tries."""

import json
import sys
from pathlib import Path

import pytest

from cfgrl_gym.cli import main
from cfgrl_gym.cli.doctor import check
from cfgrl_gym.cli.doctor_checks import CHECKS


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
