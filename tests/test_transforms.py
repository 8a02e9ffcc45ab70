"""The 2-test transform: each step and its inverse, on NumPy arrays and torch tensors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cfgrl_gym.wrappers.transforms import (
    ActionsFromModel,
    ActionsToModel,
    Normalize,
    image_from_model,
    image_to_model,
    pad_last,
    quat2axisangle,
    resize_with_pad,
    to_absolute,
    to_delta,
    unpad_last,
)


def floats(shape: tuple[int, ...], low: float, high: float) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float64, shape, elements=st.floats(low, high))


ACTIONS = floats((2, 5, 7), -1, 1)
STATES = floats((2, 8), -4, 4)
MEAN = floats((7,), -2, 2)
STD = floats((7,), 0, 3)


@settings(max_examples=50, deadline=None)
@given(actions=ACTIONS, state=STATES, mean=MEAN, std=STD, delta=st.booleans())
def test_actions_survive_the_way_to_the_model_and_back(
    actions: np.ndarray, state: np.ndarray, mean: np.ndarray, std: np.ndarray, delta: bool
) -> None:
    for kind in (np.asarray, torch.as_tensor):
        a, s, normalize = kind(actions), kind(state), Normalize(kind(mean), kind(std))
        encoded = ActionsToModel(normalize, 32, delta)(a, s)
        assert encoded.shape == (2, 5, 32)
        assert type(encoded) is type(a)
        decoded = ActionsFromModel(normalize.inverse, 7, delta)(encoded, s)
        np.testing.assert_allclose(np.asarray(decoded), actions, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(actions=ACTIONS, state=STATES)
def test_delta_and_absolute_are_inverse_and_leave_the_gripper(
    actions: np.ndarray, state: np.ndarray
) -> None:
    delta = to_delta(actions, state)
    np.testing.assert_allclose(to_absolute(delta, state), actions, atol=1e-6)
    np.testing.assert_array_equal(delta[..., 6], actions[..., 6])
    np.testing.assert_allclose(delta[:, 3, :6], actions[:, 3, :6] - state[:, :6])


def test_normalisation_is_the_scripts() -> None:
    x, mean, std = np.array([3.0]), np.array([1.0]), np.array([0.5])
    assert Normalize(mean, std)(x) == (3.0 - 1.0) / (0.5 + 1e-6)
    assert Normalize(mean, std).inverse.inverse == Normalize(mean, std)


def test_padding_is_zeros_and_refuses_to_cut() -> None:
    padded = pad_last(np.full((2, 3), np.inf), 5)
    np.testing.assert_array_equal(padded[:, 3:], 0)
    np.testing.assert_array_equal(unpad_last(padded, 3), np.inf)
    with pytest.raises(ValueError, match="can't pad 3 dimensions to 2"):
        pad_last(np.zeros(3), 2)


def test_pixels_map_to_minus_one_and_one_and_back() -> None:
    pixels = np.arange(256, dtype=np.uint8)
    mapped = image_to_model(pixels)
    assert (mapped.min(), mapped.max()) == (-1, 1)
    np.testing.assert_array_equal(image_from_model(mapped).round(), pixels)
    np.testing.assert_allclose(image_to_model(torch.as_tensor(pixels).float()), mapped, atol=1e-6)


def test_resize_keeps_the_aspect_and_centres_on_black() -> None:
    wide = np.full((2, 10, 20, 3), 200, np.uint8)
    out = resize_with_pad(wide, 8, 8)
    assert out.shape == (2, 8, 8, 3)
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out[:, 2:6], 200)
    np.testing.assert_array_equal(out[:, :2], 0)
    np.testing.assert_array_equal(out[:, 6:], 0)
    tall = resize_with_pad(torch.as_tensor(wide).permute(0, 2, 1, 3), 8, 8)
    np.testing.assert_array_equal(tall.numpy(), out.transpose(0, 2, 1, 3))


def test_halving_averages_neighbours_as_bilinear_with_antialias_does() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    # Triangle filter of twice the width at scale 1/2: weights 1, 3, 3, 1 over 8.
    weights = np.array([1, 3, 3, 1]) / 8
    expected = np.einsum("i,j,ijc->c", weights, weights, image[5:9, 7:11].astype(float))
    np.testing.assert_allclose(resize_with_pad(image, 8, 8)[3, 4], expected, atol=0.51)


def test_same_size_is_left_alone_and_bad_images_refused() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    assert resize_with_pad(image, 4, 4) is image
    with pytest.raises(ValueError, match=r"expected \(\.\.\., height, width, 3\)"):
        resize_with_pad(np.zeros((3, 4, 4), np.uint8), 8, 8)
    with pytest.raises(ValueError, match="expected uint8"):
        resize_with_pad(np.zeros((4, 4, 3), np.float32), 8, 8)


@settings(max_examples=50, deadline=None)
@given(axis=floats((3,), -1, 1), angle=st.floats(0.01, 2 * math.pi - 0.01))
def test_axis_angle_of_a_quaternion(axis: np.ndarray, angle: float) -> None:
    norm = np.linalg.norm(axis)
    if norm < 1e-3:
        return
    unit = axis / norm
    quat = np.array([*(unit * math.sin(angle / 2)), math.cos(angle / 2)])
    given_quat = quat.copy()
    np.testing.assert_allclose(quat2axisangle(quat), unit * angle, atol=1e-6)
    np.testing.assert_array_equal(quat, given_quat)


def test_axis_angle_of_no_rotation_is_zero() -> None:
    np.testing.assert_array_equal(quat2axisangle(np.array([0.0, 0.0, 0.0, 1.0])), np.zeros(3))
    np.testing.assert_array_equal(quat2axisangle(np.array([0.0, 0.0, 0.0, 1.1])), np.zeros(3))
