"""`Libero-v0`: a LIBERO task, or several, as an ordinary Gymnasium environment."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import TimeLimit

from cfgrl_gym.envs.arguments import (
    LARGEST_IMAGE,
    LONGEST,
    as_list,
    check_action,
    check_int,
    check_known,
    is_int,
)
from cfgrl_gym.envs.compiled_models import give_back_freed_memory
from cfgrl_gym.envs.episode_starts import EpisodeStarts
from cfgrl_gym.envs.fast_simulator import build_simulator
from cfgrl_gym.envs.installation import require_assets
from cfgrl_gym.envs.rendering import QUALITIES, Quality
from cfgrl_gym.envs.simulator import CAMERAS, LIBERO_SEED, SETTLE_STEPS, Simulator, image_key
from cfgrl_gym.envs.snapshots import Snapshot, check_model
from cfgrl_gym.envs.stability import attempt
from cfgrl_gym.envs.suites import (
    Task,
    TaskIds,
    episode_limit,
    load_init_states,
    object_names,
    select_tasks,
)

ACTION_DIM = 7  # OSC_POSE delta (6), gripper (1)
RENDER_MODES = ("rgb_array", "rgb_array_list")
MAX_BUILT_TASKS = 4  # compiled tasks that one environment keeps, so that switching is quick
BOUND = 1e6  # of metres, radians and their rates: beyond anything real, but finite

_INIT_STATES = "'benchmark' or 'random', or a list of the benchmark states to draw from"
_ROBOT_KEYS = {
    "robot0_joint_pos": 7,
    "robot0_joint_pos_cos": 7,
    "robot0_joint_pos_sin": 7,
    "robot0_joint_vel": 7,
    "robot0_eef_pos": 3,
    "robot0_eef_quat": 4,
    "robot0_gripper_qpos": 2,
    "robot0_gripper_qvel": 2,
}
_OBJECT_KEYS = {"pos": 3, "quat": 4, "to_robot0_eef_pos": 3, "to_robot0_eef_quat": 4}


class LiberoEnv(EpisodeStarts):
    """One control step (20 Hz) per `step`, raw LIBERO observations, sparse success reward.

    The simulator is built at the first `reset`, in the process that calls it, so that an
    environment can be handed to workers before or after a fork. While `skip_observations` is True,
    steps that don't end the episode return the previous observation again.

    `info` has `success` and `is_success`, `unstable`, `task_id`, `init_state_id` and `prompt`, and
    on request `snapshot`, from which the episode can be continued (see `give_snapshots`). An
    episode whose physics blow up (`stability.py` says what that is) ends there as truncated, with
    `unstable` true, `unstable_reason` in words, no success, and the last sound observation once
    more. The next reset starts afresh.

    :param suite: a suite that the installed LIBERO has
    :param task_id: the task, several as a sequence, or "all"; with several, each episode draws one,
        and observations hold only the objects that all of them have
    :param image_size: side of the two camera images in pixels, 8 to 4096
    :param max_episode_steps: time limit in control steps; None for the suite's own
    :param settle_steps: control steps of no motion after a reset, outside the time limit;
        at most 10,000
    :param init_states: "benchmark" for the states LIBERO evaluates on, or a list of some of them
        to draw from (an episode may still be asked to start from another); "random" for its
        placement sampler: an episode's `init_state_id` is then the sampler's seed
    :param cameras: whose images the observations have: "agentview", "robot0_eye_in_hand" or both
    :param image_quality: "benchmark" for the images that LIBERO gives, or "draft" for ones without
        multisampling that are cheaper to draw in software; NOT the benchmark's images
    :param render_mode: None, "rgb_array", or "rgb_array_list" (a frame for every control step)
    :raises ValueError: an argument that LIBERO can't serve; the message names what it can
    :raises LiberoNotInstalledError: LIBERO is missing
    """

    metadata = {  # noqa: RUF012
        "render_modes": list(RENDER_MODES),
        "render_fps": 20,
        "autoreset_mode": AutoresetMode.DISABLED,
    }

    def __init__(
        self,
        suite: str = "libero_object",
        task_id: TaskIds = 0,
        image_size: int = 224,
        max_episode_steps: int | None = None,
        settle_steps: int = SETTLE_STEPS,
        init_states: Literal["benchmark", "random"] | Sequence[int] = "benchmark",
        render_mode: str | None = None,
        cameras: Sequence[str] = CAMERAS,
        image_quality: Quality = "benchmark",
    ) -> None:
        check_known("render_mode", render_mode, (None, *RENDER_MODES))
        check_known("image_quality", image_quality, QUALITIES)
        named = as_list("cameras", cameras, f"a list of some of {CAMERAS}")
        if not named:
            raise ValueError(f"cameras must be a list of some of {CAMERAS}; got none")
        for camera in named:
            check_known("each of cameras", camera, CAMERAS)
        image_size = check_int("image_size", image_size, 8, LARGEST_IMAGE)
        settle_steps = check_int("settle_steps", settle_steps, 0, LONGEST)
        if max_episode_steps is not None:
            max_episode_steps = check_int("max_episode_steps", max_episode_steps, 1)
        super().__init__()
        self._tasks: dict[int, Task] = {t.task_id: t for t in select_tasks(suite, task_id)}
        require_assets()  # here, where a worker's error is the caller's, and not when it is built
        self.metadata = dict(self.metadata)  # vector environments write into it
        self.suite = suite
        self.image_size = image_size
        self.max_episode_steps = max_episode_steps or episode_limit(suite)
        self.settle_steps = settle_steps
        self.init_states = _init_states(init_states)
        for listed_for in self._tasks:
            self.init_state_ids(listed_for)  # refuses states that the task doesn't have
        self.render_mode = render_mode
        self.cameras = tuple(camera for camera in CAMERAS if camera in named)
        self.image_quality: Quality = image_quality
        self.skip_observations = False

        shape = (self.image_size, self.image_size, 3)
        keys: dict[str, spaces.Space[Any]] = {
            image_key(camera): spaces.Box(0, 255, shape, np.uint8) for camera in self.cameras
        }
        sizes = dict(_ROBOT_KEYS)
        for name in object_names(tuple(self._tasks.values())):
            sizes |= {f"{name}_{key}": size for key, size in _OBJECT_KEYS.items()}
        for key, size in sizes.items():
            keys[key] = spaces.Box(-BOUND, BOUND, (size,), np.float64)  # type: ignore[arg-type]
        self._spaces = keys
        self.observation_space = spaces.Dict(keys)  # type: ignore[assignment]
        self.action_space = spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)

        self._simulators: OrderedDict[int, Simulator] = OrderedDict()
        self._frames: list[np.ndarray] = []
        self._last_observation: dict[str, np.ndarray] = {}
        self._simulator: Simulator | None = None
        self._task = next(iter(self._tasks.values()))
        self._init_state_id = 0
        self._steps = 0
        self._over = True
        self._gives_snapshots = False

    # Gymnasium --------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start the episode of `options`, else the next queued one, else a drawn one.

        From a snapshot its episode goes on exactly as it did, given the same actions, and its
        control steps before count towards the time limit.

        :param options: {"task_id": int, "init_state_id": int}, both optional, or
            {"snapshot": Snapshot}
        :raises RuntimeError: the physics blow up before the first step
        :raises ValueError: other options, or a snapshot of another environment, task or model; the
            episode that runs goes on then
        """
        start = self._next_start(options)
        snapshot = start.snapshot
        if snapshot is not None:
            simulator = self._built(self._tasks[snapshot.task_id])
            check_model(snapshot, simulator.model_checksum(), simulator.state_size())
        super().reset(seed=seed)
        task_id, self._init_state_id = self._draw(start)
        self._task = self._tasks[task_id]
        self._over = True  # until there is something to step
        simulator = self._simulator = self._built(self._task)
        _, fault = attempt(partial(self._place, simulator, snapshot), simulator.fault)
        if fault is not None and snapshot is not None:
            raise RuntimeError(
                f"{self.suite} task {task_id} ({self._task.name!r}) can't go on from the snapshot: "
                f"its physics have blown up: {fault}; take another one"
            )
        if fault is not None:
            kind = "placement seed" if self.init_states == "random" else "benchmark state"
            raise RuntimeError(
                f"{self.suite} task {task_id} ({self._task.name!r}) can't start from {kind} "
                f"{self._init_state_id}: its physics blow up in the reset or the "
                f"{self.settle_steps} settle steps: {fault}. Start from another one; if all of "
                "them do so, the installed LIBERO's initial states or assets are damaged"
            )
        self._steps = 0 if snapshot is None else snapshot.steps
        self._over = False
        self._frames.clear()
        self._record_frame()
        self._last_observation = self._observation()
        return self._last_observation, self._info(success=False)

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Execute one control step.

        :param action: (7,) in [-1, 1]: OSC_POSE delta (6) and gripper (-1 opens, 1 closes)
        :raises ValueError: wrong shape, NaN or infinity, or no numbers; the simulator has not
            moved then
        :raises ResetNeeded: the episode is over
        """
        action = check_action(action, (ACTION_DIM,)).astype(np.float64)
        if self._over or self._simulator is None:
            raise ResetNeeded("the episode is over, or none has begun; call reset() first")
        simulator = self._simulator
        reached, fault = attempt(partial(simulator.advance, action), simulator.fault)
        success = bool(reached) and fault is None
        self._steps += 1
        truncated = not success and (fault is not None or self._steps >= self.max_episode_steps)
        self._over = success or truncated
        self._record_frame()
        if fault is not None:  # a copy, for the caller may have kept the last one
            self._last_observation = {k: v.copy() for k, v in self._last_observation.items()}
        elif self._over or not self.skip_observations:
            self._last_observation = self._observation()
        info = self._info(success, fault)
        return self._last_observation, float(success), success, truncated, info

    def render(self) -> Any:
        """Return the scene for people, uint8 (256, 256, 3); in list mode, all since last asked."""
        if self.render_mode is None:
            raise ValueError('make the environment with render_mode="rgb_array" to render it')
        if self.render_mode == "rgb_array_list":
            frames, self._frames = self._frames, []
            return frames
        if self._simulator is None:
            raise ResetNeeded("nothing to render yet; call reset() first")
        return self._simulator.frame()

    def close(self) -> None:
        for simulator in self._simulators.values():
            simulator.close()
        self._simulators.clear()
        self._simulator = None

    # Access -----------------------------------------------------------------------------------

    @property
    def simulator(self) -> Simulator:
        """The simulator of the current task.

        :raises ResetNeeded: before the first reset
        """
        if self._simulator is None:
            raise ResetNeeded("the simulator is built at the first reset(); call it first")
        return self._simulator

    @property
    def built_tasks(self) -> tuple[int, ...]:
        """The tasks that an episode can begin in at once, the last used one last; up to 4 are kept.

        To build another one takes seconds.
        """
        return tuple(self._simulators)

    def snapshot(self) -> Snapshot:
        """Return this moment of the episode, from which any environment of the task can go on.

        `reset(options={"snapshot": snapshot})` and `queue_episode(snapshot=snapshot)` do so, in
        this environment or another one of the same suite, task, `settle_steps` and kind of
        `init_states`, in this process or another. It is plain data of 5 to 8 KB, see `Snapshot`.

        :raises ResetNeeded: no episode runs, so that there is nothing to go on from
        :raises RuntimeError: the physics have blown up, or LIBERO's own simulator runs with a
            controller that it can't continue exactly
        """
        if self._over:
            raise ResetNeeded("the episode is over, or none has begun: nothing to go on from")
        fault = self.simulator.fault()
        if fault is not None:
            raise RuntimeError(f"the physics have blown up, so nothing can go on: {fault}")
        return self._snapshot()

    def give_snapshots(self, enabled: bool) -> None:
        """Have `info["snapshot"]` of resets and steps hold the snapshot after them, or no longer.

        A step that ends the episode has none, nor has one inside an action chunk.

        :raises ValueError: neither True nor False
        """
        check_known("enabled", enabled, (True, False))
        self._gives_snapshots = enabled

    def sim_state(self) -> np.ndarray:
        """Return the simulator's state, flat float64 (1 + nq + nv,): time, qpos, qvel."""
        return self.simulator.state()

    # ------------------------------------------------------------------------------------------

    def _built(self, task: Task) -> Simulator:
        if task.task_id not in self._simulators:
            if len(self._simulators) >= MAX_BUILT_TASKS:
                self._simulators.popitem(last=False)[1].close()
                give_back_freed_memory()
            self._simulators[task.task_id] = build_simulator(
                task, self.image_size, self.cameras, self.image_quality
            )
        self._simulators.move_to_end(task.task_id)
        return self._simulators[task.task_id]

    def _place(self, simulator: Simulator, snapshot: Snapshot | None) -> None:
        seed, init_state = self._init_state_id, None
        if self.init_states != "random":
            states = load_init_states(self.suite, self._task.task_id)
            seed, init_state = LIBERO_SEED, states[self._init_state_id]
        if snapshot is not None:
            simulator.restore(seed, init_state, snapshot.simulator)
        else:
            simulator.reset(seed, init_state)
            simulator.settle(self.settle_steps)

    def _snapshot(self) -> Snapshot:
        return Snapshot(
            suite=self.suite,
            task_id=self._task.task_id,
            init_states=self._kind_of_init_states,
            init_state_id=self._init_state_id,
            settle_steps=self.settle_steps,
            steps=self._steps,
            model=self.simulator.model_checksum(),
            simulator=self.simulator.snapshot(),
        )

    def _record_frame(self) -> None:
        if self.render_mode == "rgb_array_list":
            self._frames.append(self.simulator.frame())

    def _observation(self) -> dict[str, np.ndarray]:
        values = self.simulator.observe() | self.simulator.images()
        return {
            key: np.asarray(values[key], dtype=space.dtype) for key, space in self._spaces.items()
        }

    def _info(self, success: bool, fault: str | None = None) -> dict[str, Any]:
        info = {
            "success": success,
            "is_success": success,
            "unstable": fault is not None,
            "task_id": self._task.task_id,
            "init_state_id": self._init_state_id,
            "prompt": self._task.prompt,
        }
        if self._gives_snapshots and not self._over and not self.skip_observations:
            info["snapshot"] = self._snapshot()
        return info if fault is None else info | {"unstable_reason": fault}


def _init_states(given: Any) -> str | tuple[int, ...]:
    if isinstance(given, str) and given in ("benchmark", "random"):
        return given
    ids = as_list("init_states", given, _INIT_STATES)
    if not all(is_int(one) for one in ids):
        raise ValueError(f"init_states must be {_INIT_STATES}, ints; got {given!r:.100}")
    return tuple(int(one) for one in ids)


def limit_control_steps(env: gym.Env) -> gym.Env:
    """Give the limit that `gym.make` took for itself to the environment it is meant for.

    `gym.make(..., max_episode_steps=n)` doesn't hand `n` on. It adds a `TimeLimit` instead, which
    would count chunks; this function is applied after that and puts its work where it belongs.
    """
    if not isinstance(env, TimeLimit):
        return env
    inner = env.unwrapped
    assert isinstance(inner, LiberoEnv)
    assert inner.spec is not None
    limit = check_int("max_episode_steps", env._max_episode_steps, 1)
    inner.max_episode_steps = inner.spec.kwargs["max_episode_steps"] = limit
    return env.env
