"""Defines the interface of a built LIBERO task, and implements it by LIBERO itself.

`PlainSimulator` is LIBERO's unchanged `OffScreenRenderEnv`. The fast simulator is compared with it,
and replaced by it if the installed version of LIBERO or robosuite is unknown.
"""

import contextlib
import io
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np

from cfgrl_gym.envs.installation import import_libero
from cfgrl_gym.envs.render_backend import keep_display
from cfgrl_gym.envs.stability import find_fault
from cfgrl_gym.envs.suites import Task

CAMERAS = ("agentview", "robot0_eye_in_hand")
FRAME_SIZE = 256  # side of the images that render() gives, in pixels
SETTLE_ACTION = np.array([0, 0, 0, 0, 0, 0, -1], dtype=np.float64)
SETTLE_STEPS = 20  # 2_test_pi0_on_libero.py of openpi_pytorch
LIBERO_SEED = 0  # the seed in LIBERO's evaluation, before it sets a benchmark state
MAX_PLACEMENT_TRIES = 100


def image_key(camera: str) -> str:
    """Return LIBERO's observation key of a camera's image."""
    return f"{camera}_image"


IMAGE_KEYS = tuple(map(image_key, CAMERAS))

# Held while LIBERO builds or resets anything: it draws from numpy's global generator, prints, and
# writes to models that are shared.
building = threading.RLock()


@contextlib.contextmanager
def quiet_and_seeded(seed: int) -> Iterator[None]:
    """Seed numpy's global generator and silence stdout inside the block, one thread at a time."""
    with building:
        state = np.random.get_state()  # noqa: NPY002
        np.random.seed(seed)  # noqa: NPY002
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                yield
        finally:
            np.random.set_state(state)  # noqa: NPY002


class Simulator(ABC):
    """Defines the interface of a built LIBERO task."""

    robosuite_env: Any  # LIBERO's environment on robosuite

    def __init__(self, task: Task, image_size: int, cameras: tuple[str, ...] = CAMERAS) -> None:
        self.task = task
        self.image_size = image_size
        self.cameras = cameras

    @property
    def model(self) -> Any:
        """Return the compiled `mujoco.MjModel`, not to be modified: environments may share it."""
        return self.robosuite_env.sim.model._model

    @property
    def data(self) -> Any:
        """Return the `mujoco.MjData`."""
        return self.robosuite_env.sim.data._data

    def state(self) -> np.ndarray:
        """Return float64 (1 + nq + nv,): time, qpos, qvel, as LIBERO stores initial states."""
        return np.concatenate([[self.data.time], self.data.qpos, self.data.qvel])

    def fault(self) -> str | None:
        """Say what has gone wrong in the physics since the reset; None if they are sound."""
        return find_fault(self.model, self.data)

    def settle(self, steps: int) -> None:
        """Let objects come to rest: `steps` control steps without motion, the gripper open."""
        for _ in range(steps):
            self.advance(SETTLE_ACTION)

    @abstractmethod
    def reset(self, seed: int, init_state: np.ndarray | None) -> None:
        """Reset as LIBERO's hard reset after `seed(seed)`, then `set_init_state(init_state)`.

        :param seed: seed of LIBERO's placement sampler
        :param init_state: (1 + nq + nv,), or None for the sampler's placement
        :raises ValueError: the initial state is of another model
        :raises RuntimeError: the sampler found no placement
        """

    @abstractmethod
    def advance(self, action: np.ndarray) -> bool:
        """Execute one control step (25 physics substeps of 2 ms) and return LIBERO's success.

        :param action: float64 (7,)
        """

    @abstractmethod
    def observe(self) -> dict[str, np.ndarray]:
        """Return LIBERO's observation without the images, as robosuite measured it last."""

    @abstractmethod
    def images(self) -> dict[str, np.ndarray]:
        """Return LIBERO's image keys: uint8 (image_size, image_size, 3), as robosuite gives them.

        They are those of the cameras with which the simulator was made.
        """

    @abstractmethod
    def frame(self) -> np.ndarray:
        """Render the agent's view for people: upright, uint8 (256, 256, 3)."""

    @abstractmethod
    def close(self) -> None:
        """Free what the simulator holds; safe to call twice."""

    # Shared by the two kinds ------------------------------------------------------------------

    def _robosuite_reset(self, seed: int) -> None:
        """Run robosuite's reset, and repeat it if LIBERO's placement sampler gives up."""
        from robosuite.utils.errors import RandomizationError

        with quiet_and_seeded(seed):
            for number in range(MAX_PLACEMENT_TRIES):
                self._prepare_reset(number)
                try:
                    self.robosuite_env.reset()
                    return
                except RandomizationError:
                    continue
        raise RuntimeError(
            f"LIBERO found no placement for {self.task.name!r} with seed {seed} in "
            f"{MAX_PLACEMENT_TRIES} tries; try another seed"
        )

    @abstractmethod
    def _prepare_reset(self, number: int) -> None:
        """Prepare the state that a new build has before try `number` (from 0) of its reset."""

    def _set_state(self, init_state: np.ndarray) -> None:
        """Run the beginning of LIBERO's `set_init_state`, up to the observation."""
        if init_state.shape != self.state().shape:
            raise ValueError(
                f"the initial state has {init_state.size} numbers, the model of "
                f"{self.task.name!r} needs {self.state().size}: the installed LIBERO's "
                "initial states belong to another version of its assets"
            )
        env = self.robosuite_env
        env.sim.set_state_from_flattened(init_state)
        env.sim.forward()
        env._check_success()
        env._post_process()


class PlainSimulator(Simulator):
    """Runs LIBERO's `OffScreenRenderEnv`: a reset builds it again, a step renders both cameras.

    :param task: a task from `cfgrl_gym.envs.suites`
    :param image_size: side of the observation images in pixels
    :param cameras: those of `CAMERAS` whose images are needed
    """

    def __init__(self, task: Task, image_size: int, cameras: tuple[str, ...] = CAMERAS) -> None:
        super().__init__(task, image_size, cameras)
        wrapper = import_libero("envs.env_wrapper")
        with quiet_and_seeded(LIBERO_SEED):
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

    def _prepare_reset(self, number: int) -> None:
        # A hard reset lists the samplers of drawer and knob positions again, after those that are
        # listed already, so that LIBERO's placement depends on the number of resets before.
        if number == 0:
            self.robosuite_env.object_property_initializers = list(self._samplers)

    def advance(self, action: np.ndarray) -> bool:
        self._observation, _, success, _ = self.robosuite_env.step(action)
        return bool(success)

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
