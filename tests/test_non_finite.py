"""Losses, gradients, weights and actions that aren't finite."""

from typing import Any

import numpy as np
import pytest
import torch
from cfgrl_envs import QueueEnv, SeedEnv, vec

from cfgrl_gym import CFGRL
from cfgrl_gym.algorithms.flow import NonFiniteError
from cfgrl_gym.algorithms.metrics import MAX_SKIPPED_STEPS


class Spoiled(CFGRL):
    """Some of its windows have actions that aren't finite, as a broken recording would."""

    spoiled = 1
    value = float("nan")

    def label(self, groups: Any) -> Any:
        windows = super().label(groups)
        assert windows is not None
        windows.model_actions[: self.spoiled] = self.value
        return windows


def make(kind: type[CFGRL], **changed: Any) -> CFGRL:
    arguments: dict[str, Any] = {
        "rloo_batch_size": 4,
        "groups_per_iteration": 4,
        "enable_dynamic_sampling": False,
        "positive_share": None,  # every window once an epoch
        "n_epochs": 3,
        "batch_size": 8,
        "seed": 3,
        "policy_kwargs": {"net_arch": [16], "ema_decay": 0.5},
        "device": "cpu",
    }
    return kind("MlpPolicy", vec(QueueEnv, 2), **(arguments | changed))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Spoiled, "value", value)  # 1e30: its square overflows
    algorithm = make(Spoiled)
    before = [p.clone() for p in algorithm.policy.parameters()]
    algorithm.learn(1, log_interval=None)
    assert algorithm.windows is not None
    steps = 3 * -(-len(algorithm.windows) // 8)
    assert algorithm.logger.name_to_value["train/skipped_steps"] == 3  # once an epoch
    assert algorithm._n_updates == steps - 3
    assert np.isfinite(algorithm.logger.name_to_value["train/loss"])
    after = list(algorithm.policy.parameters())
    assert all(p.isfinite().all() for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    algorithm.learn(1, reset_num_timesteps=False)  # and it goes on


def test_sound_steps_are_not_skipped() -> None:
    algorithm = make(CFGRL).learn(1, log_interval=None)
    assert algorithm.logger.name_to_value["train/skipped_steps"] == 0


def test_too_many_in_a_row_end_the_run_with_the_weights_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Spoiled, "spoiled", 10**6)
    algorithm = make(Spoiled)
    before = {name: value.clone() for name, value in algorithm.policy.state_dict().items()}
    with pytest.raises(NonFiniteError, match=f"{MAX_SKIPPED_STEPS} optimizer steps in a row.*nan"):
        algorithm.learn(1)
    algorithm.policy.set_training_mode(True)
    for name, value in algorithm.policy.state_dict().items():
        if name != "average.in_use":
            assert torch.equal(value, before[name])
    assert not algorithm.policy.optimizer.state  # AdamW saw none of it


def test_steps_in_a_row_are_counted_over_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Spoiled, "spoiled", 10**6)
    algorithm = make(Spoiled, n_epochs=1, batch_size=1000)  # one step an update
    algorithm.learn(10**6, max_iterations=MAX_SKIPPED_STEPS - 1)
    with pytest.raises(NonFiniteError):
        algorithm.learn(10**6, max_iterations=1)


def test_a_policy_that_is_not_finite_ends_the_run_before_an_environment_sees_it() -> None:
    algorithm = make(CFGRL, policy_kwargs={"net_arch": [16]})
    with torch.no_grad():
        next(algorithm.policy.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="the policy gave actions that aren't finite"):
        algorithm.learn(1)
    env = algorithm.env
    assert env is not None
    assert env.get_attr("time") == [0, 0]


class BadReward(QueueEnv):
    """Its second control step has no reward."""

    def step(self, action: Any) -> Any:
        observation, _, terminated, truncated, info = super().step(action)
        info["rewards"][1:2] = np.nan
        return observation, float(info["rewards"].sum()), terminated, truncated, info


class BadSingleReward(SeedEnv):
    def step(self, action: Any) -> Any:
        observation, _, terminated, truncated, info = super().step(action)
        return observation, float("inf"), terminated, truncated, info


@pytest.mark.parametrize("kind", [BadReward, BadSingleReward])
def test_a_reward_that_is_not_finite_is_refused(kind: Any) -> None:
    env = vec(kind, 1)
    algorithm = CFGRL("MlpPolicy", env, policy_kwargs={"net_arch": [16]}, seed=3, device="cpu")
    with pytest.raises(
        NonFiniteError, match=r"environment 0 gave a reward that isn't finite .*Start"
    ):
        algorithm.learn(1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_predict_refuses_an_observation_that_is_not_finite(value: float) -> None:
    algorithm = make(CFGRL)
    observation = np.array([0.0, 1.0, value, 0.0], np.float32)
    with pytest.raises(NonFiniteError, match=r"the observation has NaN or infinity .*obs"):
        algorithm.predict(observation)
    algorithm.predict(np.nan_to_num(observation, posinf=0))


def test_predict_tells_weights_that_are_not_finite_from_observations() -> None:
    algorithm = make(CFGRL, policy_kwargs={"net_arch": [16]})
    with torch.no_grad():
        next(iter(algorithm.policy.parameters())).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"its weights aren't"):
        algorithm.predict(np.zeros(4, np.float32))
