"""Compiled models: the same one in a process, the right one from the disk, or a new one."""

import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Finished

from cfgrl_gym.envs import compiled_models
from cfgrl_gym.envs.compiled_models import CACHE_VARIABLE, CompiledModel, cache_folder, compiled

TETRAHEDRON = "v 0 0 0\nv {size} 0 0\nv 0 1 0\nv 0 0 1\nf 1 3 2\nf 1 2 4\nf 1 4 3\nf 2 3 4\n"
DOCUMENT = """
<mujoco>
  <asset><mesh name="mesh" file="{mesh}"/></asset>
  <worldbody>
    <body name="fixture" pos="1 2 3"><geom type="mesh" mesh="mesh"/></body>
    <body name="other"><freejoint/><geom size="0.1"/></body>
  </worldbody>
</mujoco>
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for compiled models."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def document(tmp_path: Path) -> str:
    mesh = tmp_path / "mesh.obj"
    mesh.write_text(TETRAHEDRON.format(size=1))
    return DOCUMENT.format(mesh=mesh)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys that were compiled, not found."""
    keys: list[str] = []
    original = compiled_models._compile

    def count(key: str, xml: str) -> object:
        keys.append(key)
        return original(key, xml)

    monkeypatch.setattr(compiled_models, "_compile", count)
    return keys


def forget() -> None:
    """As a new process would."""
    compiled_models._in_process.clear()


def test_a_process_has_one_model_and_the_disk_gives_an_equal_one(
    folder: Path, document: str, compilations: list[str]
) -> None:
    model = compiled(document)
    assert compiled(document) is model
    forget()
    loaded = compiled(document)
    assert loaded is not model
    assert len(compilations) == 1
    for name in dir(model.mj):
        values = getattr(model.mj, name)
        if isinstance(values, np.ndarray):
            np.testing.assert_array_equal(getattr(loaded.mj, name), values, name)
    assert {path.suffix for path in folder.iterdir()} == {".mjb", ".crc32"}


def test_a_changed_asset_is_another_model_even_with_the_size_and_time_of_the_old(
    folder: Path, document: str, tmp_path: Path, compilations: list[str]
) -> None:
    mesh = tmp_path / "mesh.obj"
    before, status = compiled(document), mesh.stat()
    mesh.write_text(TETRAHEDRON.format(size=2))
    os.utime(mesh, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert mesh.stat().st_size == status.st_size
    after = compiled(document)
    assert len(set(compilations)) == 2
    assert not np.array_equal(after.mj.mesh_vert, before.mj.mesh_vert)


@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "no checksum", "empty"])
def test_a_damaged_file_is_compiled_again(
    folder: Path, document: str, compilations: list[str], damage: str
) -> None:
    compiled(document)
    (path,) = folder.glob("*.mjb")
    content = bytearray(path.read_bytes())
    if damage == "no checksum":
        path.with_suffix(".crc32").unlink()
    elif damage == "flipped bit":
        content[len(content) // 2] ^= 1
    else:
        content = content[: 0 if damage == "empty" else -10]
    path.write_bytes(content)
    forget()
    if damage == "no checksum":
        compiled(document)
    else:
        with pytest.warns(UserWarning, match="compiling again"):
            compiled(document)
    assert len(compilations) == 2
    forget()
    compiled(document)  # mended
    assert len(compilations) == 2


def test_a_folder_that_cannot_be_written_costs_the_cache_only(
    folder: Path, document: str, compilations: list[str]
) -> None:
    folder.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match=CACHE_VARIABLE):
        assert compiled(document).mj.nbody == 3
    assert len(compilations) == 1


def test_the_cache_can_be_switched_off_and_put_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, document: str
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "off")
    assert cache_folder() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled(document)
    assert not (tmp_path / "cfgrl-gym").exists()
    monkeypatch.delenv(CACHE_VARIABLE)
    assert cache_folder() == tmp_path / "cfgrl-gym" / "models"


def test_the_least_recently_used_models_make_room(
    folder: Path, document: str, monkeypatch: pytest.MonkeyPatch, compilations: list[str]
) -> None:
    documents = [document.replace("1 2 3", f"1 2 {z}") for z in range(3)]
    compiled(documents[0])
    size = sum(path.stat().st_size for path in folder.glob("*.mjb"))
    monkeypatch.setattr(compiled_models, "CACHE_LIMIT", int(2.5 * size))
    compiled(documents[1])
    for path in folder.glob("*.mjb"):
        os.utime(path, (0, 0))
    forget()
    compiled(documents[0])  # used again, so the other one is the oldest
    compiled(documents[2])
    assert len(list(folder.glob("*.mjb"))) == len(list(folder.glob("*.crc32"))) == 2
    forget()
    for number in (0, 2):
        compiled(documents[number])
    assert len(compilations) == 3
    compiled(documents[1])
    assert len(compilations) == 4


def test_processes_that_save_the_same_model_at_once_leave_a_sound_one(
    folder: Path, document: str, run_python: Callable[..., Finished], compilations: list[str]
) -> None:
    script = f"""
import multiprocessing
from cfgrl_gym.envs.compiled_models import compiled

def bodies(document):
    return compiled(document).mj.nbody

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert set(pool.map(bodies, [{document!r}] * 12, chunksize=1)) == {{3}}
"""
    done = run_python(script, **{CACHE_VARIABLE: str(folder)})
    assert done.code == 0, done.stderr
    assert "compiling again" not in done.stderr
    compiled(document)
    assert compilations == []


def test_what_stands_elsewhere_is_a_copy_that_is_shared_and_goes_when_unused(
    folder: Path, document: str
) -> None:
    base = compiled(document)
    assert base.as_placed() is base
    base.mj.body_pos[1] = [4, 5, 6]
    placed = base.as_placed()
    assert placed is not base
    assert base.as_placed() is placed
    base.mj.body_pos[1] = [7, 8, 9]
    assert base.as_placed() is not placed
    base.restore()
    np.testing.assert_array_equal(base.mj.body_pos[1], [1, 2, 3])
    np.testing.assert_array_equal(placed.mj.body_pos[1], [4, 5, 6])
    assert base.as_placed() is base
    gone = weakref.ref(placed)
    del placed
    gc.collect()
    assert gone() is None


def test_a_copy_knows_where_it_comes_from() -> None:
    import mujoco

    model = CompiledModel(mujoco.MjModel.from_xml_string("<mujoco/>"))
    assert model.base is model
    assert CompiledModel(model.mj, model).base is model
