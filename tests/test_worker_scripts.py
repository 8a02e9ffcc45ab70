"""WorkerVecEnv in scripts as users write them, run as real processes."""

import subprocess
import sys
import threading
from pathlib import Path
from textwrap import indent

import pytest

from cfgrl_gym import WorkerVecEnv
from cfgrl_gym.algorithms.vec_envs.requests import StartError

METHODS = ("forkserver", "spawn")
MAKE = """
env = WorkerVecEnv(env_fns, workers=2, start_method="{method}")
print(*env.reset().shape, flush=True)
env.close()
"""
HEAD = """
import gymnasium as gym
from cfgrl_gym import WorkerVecEnv
env_fns = [lambda: gym.make("CartPole-v1")] * 2
"""
UNGUARDED = HEAD + MAKE
MAIN = 'if __name__ == "__main__":\n'
GUARDED = HEAD + MAIN + indent(MAKE, "    ")


def run(
    *arguments: str | Path, stdin: str = "", cwd: Path | None = None
) -> tuple[int, list[str], str]:
    """Run Python; returns exit code, lines of stderr, and stdout."""
    done = subprocess.run(
        [sys.executable, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
    )
    return done.returncode, done.stderr.strip().splitlines(), done.stdout.strip()


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_script_without_a_guard_is_told_the_cause_and_the_cure(
    method: str, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED.format(method=method))
    code, errors, output = run(script)
    assert (code, output) == (1, "")
    assert "StartError: a worker process imports the script" in errors[-1]
    assert 'put `if __name__ == "__main__":` around' in errors[-1]
    assert sum(line.startswith("Traceback") for line in errors) == 1
    assert len(errors) < 12, errors
    script.write_text(GUARDED.format(method=method))
    assert run(script) == (0, [], "2 4")


def test_code_that_is_in_no_file_works(method: str) -> None:
    assert run(stdin=UNGUARDED.format(method=method)) == (0, [], "2 4")


def test_a_script_that_a_worker_cannot_import_is_tried_once(method: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    refuses = 'if __name__ != "__main__":\n    raise LookupError("no robot here")\n'
    script.write_text(refuses + GUARDED.format(method=method).replace("workers=2", "workers=1"))
    code, errors, _ = run(script)
    assert code == 1
    assert "exit code 1 before it could begin" in errors[-1]
    assert sum("LookupError: no robot here" in line for line in errors) == 1


INTERRUPTED = """
import os, signal, threading, time
from pathlib import Path
import psutil

if __name__ != "__main__":
    Path("importing").touch()
    time.sleep(2)


def interrupt():
    while not Path("importing").exists():
        time.sleep(0.01)
    for process in psutil.Process().children(recursive=True):
        process.send_signal(signal.SIGINT)


if __name__ == "__main__":
    threading.Thread(target=interrupt).start()
"""


def test_workers_that_are_still_importing_the_script_leave_ctrl_c_to_their_parent(
    tmp_path: Path,
) -> None:
    """At a terminal it reaches all processes, and the parent decides what becomes of a run."""
    script = tmp_path / "script.py"
    script.write_text(HEAD + INTERRUPTED + indent(MAKE.format(method="forkserver"), "    "))
    code, errors, output = run(script, cwd=tmp_path)
    assert (code, errors, output) == (0, [], "2 4")


def test_an_unguarded_start_in_another_librarys_process_is_an_error_there(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    start = f"{MAIN}    multiprocessing.get_context('spawn').Process(target=print).start()\nelse:\n"
    body = indent(MAKE.format(method="spawn"), "    ")
    script.write_text("import multiprocessing" + HEAD + start + body)
    _, errors, _ = run(script)
    assert errors[-1].startswith("RuntimeError: a worker process imports the script")


@pytest.mark.parametrize("place", ["module", "attribute"])
def test_what_a_worker_cannot_import_is_raised_once(
    place: str,
    method: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "only_here.py").write_text("def make():\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import only_here  # type: ignore[import-not-found]

    if place == "module":
        (tmp_path / "only_here.py").unlink()
    else:
        (tmp_path / "only_here.py").write_text("")
    with pytest.raises((ImportError, AttributeError), match=r"only_here|make"):
        WorkerVecEnv([only_here.make], start_method=method)
    assert "Traceback" not in capfd.readouterr().err
    del sys.modules["only_here"]


def test_functions_that_cannot_be_pickled_are_refused_before_a_process_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lock = threading.Lock()
    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", None)
    with pytest.raises(ValueError, match=r"env_fns can't be sent .* pickle.*make for itself"):
        WorkerVecEnv([lambda: lock] * 2, workers=2)  # type: ignore[list-item, return-value]


def test_an_environment_that_cannot_be_made_is_tried_once_and_its_own_error_raised(
    method: str, tmp_path: Path
) -> None:
    def broken() -> None:
        (tmp_path / str(len(list(tmp_path.iterdir())))).touch()
        raise LookupError("no such robot")

    with pytest.raises(LookupError, match="no such robot") as raised:
        WorkerVecEnv([broken], start_method=method)  # type: ignore[list-item]
    assert not isinstance(raised.value, StartError)
    assert len(list(tmp_path.iterdir())) == 1
