"""Pi0Policy: guidance, the shared prefix, spaces, observations, training, SB3's interface."""

from typing import Any

import numpy as np
import pytest
import torch
from pi0_support import (
    HORIZON,
    IMAGE_SIZE,
    MODES,
    make_observation,
    make_policy,
    make_spaces,
    plain_pi0,
)

from cfgrl_gym.algorithms.flow import NULL, POSITIVE, euler, guide, sample_noise
from cfgrl_gym.algorithms.pi0 import NormStats, Pi0Policy
from cfgrl_gym.wrappers.norm_stats import Moments

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
STATS = NormStats(
    Moments(tuple(np.linspace(-1, 1, 8)), tuple(np.linspace(0.1, 2, 8))),
    Moments(tuple(np.linspace(-0.1, 0.1, 7)), tuple(np.linspace(0.2, 0.5, 7))),
)


@pytest.fixture(params=MODES)
def policy(request: pytest.FixtureRequest) -> Pi0Policy:
    return make_policy(request.param)


def draw_noise(policy: Pi0Policy, batch: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return sample_noise((batch, policy.horizon, policy.action_width), generator, policy.device)


def model_chunk(policy: Pi0Policy, w: float, **kwargs: Any) -> torch.Tensor:
    return policy.act(make_observation(**kwargs), noise=draw_noise(policy), cfg_scale=w)[0]


def branch_chunk(policy: Pi0Policy, label: int | None) -> torch.Tensor:
    """Euler's method over `predict_velocity`, which recomputes the prefix at every step."""
    obs = make_observation()
    return euler(
        lambda x, t: policy.predict_velocity(obs, x, t, label),
        draw_noise(policy),
        policy.num_inference_steps,
    )


def test_guidance_at_1_and_0_is_one_branch_exactly(policy: Pi0Policy) -> None:
    assert torch.equal(model_chunk(policy, 1.0), branch_chunk(policy, POSITIVE))
    assert torch.equal(model_chunk(policy, 0.0), branch_chunk(policy, None))


def test_shared_prefix_equals_recomputing_it_for_each_branch_and_step(policy: Pi0Policy) -> None:
    obs = make_observation()

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        null, positive = (policy.predict_velocity(obs, x, t, label) for label in (None, 1))
        return guide(null, positive, 2.0)

    expected = euler(velocity, draw_noise(policy), policy.num_inference_steps)
    torch.testing.assert_close(model_chunk(policy, 2.0), expected, atol=1e-5, rtol=0)
    assert (expected - branch_chunk(policy, 1)).abs().max() > 1e-3


def test_prefix_is_computed_once_for_a_guided_chunk(policy: Pi0Policy) -> None:
    calls = []
    policy.model.model.vlm.language_model.layers[0].register_forward_hook(
        lambda *_: calls.append(1)
    )
    model_chunk(policy, 2.0)
    assert len(calls) == 1


def test_null_chunk_is_that_of_transformers_pi0(policy: Pi0Policy) -> None:
    inputs = policy.encode_observation(make_observation())
    names = ("state", "input_ids", "pixel_values", "attention_mask", "pixel_attention_mask")
    expected = plain_pi0(policy.model).sample_actions(
        **{name: inputs[name] for name in names}, noise=draw_noise(policy), num_steps=10
    )
    torch.testing.assert_close(model_chunk(policy, 0.0), expected, atol=1e-5, rtol=0)


def test_action_guidance_combines_two_finished_chunks(policy: Pi0Policy) -> None:
    policy.guidance = "action"
    expected = guide(branch_chunk(policy, None), branch_chunk(policy, 1), 1.5)
    torch.testing.assert_close(model_chunk(policy, 1.5), expected, atol=1e-5, rtol=0)


def test_env_var_sets_the_default_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_policy().cfg_scale == 1.0
    monkeypatch.setenv("PI0_CFG_SCALE", "2.5")
    assert make_policy().cfg_scale == 2.5
    assert make_policy(cfg_scale=0.5).cfg_scale == 0.5
    monkeypatch.setenv("PI0_CFG_SCALE", "strong")
    with pytest.raises(ValueError, match="PI0_CFG_SCALE must be a number"):
        make_policy()


@pytest.mark.parametrize(("value", "label"), [("0", 0), ("1", 1), ("none", None)])
def test_env_var_forces_one_branch(
    monkeypatch: pytest.MonkeyPatch, value: str, label: int | None
) -> None:
    policy = make_policy()
    expected = branch_chunk(policy, label)
    monkeypatch.setenv("PI0_IS_POSITIVE", value)
    assert torch.equal(model_chunk(policy, 3.0), expected)


def test_prefix_dropout_gives_null_an_empty_instruction() -> None:
    policy, plain = make_policy(use_prefix_dropout=True), make_policy()
    noise, t = draw_noise(policy), torch.tensor([0.2, 0.5, 0.9])
    obs = make_observation()
    empty = dict(obs, prompt=np.zeros_like(obs["prompt"]))
    labels = torch.tensor([NULL, POSITIVE, NULL])
    expected = plain.predict_velocity(obs, noise, t, labels)
    expected[labels == NULL] = plain.predict_velocity(empty, noise, t, None)[labels == NULL]
    actual = policy.predict_velocity(obs, noise, t, labels)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    with torch.no_grad():
        inputs = policy.encode_observation(obs)
        cached = policy.velocity(inputs, noise, t, labels, policy.encode_prefix(inputs, labels))
    torch.testing.assert_close(cached, expected, atol=1e-5, rtol=0)


def test_instruction_and_images_reach_the_velocity() -> None:
    policy, obs = make_policy(), make_observation()
    noise, t = draw_noise(policy), torch.full((3,), 0.5)
    base = policy.predict_velocity(obs, noise, t)
    for key in ("prompt", "base_0_rgb", "left_wrist_0_rgb", "state"):
        changed = dict(obs, **{key: obs[key][::-1].copy()})
        assert (policy.predict_velocity(changed, noise, t) - base).abs().max() > 1e-3, key


def test_a_row_does_not_depend_on_its_batch() -> None:
    policy, obs, noise = make_policy(), make_observation(), draw_noise(make_policy())
    together = policy.sample_actions(obs, noise=noise, cfg_scale=1.5)
    for i in range(3):
        one = {key: value[i : i + 1] for key, value in obs.items()}
        alone = policy.sample_actions(one, noise=noise[i : i + 1], cfg_scale=1.5)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("delta", [True, False])
def test_decoding_inverts_encoding_of_actions(delta: bool) -> None:
    policy = make_policy(norm_stats=STATS, delta_actions=delta)
    inputs = policy.encode_observation(make_observation())
    actions = torch.rand(3, HORIZON, 7) * 2 - 1
    encoded = policy.encode_actions(inputs, actions)
    assert encoded.shape == (3, HORIZON, 32)
    assert torch.equal(encoded[..., 7:], torch.zeros(3, HORIZON, 25))
    torch.testing.assert_close(policy.decode_actions(inputs, encoded), actions, atol=1e-5, rtol=0)


def test_delta_actions_add_the_unnormalised_state_to_the_first_six() -> None:
    policy = make_policy(norm_stats=STATS, delta_actions=True)
    obs = make_observation()
    decoded = policy.decode_actions(policy.encode_observation(obs), torch.zeros(3, HORIZON, 32))
    expected = np.tile(np.array(STATS.actions.mean), (3, HORIZON, 1))
    expected[..., :6] += obs["state"][:, None, :6]
    np.testing.assert_allclose(decoded.numpy(), expected, atol=1e-6)


def test_observation_is_encoded_as_pi0_wants_it() -> None:
    policy, obs = make_policy(norm_stats=STATS), make_observation(size=IMAGE_SIZE)
    inputs = policy.encode_observation(obs)
    pixels = obs["left_wrist_0_rgb"].astype(np.float32).transpose(0, 3, 1, 2) / 127.5 - 1
    np.testing.assert_allclose(inputs["pixel_values"][:, 1].numpy(), pixels, atol=1e-6)
    state = (obs["state"] - np.array(STATS.state.mean)) / (np.array(STATS.state.std) + 1e-6)
    np.testing.assert_allclose(inputs["state"][:, :8].numpy(), state, atol=1e-5)
    image_token = policy.model.config.vlm_config.image_token_id
    assert (inputs["input_ids"] == image_token).sum(1).tolist() == [policy.image_tokens] * 3
    prompt = inputs["input_ids"][0, policy.image_tokens :].tolist()
    tokens = [2, *(3 + byte for byte in b"pick up the can\n")]
    assert prompt == tokens + [0] * (96 - len(tokens))
    lengths = [len(text) + 2 for text in ("pick up the can", "open the drawer", "close it")]
    assert inputs["attention_mask"].sum(1).tolist() == [policy.image_tokens + n for n in lengths]


def test_channel_first_images_and_tensors_are_taken_too() -> None:
    policy, obs = make_policy(), make_observation()
    expected = policy.encode_observation(obs)
    first = {k: v.transpose(0, 3, 1, 2) if v.ndim == 4 else v for k, v in obs.items()}
    for other in (first, {k: torch.as_tensor(v) for k, v in obs.items()}):
        inputs = policy.encode_observation(other)
        assert all(torch.equal(inputs[key], expected[key]) for key in expected)


@pytest.mark.parametrize("cameras", [1, 3])
def test_any_number_of_cameras(cameras: int) -> None:
    policy = Pi0Policy(*make_spaces(cameras=cameras), lambda _: 1e-3)
    actions = policy.sample_actions(make_observation(cameras=cameras), cfg_scale=1.5)
    assert actions.shape == (3, HORIZON, 7)


def test_predict_takes_one_observation_or_a_batch(policy: Pi0Policy) -> None:
    obs = make_observation()
    batch, _ = policy.predict(obs, deterministic=True)
    single, _ = policy.predict({k: v[0] for k, v in obs.items()}, deterministic=True)
    assert batch.shape == (3, HORIZON, 7)
    assert batch.dtype == np.float32
    assert single.shape == (HORIZON, 7)
    np.testing.assert_allclose(single, batch[0], atol=1e-5)
    assert policy.action_space.contains(single)


def test_single_step_action_space_takes_the_first_action() -> None:
    observation_space, action_space = make_spaces(chunk=None)
    policy = Pi0Policy(observation_space, action_space, lambda _: 1e-3, horizon=HORIZON)
    obs = {key: value[0] for key, value in make_observation().items()}
    assert policy.predict(obs)[0].shape == (7,)


@pytest.mark.parametrize("mode", MODES)
def test_training_steps_lower_the_loss_on_a_fixed_batch(mode: str) -> None:
    policy = make_policy(mode, randomise=False)
    policy.set_training_mode(True)
    obs = make_observation(batch=8)
    actions = torch.rand(8, HORIZON, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    target = policy.encode_actions(policy.encode_observation(obs), actions)
    is_pad = torch.zeros(8, HORIZON, dtype=torch.bool)
    labels = torch.tensor([1, NULL] * 4)
    losses = []
    for _ in range(60):
        generator = torch.Generator().manual_seed(1)
        t, noise = policy.draw_flow(8, generator)
        loss = policy.flow_matching_loss(obs, target, is_pad, labels, t, noise).mean()
        policy.optimizer.zero_grad()
        loss.backward()
        policy.optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_frozen_vlm_is_not_trained_and_the_expert_is() -> None:
    policy = make_policy(trainable="expert")
    obs, is_pad = make_observation(), torch.zeros(3, HORIZON, dtype=torch.bool)
    target = torch.zeros(3, HORIZON, 32)
    labels, (t, noise) = torch.tensor([1, NULL, 1]), policy.draw_flow(3, None)
    policy.flow_matching_loss(obs, target, is_pad, labels, t, noise).mean().backward()
    trained = {name for name, p in policy.named_parameters() if p.grad is not None}
    assert not any("vlm" in name for name in trained)
    assert {"model.condition.embedding", "model.action_out_proj.weight"} <= trained
    optimised = {id(p) for group in policy.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in policy.parameters() if p.requires_grad}


def test_seed_reproduces_the_initial_weights_and_leaves_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first, second, other = (make_policy(randomise=False, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    vectors = [p.parameters_to_vector() for p in (first, second, other)]
    assert np.array_equal(vectors[0], vectors[1])
    assert not np.array_equal(vectors[0], vectors[2])
