"""Converts the environment's observations to PI0's inputs, and checks its spaces."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from cfgrl_gym.algorithms.pi0.tokenizer import PromptTokenizer, tokenize
from cfgrl_gym.wrappers.norm_stats import ACTION_DIM, STATE_DIM
from cfgrl_gym.wrappers.transforms import image_to_model, resize_with_pad

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")  # PI0's three slots, in order
REQUIRED_KEYS = ("state", "prompt")
_FIX = (
    "Pi0Policy takes the observations of LiberoChunked-v0; for another LIBERO environment wrap it "
    "in cfgrl_gym.wrappers.TwoTestObservation"
)


def check_spaces(observation_space: spaces.Space, action_space: spaces.Space) -> tuple[str, ...]:
    """Check that PI0 can take these spaces, and return the cameras present, in PI0's order.

    :raises ValueError: it can't; the message says what is missing and how to add it
    """
    if not isinstance(observation_space, spaces.Dict):
        raise ValueError(
            f"the observation space is {observation_space}; expected a Dict with a camera "
            f"({', '.join(CAMERAS)}), {', '.join(REQUIRED_KEYS)}. {_FIX}"
        )
    missing = [key for key in REQUIRED_KEYS if key not in observation_space.spaces]
    cameras = tuple(name for name in CAMERAS if name in observation_space.spaces)
    if not cameras:
        missing.append(f"a camera ({', '.join(CAMERAS)})")
    if missing:
        raise ValueError(
            f"the observation space lacks {', '.join(missing)} "
            f"(it has {', '.join(observation_space.spaces)}). {_FIX}"
        )
    for name in (*cameras, *REQUIRED_KEYS):
        part = observation_space[name]
        _check_part(name, part.shape or (), str(part.dtype), _FIX)
    shape = action_space.shape or ()
    is_box = isinstance(action_space, spaces.Box)
    if not is_box or len(shape) > 2 or shape[-1:] != (ACTION_DIM,):
        raise ValueError(
            f"the action space is {action_space}; expected Box (chunk, {ACTION_DIM}) or "
            f"({ACTION_DIM},): LIBERO's OSC_POSE delta and gripper"
        )
    return cameras


def _check_part(name: str, shape: Sequence[int], dtype: str, remedy: str) -> None:
    """Check one part of an observation.

    :raises ValueError: it has another shape or dtype than PI0 takes
    """
    if name == "state":
        good = tuple(shape) == (STATE_DIM,)
        expected = f"({STATE_DIM},): position (3), axis-angle (3), gripper (2)"
    elif name == "prompt":
        good = len(shape) == 1 and dtype == "uint8"
        expected = "uint8 (N,), UTF-8 bytes"
    else:
        good = len(shape) == 3 and 3 in (shape[0], shape[-1]) and dtype == "uint8"
        expected = "uint8 (height, width, 3)"
    if not good:
        raise ValueError(
            f"{name} has shape {tuple(shape)} and dtype {dtype}; expected {expected}. {remedy}"
        )


def encode_cameras(obs: dict[str, Tensor], cameras: tuple[str, ...], size: int) -> Tensor:
    """Convert the images of the cameras to pixels in [-1, 1].

    :param obs: uint8 (batch, H, W, 3) of each camera, or (batch, 3, H, W) as SB3's
        VecTransposeImage makes it
    :return: float32 (batch, cameras, 3, size, size)
    """
    pixels = []
    for name in cameras:
        images = obs[name]
        if images.shape[-1] != 3:
            images = images.permute(0, 2, 3, 1)
        resized = resize_with_pad(images, size, size)
        pixels.append(image_to_model(resized.permute(0, 3, 1, 2).float()))
    return torch.stack(pixels, dim=1)


def encode_text(
    prompts: Tensor,
    tokenizer: PromptTokenizer,
    image_token_id: int,
    image_tokens: int,
    words: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Build the prefix's token ids and masks, int64 (batch, image tokens + prompt tokens).

    :param prompts: UTF-8 bytes, uint8 (batch, N), zero-padded
    :param image_tokens: number of tokens of all cameras together; they come first
    :param words: text after each instruction; None: nothing
    """
    rows = prompts.cpu().numpy().astype(np.uint8)
    texts = [row.tobytes().rstrip(b"\0").decode("utf-8", errors="replace") for row in rows]
    ids, mask, instruction = tokenize(texts, tokenizer, prompts.device, words)
    images = torch.full(
        (ids.shape[0], image_tokens), image_token_id, dtype=torch.int64, device=ids.device
    )
    return {
        "input_ids": torch.cat([images, ids], dim=1),
        "attention_mask": torch.cat([torch.ones_like(images), mask], dim=1),
        "instruction_mask": torch.cat([torch.zeros_like(images), instruction], dim=1),
    }


def to_tensors(obs: Any, keys: tuple[str, ...], device: torch.device) -> dict[str, Tensor]:
    """Convert the observation's `keys` to tensors on `device`, checking that they fit together."""
    if not isinstance(obs, dict):
        raise ValueError(f"expected a dictionary observation; got {type(obs).__name__}")
    missing = [key for key in keys if key not in obs]
    if missing:
        raise ValueError(f"the observation lacks {', '.join(missing)}; it has {', '.join(obs)}")
    tensors = {key: torch.as_tensor(obs[key], device=device) for key in keys}
    batch = {key: tensor.shape[0] if tensor.ndim else None for key, tensor in tensors.items()}
    if len(set(batch.values())) != 1:
        raise ValueError(f"the observation's parts differ in batch size: {batch}")
    for name, part in tensors.items():
        dtype = str(part.dtype).removeprefix("torch.")
        _check_part(name, part.shape[1:], dtype, "Every part needs a batch dimension, as its first")
    return tensors
