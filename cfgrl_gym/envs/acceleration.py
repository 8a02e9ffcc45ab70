"""Puts the fast simulator into programs that build LIBERO's environments themselves."""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_WRAPPER = "libero.libero.envs.env_wrapper"


def accelerate_libero() -> None:
    """Have LIBERO's own classes build fast environments, as `cfgrl_gym.envs.OffScreenRenderEnv` is.

    To be called at any time, once in each process; LIBERO isn't imported by it. Results stay what
    they are, bit for bit.
    """
    if _WRAPPER in sys.modules:
        _accelerate()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _accelerate() -> None:
    from cfgrl_gym.envs import drop_in

    drop_in.accelerate()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the module that builds LIBERO's environments, to accelerate it once it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _WRAPPER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _accelerate()
