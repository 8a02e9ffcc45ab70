"""Implements the "2-test" transform between LIBERO and PI0, each step with its inverse.

The steps are those of openpi_pytorch's script `2_test_pi0_on_libero.py`. Arithmetic uses plain
operators, so the functions take NumPy arrays and torch tensors; statistics and data must both be
arrays or both be tensors.
The 180° rotation of camera images happens in the environment's wrapper, not here.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any  # np.ndarray or torch.Tensor

STD_EPSILON = 1e-6  # the script divides by (std + 1e-6)
POSE_DIM = 6  # position (3) and axis-angle (3): the dimensions of the extra delta transform


@dataclass(frozen=True)
class Normalize:
    """Computes (x - mean) / (std + 1e-6) for mean and std (dim,) and x (..., dim)."""

    mean: Array
    std: Array

    def __call__(self, x: Array) -> Array:
        return (x - self.mean) / (self.std + STD_EPSILON)

    @property
    def inverse(self) -> "Unnormalize":
        return Unnormalize(self.mean, self.std)


@dataclass(frozen=True)
class Unnormalize:
    """Computes x * (std + 1e-6) + mean, the inverse of `Normalize`."""

    mean: Array
    std: Array

    def __call__(self, x: Array) -> Array:
        return x * (self.std + STD_EPSILON) + self.mean

    @property
    def inverse(self) -> Normalize:
        return Normalize(self.mean, self.std)


def to_delta(actions: Array, state: Array) -> Array:
    """Subtract the state in the first 6 dims, as PI0's LIBERO checkpoints predict actions.

    :param actions: (..., H, dim)
    :param state: (..., 8), not normalised
    """
    return actions - _pose(state, actions.shape[-1])


def to_absolute(actions: Array, state: Array) -> Array:
    """Add the state in the first 6 dims; the inverse of `to_delta`."""
    return actions + _pose(state, actions.shape[-1])


def _pose(state: Array, width: int) -> Array:
    """Return what the delta transform subtracts from each action, 0 beyond the first 6 dims."""
    return pad_last(state[..., None, :POSE_DIM], width)


def pad_last(x: Array, width: int) -> Array:
    """Zero-pad the last dimension to `width`."""
    missing = width - x.shape[-1]
    if missing < 0:
        raise ValueError(f"can't pad {x.shape[-1]} dimensions to {width}; it would cut {-missing}")
    if isinstance(x, np.ndarray):
        return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    import torch.nn.functional as F  # here, so that environment processes don't load torch

    return F.pad(x, (0, missing))


def unpad_last(x: Array, width: int) -> Array:
    """Keep the first `width` of the last dimension; the inverse of `pad_last`."""
    return x[..., :width]


@dataclass(frozen=True)
class ActionsToModel:
    """Converts environment actions to model space: delta (if set), normalise, zero-pad.

    :param normalize: statistics of the actions as the model sees them, 7 numbers
    :param width: the model's action width
    :param delta: subtract the state in the first 6 dimensions
    """

    normalize: Normalize
    width: int
    delta: bool

    def __call__(self, actions: Array, state: Array) -> Array:
        """Convert actions (..., H, 7), given the raw state (..., 8), to (..., H, width)."""
        if self.delta:
            actions = to_delta(actions, state)
        return pad_last(self.normalize(actions), self.width)


@dataclass(frozen=True)
class ActionsFromModel:
    """Converts model space to environment actions, the inverse of `ActionsToModel`."""

    unnormalize: Unnormalize
    action_dim: int
    delta: bool

    def __call__(self, actions: Array, state: Array) -> Array:
        """Convert actions (..., H, width), given a raw state (..., 8), to (..., H, action_dim)."""
        actions = self.unnormalize(unpad_last(actions, self.action_dim))
        return to_absolute(actions, state) if self.delta else actions


def image_to_model(image: Array) -> Array:
    """Map uint8 pixels to [-1, 1]: x / 127.5 - 1, as a float array of any shape."""
    return image / 127.5 - 1.0


def image_from_model(image: Array) -> Array:
    """Map [-1, 1] to 0..255, as floats; the inverse of `image_to_model`."""
    return (image + 1.0) * 127.5


def resize_with_pad(images: Array, height: int, width: int) -> Array:
    """Resize with the aspect ratio kept: bilinear, centred, the rest filled with 0.

    This is openpi's `image_tools.resize_with_pad`. On uint8 images the padding is black, which
    `image_to_model` maps to -1.

    :param images: uint8 (..., H, W, 3)
    :return: uint8 (..., height, width, 3), an array or tensor like the input
    """
    if images.ndim < 3 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(
            f"images have shape {tuple(images.shape)}; expected (..., height, width, 3), "
            "none of them 0"
        )
    given_height, given_width = images.shape[-3:-1]
    if (given_height, given_width) == (height, width):
        return images
    import torch  # here, as in `pad_last`
    import torch.nn.functional as F

    tensor = torch.from_numpy(images.copy()) if isinstance(images, np.ndarray) else images
    if tensor.dtype != torch.uint8:
        raise ValueError(f"images have dtype {tensor.dtype}; expected uint8 pixels, 0..255")
    ratio = max(given_width / width, given_height / height)
    new_height, new_width = int(given_height / ratio), int(given_width / ratio)
    flat = tensor.reshape(-1, given_height, given_width, 3).permute(0, 3, 1, 2)
    resized = F.interpolate(
        flat.float(),
        size=(new_height, new_width),
        mode="bilinear",
        align_corners=False,
        antialias=True,
    )
    top, left = (height - new_height) // 2, (width - new_width) // 2
    out = torch.zeros(flat.shape[0], 3, height, width, dtype=torch.uint8, device=tensor.device)
    out[:, :, top : top + new_height, left : left + new_width] = resized.round().clamp(0, 255)
    out = out.permute(0, 2, 3, 1).reshape(*images.shape[:-3], height, width, 3)
    return out.numpy() if isinstance(images, np.ndarray) else out


def quat2axisangle(quat: np.ndarray) -> np.ndarray:
    """Convert a quaternion (x, y, z, w) to axis-angle in radians, (3,); w is clipped to [-1, 1].

    This computes the same as robosuite's `utils.transform_utils.quat2axisangle`, without modifying
    its argument.
    """
    w = min(max(float(quat[3]), -1.0), 1.0)
    denominator = math.sqrt(1.0 - w * w)
    if math.isclose(denominator, 0.0):  # (close to) no rotation
        return np.zeros(3)
    return np.asarray(quat[:3]) * 2.0 * math.acos(w) / denominator
