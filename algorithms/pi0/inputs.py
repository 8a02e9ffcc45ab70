"""Observations, as the environment gives them, to PI0's inputs; and which spaces will do."""

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
    """The cameras that the observation space has, in PI0's order.

    :raises ValueError: PI0 can't take these spaces; says what is missing and the fix
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
    for name in cameras:
        box = observation_space.spaces[name]
        if box.dtype != np.uint8 or len(box.shape or ()) != 3 or 3 not in box.shape:  # type: ignore[operator]
            raise ValueError(f"{name} is {box}; expected uint8 (height, width, 3). {_FIX}")
    if observation_space["state"].shape != (STATE_DIM,):
        raise ValueError(
            f"state has shape {observation_space['state'].shape}; expected ({STATE_DIM},): "
            f"position (3), axis-angle (3), gripper (2). {_FIX}"
        )
    prompt = observation_space["prompt"]
    if prompt.dtype != np.uint8 or len(prompt.shape or ()) != 1:
        raise ValueError(f"prompt is {prompt}; expected uint8 (N,), UTF-8 bytes. {_FIX}")
    shape = action_space.shape
    if not isinstance(action_space, spaces.Box) or shape is None or shape[-1:] != (ACTION_DIM,):
        raise ValueError(
            f"the action space is {action_space}; expected Box (chunk, {ACTION_DIM}) or "
            f"({ACTION_DIM},): LIBERO's OSC_POSE delta and gripper"
        )
    if len(shape) > 2:
        raise ValueError(f"the action space has shape {shape}; expected (chunk, {ACTION_DIM})")
    return cameras


def encode_cameras(obs: dict[str, Tensor], cameras: tuple[str, ...], size: int) -> Tensor:
    """Images of the cameras there are, to pixels in [-1, 1].

    :param obs: uint8 (batch, H, W, 3) of each camera, or (batch, 3, H, W) as SB3's
        VecTransposeImage makes it
    :return: float32 (batch, cameras, 3, size, size)
    """
    pixels = []
    for name in cameras:
        images = obs[name]
        rgb = images.ndim == 4 and 3 in (images.shape[-1], images.shape[1])
        if not rgb or images.dtype != torch.uint8:
            raise ValueError(
                f"{name} has shape {tuple(images.shape)} and dtype {images.dtype}; expected uint8 "
                "(batch, height, width, 3). A single observation needs a batch dimension"
            )
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
) -> dict[str, Tensor]:
    """Token ids of the whole prefix and its masks, int64 (batch, image tokens + prompt tokens).

    :param prompts: UTF-8 bytes, uint8 (batch, N), zero-padded
    :param image_tokens: tokens of all the cameras there are; they come first
    """
    rows = prompts.cpu().numpy().astype(np.uint8)
    texts = [row.tobytes().rstrip(b"\0").decode("utf-8", errors="replace") for row in rows]
    ids, mask, instruction = tokenize(texts, tokenizer, prompts.device)
    images = torch.full(
        (ids.shape[0], image_tokens), image_token_id, dtype=torch.int64, device=ids.device
    )
    return {
        "input_ids": torch.cat([images, ids], dim=1),
        "attention_mask": torch.cat([torch.ones_like(images), mask], dim=1),
        "instruction_mask": torch.cat([torch.zeros_like(images), instruction], dim=1),
    }


def to_tensors(obs: Any, keys: tuple[str, ...], device: torch.device) -> dict[str, Tensor]:
    """The observation's `keys` as tensors on `device`, all of one batch size."""
    if not isinstance(obs, dict):
        raise ValueError(f"expected a dictionary observation; got {type(obs).__name__}")
    missing = [key for key in keys if key not in obs]
    if missing:
        raise ValueError(f"the observation lacks {', '.join(missing)}; it has {', '.join(obs)}")
    tensors = {key: torch.as_tensor(obs[key], device=device) for key in keys}
    batch = {key: tensor.shape[0] if tensor.ndim else None for key, tensor in tensors.items()}
    if len(set(batch.values())) != 1:
        raise ValueError(f"the observation's parts differ in batch size: {batch}")
    if tensors["state"].ndim != 2 or tensors["state"].shape[1] != STATE_DIM:
        raise ValueError(
            f"state has shape {tuple(tensors['state'].shape)}; expected (batch, {STATE_DIM})"
        )
    if "prompt" in keys and tensors["prompt"].ndim != 2:
        raise ValueError(f"prompt has shape {tuple(tensors['prompt'].shape)}; expected (batch, N)")
    return tensors
