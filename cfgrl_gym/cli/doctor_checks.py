"""Runs one check of `cfgrl doctor` as `python -m cfgrl_gym.cli.doctor_checks NAME`; prints JSON."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Any

from cfgrl_gym.cli.run_folder import installed

EXACTNESS_TASKS = {  # the suites of `cfgrl doctor --exactness`, and the task of each
    "libero_spatial": 4,  # a bowl in a drawer
    "libero_object": 0,
    "libero_goal": 0,  # open a drawer
    "libero_10": 2,  # a stove's knob and a pot
    "libero_90": 38,
    "libero_goal_swap": 7,  # LIBERO-PRO
}
EXACTNESS = "exactness"  # exactness:libero_goal is the name of one such check
_EXACTNESS_STEPS = 200
LEAST_FREE_GB = 2.0
LEAST_PYTHON = (3, 10)

# A box under a light, in front of a camera.
_SCENE = """
<mujoco><worldbody>
  <light pos="0 0 3"/>
  <camera name="camera" pos="0 -2 1" xyaxes="1 0 0 0 0.45 0.9"/>
  <geom type="box" size=".3 .3 .3" rgba="1 .5 .2 1" group="1"/>
</worldbody></mujoco>
"""


@dataclass(frozen=True)
class Finding:
    """Holds what a check found, and what to do if that is a problem."""

    ok: bool
    detail: str
    fix: str = ""


def check_python() -> Finding:
    """Check that Python is new enough."""
    detail = f"{platform.python_version()} at {sys.executable}"
    wanted = ".".join(map(str, LEAST_PYTHON))
    return Finding(sys.version_info >= LEAST_PYTHON, detail, f"install Python {wanted} or newer")


def check_packages() -> Finding:
    """Check that every requirement of the project is installed in a version that it accepts."""
    from packaging.requirements import Requirement

    found: list[str] = []
    wrong: list[str] = []
    for text in importlib.metadata.requires("cfgrl-gym") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed([requirement.name]).get(requirement.name)
        if version is None:
            wrong.append(f"{requirement} (missing)")
            continue
        good = requirement.specifier.contains(version, prereleases=True)
        (found if good else wrong).append(f"{requirement.name} {version}")
    if wrong:
        return Finding(False, ", ".join(wrong), "pip install --upgrade cfgrl-gym")
    return Finding(True, ", ".join(found))


def check_rendering() -> Finding:
    """Check that the rendering back end LIBERO would use renders an image of a small scene."""
    from cfgrl_gym.envs.compiled_models import CompiledModel
    from cfgrl_gym.envs.render_backend import FIX, choose_backend
    from cfgrl_gym.envs.rendering import render

    backend = choose_backend()
    import mujoco

    model = CompiledModel(mujoco.MjModel.from_xml_string(_SCENE))
    data = mujoco.MjData(model.mj)
    mujoco.mj_forward(model.mj, data)
    render(model, data, {}, ["camera"], 128)
    began = time.perf_counter()
    (image,) = render(model, data, {}, ["camera"], 128)
    took = time.perf_counter() - began
    if image.min() == image.max():
        fix = f"{FIX}; or set MUJOCO_GL to egl or osmesa"
        return Finding(False, f"{backend} renders an empty image", fix)
    return Finding(True, f"{backend}, MuJoCo {mujoco.__version__}, {took * 1000:.0f} ms an image")


def check_libero() -> Finding:
    """Check that LIBERO can be imported, and find which distribution it is and where."""
    from cfgrl_gym.envs.installation import (
        import_libero,
        install_hint,
        libero_distributions,
        libero_root,
    )

    root, names = libero_root(), libero_distributions()
    import_libero("envs.env_wrapper")
    versions = installed((*names, "robosuite", "mujoco"))
    found = [] if names else ["a checkout"]
    found += [f"{name} {version}" for name, version in versions.items()]
    detail = f"{', '.join(found)} at {root}"
    # pip may leave a simulator there that LIBERO excludes, such as a MuJoCo that came afterwards
    for requirement in [r for name in names for r in _unmet(name, ("robosuite", "mujoco"))]:
        wanted = f"pip install '{requirement.name}{requirement.specifier}'"
        return Finding(False, f"{detail}, which excludes this {requirement.name}", wanted)
    return Finding(len(names) < 2, detail, install_hint())


def _unmet(distribution: str, packages: tuple[str, ...]) -> list[Any]:
    """Of a distribution's requirements, those on some packages that aren't satisfied."""
    from packaging.requirements import Requirement

    unmet = []
    for requirement in map(Requirement, importlib.metadata.requires(distribution) or []):
        optional = requirement.marker and not requirement.marker.evaluate({"extra": ""})
        if requirement.name in packages and not optional:
            version = importlib.metadata.version(requirement.name)
            if not requirement.specifier.contains(version, prereleases=True):
                unmet.append(requirement)
    return unmet


def check_suites() -> Finding:
    """Check that assets, and the task files and initial states of every suite, are there."""
    from cfgrl_gym.envs.installation import install_hint, require_assets
    from cfgrl_gym.envs.suites import available_suites, load_tasks

    require_assets()
    suites = available_suites()
    tasks = [task for suite in suites for task in load_tasks(suite)]
    missing = [str(task.bddl_file) for task in tasks if not task.bddl_file.is_file()]
    missing += [str(task.init_states_file) for task in tasks if not task.init_states_file.is_file()]
    if missing or not suites:
        detail = f"{len(missing)} files missing, such as {missing[:1]}"
        return Finding(False, detail, install_hint(again=True))
    four = [
        s for s in ("libero_spatial", "libero_object", "libero_goal", "libero_10") if s in suites
    ]
    return Finding(True, f"{len(suites)} suites, {len(tasks)} tasks, {', '.join(four)} among them")


def check_torch() -> Finding:
    """Check that torch computes on the device that would be used."""
    import torch
    from stable_baselines3.common.utils import get_device

    device = get_device("auto")
    value = (torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)).sum().item()
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    detail = f"{torch.__version__} on {device.type} ({name}), bf16 {'used' if bf16 else 'not used'}"
    if value != 512:
        return Finding(False, f"{detail}; a matrix product is wrong", "reinstall torch")
    return Finding(True, detail)


def check_pi0() -> Finding:
    """Check that transformers has PI0, and that the project's policy can be imported."""
    import transformers
    from transformers import PI0ForConditionalGeneration

    from cfgrl_gym.algorithms.pi0 import Pi0Policy

    names = f"{PI0ForConditionalGeneration.__name__}, {Pi0Policy.__name__}"
    return Finding(True, f"transformers {transformers.__version__}, {names}")


def check_disk() -> Finding:
    """Check that the temporary folder can be written to and has room."""
    folder = tempfile.gettempdir()
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"cfgrl")
    free = shutil.disk_usage(folder).free / 1e9
    return Finding(
        free >= LEAST_FREE_GB,
        f"{free:.1f} GB free in {folder}",
        f"free {LEAST_FREE_GB:g} GB there, or set TMPDIR to a folder with more room",
    )


def check_exactness(suite: str) -> Finding:
    """Check that the simulator equals LIBERO's own environment on one task of a suite."""
    from cfgrl_gym.envs.compiled_models import cache_folder
    from cfgrl_gym.envs.exactness import compare, downward_actions
    from cfgrl_gym.envs.simulator import IMAGE_KEYS
    from cfgrl_gym.envs.suites import available_suites, select_tasks
    from cfgrl_gym.envs.upstream import UnknownUpstreamError

    if suite not in available_suites():
        return Finding(True, "not compared: the installed LIBERO doesn't have this suite")
    task = select_tasks(suite, EXACTNESS_TASKS[suite])[0]
    try:
        report = compare(task, downward_actions(_EXACTNESS_STEPS, seed=task.task_id))
    except UnknownUpstreamError as error:
        return Finding(
            True, f"not compared: results are LIBERO's own, at its own speed, because {error}"
        )
    difference = report.difference
    if difference is None:
        return Finding(
            True,
            f"equal bit for bit: task {task.task_id}, {report.steps} steps, again after "
            f"{report.others} other episodes: state, success and {report.observations} "
            f"observations at each step, {report.images} images, up to {report.contacts} contacts "
            "of the robot",
        )
    if difference.key in IMAGE_KEYS:
        fix = "render in software (export MUJOCO_GL=osmesa) and compare again"
    else:
        fix = f"delete the compiled models in {cache_folder()} and compare again"
    return Finding(
        False,
        f"{difference.key} differs by up to {difference.size:.2g} from LIBERO's at step "
        f"{difference.step} of the {difference.episode} episode (task {task.task_id})",
        f"{fix}; if there is still a difference, results here aren't LIBERO's: please report it "
        "with the output of cfgrl doctor --exactness --json",
    )


_CHECKS = (
    *(check_python, check_packages, check_rendering, check_libero),
    *(check_suites, check_torch, check_pi0, check_disk),
)
CHECKS = {check.__name__.removeprefix("check_"): check for check in _CHECKS}


def find(name: str) -> Finding:
    """Run one check; an exception of any kind is a finding too."""
    kind, _, suite = name.partition(":")
    try:
        finding = check_exactness(suite) if kind == EXACTNESS else CHECKS[name]()
    except Exception as error:
        text = " ".join(str(error).split())
        # The project's own messages end with what to do.
        fix = re.split(r"; (?=install|on Debian|set |give |copy )", text)
        hint = fix[-1] if len(fix) > 1 else "pip install --upgrade cfgrl-gym"
        return Finding(False, f"{type(error).__name__}: {text}", hint)
    return finding if not finding.ok else Finding(True, finding.detail)


if __name__ == "__main__":
    print(json.dumps(asdict(find(sys.argv[1]))))
