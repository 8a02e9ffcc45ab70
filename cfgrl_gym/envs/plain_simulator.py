"""Runs LIBERO's unchanged `OffScreenRenderEnv`.

The fast simulator is compared with it, and replaced by it if the installed version of LIBERO or
robosuite is unknown.
"""

import numpy as np

from cfgrl_gym.envs.installation import import_libero
from cfgrl_gym.envs.problems import replaced
from cfgrl_gym.envs.render_backend import keep_display, load_triton
from cfgrl_gym.envs.simulator import (
    CAMERAS,
    FRAME_SIZE,
    IMAGE_KEYS,
    LIBERO_SEED,
    Simulator,
    image_key,
    quiet_and_seeded,
)
from cfgrl_gym.envs.snapshots import SimulatorSnapshot
from cfgrl_gym.envs.suites import Task


class PlainSimulator(Simulator):
    """Runs LIBERO's `OffScreenRenderEnv`: a reset builds it again, a step renders both cameras.

    :param task: a task from `cfgrl_gym.envs.suites`
    :param image_size: side of the observation images in pixels
    :param cameras: those of `CAMERAS` whose images are needed
    """

    def __init__(self, task: Task, image_size: int, cameras: tuple[str, ...] = CAMERAS) -> None:
        super().__init__(task, image_size, cameras)
        load_triton()
        wrapper = import_libero("envs.env_wrapper")
        with quiet_and_seeded(LIBERO_SEED), replaced(lambda own: own):
            self._control = wrapper.OffScreenRenderEnv(
                bddl_file_name=str(task.bddl_file),
                camera_names=list(cameras),
                camera_heights=image_size,
                camera_widths=image_size,
                ignore_done=True,
            )
        keep_display()
        self.robosuite_env = self._control.env
        self._samplers = list(self.robosuite_env.object_property_initializers)
        self._observation: dict[str, np.ndarray] = {}

    def reset(self, seed: int, init_state: np.ndarray | None) -> None:
        self._robosuite_reset(seed)
        if init_state is not None:
            self._set_state(init_state)
            self.robosuite_env._update_observables(force=True)
        self._observation = self.robosuite_env._get_observations()
        self._forget()

    def _prepare_reset(self, number: int) -> None:
        # A hard reset lists the samplers of drawer and knob positions again, after those that are
        # listed already, so that LIBERO's placement depends on the number of resets before.
        if number == 0:
            self.robosuite_env.object_property_initializers = list(self._samplers)

    def advance(self, action: np.ndarray) -> bool:
        self._remember(action)
        self._observation, _, success, _ = self.robosuite_env.step(action)
        return bool(success)

    def snapshot(self) -> SimulatorSnapshot:
        controller = self.robosuite_env.robots[0].controller
        interpolators = [getattr(controller, f"interpolator_{of}", None) for of in ("pos", "ori")]
        if controller.name != "OSC_POSE" or any(one is not None for one in interpolators):
            raise RuntimeError(
                f"no snapshot can be taken: the installed robosuite's controller {controller.name} "
                f"(interpolators {interpolators}) may have a memory that a snapshot doesn't hold, "
                "so that the episode wouldn't go on exactly; use the supported versions, see "
                "`cfgrl doctor`"
            )
        return super().snapshot()

    def _gripper_and_clock(self) -> tuple[np.ndarray, float, bool]:
        gripper = self.robosuite_env.robots[0].gripper.current_action
        # All observables are measured at the same time.
        one = next(iter(self.robosuite_env._observables.values()))
        fingers = np.array(np.broadcast_to(gripper, (2,)), dtype=np.float64)
        return fingers, one._time_since_last_sample, one._sampled

    def _set_gripper_and_clock(self, gripper: np.ndarray, clock: float, sampled: bool) -> None:
        self.robosuite_env.robots[0].gripper.current_action = gripper.copy()
        for observable in self.robosuite_env._observables.values():
            observable._time_since_last_sample, observable._sampled = clock, sampled

    def observe(self) -> dict[str, np.ndarray]:
        return {
            key: np.array(value)
            for key, value in self._observation.items()
            if key not in IMAGE_KEYS and not key.endswith("-state")
        }

    def images(self) -> dict[str, np.ndarray]:
        keys = map(image_key, self.cameras)
        return {key: np.array(self._observation[key]) for key in keys}

    def frame(self) -> np.ndarray:
        image = self.robosuite_env.sim.render(
            width=FRAME_SIZE, height=FRAME_SIZE, camera_name=CAMERAS[0]
        )
        return np.array(image[::-1])

    def close(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
