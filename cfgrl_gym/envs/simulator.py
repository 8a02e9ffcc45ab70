"""One LIBERO task in MuJoCo: exact resets without rebuilding, steps that don't render.

The physics is LIBERO's own environment on robosuite. Two things differ from calling it directly,
neither of them in a result: a reset restores the state of a fresh build instead of building again,
and a physics substep computes the forward dynamics once instead of three times.
"""

import contextlib
import io
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from cfgrl_gym.envs.installation import import_libero
from cfgrl_gym.envs.rendering import OffscreenRenderer
from cfgrl_gym.envs.suites import Task

CAMERAS = ("agentview", "robot0_eye_in_hand")
IMAGE_KEYS = tuple(f"{camera}_image" for camera in CAMERAS)
FRAME_SIZE = 256  # side of the images that render() gives, in pixels
SETTLE_ACTION = np.array([0, 0, 0, 0, 0, 0, -1], dtype=np.float64)
SETTLE_STEPS = 20  # 2_test_pi0_on_libero.py of openpi_pytorch
LIBERO_SEED = 0  # LIBERO's evaluation seeds its environments so before it sets a benchmark state
MAX_PLACEMENT_TRIES = 100

# Model arrays that robosuite and LIBERO write to after the build: fixtures are placed by moving
# their bodies, and markers, stove flames and the like are shown by colour.
_MUTABLE_MODEL_ARRAYS = ("body_pos", "body_quat", "site_rgba", "geom_rgba")


@contextlib.contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """LIBERO draws from numpy's global generator: seed it for a moment, then put it back."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def _remember_pristine_model(environment_class: type) -> type:
    """Subclass that keeps a copy of the model arrays as compiled, before anything is placed."""

    def initialize_sim(self: Any, xml_string: str | None = None) -> None:
        environment_class._initialize_sim(self, xml_string)  # type: ignore[attr-defined]
        self.pristine = {
            name: getattr(self.sim.model, name).copy() for name in _MUTABLE_MODEL_ARRAYS
        }

    # LIBERO compares the class name with the problem's, so the name stays.
    return type(
        environment_class.__name__, (environment_class,), {"_initialize_sim": initialize_sim}
    )


class _SamplingClock:
    """When robosuite measures: one physics substep of each control period, not the last one.

    `robosuite/utils/observables.py` counts time since the last measurement in floating point, and
    the forced measurements of a reset shift its phase (after LIBERO's `set_init_state` it measures
    one substep before the end of a control step). An observation equals LIBERO's only at exactly
    that substep.
    """

    def __init__(self, period: float, substep: float) -> None:
        self._period, self._substep = period, substep
        self._time, self._sampled = 0.0, False

    def restart(self, forced_measurements: int) -> None:
        self._time = 0.0
        for _ in range(forced_measurements):
            self._sampled = True
            self._count()

    def tick(self) -> bool:
        """Let one substep pass; True when robosuite measures after it."""
        measure = not self._sampled and self._period >= self._time + self._substep
        self._sampled = self._sampled or measure
        self._count()
        return measure

    def _count(self) -> None:
        self._time += self._substep
        if self._time >= self._period:
            self._time %= self._period
            self._sampled = False


class Simulator:
    """A built LIBERO task.

    :param task: from `cfgrl_gym.envs.suites`
    :param image_size: side of the observation images in pixels
    """

    def __init__(self, task: Task, image_size: int) -> None:
        wrapper = import_libero("envs.env_wrapper")
        import mujoco

        self.task = task
        self.image_size = image_size
        self._mujoco = mujoco
        self._renderer: OffscreenRenderer | None = None
        self._renderer_pid: int | None = None
        problem = wrapper.BDDLUtils.get_problem_info(str(task.bddl_file))["problem_name"]
        registered = wrapper.TASK_MAPPING[problem]
        wrapper.TASK_MAPPING[problem] = _remember_pristine_model(registered)
        try:
            with contextlib.redirect_stdout(io.StringIO()), _numpy_seed(LIBERO_SEED):
                control = wrapper.ControlEnv(
                    bddl_file_name=str(task.bddl_file),
                    use_camera_obs=False,
                    has_offscreen_renderer=False,
                    hard_reset=False,
                    ignore_done=True,
                )
        finally:
            wrapper.TASK_MAPPING[problem] = registered
        self.robosuite_env: Any = control.env
        # LIBERO's first reset builds the task a second time and thereby lists each sampler of
        # drawer and knob positions twice; the draws that follow depend on it.
        self.robosuite_env.object_property_initializers *= 2
        self._clock = _SamplingClock(
            self.robosuite_env.control_timestep, self.robosuite_env.model_timestep
        )
        # Images are drawn later than they are measured, from a copy with the measured pose.
        self._image_data: Any = mujoco.MjData(self.model)
        self._image_qpos = self.data.qpos.copy()
        self._measurement: dict[str, np.ndarray] = {}

    # State ------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        """The compiled `mujoco.MjModel`."""
        return self.robosuite_env.sim.model._model

    @property
    def data(self) -> Any:
        """The `mujoco.MjData`."""
        return self.robosuite_env.sim.data._data

    def state(self) -> np.ndarray:
        """Flat float64 (1 + nq + nv,): time, qpos, qvel, as LIBERO's initial states are stored."""
        return np.concatenate([[self.data.time], self.data.qpos, self.data.qvel])

    def reset(self, seed: int, init_state: np.ndarray | None) -> None:
        """As LIBERO's hard reset after `seed(seed)`, then `set_init_state(init_state)`.

        :param seed: for LIBERO's placement sampler
        :param init_state: (1 + nq + nv,), or None for what the sampler placed
        """
        from robosuite.utils.errors import RandomizationError

        env = self.robosuite_env
        with _numpy_seed(seed), contextlib.redirect_stdout(io.StringIO()):
            for _ in range(MAX_PLACEMENT_TRIES):
                for name, array in env.pristine.items():
                    getattr(env.sim.model, name)[:] = array
                # A rebuilt gripper starts with no memory of its last command.
                for robot in env.robots:
                    robot.gripper.current_action = np.zeros(robot.gripper.dof)
                try:
                    env.reset()
                    break
                except RandomizationError:
                    continue
            else:
                raise RuntimeError(
                    f"LIBERO found no placement for {self.task.name!r} with seed {seed} in "
                    f"{MAX_PLACEMENT_TRIES} tries; try another seed"
                )
        if init_state is not None:
            if init_state.shape != self.state().shape:
                raise ValueError(
                    f"the initial state has {init_state.size} numbers, the model of "
                    f"{self.task.name!r} needs {self.state().size}: the installed LIBERO's "
                    "initial states belong to another version of its assets"
                )
            env.sim.set_state_from_flattened(init_state)
            env.sim.forward()
            env._check_success()
            env._post_process()
        self._clock.restart(forced_measurements=1 if init_state is None else 2)
        self._image_qpos[:] = self.data.qpos
        self._measure()

    def advance(self, action: np.ndarray) -> bool:
        """One control step (25 physics substeps of 2 ms); returns LIBERO's success."""
        env = self.robosuite_env
        sim, model, data = env.sim, self.model, self.data
        env.timestep += 1
        # mj_step1 has computed all that the controller reads, so its own forward() calls are void.
        sim.forward = _nothing
        try:
            for substep in range(int(env.control_timestep / env.model_timestep)):
                measure = self._clock.tick()
                if measure:  # the poses that are drawn are those before the integration
                    self._image_qpos[:] = data.qpos
                self._mujoco.mj_step1(model, data)
                env._pre_action(action, substep == 0)
                self._mujoco.mj_step2(model, data)
                if measure:
                    self._measure()
        finally:
            del sim.forward
        env.cur_time += env.control_timestep
        env._post_action(action)
        return bool(env._check_success())

    def settle(self, steps: int) -> None:
        """Let things come to rest: so many control steps without a motion, the gripper open."""
        for _ in range(steps):
            self.advance(SETTLE_ACTION)

    # Observation ------------------------------------------------------------------------------

    def _measure(self) -> None:
        env = self.robosuite_env
        env._update_observables(force=True)
        self._measurement = {
            key: np.asarray(value)
            for key, value in env._get_observations().items()
            if not key.endswith("-state")
        }

    def observe(self) -> dict[str, np.ndarray]:
        """LIBERO's observation keys other than the images, as robosuite measured them last."""
        return dict(self._measurement)

    def images(self) -> dict[str, np.ndarray]:
        """LIBERO's image keys: uint8 (image_size, image_size, 3), as robosuite gives them."""
        data = self._image_data
        data.qpos[:] = self._image_qpos
        # What a picture depends on, in the order of mj_fwdPosition.
        for compute in (
            self._mujoco.mj_kinematics,
            self._mujoco.mj_comPos,
            self._mujoco.mj_camlight,
        ):
            compute(self.model, data)
        return {
            f"{camera}_image": self._render(data, camera, self.image_size) for camera in CAMERAS
        }

    def frame(self) -> np.ndarray:
        """The agent's view for people: upright, uint8 (256, 256, 3)."""
        return self._render(self.data, CAMERAS[0], FRAME_SIZE)[::-1].copy()

    def _render(self, data: Any, camera: str, size: int) -> np.ndarray:
        # Made at the first image and in the process that wants it: a context can't be inherited.
        if self._renderer is None or self._renderer_pid != os.getpid():
            self._renderer = OffscreenRenderer(self.model, max(self.image_size, FRAME_SIZE))
            self._renderer_pid = os.getpid()
        return self._renderer.render(data, camera, size)

    def close(self) -> None:
        """Free the render context and the simulation; safe to call twice."""
        if self._renderer is not None and self._renderer_pid == os.getpid():
            self._renderer.close()
        self._renderer = None


def _nothing() -> None:
    return None
