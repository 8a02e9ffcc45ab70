"""Prefixes kept from acting to the update: exact, within the budget, given back."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from pi0_support import HORIZON, SIZES, PromptEnv, make_observation, make_policy
from stable_baselines3.common.vec_env import DummyVecEnv

from cfgrl_gym.algorithms import CFGRL
from cfgrl_gym.algorithms.flow import NULL
from cfgrl_gym.algorithms.memory.prefix_cache import PrefixCache
from cfgrl_gym.algorithms.pi0 import Pi0Policy
from cfgrl_gym.wrappers.prompt import encode_prompt

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
PLENTY = 2**30
LABELS = torch.tensor([1, NULL, 1])


def count_vlm_passes(policy: Pi0Policy) -> list[int]:
    """Grows by the batch size of every pass (but those of the memory plan, without storage)."""
    batches: list[int] = []

    def count(_: Any, __: Any, output: torch.Tensor) -> None:
        if type(output) is torch.Tensor:
            batches.append(len(output))

    policy.model.model.vlm.language_model.layers[0].register_forward_hook(count)
    return batches


def gradients(policy: Pi0Policy, prefix: Any, obs: Any = None) -> list[torch.Tensor]:
    t, noise = policy.draw_flow(3, torch.Generator().manual_seed(1))
    actions = torch.zeros(3, HORIZON, policy.action_width)
    is_pad = torch.zeros(3, HORIZON, dtype=torch.bool)
    policy.zero_grad()
    losses = policy.flow_matching_loss(
        obs or make_observation(), actions, is_pad, LABELS, t, noise, prefix
    )
    losses.sum().backward()
    kept = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
    return [losses.detach(), *kept]


@pytest.mark.parametrize("prefix_dropout", [False, True])
def test_loss_and_gradients_from_a_kept_prefix_are_those_of_a_new_one(prefix_dropout: bool) -> None:
    policy = make_policy(trainable="expert", use_prefix_dropout=prefix_dropout)
    memory = PrefixCache(policy, 0, PLENTY)
    keys = memory.keep(policy.act(make_observation(), cfg_scale=2.0).prefixes, 3)
    passes = count_vlm_passes(policy)
    kept = memory.recall(make_observation(), keys, LABELS)
    assert passes == []
    first, again, fresh = (gradients(policy, prefix) for prefix in (kept, kept, None))
    for a, b, c in zip(first, again, fresh, strict=True):
        assert torch.equal(a, b)
        if prefix_dropout:  # ∅ rows computed apart or beside the others
            torch.testing.assert_close(a, c, atol=1e-6, rtol=1e-5)
        else:
            assert torch.equal(a, c)


def test_what_finds_no_room_is_computed_and_the_rest_is_not() -> None:
    policy = make_policy(trainable="expert")
    prefixes = policy.act(make_observation()).prefixes
    (prefix,) = prefixes.values()
    row = policy.split_prefix(prefix)[0]
    size = sum(tensor.nbytes for tensor in row.values())
    memory = PrefixCache(policy, PLENTY, 2 * size + 1)  # no GPU: the host's budget counts
    keys = memory.keep(prefixes, 3)
    assert [key in memory for key in keys] == [True, True, False]
    passes = count_vlm_passes(policy)
    recalled = memory.recall(make_observation(), keys, LABELS)
    assert passes == [1]
    mask = prefix.attention_mask
    assert torch.equal(recalled.attention_mask, mask)
    real = mask[:, None, None, None, :, None]
    torch.testing.assert_close(
        recalled.keys_values * real, prefix.keys_values * real, atol=1e-6, rtol=0
    )
    memory.keep_only(keys[1:])
    memory.recall(make_observation(), keys, LABELS)  # the first is computed again and finds room
    assert passes == [1, 2]
    assert [key in memory for key in keys] == [True, True, False]
    memory.keep_only([keys[0], keys[2]])
    assert memory.free["host"] == size + 1
    memory.recall(make_observation(), [keys[1]] * 3, LABELS)  # one sample, three times in the batch
    assert memory.free["host"] == 1


def test_prompts_of_different_lengths_share_a_batch() -> None:
    policy = make_policy(trainable="expert")
    memory = PrefixCache(policy, 0, PLENTY)
    obs, keys, room = make_observation(), [], [PLENTY]
    longer = (
        "pick up the can and " * 5 + "close it"
    )  # than the 96 tokens that prompts are padded to
    prompts = [encode_prompt(text) for text in ("open the drawer", longer, "close it")]
    obs["prompt"] = np.stack(prompts)
    for i in range(3):
        one = {key: value[i : i + 1] for key, value in obs.items()}
        keys += memory.keep(policy.act(one).prefixes, 1)
        room.append(memory.free["host"])
    assert len({before - after for before, after in pairwise(room)}) > 1
    for a, b in zip(
        gradients(policy, memory.recall(obs, keys, LABELS), obs),
        gradients(policy, None, obs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_nothing_is_kept_of_a_vlm_that_trains() -> None:
    policy = make_policy(trainable="all")
    memory = PrefixCache(policy, 0, PLENTY)
    keys = memory.keep(policy.act(make_observation()).prefixes, 3)
    assert memory.free["host"] == PLENTY
    assert memory.recall(make_observation(), keys, LABELS) is None


SMALL: dict[str, Any] = {
    "rloo_batch_size": 3,
    "groups_per_iteration": 2,
    "batch_size": 16,
    "positive_share": None,
    "replay_iterations": 0,
    "n_epochs": 4,
    "seed": 0,
    "device": "cpu",
}


def learn(**kwargs: Any) -> tuple[CFGRL, list[int]]:
    stride = kwargs.get("window_stride")
    algorithm = CFGRL(
        "Pi0Policy",
        DummyVecEnv([lambda: PromptEnv(stride)] * 2),
        policy_kwargs={"sizes": SIZES, "trainable": "expert"},
        **(SMALL | kwargs),
    )
    passes = count_vlm_passes(algorithm.policy)  # type: ignore[arg-type]
    return algorithm.learn(1), passes


def test_an_update_from_kept_prefixes_runs_no_vlm_and_learns_the_same() -> None:
    kept, few = learn()
    recomputed, many = learn(prefix_memory=0)
    assert kept.windows is not None
    samples = len(kept.windows)
    assert set(few) == {2}  # a row for each environment while acting, and nothing else
    # 4 epochs, and the guidance gap once
    assert sum(many) == sum(few) + 4 * samples + min(samples, 16)
    for a, b in zip(kept.policy.parameters(), recomputed.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_the_plan_is_told_and_a_budget_too_small_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    learn(verbose=1, prefix_memory=0.5)
    said = capsys.readouterr().out
    assert "Memory: an update on micro-batches of 16 needs about 0.0" in said
    assert "0.50 GiB for prefixes in the host's memory" in said
    with pytest.warns(UserWarning, match="batches of 16 don't fit in 0.0 GiB: going on with micro"):
        learn(device_memory=0.0025)
    with pytest.raises(MemoryError, match="an update on one window at a time needs"):
        learn(device_memory=0.0001)


def test_windows_inside_chunks_are_computed_once() -> None:
    algorithm, passes = learn(window_stride=2)
    assert algorithm.windows is not None
    _, acting = learn()
    of_kept_groups = len(algorithm.windows) // 3  # at offset 0; as many at 2 and at 4
    assert sum(passes) == sum(acting) + 2 * of_kept_groups


def test_discarded_groups_and_old_windows_give_their_room_back() -> None:
    algorithm, _ = learn(prefix_memory=1.0)
    assert algorithm.windows is not None
    memory, keys = algorithm._prefixes, algorithm.windows.prefix_keys.tolist()
    assert all(key in memory for key in keys)
    assert memory.free["host"] < 2**30
    algorithm.learn(1, reset_num_timesteps=False)
    assert not any(key in memory for key in keys)
    memory.keep_only(())
    assert memory.free["host"] == 2**30
