"""CFGRL where the answer can be worked out: one action, rewarded with a known probability.

The behaviour is the density p(a), and an episode succeeds with probability q(a). Whether a group
is mixed depends on the actions only through the rewards, so among the kept groups' successes
actions have the density p_1 ∝ p·q, and among the failures p_0 ∝ p·(1 - q). With s the share of
successes in mixed groups and d the condition dropout:

- o = 1 is trained on the successes: w = 1 samples p_1 = p·p(o=1|a) / p(o=1);
- ∅ is trained on the failures and the dropped successes: w = 0 samples
  p_∅ = ((1 - s)·p_0 + d·s·p_1) / ((1 - s) + d·s) with `negatives="null"`, and with "zero", where
  failures are dropped at the same rate, or with a `null_rate` the marginal (1 - s)·p_0 + s·p_1.

Beyond w = 1 guidance goes on in the same direction.
"""

import numpy as np
import pytest
import torch
from bandit import BanditEnv, reward_probability
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from cfgrl_gym.algorithms import CFGRL

K, DROPOUT = 4, 0.1
# Of the mean reward: 1,600 episodes (0.01), ten Euler steps (0.01) and an imperfect fit.
TOLERANCE = 0.05


def bandits(n_envs):
    return DummyVecEnv([lambda i=i: BanditEnv(luck=i) for i in range(n_envs)])


def base_policy(algorithm):
    """With no velocity, sampling returns its noise: p is the standard normal in model space."""
    nn.init.zeros_(algorithm.policy.output.weight)
    nn.init.zeros_(algorithm.policy.output.bias)


def mean_reward(policy, cfg_scale=None):
    generator = torch.Generator().manual_seed(1)
    obs = np.zeros((20_000, 1), np.float32)
    actions = policy.act(obs, cfg_scale=cfg_scale, generator=generator).actions
    return reward_probability(actions[:, 0, 0].numpy()).mean()


def closed_form(negatives):
    """Mean reward of the base, of w = 0 and of w = 1, by quadrature in model space."""
    x = np.linspace(-8, 8, 20_001)
    q = reward_probability(np.clip(2 * x, -2, 2))  # the Box is [-2, 2]; actions are clipped to it
    p = np.exp(-(x**2) / 2)
    p = p / p.sum()
    r = (p * q).sum()
    p_1, p_0 = p * q / r, p * (1 - q) / (1 - r)
    # Expected successes of a group that is mixed: K·r without those of all-success groups.
    s = (r - r**K) / (1 - r**K - (1 - r) ** K)
    dropped = DROPOUT if negatives == "null" else 1.0
    p_null = (1 - s) * p_0 + dropped * s * p_1
    p_null = p_null / p_null.sum()
    return r, (p_null * q).sum(), (p_1 * q).sum()


@pytest.mark.parametrize(
    ("negatives", "null_rate"), [("null", None), ("zero", None), ("null", 0.3)]
)
def test_guidance_samples_the_density_that_one_labelling_defines(negatives, null_rate):
    algorithm = CFGRL(
        "MlpPolicy",
        bandits(50),
        learning_rate=1e-3,
        rloo_batch_size=K,
        groups_per_iteration=400,
        early_stop_percentage=1.0,
        dropout_prob=DROPOUT,
        negatives=negatives,
        null_rate=null_rate,
        positive_share=None,  # the closed form is that of every window once an epoch
        n_epochs=200,
        batch_size=256,
        policy_kwargs={"net_arch": [64, 64]},
        seed=0,
        device="cpu",
    )
    base_policy(algorithm)
    base, at_0, at_1 = closed_form(negatives if null_rate is None else "marginal")
    assert mean_reward(algorithm.policy) == pytest.approx(base, abs=0.01)
    algorithm.learn(1)
    rewards = [mean_reward(algorithm.policy, w) for w in (0.0, 1.0, 2.0, 3.0)]
    assert rewards[0] == pytest.approx(at_0, abs=TOLERANCE)
    assert rewards[1] == pytest.approx(at_1, abs=TOLERANCE)
    assert np.all(np.diff(rewards) > 0)
    assert rewards[2] > rewards[1] + TOLERANCE


def test_the_mean_reward_rises_over_iterations():
    algorithm = CFGRL(
        "MlpPolicy",
        bandits(16),
        learning_rate=1e-3,
        groups_per_iteration=16,
        n_epochs=30,
        policy_kwargs={"net_arch": [64, 64]},
        seed=0,
        device="cpu",
    )
    base_policy(algorithm)
    rewards = [mean_reward(algorithm.policy)]
    for _ in range(3):
        algorithm.learn(1, reset_num_timesteps=False)
        rewards.append(mean_reward(algorithm.policy))
    assert rewards[1] > rewards[0]
    assert rewards[-1] > rewards[0] + 0.2
