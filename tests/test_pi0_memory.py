"""The estimate of an update's memory, against closed forms and what allocators really give."""

import re
import resource
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from pi0_support import make_policy
from torch import nn
from torch.profiler import ProfilerActivity, profile

from cfgrl_gym.algorithms.memory.device import available_bytes
from cfgrl_gym.algorithms.memory.plan import saved_by_sharing
from cfgrl_gym.algorithms.pi0 import Pi0Policy, TinySizes
from cfgrl_gym.algorithms.pi0.condition import Pi0CFGRLConfig
from cfgrl_gym.algorithms.pi0.lora import add_lora
from cfgrl_gym.algorithms.pi0.memory import (
    HEADROOM,
    estimate_update,
    plan_update,
)
from cfgrl_gym.algorithms.pi0.model import Pi0ForCFGRL

MIB, GB = 2**20, 10**9
CAMERAS, BATCH = 2, 8
# Wide enough that an update's tensors, not the operations' scratch, decide.
WIDE = TinySizes(hidden_size=128, num_heads=4, num_layers=3, image_size=64, patch_size=8)


def allocated_peak(work: Callable[[], Any]) -> int:
    """The most bytes that torch's CPU allocator had given out at once during `work`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return int(np.cumsum([size for _, size in changes]).max())


def observation(policy: Pi0Policy, batch: int) -> dict[str, torch.Tensor]:
    obs = {name: torch.zeros(batch, 32, 32, 3, dtype=torch.uint8) for name in policy.cameras}
    obs["state"] = torch.zeros(batch, 8)
    obs["prompt"] = torch.full((batch, 12), ord("a"), dtype=torch.uint8)
    return obs


def update(policy: Pi0Policy, obs: Any, prefix: Any) -> None:
    batch = len(obs["state"])
    actions = torch.zeros(batch, policy.horizon, policy.action_width)
    is_pad = torch.zeros(batch, policy.horizon, dtype=torch.bool)
    labels, t = torch.ones(batch, dtype=torch.int64), torch.full((batch,), 0.5)
    policy.flow_matching_loss(obs, actions, is_pad, labels, t, actions, prefix).sum().backward()


def measured_and_estimated(batch: int, accumulate: bool, **kwargs: Any) -> tuple[int, int]:
    """Bytes at the peak of a real update on the CPU, and what was expected."""
    policy = make_policy(sizes=WIDE, **kwargs)
    policy.set_training_mode(True)
    obs = observation(policy, batch)
    inputs = policy.encode_observation(obs)
    prompt_tokens = inputs["input_ids"].shape[1] - policy.image_tokens
    existing = sum(t.numel() * t.element_size() for t in policy.model.state_dict().values())

    def work() -> None:
        labels = torch.ones(batch, dtype=torch.int64)
        prefix = policy.encode_prefix(inputs, labels) if policy.frozen_prefix else None
        update(policy, obs, prefix)

    work()
    if accumulate:  # the gradients stay, so they are not among what is allocated
        existing += sum(p.grad.nbytes for p in policy.parameters() if p.grad is not None)
    else:
        policy.optimizer.zero_grad()
    measured = existing + allocated_peak(work)
    estimate = estimate_update(
        policy.model,
        batch,
        cameras=len(policy.cameras),
        prompt_tokens=prompt_tokens,
        device_type="cpu",
        accumulate=accumulate,
    )
    return measured, estimate.total - estimate.optimizer


@pytest.fixture(scope="module")
def full_size() -> Pi0ForCFGRL:
    """The full model as expert training has it, on the meta device."""
    return full_model("expert")


def full_model(trainable: str) -> Pi0ForCFGRL:
    with torch.device("meta"):
        model = Pi0ForCFGRL(Pi0CFGRLConfig())
    model.drop_unused_embeddings()
    if trainable != "all":
        for parameter in model.model.vlm.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    if trainable == "expert":
        model.model.vlm.requires_grad_(False)
    if trainable == "lora":
        add_lora(model)
    return model


# Against the allocator ------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("trainable", ["expert", "all", "lora"])
def test_the_estimate_is_within_5_percent_of_what_an_update_allocates(
    trainable: str, gradient_checkpointing: bool, accumulate: bool
) -> None:
    measured, estimated = measured_and_estimated(
        BATCH,
        accumulate,
        trainable=trainable,
        gradient_checkpointing=gradient_checkpointing,
    )
    assert estimated == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("foreach", [False, True])  # CUDA's default is True
def test_the_optimizers_part_is_what_adamw_allocates(foreach: bool) -> None:
    policy = make_policy(
        sizes=WIDE, trainable="all", optimizer_kwargs={"foreach": foreach, "weight_decay": 0.1}
    )
    model = policy.model
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    device_type = "cuda" if foreach else "cpu"
    estimate = estimate_update(model, 1, cameras=1, prompt_tokens=1, device_type=device_type)
    first = allocated_peak(policy.optimizer.step)  # makes the two averages
    again = allocated_peak(policy.optimizer.step)
    assert first == pytest.approx(estimate.optimizer + again, rel=0.05)
    assert again <= 1.05 * estimate.activations


# Against closed forms -------------------------------------------------------------------------


def test_the_parts_of_expert_training_at_full_size(full_size: Pi0ForCFGRL) -> None:
    estimate = estimate_update(full_size, 32, cameras=3, average=True)
    vlm = sum(p.numel() for p in full_size.model.vlm.parameters())
    expert = sum(p.numel() for p in full_size.parameters()) - vlm
    assert 2.9e9 < vlm < 3.0e9
    assert 0.3e9 < expert < 0.33e9
    assert estimate.weights == pytest.approx(2 * vlm + 4 * expert, rel=1e-4)  # and buffers
    assert estimate.gradients == estimate.average == 4 * expert
    assert estimate.optimizer == 2 * 4 * expert
    # 18 layers, keys and values, 256 wide, bfloat16: 18 KB a token; 3 · 256 + 48 tokens
    assert estimate.prefix == 32 * 816 * 18 * 2 * 256 * 2
    assert estimate.prefix / (32 * 816) == 18 * 1024
    assert estimate.total == sum(estimate.parts().values())


def test_expert_training_of_the_full_model_fits_16_gb(full_size: Pi0ForCFGRL) -> None:
    plan = plan_update(full_size, 32, free=16 * GB, cameras=2, average=True)
    assert plan.needed is not None
    assert plan.needed * (1 + HEADROOM) <= 16 * GB
    assert plan.room >= 0


def test_two_branches_with_prefixes_of_their_own_need_both(full_size: Pi0ForCFGRL) -> None:
    one, two = (
        estimate_update(full_size, 2, cameras=2, two_prefixes=both) for both in (False, True)
    )
    assert two.prefix == 2 * one.prefix


def test_lora_has_gradients_of_its_adapters_only() -> None:
    model = full_model("lora")
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    estimate = estimate_update(model, 1, cameras=2)
    assert estimate.gradients == 4 * adapters < estimate.weights / 20
    assert estimate.prefix == 0  # the VLM runs with gradients, and nothing of it is kept


def test_activations_grow_with_the_batch_and_checkpointing_makes_them_smaller() -> None:
    model = full_model("all")
    eight, sixteen = (estimate_update(model, batch, cameras=2).activations for batch in (8, 16))
    assert eight < sixteen < 2 * eight
    model.checkpoint_layers()
    assert estimate_update(model, 16, cameras=2).activations < sixteen / 2


def test_the_full_model_is_estimated_without_being_allocated(full_size: Pi0ForCFGRL) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kib = 1024 if sys.platform == "linux" else 1
    estimate = estimate_update(full_size, 32, cameras=3)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * kib
    assert estimate.total > 10 * GB
    assert grown < 500 * MIB
    assert all(parameter.is_meta for parameter in full_size.parameters())


def test_the_model_is_left_as_it_was() -> None:
    policy = make_policy(trainable="expert")
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    estimate_update(policy.model, 2, cameras=CAMERAS, device_type="cpu")
    after = policy.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in policy.model.parameters())


# Plan and refusal -----------------------------------------------------------------------------


def test_a_micro_batch_is_halved_until_it_fits() -> None:
    model = make_policy(trainable="expert").model
    need = {
        size: estimate_update(model, size, cameras=3, device_type="cpu", accumulate=size < 24).total
        for size in (24, 12, 6, 3, 2)
    }
    sizes = list(need)
    cases = [(need[24], 24)] + [(need[a] - 1, b) for a, b in pairwise(sizes)]
    for enough, expected in cases:
        free = int(enough * (1 + HEADROOM)) + 1
        plan = plan_update(model, 24, free=free, cameras=3, device_type="cpu")
        assert plan.batch_size == expected
        assert plan.needed == need[expected]
        assert plan.room == int(free / (1 + HEADROOM)) - need[expected]


def test_a_device_without_enough_memory_is_refused_by_part(full_size: Pi0ForCFGRL) -> None:
    with pytest.raises(MemoryError) as refused:
        plan_update(full_size, 32, free=8 * GB, cameras=2, device="cuda:0", average=True)
    message = str(refused.value)
    needed, free = (float(x) for x in re.findall(r"([\d.]+) GiB", message))
    one = estimate_update(full_size, 1, cameras=2, average=True)
    assert needed == pytest.approx(one.total * (1 + HEADROOM) / 2**30, abs=0.01)
    assert free == pytest.approx(8 * GB / 2**30, abs=0.01)
    for name, size in one.parts().items():
        assert f"{name} {size / 2**30:.2f}" in message
    assert "cuda:0" in message
    assert "no moving average" in message
    assert "trainable" not in message  # it is expert training already


@pytest.mark.parametrize(
    ("kwargs", "helps"),
    [
        ({"trainable": "all"}, ["trainable='expert' or 'lora'", "gradient_checkpointing=True"]),
        ({"trainable": "all", "gradient_checkpointing": True}, ["trainable='expert' or 'lora'"]),
        (
            {"trainable": "lora"},
            ["trainable='expert'", "gradient_checkpointing=True", "vlm_dtype='bfloat16'"],
        ),
        ({"trainable": "expert"}, ["vlm_dtype='bfloat16'"]),
    ],
)
def test_the_refusal_names_what_would_help_this_model(
    kwargs: dict[str, Any], helps: list[str]
) -> None:
    with pytest.raises(MemoryError) as refused:
        plan_update(make_policy(**kwargs).model, 4, free=1000, cameras=2)
    advice = str(refused.value).split("What helps: ")[1].split("; ")
    assert advice[-1] == "a device with more memory"
    assert [given.split(" instead")[0] for given in advice[:-1]] == helps


def test_what_a_model_occupies_is_there_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("M", (), {"available": 1000}))
    layer = torch.nn.Linear(10, 10, bias=False)
    assert available_bytes(torch.device("cpu"), layer) == 1000 + 400
    assert available_bytes(torch.device("cpu"), layer.to("meta")) == 1000


def test_shares_save_what_is_not_gathered_or_copied() -> None:
    """1,024 bytes train, 256 of them in a unit; ranks hold a fourth of five times as much."""
    unit = nn.Linear(8, 8, bias=False)
    module = nn.Sequential(
        unit, nn.Linear(8, 24, bias=False), nn.Linear(9, 9).requires_grad_(False)
    )
    gradients_and_averages, gathered = 3 * 1024, (1024 - 256) + 2 * 256
    expected = gradients_and_averages - 5 * 1024 // 4 - 2 * gathered
    assert saved_by_sharing(module, [unit], copied=4 * 1024, ranks=4) == expected


def test_pi0_gathers_apart_what_is_large(full_size: Pi0ForCFGRL) -> None:
    apart = {id(p) for unit in full_size.fsdp_units() for p in unit.parameters()}
    sizes = [p.numel() for p in full_size.parameters() if id(p) not in apart]
    assert sum(sizes) < 0.1 * sum(p.numel() for p in full_size.parameters())
