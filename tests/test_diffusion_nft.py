"""The control DiffusionNFT: its loss against closed forms, and a bandit with a known answer."""

import numpy as np
import pytest
import torch
from bandit import BanditEnv, reward_probability
from cfgrl_envs import QueueEnv, vec
from controls import DiffusionNFT
from nft_loss import nft_loss, optimality_probabilities
from pi0_support import SIZES, PromptEnv
from scipy.special import comb
from stable_baselines3.common.vec_env import DummyVecEnv
from test_study import SMALL
from torch import nn

from cfgrl_gym.algorithms import CFGRL, Pi0Policy
from cfgrl_gym.algorithms.flow import NULL
from cfgrl_gym.algorithms.mlp_policy import MlpPolicy

BETA = 0.3


def samples(batch=5, horizon=3, width=2):
    generator = torch.Generator().manual_seed(0)
    v, v_old, target = torch.randn(3, batch, horizon, width, generator=generator)
    counted = torch.ones(batch, horizon, width, dtype=torch.bool)
    return v, v_old, target, counted


@pytest.mark.parametrize("r", [0.0, 0.2, 0.5, 0.7, 1.0])
def test_the_minimiser_is_v_old_plus_the_signed_residual_over_beta(r):
    _, v_old, target, counted = samples()
    best = v_old + (2 * r - 1) * (target - v_old) / BETA
    v = best.clone().requires_grad_()
    at_best = nft_loss(v, v_old, target, torch.full((5,), r), counted, BETA)
    (gradient,) = torch.autograd.grad(at_best.sum(), v)
    assert gradient.abs().max() < 1e-5
    for step in (0.1, -0.1):
        beside = nft_loss(best + step, v_old, target, torch.full((5,), r), counted, BETA)
        assert (beside > at_best).all()


def test_with_beta_1_a_certain_success_is_plain_flow_matching():
    v, v_old, target, counted = samples()
    loss = nft_loss(v, v_old, target, torch.ones(5), counted, 1.0)
    torch.testing.assert_close(loss, (v - target).square().mean((1, 2)))


@pytest.mark.parametrize("adaptive", [False, True])
def test_at_v_old_r_and_1_minus_r_push_in_opposite_directions(adaptive):
    _, v_old, target, counted = samples()
    t = torch.linspace(0.1, 0.9, 5) if adaptive else None

    def gradient(r):
        v = v_old.clone().requires_grad_()
        loss = nft_loss(v, v_old, target, torch.full((5,), r), counted, BETA, t)
        return torch.autograd.grad(loss.sum(), v)[0]

    torch.testing.assert_close(gradient(0.8), -gradient(0.2))
    assert gradient(0.5).abs().max() < 1e-6
    # A step down it, for a success, goes from v_old towards the target.
    assert ((-gradient(0.8) * (target - v_old)).sum((1, 2)) > 0).all()


def test_the_adaptive_weight_is_the_error_of_the_predicted_clean_action():
    generator = torch.Generator().manual_seed(1)
    actions, noise, v, v_old = torch.randn(4, 6, 3, 2, generator=generator)
    t, r = torch.rand(2, 6, generator=generator)
    counted = torch.ones_like(v, dtype=torch.bool)
    loss = nft_loss(v, v_old, noise - actions, r, counted, BETA, t)
    # Independently, in the space of actions: x_t - t v is what v takes the clean action to be.
    time = t[:, None, None]
    x_t = time * noise + (1 - time) * actions
    expected = torch.zeros(6)
    for share, velocity in (
        (r, (1 - BETA) * v_old + BETA * v),
        (1 - r, (1 + BETA) * v_old - BETA * v),
    ):
        error = x_t - time * velocity - actions
        expected += share * error.square().mean((1, 2)) / error.abs().mean((1, 2))
    torch.testing.assert_close(loss, expected)


def test_steps_that_were_never_executed_do_not_count():
    v, v_old, target, counted = samples()
    counted[:, 2:] = False
    whole = nft_loss(v[:, :2], v_old[:, :2], target[:, :2], torch.ones(5), counted[:, :2], BETA)
    for changed in (target, target.clone().index_fill_(1, torch.tensor([2]), 100.0)):
        loss = nft_loss(v, v_old, changed, torch.ones(5), counted, BETA)
        torch.testing.assert_close(loss, whole)


def test_optimality_probabilities_by_hand():
    # All returns have the standard deviation 0.5; the groups the means 0.75 and 0.25.
    returns = np.array([[1.0, 1, 1, 0], [0, 0, 1, 0]])
    r = optimality_probabilities(returns, clip=5.0)
    expected = [[0.55, 0.55, 0.55, 0.35], [0.45, 0.45, 0.65, 0.45]]
    np.testing.assert_allclose(r, expected, atol=1e-4)
    clipped = optimality_probabilities(returns, clip=0.25)
    np.testing.assert_array_equal(clipped, [[1, 1, 1, 0], [0, 0, 1, 0]])
    np.testing.assert_array_equal(optimality_probabilities(np.ones((2, 4)), 5.0), 0.5)


class Recorded(DiffusionNFT):
    """Records the losses of optimizer steps, and what was learned from."""

    losses: list
    seen: list

    def label(self, groups):
        self.groups = groups
        return super().label(groups)

    def window_losses(self, batch, t, noise):
        losses = super().window_losses(batch, t, noise)
        self.losses.append(losses.detach())
        self.seen.append(batch)
        return losses


def queue_model(**kwargs):
    options = {**SMALL, "n_epochs": 2, **kwargs}
    model = Recorded("MlpPolicy", vec(QueueEnv, 2, chunk=3), **options)
    model.losses, model.seen = [], []
    return model


def test_every_window_has_the_probability_of_its_episode_over_replayed_iterations():
    model = queue_model(replay_iterations=1)
    expected = {}
    for _ in range(2):
        model.seen.clear()
        model.learn(1, reset_num_timesteps=False)
        returns = np.array([[e.total_reward for e in group] for group in model.groups])
        r = 0.5 + (returns - returns.mean(1, keepdims=True)) / (returns.std() + 1e-4) / 10
        for group, of_group in zip(model.groups, r, strict=True):
            for episode, value in zip(group, of_group, strict=True):
                expected |= {chunk.model_actions.tobytes(): value for chunk in episode.chunks}
    assert len({round(value, 6) for value in expected.values()}) > 2
    drawn = [
        (actions.numpy().tobytes(), value.item())
        for batch in model.seen
        for actions, value in zip(batch.model_actions, batch.optimality, strict=True)
    ]
    assert {key for key, _ in drawn} == set(expected)  # of both iterations
    assert len(drawn) == 2 * len(expected)  # each once an epoch
    for key, value in drawn:
        assert value == pytest.approx(expected[key], abs=1e-6)
    assert all((batch.labels == NULL).all() for batch in model.seen)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_v_old_is_the_policy_that_collected_during_the_whole_update(ema_decay, monkeypatch):
    given = []

    def spy(v, v_old, *arguments):
        given.append((v.detach().clone(), v_old.clone()))
        return nft_loss(v, v_old, *arguments)

    monkeypatch.setattr("controls.nft_loss", spy)
    arch = {"net_arch": [16], "ema_decay": ema_decay}
    model = queue_model(policy_kwargs=arch, learning_rate=0.01, batch_size=1000, n_epochs=3)
    inputs = []
    velocity = MlpPolicy.velocity

    def recorded(self, *arguments):
        if self.training:
            inputs.append(arguments)
        return velocity(self, *arguments)

    model.learn(1)  # so that average and weights differ
    model.policy.set_training_mode(False)
    frozen = MlpPolicy(**model.policy._get_constructor_parameters())
    frozen.load_state_dict(model.policy.state_dict())
    given.clear()
    monkeypatch.setattr(MlpPolicy, "velocity", recorded)
    model.learn(1, reset_num_timesteps=False)
    monkeypatch.undo()
    assert len(given) == 3
    for (v, v_old), arguments in zip(given, inputs[::2], strict=True):
        torch.testing.assert_close(v_old, frozen.velocity(*arguments))
        if v is not given[0][0]:
            assert (v - v_old).abs().max() > 1e-3
    assert not hasattr(model, "_old")


@pytest.mark.parametrize("trainable", ["expert", "all"])
@pytest.mark.parametrize("learning_rate", [0.0, 0.01])
def test_pi0_s_v_old_is_its_velocity_before_the_update(trainable, learning_rate, monkeypatch):
    distances = []

    def spy(v, v_old, *arguments):
        distances.append((v - v_old).abs().max().item())
        return nft_loss(v, v_old, *arguments)

    monkeypatch.setattr("controls.nft_loss", spy)
    model = DiffusionNFT(
        Pi0Policy,
        vec(PromptEnv, 4),
        learning_rate=learning_rate,
        rloo_batch_size=4,
        groups_per_iteration=2,
        enable_dynamic_sampling=False,
        cfg_scale=0.0,
        n_epochs=2,
        policy_kwargs={"sizes": SIZES, "trainable": trainable},
        seed=0,
        device="cpu",
    )
    model.learn(1)
    assert len(distances) == 2
    assert distances[0] < 1e-5
    assert (distances[1] > 1e-3) == (learning_rate > 0)


def test_it_makes_as_many_optimizer_steps_as_cfgrl():
    def steps(algorithm):
        model = algorithm(
            "MlpPolicy",
            vec(QueueEnv, 2, chunk=3),
            groups_per_iteration=6,
            enable_dynamic_sampling=False,
            cfg_scale=0.0,
            policy_kwargs={"net_arch": [16]},
            seed=3,
            device="cpu",
        )
        return model.learn(1)._n_updates

    assert steps(DiffusionNFT) == steps(CFGRL)


# The known answer ---------------------------------------------------------------------------------

K, STEPS = 4, 10
TOLERANCE = 0.04  # of the mean reward: sampled episodes (0.01) and an imperfect fit


def base_slope(t):
    """The exact velocity from noise to standard normal actions is this times x_t."""
    return (2 * t - 1) / (t**2 + (1 - t) ** 2)


class ExactBase(MlpPolicy):
    """Adds what is learned to the exact velocity of standard normal actions, and begins there."""

    def __init__(self, *arguments, **kwargs):
        super().__init__(*arguments, **kwargs)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def velocity(self, inputs, x_t, t, labels, prefix=None):
        learned = super().velocity(inputs, x_t, t, labels, prefix)
        return learned + base_slope(t)[:, None, None] * x_t


class Plain(DiffusionNFT):
    """Without the adaptive weight, with which the minimiser has no closed form."""

    ADAPTIVE = False


def known_answer(beta, clip):
    """Mean reward of the minimiser, sampled as the policy samples.

    With g(a) = E[2r - 1 | a], it is v_old + E[g(a) (v - v_old) | x_t] / β. An episode with the
    number m of the other K - 1 that succeed has 2r - 1 = (R - (R + m) / K) / (clip·std).
    """
    times = 1 - np.arange(STEPS) / STEPS
    # What collected: few Euler steps along the exact velocity give less than a deviation of 1.
    deviation = np.prod(1 - base_slope(times) / STEPS)
    a = np.linspace(-6, 6, 2001)  # in model space; the Box is [-2, 2]
    q = reward_probability(np.clip(2 * a, -2, 2))
    p = np.exp(-((a / deviation) ** 2) / 2)
    p /= p.sum()
    rate = (p * q).sum()
    m = np.arange(K)
    others = comb(K - 1, m) * rate**m * (1 - rate) ** (K - 1 - m)
    std = np.sqrt(rate * (1 - rate))
    g_1, g_0 = ((others * (reward - (reward + m) / K)).sum() for reward in (1, 0))
    g = (q * g_1 + (1 - q) * g_0) / (clip * std)

    grid = np.linspace(-6, 6, 601)

    def field(t):
        noise = (grid[:, None] - (1 - t) * a) / t  # (x_t, a)
        weights = p * np.exp(-(noise**2) / 2)
        weights /= weights.sum(1, keepdims=True)
        old = base_slope(t) * grid
        return old + (weights * g * (noise - a - old[:, None])).sum(1) / beta

    x = torch.randn(20_000, generator=torch.Generator().manual_seed(2)).numpy()
    for t in times:
        x = x - np.interp(x, grid, field(t)) / STEPS
    return reward_probability(np.clip(2 * x, -2, 2)).mean()


def bandit_model(algorithm, **options):
    return algorithm(
        ExactBase,
        DummyVecEnv([lambda i=i: BanditEnv(luck=i) for i in range(50)]),
        learning_rate=1e-3,
        rloo_batch_size=K,
        enable_dynamic_sampling=False,
        cfg_scale=0.0,
        batch_size=256,
        policy_kwargs={"net_arch": [64, 64], "num_inference_steps": STEPS},
        seed=0,
        device="cpu",
        **options,
    )


def mean_reward(policy):
    generator = torch.Generator().manual_seed(1)
    obs = np.zeros((20_000, 1), np.float32)
    actions = policy.act(obs, cfg_scale=0.0, generator=generator).actions
    return reward_probability(actions[:, 0, 0].numpy()).mean()


@pytest.mark.parametrize("beta", [0.1, 0.2, 1.0])
def test_one_update_reaches_the_closed_form_minimiser(beta, monkeypatch):
    monkeypatch.setattr(Plain, "BETA", beta)
    model = bandit_model(Plain, groups_per_iteration=400, n_epochs=200)
    base = known_answer(np.inf, 5.0)
    assert mean_reward(model.policy) == pytest.approx(base, abs=0.01)
    expected = known_answer(beta, 5.0)
    model.learn(1)
    assert mean_reward(model.policy) == pytest.approx(expected, abs=TOLERANCE)


def test_iterations_of_the_published_form_raise_the_mean_reward():
    model = bandit_model(DiffusionNFT, groups_per_iteration=32, n_epochs=30)
    rewards = [mean_reward(model.policy)]
    for _ in range(3):
        model.learn(1, reset_num_timesteps=False)
        rewards.append(mean_reward(model.policy))
    assert rewards[1] > rewards[0] + 0.05
    assert rewards[-1] > rewards[0] + 0.2
