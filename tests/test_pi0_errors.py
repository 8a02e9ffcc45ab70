"""Spaces, observations and arguments that Pi0Policy refuses, each with a message that helps."""

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from pi0_support import make_observation, make_policy, make_spaces

from cfgrl_gym.algorithms.pi0 import Pi0Policy


def _without(*keys: str) -> spaces.Dict:
    space = make_spaces()[0]
    return spaces.Dict({name: part for name, part in space.spaces.items() if name not in keys})


@pytest.mark.parametrize(
    ("observation_space", "action_shape", "message"),
    [
        (spaces.Box(-1, 1, (8,)), (6, 7), "expected a Dict with a camera"),
        (_without("prompt"), (6, 7), "lacks prompt .*TwoTestObservation"),
        (_without("base_0_rgb", "left_wrist_0_rgb"), (6, 7), r"lacks a camera \(base_0_rgb"),
        (spaces.Dict({**make_spaces()[0].spaces, "state": spaces.Box(-1, 1, (9,))}), (6, 7), "9"),
        (make_spaces()[0], (6, 8), "OSC_POSE delta and gripper"),
    ],
)
def test_spaces_it_cannot_take_are_refused(
    observation_space: spaces.Space, action_shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Pi0Policy(observation_space, spaces.Box(-1, 1, action_shape), lambda _: 1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_0_rgb": np.zeros((3, 32, 32), np.uint8)}, "base_0_rgb has shape"),
        ({"base_0_rgb": np.zeros((3, 32, 32, 3), np.float32)}, "expected uint8"),
        ({"state": np.zeros((3, 9), np.float32)}, "state has shape"),
        ({"state": np.zeros((2, 8), np.float32)}, "differ in batch size"),
        ({"prompt": np.zeros((3,), np.uint8)}, "prompt has shape"),
    ],
)
def test_bad_observations_are_refused(change: dict[str, np.ndarray], message: str) -> None:
    policy = make_policy()
    with pytest.raises(ValueError, match=message):
        policy.encode_observation({**make_observation(), **change})
    with pytest.raises(ValueError, match="lacks state"):
        policy.encode_observation({k: v for k, v in make_observation().items() if k != "state"})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"preset": "huge"}, "preset must be one of"),
        ({"preset": "pi0"}, "needs a checkpoint"),
        ({"trainable": "lora", "lora_rank": 0}, "lora_rank must be at least 1; got 0"),
        ({"trainable": "vlm"}, "trainable must be one of"),
        ({"guidance": "both"}, "guidance must be"),
        ({"horizon": 3}, "chunk_size <= 3"),
    ],
)
def test_bad_arguments_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy(**kwargs)
