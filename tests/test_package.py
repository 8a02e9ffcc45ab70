"""What importing and installing the package does, and doesn't."""

import ast
import configparser
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Finished
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import cfgrl_gym

ROOT = Path(__file__).parents[1]


def test_importing_the_package_is_light_and_registers_the_environments(
    run_python: Callable[..., Finished],
) -> None:
    done = run_python(
        """
import json, sys
import cfgrl_gym
import gymnasium
heavy = ["torch", "transformers", "robosuite", "libero", "mujoco", "stable_baselines3", "h5py"]
print(json.dumps({
    "heavy": [name for name in heavy if name in sys.modules],
    "ids": [name for name in gymnasium.registry if name.startswith("Libero")],
}))
"""
    )
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout) == {"heavy": [], "ids": ["Libero-v0", "LiberoChunked-v0"]}


def test_no_general_names_are_put_into_anyones_way(run_python: Callable[..., Finished]) -> None:
    done = run_python(
        """
import json
from importlib.util import find_spec
general = ["algorithms", "wrappers", "benchmarks", "envs", "demos", "cli"]
inside = ["algorithms", "algorithms.pi0", "wrappers", "envs", "demos", "cli"]
print(json.dumps({
    "general": [name for name in general if find_spec(name)],
    "inside": [name for name in inside if find_spec("cfgrl_gym." + name) is None],
}))
"""
    )
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout) == {"general": [], "inside": []}


def test_all_folders_of_modules_are_installed() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    walked = os.walk(ROOT / "cfgrl_gym", followlinks=True)
    folders = [Path(folder) for folder, _, files in walked if "__init__.py" in files]
    there = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(config["options"]["packages"].split()) == there


def test_the_users_own_wrappers_module_is_not_shadowed(
    tmp_path, run_python: Callable[..., Finished]
) -> None:
    (tmp_path / "wrappers.py").write_text("MINE = True\n", encoding="utf-8")
    done = run_python("import cfgrl_gym.wrappers, wrappers; print(wrappers.MINE)")
    assert done.stdout.strip() == "True", done.stderr


def test_algorithm_and_policies_are_reached_from_the_package() -> None:
    from cfgrl_gym import CFGRL, MlpPolicy, Pi0Policy, algorithms
    from cfgrl_gym.algorithms.pi0 import Pi0Policy as from_its_module

    assert algorithms.CFGRL is CFGRL
    assert algorithms.MlpPolicy is MlpPolicy
    assert Pi0Policy is from_its_module
    with pytest.raises(AttributeError, match="'cfgrl_gym' has no attribute 'PPO'"):
        _ = cfgrl_gym.PPO


def promised(which: str) -> list[Requirement]:
    """Of setup.cfg: its install_requires, or an extra."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    section = "options" if which == "install_requires" else "options.extras_require"
    lines = setup[section][which].splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_the_constraints_pin_everything_that_is_promised_to_versions_that_fit() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            match = re.fullmatch(r'([a-z0-9-]+)==([\w.]+)(; python_version >= "3\.11")?', line)
            assert match, f"{line!r} names more than a package and its version"
            pins[match[1]] = match[2]
    for which in ("install_requires", "libero", "lora", "dev"):
        for requirement in promised(which):
            version = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement} isn't {version}"
            try:
                brought = importlib.metadata.requires(requirement.name) or []
                installed = importlib.metadata.version(requirement.name).partition("+")[0]
            except importlib.metadata.PackageNotFoundError:  # of an extra that isn't installed
                continue
            if installed != version:  # an environment of other versions, which bring others
                continue
            for text in brought:  # is pinned too
                needed = Requirement(text)
                if needed.marker is None or needed.marker.evaluate(
                    {"extra": "", "python_version": "3.11"}
                ):
                    assert canonicalize_name(needed.name) in {*pins, "setuptools"}


# Where the name that is imported isn't that of its distribution, and what others always bring.
IMPORTED_AS = {"PIL": "pillow", "yaml": "pyyaml", "markupsafe": "jinja2"}
WITH_LIBERO = {"mujoco", "robosuite", "numba", "llvmlite", "scipy"}  # every distribution's


def test_whatever_the_package_imports_it_requires_whichever_libero_is_installed() -> None:
    root = Path(cfgrl_gym.__file__).parent
    requirements = [r for part in ("install_requires", "lora", "ray") for r in promised(part)]
    required = {canonicalize_name(r.name).replace("-", "_") for r in requirements}
    files = [Path(f) for folder in (root, *root.glob("*/")) for f in folder.rglob("*.py")]
    imported = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - {"cfgrl_gym"} - WITH_LIBERO
    assert "torch" in foreign  # the folders behind links are read too
    assert {IMPORTED_AS.get(name, name) for name in foreign} - required == set()
