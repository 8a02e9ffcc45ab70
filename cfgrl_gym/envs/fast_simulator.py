"""Computes LIBERO's physics and observations, bit for bit, at a fraction of their cost.

The task is LIBERO's own environment on robosuite, which still decides about placement, success and
the look of a flame. What is done differently, without a difference in the result:

- The compiled model is shared with other environments and kept on disk (`compiled_models`).
- A reset restores the state of a new build instead of building again.
- A control step runs the compiled controller, and each substep computes the dynamics once instead
  of three times (`control_loop`).
- Observations and images are computed on request, from the state in which robosuite would have
  measured them (`control_loop`).
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from cfgrl_gym.envs import rendering
from cfgrl_gym.envs.compiled_models import COLOURS, CompiledModel, compiled
from cfgrl_gym.envs.installation import assets_required, fast_hint, import_libero
from cfgrl_gym.envs.plain_simulator import PlainSimulator
from cfgrl_gym.envs.problems import replaced
from cfgrl_gym.envs.rendering import Quality
from cfgrl_gym.envs.simulator import (
    CAMERAS,
    FRAME_SIZE,
    LIBERO_SEED,
    SETTLE_ACTION,
    Simulator,
    building,
    image_key,
    quiet_and_seeded,
)
from cfgrl_gym.envs.stability import keep_log_out_of_the_working_directory
from cfgrl_gym.envs.suites import Task
from cfgrl_gym.envs.upstream import UnknownUpstreamError, check_upstream

_warned = False
_CHECKED_STEPS = 2  # control steps, 50 substeps


def build_simulator(
    task: Task,
    image_size: int,
    cameras: tuple[str, ...] = CAMERAS,
    quality: Quality = "benchmark",
) -> Simulator:
    """Build a `FastSimulator` or, if that may not be exact, unchanged LIBERO, with a warning."""
    global _warned
    keep_log_out_of_the_working_directory()
    with assets_required():
        try:
            return FastSimulator(task, image_size, cameras, quality)
        except UnknownUpstreamError as error:
            if not _warned:
                _warned = True
                warnings.warn(
                    f"simulating at LIBERO's own speed: {error}. Results are LIBERO's all the "
                    f"same. For the fast path: {fast_hint()}",
                    stacklevel=4,
                )
            return PlainSimulator(task, image_size, cameras)


def set_measured(model: Any, data: Any, measured: tuple[np.ndarray, ...]) -> None:
    """Give `mujoco.MjData` the poses of what `ControlLoop.measured` holds."""
    import mujoco

    data.qpos[:], after, velocities = measured
    # What a measurement or a picture depends on, in the order of mj_fwdPosition.
    mujoco.mj_kinematics(model, data)
    mujoco.mj_comPos(model, data)
    mujoco.mj_camlight(model, data)
    data.qpos[:], data.qvel[:] = after, velocities


def on_shared_models(environment_class: type) -> type:
    """Make a subclass of a LIBERO problem that takes compiled models and doesn't modify them."""
    from robosuite.utils.binding_utils import MjModel, MjSim

    own_colours = type("MjModel", (MjModel,), {})
    for name in COLOURS:
        setattr(own_colours, name, None)  # an attribute of its own in place of the property

    def initialize_sim(self: Any, xml_string: str | None = None) -> None:
        self.compiled_model = compiled(xml_string or self.model.get_xml())
        self.sim = MjSim(self.compiled_model.mj)
        self.sim.model.__class__ = own_colours
        for name, colours in self.compiled_model.colours.items():
            setattr(self.sim.model, name, colours.copy())
        self.sim.forward()
        self.initialize_time(self.control_freq)

    # LIBERO compares the class name with the problem's, so the name stays.
    body = {"_initialize_sim": initialize_sim, "__module__": __name__}
    return type(environment_class.__name__, (environment_class,), body)


class FastSimulator(Simulator):
    """Runs a LIBERO task at full speed.

    :param task: a task from `cfgrl_gym.envs.suites`
    :param image_size: side of the observation images in pixels
    :param cameras: those of `CAMERAS` whose images are needed
    :param quality: "benchmark" for LIBERO's images, "draft" for cheaper ones without multisampling
    :raises UnknownUpstreamError: the installed LIBERO, robosuite or MuJoCo isn't a version whose
        results this class is known to reproduce
    """

    _checked = False  # that the compiled controller gives robosuite's bits in this process

    def __init__(
        self,
        task: Task,
        image_size: int,
        cameras: tuple[str, ...] = CAMERAS,
        quality: Quality = "benchmark",
    ) -> None:
        super().__init__(task, image_size, cameras)
        self.quality: Quality = quality
        wrapper = import_libero("envs.env_wrapper")
        with quiet_and_seeded(LIBERO_SEED), replaced(on_shared_models):
            control = wrapper.ControlEnv(
                bddl_file_name=str(task.bddl_file),
                use_camera_obs=False,
                has_offscreen_renderer=False,
                hard_reset=False,
                ignore_done=True,
            )
        self._take(control.env, type(control.env))

    def _take(self, env: Any, problem: Any) -> None:
        """Simulate this environment from now on.

        :param problem: the class of `on_shared_models` with robosuite's own reset and step
        """
        import mujoco

        from cfgrl_gym.envs.control_loop import ControlLoop

        self.robosuite_env, self._problem = env, problem
        self._samplers = list(env.object_property_initializers)
        self._compiled: CompiledModel = env.compiled_model
        # The poses in the measured state, computed on request.
        self._measured: Any = mujoco.MjData(self.model)
        self._measured_is_current = False
        self._measured_colours: dict[str, np.ndarray] = {}
        check_upstream(env, import_libero("envs.env_wrapper").ControlEnv)
        self._loop: Any = ControlLoop(env)
        self._check_control_loop()

    # Episodes ---------------------------------------------------------------------------------

    def reset(self, seed: int, init_state: np.ndarray | None) -> None:
        with self._placing():
            self._robosuite_reset(seed)
        if init_state is not None:
            self._set_state(init_state)
        self._begin_episode(forced_measurements=1 if init_state is None else 2)

    @contextmanager
    def _placing(self) -> Iterator[None]:
        """Have the model as compiled inside, in which a reset moves fixtures."""
        sim, base = self.robosuite_env.sim, self._compiled.base
        with building:
            sim.model._model = base.mj
            try:
                yield
                self._compiled = self._placed(base)
            finally:
                base.restore()
                sim.model._model = self._compiled.mj

    def _placed(self, base: CompiledModel) -> CompiledModel:
        """Return the model to step after a reset that moved the fixtures of `base`."""
        return base.as_placed()

    def _begin_episode(self, forced_measurements: int) -> None:
        self._loop.start_episode(forced_measurements)
        self._measured_is_current = False
        self._measured_colours = self._colours()
        self._forget()

    def _reset_robosuite(self) -> None:
        self._problem.reset(self.robosuite_env)

    def _prepare_reset(self, number: int) -> None:
        env, base = self.robosuite_env, self._compiled.base
        base.restore()
        for name, colours in base.colours.items():
            getattr(env.sim.model, name)[:] = colours
        # LIBERO builds a task once more at each try of a reset, and every build lists the samplers
        # of drawer and knob positions again; the draws that follow depend on it.
        env.object_property_initializers = self._samplers * (2 + number)
        # A rebuilt gripper starts with no memory of its last command.
        for robot in env.robots:
            robot.gripper.current_action = np.zeros(robot.gripper.dof)

    def advance(self, action: np.ndarray) -> bool:
        self._remember(action)
        self._control_step(action)
        return bool(self.robosuite_env._check_success())

    def _control_step(self, action: np.ndarray) -> float:
        """Execute a control step, and return LIBERO's reward."""
        env = self.robosuite_env
        env.timestep += 1
        if self._loop.advance(action):
            self._measured_is_current = False
        env.cur_time += env.control_timestep
        self._measured_colours = self._colours()  # LIBERO draws first and then turns a flame on
        reward: float = env._post_action(action)[0]
        return reward

    def _gripper_and_clock(self) -> tuple[np.ndarray, float, bool]:
        return self._loop.gripper.copy(), *self._loop.clock.phase

    def _set_gripper_and_clock(self, gripper: np.ndarray, clock: float, sampled: bool) -> None:
        # Twice, for the first substep of an episode is robosuite's own.
        self.robosuite_env.robots[0].gripper.current_action = gripper.copy()
        self._loop.gripper[:] = gripper
        self._loop.clock.phase = clock, sampled

    # Observation ------------------------------------------------------------------------------

    def _measured_poses(self) -> Any:
        """Return `MjData` with the poses that robosuite's observables measured."""
        if not self._measured_is_current:
            set_measured(self.model, self._measured, self._loop.measured)
            self._measured_is_current = True
        return self._measured

    def observe(self) -> dict[str, np.ndarray]:
        env = self.robosuite_env
        wrapped, now = env.sim.data, env.sim.data._data
        cache, observation = env._obs_cache, {}
        wrapped._data = self._measured_poses()
        try:
            # `Observable.update` and `_get_observations` of robosuite, without their clocks
            for name, observable in env._observables.items():
                if observable._enabled:
                    value = np.array(observable._sensor(cache))
                    value = cache[name] = value[0] if value.shape == (1,) else value
                    if observable._active:
                        observation[name] = np.array(value)
        finally:
            wrapped._data = now
        return observation

    def images(self) -> dict[str, np.ndarray]:
        poses, colours = self._measured_poses(), self._measured_colours
        pictures = self._render(poses, self.cameras, self.image_size, colours)
        return {
            image_key(camera): picture
            for camera, picture in zip(self.cameras, pictures, strict=True)
        }

    def frame(self) -> np.ndarray:
        return self._render(self.data, CAMERAS[:1], FRAME_SIZE)[0][::-1].copy()

    def _colours(self) -> dict[str, np.ndarray]:
        return {name: getattr(self.robosuite_env.sim.model, name).copy() for name in COLOURS}

    def _render(
        self,
        data: Any,
        cameras: tuple[str, ...],
        size: int,
        colours: dict[str, np.ndarray] | None = None,
    ) -> list[np.ndarray]:
        colours = colours or self._colours()
        return rendering.render(self._compiled, data, colours, cameras, size, self.quality)

    def close(self) -> None:
        """Free the simulator, and models and contexts if no other environment uses them."""
        if self.robosuite_env is not None:
            # LIBERO's objects form reference cycles; dropping the large ones frees them now.
            self.robosuite_env.compiled_model = None
            self.robosuite_env.close()
            self.robosuite_env = self._loop = self._measured = None
            self._compiled = None  # type: ignore[assignment]
            rendering.free_unused()

    # Check ------------------------------------------------------------------------------------

    def _check_control_loop(self) -> None:
        """Compare the compiled controller with robosuite's own, once per process.

        Numerical libraries of another machine could round differently, which the version of the
        source code can't show.
        """
        if FastSimulator._checked:
            return
        actions = np.random.default_rng(0).uniform(-1, 1, (_CHECKED_STEPS, len(SETTLE_ACTION)))
        results = []
        for advance in (partial(self._problem.step, self.robosuite_env), self.advance):
            self.reset(LIBERO_SEED, None)
            for action in actions:
                advance(action)
            results.append(self.state())
        difference = np.abs(results[0] - results[1]).max()
        if difference != 0:  # also if it is not a number
            raise UnknownUpstreamError(
                "the compiled controller and robosuite's own give different results on this "
                f"machine (by up to {difference:.1e})"
            )
        FastSimulator._checked = True
