"""Choosing a rendering back end, and render contexts at forks and at the interpreter's exit."""

import gc
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Finished

from cfgrl_gym.envs import render_backend, rendering
from cfgrl_gym.envs.compiled_models import CompiledModel
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


@pytest.mark.parametrize("other", ["", "LiberoEnv(image_size=16).reset()"])
def test_liberos_own_environment_left_open_exits_quietly(
    other: str, run_python: Callable[..., Finished]
) -> None:
    """robosuite's contexts, alone or with ours made after them on the same display."""
    script = f"""
from cfgrl_gym.envs.libero import LiberoEnv
from cfgrl_gym.envs.plain_simulator import PlainSimulator
from cfgrl_gym.envs.suites import select_tasks

simulator = PlainSimulator(select_tasks("libero_object", 0)[0], 16)
simulator.reset(0, None)
{other}
"""
    done = run_python(script, MUJOCO_GL="")
    assert done.code == 0, done.stderr
    for word in ("Traceback", "Exception ignored", "Error"):
        assert word not in done.stderr


LIBRARIES = """
from pathlib import Path

def has_llvm():  # llvmlite's own LLVM is linked into it and has no file of that name
    return "libLLVM" in Path("/proc/self/maps").read_text()
"""


FIRST_CONTEXT = {
    "ours": "from cfgrl_gym.envs.libero import LiberoEnv\nLiberoEnv(image_size=16).reset()",
    "LIBERO's": (
        "from cfgrl_gym.envs.plain_simulator import PlainSimulator\n"
        "from cfgrl_gym.envs.suites import select_tasks\n"
        "PlainSimulator(select_tasks('libero_object', 0)[0], 16)"
    ),
}


@pytest.mark.parametrize("whose", FIRST_CONTEXT)
def test_tritons_library_is_loaded_before_mesas(
    whose: str, tmp_path: Path, run_python: Callable[..., Finished]
) -> None:
    """A package in triton's place says when it is loaded: not all builds of torch bring one."""
    package = tmp_path / "triton" / "_C"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    note = "print('triton, LLVM loaded:', has_llvm())"
    (package / "libtriton.py").write_text(f"{LIBRARIES}\n{note}\n")
    script = f"{LIBRARIES}\n{FIRST_CONTEXT[whose]}\n"
    done = run_python(script + "print('context, LLVM loaded:', has_llvm())")
    assert done.code == 0, done.stderr
    triton, context = done.stdout.splitlines()
    assert triton == "triton, LLVM loaded: False"
    if context != "context, LLVM loaded: True":
        pytest.skip("this machine doesn't render with llvmpipe")


# Contexts in turns ------------------------------------------------------------------------------

SCENE = """
<mujoco>
  <visual><global offwidth="16" offheight="16"/></visual>
  <worldbody>
    <light pos="0 0 3"/>
    <camera name="camera" pos="0 -2 1" xyaxes="1 0 0 0 0.45 0.9"/>
    <geom name="box" type="box" size="{size} 0.3 0.3" rgba="1 0 0 1" group="1"/>
  </worldbody>
</mujoco>
"""


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[rendering._Pool]:
    """Contexts of this test's own."""
    pool = rendering._Pool()
    monkeypatch.setattr(rendering, "_pool", pool)
    yield pool
    pool.close()


def scene(size: float = 0.3) -> tuple[CompiledModel, Any]:
    import mujoco

    model = CompiledModel(mujoco.MjModel.from_xml_string(SCENE.format(size=size)))
    data = mujoco.MjData(model.mj)
    mujoco.mj_forward(model.mj, data)
    return model, data


def picture(model: CompiledModel, data: Any, pixels: int = 32, **colours: Any) -> np.ndarray:
    (image,) = rendering.render(model, data, colours, ["camera"], pixels)
    return image


@pytest.mark.parametrize("cores", [1, 2])
def test_threads_take_turns_at_few_contexts_and_see_what_one_thread_sees(
    pool: rendering._Pool, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    monkeypatch.setattr(rendering, "processors", lambda: cores)
    scenes = [scene(0.1 * (number + 1)) for number in range(3)]
    alone = [picture(*s) for s in scenes]
    assert not np.array_equal(alone[0], alone[1])
    with ThreadPoolExecutor(4) as threads:
        numbers = [number % 3 for number in range(60)]
        for number, image in zip(
            numbers, threads.map(lambda n: picture(*scenes[n]), numbers), strict=True
        ):
            np.testing.assert_array_equal(image, alone[number])
    for number, (model, _) in enumerate(scenes):
        kept = sum(painter.serves(model, "benchmark") for painter in pool._idle)
        assert 1 <= kept <= cores, number


def test_colours_are_each_environments_own(pool: rendering._Pool) -> None:
    model, data = scene()
    green = np.array([[0, 1, 0, 1]], np.float32)
    red = picture(model, data, geom_rgba=model.colours["geom_rgba"])
    other = picture(model, data, geom_rgba=green)
    assert red[..., 0].max() > 100 > other[..., 0].max()
    np.testing.assert_array_equal(picture(model, data, geom_rgba=model.colours["geom_rgba"]), red)


def test_more_models_than_are_kept_and_larger_images(pool: rendering._Pool) -> None:
    scenes = [scene(0.03 * (number + 1)) for number in range(rendering.MAX_CONTEXTS + 2)]
    first = [picture(*s) for s in scenes]
    assert len(pool._idle) == rendering.MAX_CONTEXTS
    np.testing.assert_array_equal(first, [picture(*s) for s in scenes])
    assert picture(*scenes[-1], pixels=200).shape == (200, 200, 3)
    np.testing.assert_array_equal(picture(*scenes[-1]), first[-1])
    assert len(pool._idle) == rendering.MAX_CONTEXTS


def test_what_is_kept_for_a_model_goes_with_it(pool: rendering._Pool) -> None:
    model, data = scene()
    picture(model, data)
    assert len(pool._idle) == 1
    del model
    gc.collect()
    rendering.free_unused()
    assert pool._idle == []


def test_a_draft_is_another_picture_and_leaves_the_benchmarks_as_it_is(
    pool: rendering._Pool,
) -> None:
    model, data = scene()
    before = picture(model, data)
    (draft,) = rendering.render(model, data, {}, ["camera"], 32, "draft")
    assert 0 < (draft != before).mean() < 0.1  # at the edges
    np.testing.assert_array_equal(picture(model, data), before)


def test_a_camera_that_is_not_there_is_an_error_and_not_the_end(pool: rendering._Pool) -> None:
    model, data = scene()
    with pytest.raises(ValueError, match="no camera 'frontview'"):
        rendering.render(model, data, {}, ["frontview"], 32)
    assert picture(model, data).shape == (32, 32, 3)
