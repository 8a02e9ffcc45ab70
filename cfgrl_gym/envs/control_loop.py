"""Compiles one control step of robosuite's OSC_POSE controller: same arithmetic, same bits.

robosuite runs its controller in Python before each of the 25 physics substeps of a control step,
which takes longer than the physics. Here that loop is one numba function that calls MuJoCo's C
functions itself and holds no lock on the interpreter. The formulas are those of
`robosuite/controllers/osc.py` and `robosuite/utils/control_utils.py` (after O. Khatib, "A unified
approach for motion and force control of robot manipulators", 1987), in the same order of
operations, through the same LAPACK routines, on arrays of the same memory layout.
"""

import glob
import os
from typing import Any

import llvmlite.binding
import mujoco
import numpy as np
import scipy.linalg  # noqa: F401  # the linear algebra of numba's functions
from numba import njit, types
from threadpoolctl import ThreadpoolController

# The library that the Python package has loaded already; the functions below are found in it.
_LIBRARY = glob.glob(os.path.join(os.path.dirname(mujoco.__file__), "libmujoco.*"))
if _LIBRARY:
    llvmlite.binding.load_library_permanently(_LIBRARY[0])

# For 7 by 7 matrices OpenBLAS's own threads are of no use, but with them two simulations in one
# process wait for one another. The results are the same bits (numpy's OpenBLAS is another one).
for _pool in ThreadpoolController().lib_controllers:
    if _pool.internal_api == "openblas" and "scipy" in _pool.filepath:
        _pool.set_num_threads(1)

_ADDRESS = types.intp
_DOUBLES = types.CPointer(types.double)
_mj_step1 = types.ExternalFunction("mj_step1", types.void(_ADDRESS, _ADDRESS))
_mj_step2 = types.ExternalFunction("mj_step2", types.void(_ADDRESS, _ADDRESS))
_mj_jac_site = types.ExternalFunction(
    "mj_jacSite", types.void(_ADDRESS, _ADDRESS, _DOUBLES, _DOUBLES, types.intc)
)

_JOINTS, _FINGERS = 7, 2
_NULLSPACE_KP = 10  # joint_kp of robosuite's nullspace_torques


@njit(nogil=True, cache=True)
def _run(  # type: ignore[no-untyped-def]  # numba infers the types
    # MuJoCo's structures (addresses) and views of their arrays
    model, data, site, qpos, qvel, inertia, bias, ctrl, site_pos, site_mat,
    # where the arm and the gripper are in them
    arm_qpos, arm_qvel, arm_actuators, finger_actuators, arm_inertia,
    # the controller
    goal_pos, goal_mat, kp, kd, rest_pose, torque_low, torque_high,
    finger_bias, finger_weight, finger_current, finger_delta,
    # work space, in robosuite's memory layout
    jac_pos, jac_rot, J_full, J_pos, J_ori, mass,
    # which substep is measured, and what is kept of it
    first, substeps, measured, qpos_before, qpos_after, qvel_after,
):  # fmt: skip
    """Run a control step, of whose substep 0 the caller has done `mj_step1` to compute the goal."""
    q, v = np.empty(_JOINTS), np.empty(_JOINTS)
    wrench = np.empty(6)
    for substep in range(first, substeps):
        if substep == measured:
            qpos_before[:] = qpos
        if substep > 0:
            _mj_step1(model, data)

        # Controller.update
        _mj_jac_site(model, data, jac_pos.ctypes, jac_rot.ctypes, site)
        ee_pos_vel = np.dot(jac_pos, qvel)
        ee_ori_vel = np.dot(jac_rot, qvel)
        for column in range(_JOINTS):
            for row in range(3):
                J_pos[row, column] = J_full[row, column] = jac_pos[row, arm_qvel[column]]
                J_ori[row, column] = J_full[row + 3, column] = jac_rot[row, arm_qvel[column]]
            for row in range(_JOINTS):
                mass[row, column] = inertia[arm_inertia[row, column]]
            q[column], v[column] = qpos[arm_qpos[column]], qvel[arm_qvel[column]]
        ee_mat = site_mat[site].reshape((3, 3))

        # OperationalSpaceController.run_controller: the wrench wanted at the end effector
        ori_error = 0.5 * (
            np.cross(ee_mat[:, 0], goal_mat[:, 0])
            + np.cross(ee_mat[:, 1], goal_mat[:, 1])
            + np.cross(ee_mat[:, 2], goal_mat[:, 2])
        )
        force = (goal_pos - site_pos[site]) * kp[:3] + (-ee_pos_vel) * kd[:3]
        torque = ori_error * kp[3:] + (-ee_ori_vel) * kd[3:]

        # control_utils.opspace_matrices
        mass_inv = np.linalg.inv(mass)
        lambda_full = np.linalg.pinv(np.dot(np.dot(J_full, mass_inv), J_full.transpose()))
        lambda_pos = np.linalg.pinv(np.dot(np.dot(J_pos, mass_inv), J_pos.transpose()))
        lambda_ori = np.linalg.pinv(np.dot(np.dot(J_ori, mass_inv), J_ori.transpose()))
        J_bar = np.dot(np.dot(mass_inv, J_full.transpose()), lambda_full)
        nullspace = np.eye(_JOINTS) - np.dot(J_bar, J_full)

        wrench[:3] = np.dot(lambda_pos, force)
        wrench[3:] = np.dot(lambda_ori, torque)
        torques = np.dot(J_full.transpose(), wrench)
        for joint in range(_JOINTS):
            torques[joint] += bias[arm_qvel[joint]]
        # control_utils.nullspace_torques
        kv = np.sqrt(_NULLSPACE_KP) * 2
        pose_torques = np.dot(mass, _NULLSPACE_KP * (rest_pose - q) - kv * v)
        torques += np.dot(nullspace.transpose(), pose_torques)

        # SingleArm.control, Manipulator.grip_action, PandaGripper.format_action
        for joint in range(_JOINTS):
            ctrl[arm_actuators[joint]] = min(
                max(torques[joint], torque_low[joint]), torque_high[joint]
            )
        for finger in range(_FINGERS):
            finger_current[finger] = min(
                max(finger_current[finger] + finger_delta[finger], -1.0), 1.0
            )
            ctrl[finger_actuators[finger]] = (
                finger_bias[finger] + finger_weight[finger] * finger_current[finger]
            )

        _mj_step2(model, data)
        if substep == measured:
            qpos_after[:], qvel_after[:] = qpos, qvel


class SamplingClock:
    """Tracks when robosuite measures: in one physics substep per control period, not the last one.

    `robosuite/utils/observables.py` counts time since the last measurement in floating point, and
    the forced measurements of a reset shift its phase (after LIBERO's `set_init_state` it measures
    one substep before the end of a control step). An observation equals LIBERO's only at exactly
    that substep.
    """

    def __init__(self, period: float, substep: float) -> None:
        self._period, self._substep = period, substep
        self._time, self._sampled = 0.0, False

    @property
    def phase(self) -> tuple[float, bool]:
        """Return the seconds since the period began, and whether it has been measured in."""
        return self._time, self._sampled

    @phase.setter
    def phase(self, phase: tuple[float, bool]) -> None:
        self._time, self._sampled = phase

    def restart(self, forced_measurements: int) -> None:
        self._time = 0.0
        for _ in range(forced_measurements):
            self.substep(forced=True)

    def control_step(self, substeps: int) -> int:
        """Advance by a control step; return the substep after which robosuite measures, or -1."""
        measured = -1
        for substep in range(substeps):
            if self.substep():
                measured = substep
        return measured

    def substep(self, forced: bool = False) -> bool:
        """Advance by a substep, and return whether robosuite measures after it."""
        due = not self._sampled and self._period >= self._time + self._substep
        self._sampled = self._sampled or due or forced
        self._time += self._substep
        if self._time >= self._period:
            self._time %= self._period
            self._sampled = False
        return due or forced


class ControlLoop:
    """Drives one robosuite environment with a single Panda under OSC_POSE.

    :param env: robosuite's environment, which `check_upstream` has accepted
    :ivar gripper: the fingers' commands now, float64 (2,)
    :ivar clock: when robosuite measures
    :ivar measured: the state in which robosuite would have measured its observables last:
        positions before that substep (nq,), positions (nq,) and velocities (nv,) after it
    """

    def __init__(self, env: Any) -> None:
        self._env = env
        robot = env.robots[0]
        model = env.sim.model._model
        data = env.sim.data._data
        nv = model.nv
        self._substeps = int(env.control_timestep / env.model_timestep)
        self.clock = SamplingClock(env.control_timestep, env.model_timestep)
        self.measured = (data.qpos.copy(), data.qpos.copy(), data.qvel.copy())
        self._site = model.site(robot.gripper.important_sites["grip_site"]).id
        self._site_pos, self._site_mat = data.site_xpos[self._site], data.site_xmat[self._site]
        arm_qvel = _indices(robot._ref_joint_vel_indexes)
        fingers = _indices(robot._ref_joint_gripper_actuator_indexes)
        self._simulation = (
            self._site, data.qpos, data.qvel, data.M, data.qfrc_bias, data.ctrl,
            data.site_xpos, data.site_xmat,
            _indices(robot._ref_joint_pos_indexes), arm_qvel,
            _indices(robot._ref_joint_actuator_indexes), fingers,
            _inertia_addresses(model, arm_qvel),
        )  # fmt: skip
        self._torque_limits = tuple(np.array(limit) for limit in robot.torque_limits)
        low, high = model.actuator_ctrlrange[fingers].T
        self._finger_range = (0.5 * (high + low), 0.5 * (high - low))
        self.gripper = np.zeros(_FINGERS)
        self._goal_pos, self._goal_mat = np.zeros(3), np.zeros((3, 3))
        self._work = (
            np.zeros((3, nv)), np.zeros((3, nv)),
            *(np.zeros(shape, order="F") for shape in ((6, _JOINTS), (3, _JOINTS), (3, _JOINTS))),
            np.zeros((_JOINTS, _JOINTS), order="F"),
        )  # fmt: skip

    def start_episode(self, forced_measurements: int) -> None:
        """Take over the controller and the gripper that robosuite's reset has created.

        :param forced_measurements: number of robosuite's measurements since then
        """
        self.clock.restart(forced_measurements)
        self.measure()
        self.read_controller()
        self.gripper[:] = self._env.robots[0].gripper.current_action

    def measure(self) -> None:
        """Keep the state that is there now as the one that robosuite has measured."""
        data = self._env.sim.data._data
        for kept, values in zip(self.measured, (data.qpos, data.qpos, data.qvel), strict=True):
            kept[:] = values

    def read_controller(self) -> None:
        """Take over the controller's settings, which may be changed in an episode."""
        self._controller = controller = self._env.robots[0].controller
        self._gains = tuple(
            np.array(values, dtype=np.float64)
            for values in (controller.kp, controller.kd, controller.initial_joint)
        )

    def advance(self, action: np.ndarray) -> bool:
        """Execute one control step, and return whether robosuite would have measured in it.

        :param action: float64 (7,)
        """
        measured = self.clock.control_step(self._substeps)
        sim, controller = self._env.sim, self._controller
        model, data = sim.model._model, sim.data._data
        mujoco.mj_step1(model, data)
        if controller.new_update:
            # All that the goal depends on; the flag keeps robosuite from reading the rest, too.
            controller.ee_pos = self._site_pos.copy()
            controller.ee_ori_mat = self._site_mat.reshape(3, 3).copy()
            controller.new_update = False
            controller.set_goal(action[:6])
            first = 0
        else:
            self._stale_substep(action, measured)
            first = 1
        self._goal_pos[:], self._goal_mat[:] = controller.goal_pos, controller.goal_ori
        speed = self._env.robots[0].gripper.speed
        _run(  # type: ignore[call-arg]  # a numba function
            model._address, data._address, *self._simulation,
            self._goal_pos, self._goal_mat, *self._gains, *self._torque_limits,
            *self._finger_range, self.gripper,
            np.array([-1.0, 1.0]) * speed * np.sign(action[6:]),
            *self._work, first, self._substeps, measured, *self.measured,
        )  # fmt: skip
        controller.new_update = True
        return measured >= 0

    def _stale_substep(self, action: np.ndarray, measured: int) -> None:
        """Run the first substep of an episode, for which robosuite doesn't read the new state.

        Its controller still uses the pose and the inertia from its own reset, before the initial
        state was set, so that the goal and the first torques differ.
        """
        env = self._env
        model, data = env.sim.model._model, env.sim.data._data
        if measured == 0:
            self.measured[0][:] = data.qpos
        env.sim.forward = lambda: None  # mj_step1 has done it
        try:
            env._pre_action(action, True)
        finally:
            del env.sim.forward
        self.gripper[:] = env.robots[0].gripper.current_action
        mujoco.mj_step2(model, data)
        if measured == 0:
            self.measured[1][:], self.measured[2][:] = data.qpos, data.qvel


def _indices(values: Any) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def _inertia_addresses(model: Any, dofs: np.ndarray) -> np.ndarray:
    """Return where `MjData.M`, in compressed rows, has the entries of a chain of dofs, (n, n)."""
    addresses = np.zeros((len(dofs), len(dofs)), dtype=np.int64)
    for row, dof in enumerate(dofs):
        begin = model.M_rowadr[dof]
        columns = list(model.M_colind[begin : begin + model.M_rownnz[dof]])
        for column, other in enumerate(dofs[: row + 1]):
            addresses[row, column] = addresses[column, row] = begin + columns.index(other)
    return addresses
