"""Wraps LIBERO in the observations and actions of PI0's checkpoints, and makes `LiberoChunked-v0`.

Reference: `2_test_pi0_on_libero.py` of openpi_pytorch. Its `[:, :, ::-1]`, commented as a change
of colour order, acts on a transposed (C, H, W) image and reverses the width; together with the
vertical flip before it, the image is turned by 180° and its colours stay as they are. That is also
what openpi's own LIBERO evaluation does (`examples/libero/main.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils import RecordConstructorArgs

from cfgrl_gym.envs.arguments import as_list
from cfgrl_gym.envs.libero import BOUND, LiberoEnv
from cfgrl_gym.wrappers.action_chunk import ActionChunk
from cfgrl_gym.wrappers.norm_stats import STATE_DIM
from cfgrl_gym.wrappers.prompt import PROMPT_BYTES, encode_prompt
from cfgrl_gym.wrappers.transforms import quat2axisangle

# the model's camera slot: LIBERO's image
CAMERA_SLOTS = {"base_0_rgb": "agentview_image", "left_wrist_0_rgb": "robot0_eye_in_hand_image"}


def two_test_space(images: Mapping[str, spaces.Space[Any]]) -> spaces.Dict:
    """Return `TwoTestObservation`'s observation space, given the spaces of its camera images."""
    state = spaces.Box(-BOUND, BOUND, (STATE_DIM,), np.float32)
    prompt = spaces.Box(0, 255, (PROMPT_BYTES,), np.uint8)
    return spaces.Dict({**images, "state": state, "prompt": prompt})


def rotate_image(raw: np.ndarray) -> np.ndarray:
    """Turn a raw robosuite image (H, W, RGB) by 180°; the transform is its own inverse."""
    return np.ascontiguousarray(raw[::-1, ::-1])


def robot_state(raw: dict[str, np.ndarray]) -> np.ndarray:
    """Return float32 (8,): gripper position (3, m), axis-angle (3, rad), finger joints (2, m)."""
    return np.concatenate(
        [
            raw["robot0_eef_pos"],
            quat2axisangle(raw["robot0_eef_quat"]),
            raw["robot0_gripper_qpos"],
        ]
    ).astype(np.float32)


class TwoTestObservation(gym.Wrapper[Any, np.ndarray, Any, np.ndarray], RecordConstructorArgs):
    """Gives camera images, the robot's state and the instruction in the form that PI0 reads.

    Keys: `base_0_rgb` and `left_wrist_0_rgb`, uint8 (size, size, 3), if the environment has these
    cameras; `state`, float32 (8,), not normalised; `prompt`, uint8 (256,), see `decode_prompt`.

    :param env: an environment with LIBERO's raw observations and `info["prompt"]`
    :raises ValueError: the environment lacks a key that is needed

    Example:
        >>> env = TwoTestObservation(gym.make("Libero-v0"))  # doctest: +SKIP
    """

    def __init__(self, env: gym.Env) -> None:
        RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)
        self._raw: Any = None
        self._seen: dict[str, np.ndarray] = {}
        raw = env.observation_space
        needed = {"robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"}
        keys = set(raw) if isinstance(raw, spaces.Dict) else set()
        missing = needed - keys
        self._slots = {slot: key for slot, key in CAMERA_SLOTS.items() if key in keys}
        if not self._slots:
            missing |= {CAMERA_SLOTS["base_0_rgb"]}
        if missing:
            raise ValueError(
                f"the environment's observations lack {sorted(missing)}; wrap Libero-v0 itself"
            )
        self.observation_space = two_test_space(
            {slot: raw[key] for slot, key in self._slots.items()}  # type: ignore[index]
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        raw, info = self.env.reset(seed=seed, options=options)
        return self._observation(raw, info), info

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], Any, bool, bool, dict[str, Any]]:
        raw, reward, terminated, truncated, info = self.env.step(action)
        return self._observation(raw, info), reward, terminated, truncated, info

    def _observation(self, raw: Any, info: dict[str, Any]) -> dict[str, np.ndarray]:
        if raw is not self._raw:  # inside a chunk the environment repeats its observation
            self._raw = raw
            self._seen = {slot: rotate_image(raw[key]) for slot, key in self._slots.items()}
            self._seen["state"] = robot_state(raw)
            self._seen["prompt"] = encode_prompt(info["prompt"])
        return self._seen


class LiberoChunked(ActionChunk):
    """Serves as the outermost wrapper of `LiberoChunked-v0`."""

    @property
    def spec(self) -> EnvSpec | None:  # type: ignore[override]
        """Return the spec without the wrappers inside, because the entry point applies these."""
        return self.unwrapped.spec


def make_libero_chunked(
    chunk_size: int = 50,
    observation_stride: int | None = None,
    step_wrappers: Sequence[Callable[[gym.Env], gym.Env]] = (),
    **libero: Any,
) -> gym.Env:
    """Make `Libero-v0` with the 2-test observation and action chunks.

    :param chunk_size: actions executed open loop in one step
    :param observation_stride: see `ActionChunk`
    :param step_wrappers: functions that wrap `Libero-v0` before the chunks do, the first one
        innermost: they see every control step. `[partial(RecordVideo, video_folder="videos")]`
        records a frame for each
    :param libero: the arguments of `LiberoEnv`
    :raises ValueError: `step_wrappers` are no functions, or an argument that `LiberoEnv` refuses
    """
    wrappers = as_list("step_wrappers", step_wrappers, "a list of functions that wrap Libero-v0")
    env: gym.Env = LiberoEnv(**libero)
    for wrap in wrappers:
        wrapped = wrap(env) if callable(wrap) else None
        if not isinstance(wrapped, gym.Env):
            raise ValueError(
                f"each of step_wrappers must be a function that wraps Libero-v0; {wrap!r:.100} "
                f"gave {wrapped!r:.100}. For arguments of its own use functools.partial"
            )
        env = wrapped
    return LiberoChunked(TwoTestObservation(env), chunk_size, observation_stride)
