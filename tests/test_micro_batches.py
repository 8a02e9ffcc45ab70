"""Running out of memory in an update: smaller micro-batches, the same gradients."""

from typing import Any

import pytest
import torch
from cfgrl_envs import SeedEnv, vec
from torch import Tensor

from cfgrl_gym.algorithms import CFGRL, MlpPolicy

SETTINGS = {
    "rloo_batch_size": 3,
    "groups_per_iteration": 2,
    "policy_kwargs": {"net_arch": [16]},
    "batch_size": 24,
    "seed": 3,
    "device": "cpu",
}


def hungry(limit: int) -> type[MlpPolicy]:
    """A policy whose loss asks the allocator for what it can't give when the batch is larger."""

    class Hungry(MlpPolicy):
        tried: list[int] = []  # noqa: RUF012

        def flow_matching_loss(self, obs: Any, *arguments: Any) -> Tensor:
            self.tried.append(len(obs))
            if len(obs) > limit:
                torch.empty(10**15, dtype=torch.uint8)
            return super().flow_matching_loss(obs, *arguments)

    return Hungry


def test_memory_that_runs_out_halves_the_micro_batch_and_changes_no_weight() -> None:
    plain = CFGRL("MlpPolicy", vec(SeedEnv, 2), **SETTINGS).learn(1)
    policy = hungry(limit=7)
    algorithm = CFGRL(policy, vec(SeedEnv, 2), **SETTINGS)
    with pytest.warns(UserWarning, match="going on with micro-batches of 6"):
        algorithm.learn(1)
    assert policy.tried[:7] == [24, 12, 6, 6, 6, 6, 6]  # and 6 from the next step on
    assert max(policy.tried[3:]) == 6
    assert algorithm._n_updates == plain._n_updates
    for a, b in zip(plain.policy.parameters(), algorithm.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


def test_no_memory_for_a_single_sample_is_an_error() -> None:
    algorithm = CFGRL(hungry(limit=0), vec(SeedEnv, 2), **SETTINGS)
    no_memory = pytest.raises(RuntimeError, match="allocate memory")
    with pytest.warns(UserWarning, match="out of memory"), no_memory:
        algorithm.learn(1)


def test_other_errors_are_not_taken_for_it() -> None:
    class Broken(MlpPolicy):
        def flow_matching_loss(self, *_: Any) -> Tensor:
            raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        CFGRL(Broken, vec(SeedEnv, 2), **SETTINGS).learn(1)
