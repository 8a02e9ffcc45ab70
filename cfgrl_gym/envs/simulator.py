"""Defines the interface of a built LIBERO task, which two simulators implement.

`fast_simulator.py` has the usual one, `plain_simulator.py` LIBERO itself.
"""

import contextlib
import io
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np

from cfgrl_gym.envs.snapshots import ControlStep, SimulatorSnapshot
from cfgrl_gym.envs.stability import find_fault
from cfgrl_gym.envs.suites import Task

CAMERAS = ("agentview", "robot0_eye_in_hand")
FRAME_SIZE = 256  # side of the images that render() gives, in pixels
SETTLE_ACTION = np.array([0, 0, 0, 0, 0, 0, -1], dtype=np.float64)
SETTLE_STEPS = 20  # 2_test_pi0_on_libero.py of openpi_pytorch
LIBERO_SEED = 0  # the seed in LIBERO's evaluation, before it sets a benchmark state
MAX_PLACEMENT_TRIES = 100
# Of a model: what differs between the tasks, and between versions of LIBERO and its assets. Where
# the bodies are is left out, for LIBERO places fixtures at a reset.
_MODEL_ARRAYS = ("qpos0", "body_mass", "body_inertia", "geom_type", "geom_size", "actuator_gainprm")


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
        self._before = np.empty(0)  # the state before the last control step
        self._last_step: dict[str, Any] | None = None  # what else that step depended on
        self._model_checksum: int | None = None

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

    # Snapshots --------------------------------------------------------------------------------

    def model_checksum(self) -> int:
        """Return a checksum of the compiled model and MuJoCo's version."""
        if self._model_checksum is None:
            import mujoco

            arrays = [np.ascontiguousarray(getattr(self.model, name)) for name in _MODEL_ARRAYS]
            parts = (
                mujoco.__version__.encode(),
                self.model.names,
                *map(np.ndarray.tobytes, arrays),
            )
            self._model_checksum = zlib.crc32(b"".join(parts))
        return self._model_checksum

    def state_size(self) -> int:
        """Count the numbers of MuJoCo's `mjSTATE_INTEGRATION`."""
        import mujoco

        return int(mujoco.mj_stateSize(self.model, mujoco.mjtState.mjSTATE_INTEGRATION))

    def snapshot(self) -> SimulatorSnapshot:
        """Return all that `restore` needs to come back to this moment.

        :raises RuntimeError: the controller may have a memory that a snapshot doesn't hold
        """
        step = self._last_step
        return SimulatorSnapshot(
            state=self._integration_state(np.empty(self._before.size)),
            last_step=None if step is None else ControlStep(before=self._before.copy(), **step),
        )

    def restore(
        self, seed: int, init_state: np.ndarray | None, snapshot: SimulatorSnapshot
    ) -> None:
        """Reset as the snapshot's episode was, and repeat the control step that led to it.

        :param seed: of that reset
        :param init_state: of that reset
        :raises RuntimeError: the sampler found no placement
        """
        self.reset(seed, init_state)
        step = snapshot.last_step
        if step is not None:
            self._set_integration_state(step.before)
            self._show_state()  # LIBERO shows a flame by the state after each control step
            self._set_integration_state(step.before)  # before MuJoCo 3.3.6, `forward` changes it
            if step.goal_ori is not None:
                controller = self.robosuite_env.robots[0].controller
                controller.goal_ori, controller.new_update = step.goal_ori.copy(), True
            self._set_gripper_and_clock(step.gripper, step.clock, step.sampled)
            self.advance(step.action)
        # The same state already, unless something but a control step had changed it.
        self._set_integration_state(snapshot.state)

    def _remember(self, action: np.ndarray) -> None:
        """Keep what a control step with this action is going to depend on."""
        self._integration_state(self._before)
        controller = self.robosuite_env.robots[0].controller
        gripper, clock, sampled = self._gripper_and_clock()
        self._last_step = {
            "action": action.copy(),
            "goal_ori": np.array(controller.goal_ori) if controller.new_update else None,
            "gripper": gripper,
            "clock": clock,
            "sampled": sampled,
        }

    def _forget(self) -> None:
        """Forget the steps of the episode before, at the end of a reset."""
        self._last_step = None
        self._before = np.empty(self.state_size())

    @abstractmethod
    def _gripper_and_clock(self) -> tuple[np.ndarray, float, bool]:
        """Return `gripper` (a copy), `clock` and `sampled` of a `ControlStep` that begins now."""

    @abstractmethod
    def _set_gripper_and_clock(self, gripper: np.ndarray, clock: float, sampled: bool) -> None:
        """Set what `_gripper_and_clock` returns."""

    def _integration_state(self, state: np.ndarray) -> np.ndarray:
        import mujoco

        mujoco.mj_getState(self.model, self.data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
        return state

    def _set_integration_state(self, state: np.ndarray) -> None:
        import mujoco

        mujoco.mj_setState(self.model, self.data, state, mujoco.mjtState.mjSTATE_INTEGRATION)

    # Shared by the two kinds ------------------------------------------------------------------

    def _robosuite_reset(self, seed: int) -> None:
        """Run robosuite's reset, and repeat it if LIBERO's placement sampler gives up."""
        from robosuite.utils.errors import RandomizationError

        with quiet_and_seeded(seed):
            for number in range(MAX_PLACEMENT_TRIES):
                self._prepare_reset(number)
                try:
                    self._reset_robosuite()
                    return
                except RandomizationError:
                    continue
        raise RuntimeError(
            f"LIBERO found no placement for {self.task.name!r} with seed {seed} in "
            f"{MAX_PLACEMENT_TRIES} tries; try another seed"
        )

    def _reset_robosuite(self) -> None:
        self.robosuite_env.reset()

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
        self.robosuite_env.sim.set_state_from_flattened(init_state)
        self._show_state()

    def _show_state(self) -> None:
        """Compute what follows from a state that was set, and have LIBERO look at it."""
        env = self.robosuite_env
        env.sim.forward()
        env._check_success()
        env._post_process()
