"""The average of the weights acts, the optimizer's weights train, and both are saved."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cfgrl_envs import SeedEnv, vec
from pi0_support import make_observation, make_policy, make_spaces

from cfgrl_gym.algorithms import CFGRL, MlpPolicy, Pi0Policy

OBS = np.ones((4, 2), np.float32)
SETTINGS = {
    "rloo_batch_size": 3,
    "groups_per_iteration": 2,
    "batch_size": 16,
    "replay_iterations": 0,  # they are not saved
    "seed": 3,
    "device": "cpu",
}


def make(ema_decay: float | None) -> CFGRL:
    kwargs = {"net_arch": [16], "ema_decay": ema_decay}
    return CFGRL("MlpPolicy", vec(SeedEnv, 2), policy_kwargs=kwargs, **SETTINGS)


def weights(policy: MlpPolicy) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


def test_the_average_is_that_of_its_definition() -> None:
    policy = make(0.9).policy
    policy.set_training_mode(True)
    expected = weights(policy)
    for _ in range(5):
        loss = sum(p.square().sum() for p in policy.parameters())
        policy.optimizer.zero_grad()
        loss.backward()
        policy.optimizer.step()
        policy.after_optimizer_step()
        expected = 0.9 * expected + 0.1 * weights(policy)
    raw = weights(policy)
    policy.set_training_mode(False)
    torch.testing.assert_close(weights(policy), expected, atol=1e-6, rtol=0)
    assert not torch.allclose(expected, raw, atol=1e-5)
    policy.set_training_mode(True)
    assert torch.equal(weights(policy), raw)


def acted(policy: MlpPolicy) -> list[torch.Tensor]:
    """What the policy does, by every way to ask for it."""
    chunks, t = torch.zeros(4, 1, 2), torch.full((4,), 0.5)
    return [
        policy.act(OBS, noise=chunks).actions,
        policy.sample_actions(OBS, noise=chunks),
        policy.predict_velocity(OBS, chunks, t, 1),
        policy.guidance_gap(OBS, chunks, t, chunks + 1),
    ]


@pytest.mark.parametrize("how", ["learn", "load"])
def test_acting_means_the_average_right_after_learning_and_loading(
    how: str, tmp_path: Path
) -> None:
    algorithm = make(0.9).learn(60)
    if how == "load":
        algorithm.policy.set_training_mode(True)
        algorithm.save(tmp_path / "cfgrl")
        algorithm = CFGRL.load(tmp_path / "cfgrl", device="cpu")
    policy = algorithm.policy
    raw = weights(policy)
    before = acted(policy)
    assert policy.training
    assert torch.equal(weights(policy), raw)  # the optimizer's again, for whoever trains on
    policy.predict(OBS)
    assert not torch.equal(weights(policy), raw)
    for one, other in zip(before, acted(policy), strict=True):
        assert torch.equal(one, other)


def test_the_training_s_own_log_measures_what_acts() -> None:
    algorithm = make(0.999)
    start = [p.clone() for p in algorithm.policy.parameters()]
    algorithm.learn(1, log_interval=None)
    logged = algorithm.logger.name_to_value["train/guidance_gap"]
    algorithm.policy.set_training_mode(False)
    for acting, before in zip(algorithm.policy.parameters(), start, strict=True):
        torch.testing.assert_close(acting, before, atol=5e-3, rtol=0)  # hardly moved
    assert logged < 0.02


def test_no_average_and_decay_0_are_the_same() -> None:
    # To rounding: torch's average is a + (b - a)·1.
    plain, zero = make(None).learn(60), make(0.0).learn(60)
    zero.policy.set_training_mode(False)
    torch.testing.assert_close(weights(plain.policy), weights(zero.policy), atol=1e-4, rtol=0)


@pytest.mark.parametrize("training", [True, False])
def test_learning_goes_on_after_loading_as_if_it_had_not_stopped(
    tmp_path: Path, training: bool
) -> None:
    algorithm = make(0.95).learn(40)
    algorithm.policy.set_training_mode(training)
    algorithm.save(tmp_path / "cfgrl")
    loaded = CFGRL.load(tmp_path / "cfgrl", env=vec(SeedEnv, 2), device="cpu")
    for each in (algorithm, loaded):
        each.learn(40, reset_num_timesteps=False)
        each.policy.set_training_mode(False)
    assert torch.equal(weights(algorithm.policy), weights(loaded.policy))
    for each in (algorithm, loaded):
        each.policy.set_training_mode(True)
    assert torch.equal(weights(algorithm.policy), weights(loaded.policy))


def test_a_decay_that_is_no_average_is_refused() -> None:
    for bad in (1.0, -0.1):
        with pytest.raises(ValueError, match="ema_decay must be in"):
            make(bad)


def test_updating_while_the_average_acts_is_refused() -> None:
    policy = make(0.9).policy
    policy.set_training_mode(False)
    with pytest.raises(RuntimeError, match="training mode"):
        policy.after_optimizer_step()


def test_a_pi0_folder_holds_what_acts(tmp_path: Path) -> None:
    policy = make_policy(ema_decay=0.5)
    policy.set_training_mode(True)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01)
    policy.after_optimizer_step()
    policy.save_pretrained(tmp_path)
    assert policy.training
    again = Pi0Policy(*make_spaces(), lambda _: 1e-3, checkpoint=tmp_path)
    obs = make_observation()
    actions, _ = policy.predict(obs, deterministic=True)
    assert np.array_equal(again.predict(obs, deterministic=True)[0], actions)
    policy.set_training_mode(True)
    name, raw = next((n, p) for n, p in policy.named_parameters() if p.requires_grad)
    assert not torch.allclose(raw, again.get_parameter(name))
