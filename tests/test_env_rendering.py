"""Choosing a rendering back end, and render contexts at forks and at the interpreter's exit."""

import os
from collections.abc import Callable

import pytest
from conftest import Finished

from cfgrl_gym.envs import render_backend
from cfgrl_gym.envs.render_backend import RenderingUnavailableError, choose_backend


@pytest.mark.parametrize("name", ["egl", "osmesa", "glfw"])
def test_a_back_end_that_the_user_chose_is_kept(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("MUJOCO_GL", name)
    assert choose_backend() == name
    assert os.environ["MUJOCO_GL"] == name


@pytest.mark.parametrize(
    ("devices", "osmesa", "chosen"), [(1, True, "egl"), (2, False, "egl"), (0, True, "osmesa")]
)
def test_egl_is_preferred_and_osmesa_is_the_fallback(
    monkeypatch: pytest.MonkeyPatch, devices: int, osmesa: bool, chosen: str
) -> None:
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.setattr(render_backend, "_egl_device_count", lambda: devices)
    monkeypatch.setattr(render_backend, "_has_osmesa", lambda: osmesa)
    assert choose_backend() == chosen
    assert os.environ["MUJOCO_GL"] == chosen


def test_without_any_back_end_the_error_names_the_packages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.setattr(render_backend, "_egl_device_count", lambda: 0)
    monkeypatch.setattr(render_backend, "_has_osmesa", lambda: False)
    with pytest.raises(RenderingUnavailableError, match=r"apt-get install .*libegl1.*libosmesa6"):
        choose_backend()


def test_this_machine_has_a_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "")
    assert choose_backend() in ("egl", "osmesa")


FORK_SCRIPT = """
import os, sys
import mujoco  # before a back end is chosen: nothing may depend on who comes first
from cfgrl_gym.envs.libero import LiberoEnv
from cfgrl_gym.envs.render_backend import RenderingUnavailableError

env = LiberoEnv(image_size=16, settle_steps=0)
env.reset()
child = os.fork()
try:
    env.reset()
except RenderingUnavailableError as error:
    assert not child, "only the child's context is gone"
    print("refused:", error, flush=True)
    sys.exit(3)  # an ordinary exit, with handlers
assert child, "the child rendered"
_, status = os.waitpid(child, 0)
print("child exited with", os.waitstatus_to_exitcode(status))
env.reset()
# and ends without env.close()
"""


def test_a_fork_after_rendering_is_refused_and_an_unclosed_environment_exits_quietly(
    run_python: Callable[..., Finished],
) -> None:
    done = run_python(FORK_SCRIPT, MUJOCO_GL="")
    refused, child, *_ = done.stdout.split("\n")
    assert refused.startswith("refused: ")
    for remedy in ("forked", "forkserver", "spawn"):
        assert remedy in refused
    assert child == "child exited with 3"
    assert done.code == 0
    for word in ("Traceback", "Exception ignored", "Error"):
        assert word not in done.stderr
