"""The flow-matching policy for vectors."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

from cfgrl_gym.algorithms import MlpPolicy

OBS = spaces.Box(-1, 1, (3,), np.float32)
CHUNK = spaces.Box(
    np.array([[-1, 0], [-2, 0]], np.float32), np.array([[1, 10], [2, 30]], np.float32)
)


def make(action_space=CHUNK, **kwargs):
    torch.manual_seed(0)
    return MlpPolicy(OBS, action_space, lambda _: 1e-3, net_arch=[16, 16], **kwargs)


def test_the_box_maps_to_plus_minus_one_and_back():
    policy = make()
    box = torch.from_numpy(np.stack([CHUNK.low, CHUNK.high, (CHUNK.low + CHUNK.high) / 2]))
    scaled = policy.encode_actions({}, box)
    expected = torch.tensor([-1.0, 1.0, 0.0])[:, None, None].expand(3, 2, 2)
    torch.testing.assert_close(scaled, expected)
    torch.testing.assert_close(policy.decode_actions({}, scaled), box)


@pytest.mark.parametrize("space", [CHUNK, spaces.Box(-2, 2, (3,), np.float32)])
def test_predicted_actions_are_in_the_space(space):
    policy = make(space)
    obs = np.zeros((5, 3), np.float32)
    actions, _ = policy.predict(obs)
    assert all(space.contains(action) for action in actions)
    single, _ = policy.predict(obs[0], deterministic=True)
    assert space.contains(single)
    np.testing.assert_array_equal(single, policy.predict(obs[0], deterministic=True)[0])


def test_null_touches_no_parameter_of_the_condition():
    policy = make()
    x, t, obs = torch.randn(4, 2, 2), torch.rand(4), np.ones((4, 3), np.float32)
    inputs = policy.encode_observation(obs)

    def gradient(labels):
        policy.zero_grad()
        policy.velocity(inputs, x, t, torch.tensor(labels)).square().sum().backward()
        return policy.condition.grad

    assert not gradient([-1] * 4).any()
    with_positive = gradient([-1, 1, -1, -1])
    assert with_positive[1].any()
    assert not with_positive[0].any()  # that of o = 0
    before = policy.predict_velocity(obs, x, t)
    with torch.no_grad():
        policy.condition.fill_(1e6)
    torch.testing.assert_close(policy.predict_velocity(obs, x, t), before, rtol=0, atol=0)


def test_a_row_does_not_depend_on_the_other_labels_of_its_batch():
    policy = make()
    x, t, obs = torch.randn(3, 2, 2), torch.rand(3), np.ones((3, 3), np.float32)
    labels = torch.tensor([-1, 1, 0])
    mixed = policy.predict_velocity(obs, x, t, labels)
    for row, label in enumerate((None, 1, 0)):
        alone = policy.predict_velocity(obs, x, t, label)
        torch.testing.assert_close(mixed[row], alone[row], rtol=0, atol=1e-6)
    assert not torch.allclose(mixed[0], policy.predict_velocity(obs, x, t, 1)[0], atol=1e-6)


def test_cfg_scale_is_saved_with_the_weights_unless_the_environment_sets_it(tmp_path, monkeypatch):
    policy = make()
    policy.cfg_scale = 2.5
    policy.save(tmp_path / "policy.pt")
    loaded = MlpPolicy.load(tmp_path / "policy.pt", device="cpu", trusted=True)
    assert loaded.cfg_scale == 2.5
    obs = np.zeros((2, 3), np.float32)
    np.testing.assert_array_equal(
        loaded.predict(obs, deterministic=True)[0], policy.predict(obs, deterministic=True)[0]
    )
    monkeypatch.setenv("PI0_CFG_SCALE", "3.5")
    fresh = make()
    fresh.load_state_dict(policy.state_dict())
    assert fresh.cfg_scale == 3.5


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(0, 255, (8, 8, 3), np.uint8),
        spaces.Dict({"a": OBS}),
        spaces.Discrete(3),
    ],
)
def test_images_and_dictionaries_are_refused(space):
    with pytest.raises(ValueError, match="MlpPolicy takes a Box"):
        MlpPolicy(space, CHUNK, lambda _: 1e-3)


def test_an_episode_acts_alike_in_whatever_row_of_the_batch_it_stands():
    """With layers whose rounding depends on a row's place on some processors."""
    rng = np.random.default_rng(0)
    for width, horizon in ((13, 3), (32, 1), (32, 3)):
        space = spaces.Box(-1, 1, (horizon, 1), np.float32)
        policy = MlpPolicy(OBS, space, lambda _: 1e-3, net_arch=[width])
        for rows in (1, 2, 4, 6):
            for _ in range(20):
                obs = rng.normal(size=(rows, 3)).astype(np.float32)
                noise = torch.from_numpy(rng.normal(size=(rows, horizon, 1)).astype(np.float32))
                order = rng.permutation(rows)
                acted = policy.act(obs, noise=noise).model_actions
                again = policy.act(obs[order], noise=noise[order]).model_actions
                assert torch.equal(acted[order], again), (width, horizon, rows)
