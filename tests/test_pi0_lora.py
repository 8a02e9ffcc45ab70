"""Adapters on PI0: what they add, what is trained, and how they are saved."""

import sys
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cfgrl_envs import vec
from pi0_support import (
    HORIZON,
    MODES,
    SIZES,
    make_inputs,
    make_model,
    make_observation,
    make_policy,
    make_spaces,
)
from torch import Tensor, nn
from transformers import PI0ForConditionalGeneration

from cfgrl_gym import CFGRL
from cfgrl_gym.algorithms.flow import NULL
from cfgrl_gym.algorithms.pi0 import Pi0CFGRLConfig, Pi0ForCFGRL, Pi0Policy
from cfgrl_gym.algorithms.pi0.lora import add_lora, merged_state_dict

pytest.importorskip("peft")
LABELS = torch.tensor([1, NULL, 0, 1])
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def lora_model(mode: str = "token", rank: int = 2) -> Pi0ForCFGRL:
    model = make_model(mode)
    add_lora(model, rank, seed=0)
    return model


def lora_policy(**kwargs: object) -> Pi0Policy:
    return make_policy(trainable="lora", lora_rank=2, **kwargs)


def randomise_adapters(model: Pi0ForCFGRL) -> None:
    """Every B away from zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def adapted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            yield name, module


def velocity(model: PI0ForConditionalGeneration, labels: Tensor | None = LABELS) -> Tensor:
    condition = {} if labels is None else {"is_positive": labels}
    with torch.no_grad():
        output: Tensor = model(**make_inputs(), **condition).logits
    return output


def loss_of(policy: Pi0Policy, seed: int = 1) -> Tensor:
    obs = make_observation(batch=4)
    actions = torch.rand(4, HORIZON, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    target = policy.encode_actions(policy.encode_observation(obs), actions)
    is_pad = torch.zeros(4, HORIZON, dtype=torch.bool)
    t, noise = policy.draw_flow(4, torch.Generator().manual_seed(seed))
    return policy.flow_matching_loss(obs, target, is_pad, LABELS, t, noise).mean()


def train(policy: Pi0Policy, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = loss_of(policy)
        policy.optimizer.zero_grad()
        loss.backward()
        policy.optimizer.step()
        losses.append(loss.item())
    return losses


# What is added ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_new_adapters_change_no_bit_of_the_velocity(mode: str) -> None:
    assert torch.equal(velocity(lora_model(mode)), velocity(make_model(mode)))


def test_adapters_are_on_the_projections_that_reach_the_velocity_and_nowhere_else() -> None:
    names = {name for name, _ in adapted(lora_model())}
    attention = {f"self_attn.{p}" for p in PROJECTIONS if len(p) == 6}
    every = attention | {f"mlp.{p}" for p in PROJECTIONS if len(p) > 6}
    vlm, dit = "model.vlm.language_model.layers", "model.dit.layers"
    expected = {f"{dit}.{i}.{name}" for i in range(2) for name in every}
    expected |= {f"{vlm}.0.{name}" for name in every}
    expected |= {f"{vlm}.1.self_attn.k_proj", f"{vlm}.1.self_attn.v_proj"}
    assert names == expected


def test_adapted_layer_is_a_linear_layer_with_the_merged_weight() -> None:
    model = lora_model()
    randomise_adapters(model)
    for name, layer in adapted(model):
        state = layer.state_dict()
        a, b = state["lora_A.default.weight"], state["lora_B.default.weight"]
        assert a.shape[0] == b.shape[1] == (4 if ".dit." in name else 2)  # ranks
        weight = state["base_layer.weight"].double() + b.double() @ a.double()
        x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(1))
        expected = F.linear(x.double(), weight)
        torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=0)


def test_seed_reproduces_the_adapters_and_leaves_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first, second, other = make_model("token"), make_model("token"), make_model("token")
    for model, seed in ((first, 3), (second, 3), (other, 4)):
        add_lora(model, 2, seed)
    assert torch.equal(before, torch.random.get_rng_state())
    key = "model.dit.layers.0.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(first.state_dict()[key], second.state_dict()[key])
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])


def test_full_size_trains_as_many_parameters_as_openpis_ranks_imply() -> None:
    gemma = {
        "model_type": "gemma",
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 257152,
    }
    vlm = {
        "model_type": "paligemma",
        "text_config": {**gemma, "hidden_size": 2048, "intermediate_size": 16384},
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "projection_dim": 2048,
    }
    dit = {**gemma, "hidden_size": 1024, "intermediate_size": 4096}
    config = Pi0CFGRLConfig(vlm_config=vlm, dit_config=dit, condition_mode="token")
    with torch.device("meta"):
        model = Pi0ForCFGRL(config)
        model.drop_unused_embeddings()
        add_lora(model)

    def layer(hidden: int, mlp: int) -> int:
        """Sum over a layer's projections of inputs + outputs."""
        kv, q_and_o, each_mlp = hidden + 256, 2 * (hidden + 2048), hidden + mlp
        return 2 * kv + q_and_o + 3 * each_mlp

    adapters = 16 * (17 * layer(2048, 16384) + 2 * (2048 + 256)) + 32 * 18 * layer(1024, 4096)
    around = 2 * (32 * 1024 + 1024) + (2048 + 1 + 1024 + 1) * 1024 + 1024 * 32 + 32
    condition = 2 * 1024
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == adapters + around + condition
    assert 3.2e9 < sum(p.numel() for p in model.parameters()) < 3.4e9


# Number formats -----------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_base_has_float32_adapters_that_learn(autocast: bool) -> None:
    model = make_model("token")
    language_model = model.model.vlm.language_model
    for layer in language_model.layers:
        layer.to(torch.bfloat16)
    plain = {name: p.clone() for name, p in model.state_dict().items()}
    add_lora(model, 2, seed=0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    layer = language_model.layers[0].mlp.up_proj
    assert layer.base_layer.weight.dtype == torch.bfloat16
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(layer(x), layer.base_layer(x))
    randomise_adapters(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    for factor in (layer.lora_A, layer.lora_B):
        gradient = factor["default"].weight.grad
        assert gradient.dtype == torch.float32
        assert gradient.abs().max() > 0
    merged = merged_state_dict(model)
    assert {name: p.dtype for name, p in merged.items()} == {n: p.dtype for n, p in plain.items()}
    key = "model.vlm.language_model.layers.0.mlp.up_proj.weight"
    exact = plain[key].double() + (
        layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    )
    torch.testing.assert_close(merged[key].double(), exact, atol=0, rtol=2**-8)
    expected = F.linear(x.double(), exact)
    torch.testing.assert_close(y.double(), expected, atol=0.05, rtol=0.02)


def test_autocast_trains_all_adapters() -> None:
    policy = lora_policy()
    randomise_adapters(policy.model)
    expected = loss_of(policy)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(policy)
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=0.02, rtol=0.02)
    for name, parameter in policy.named_parameters():
        if ".lora_" in name:
            assert parameter.grad is not None, name
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.abs().max() > 0, name


# Training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix_dropout", [False, True])
def test_gradients_reach_every_adapter_and_no_base_weight(prefix_dropout: bool) -> None:
    policy = lora_policy(use_prefix_dropout=prefix_dropout)
    loss_of(policy).backward()
    optimised = {id(p) for group in policy.optimizer.param_groups for p in group["params"]}
    seen = set()
    for name, parameter in policy.model.named_parameters():
        around = name.startswith(("condition.", "embed_action_time.", "action_out_proj."))
        if ".lora_" in name or around:
            seen.add(id(parameter))
            if ".lora_A." not in name:  # B is zero, so A's first gradient is
                assert parameter.grad is not None, name
                assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name
    assert optimised == seen


def test_training_lowers_the_loss_and_leaves_the_base_as_it_was() -> None:
    policy, untouched = lora_policy(randomise=False), make_policy(randomise=False)
    losses = train(policy, 60)
    assert losses[-1] < 0.7 * losses[0]
    base = {
        name.replace(".base_layer.", "."): p
        for name, p in policy.model.named_parameters()
        if not p.requires_grad
    }
    for name, parameter in untouched.model.named_parameters():
        assert name not in base or torch.equal(base[name], parameter), name
    assert sum(p.numel() for p in base.values()) > 0.5 * sum(
        p.numel() for p in untouched.parameters()
    )
    for name, layer in adapted(policy.model):
        assert layer.lora_B["default"].weight.abs().max() > 0, name


# Saving -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_merged_weights_give_the_adapted_velocity(mode: str) -> None:
    model, merged = lora_model(mode), make_model(mode)
    randomise_adapters(model)
    merged.load_state_dict(merged_state_dict(model))
    torch.testing.assert_close(velocity(merged), velocity(model), atol=1e-5, rtol=0)
    assert (velocity(model) - velocity(make_model(mode))).abs().max() > 1e-2


def test_pretrained_folder_is_an_ordinary_checkpoint_and_the_policy_trains_on(
    tmp_path: Path,
) -> None:
    policy = lora_policy()
    randomise_adapters(policy.model)
    before = {name: p.clone() for name, p in policy.state_dict().items()}
    policy.save_pretrained(tmp_path)
    after = policy.state_dict()
    assert all(
        torch.equal(torch.as_tensor(after[n]), torch.as_tensor(p)) for n, p in before.items()
    )
    plain, info = PI0ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) <= {"model.dit.embed_tokens.weight"}
    assert set(info["unexpected_keys"]) == {"condition.embedding"}
    expected = velocity(policy.model, torch.full((4,), NULL))
    torch.testing.assert_close(velocity(plain.eval(), None), expected, atol=1e-5, rtol=0)
    obs, noise = make_observation(), torch.randn(3, HORIZON, 32)
    for trainable in ("all", "lora"):
        again = Pi0Policy(*make_spaces(), lambda _: 1e-3, checkpoint=tmp_path, trainable=trainable)
        has_adapters = any(".lora_" in name for name in again.state_dict())
        assert has_adapters == (trainable == "lora")
        torch.testing.assert_close(
            again.sample_actions(obs, noise, 1.5),
            policy.sample_actions(obs, noise, 1.5),
            atol=1e-5,
            rtol=0,
        )
    losses = train(policy, 10)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("mode", MODES)
def test_sb3_save_and_load_predict_bit_equal(mode: str, tmp_path: Path) -> None:
    policy = lora_policy(mode=mode)
    randomise_adapters(policy.model)
    policy.save(str(tmp_path / "policy"))
    again = Pi0Policy.load(str(tmp_path / "policy"), device="cpu", trusted=True)
    assert (again.config.trainable, again.lora_rank) == ("lora", 2)
    obs = make_observation()
    actions, expected = (p.predict(obs, deterministic=True)[0] for p in (again, policy))
    assert np.array_equal(actions, expected)
    trained, restored = (
        {name for name, p in each.named_parameters() if p.requires_grad} for each in (policy, again)
    )
    assert trained == restored


class OneChunkEnv(gym.Env):
    """One chunk; the reward is 1 where the chunk's first action is positive."""

    def __init__(self) -> None:
        self.observation_space, self.action_space = make_spaces()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return {key: value[0] for key, value in make_observation(batch=1).items()}, {}

    def step(self, action):
        reward = float(action[0, 0] > 0)
        info = {"rewards": np.array([reward] + [0.0] * (HORIZON - 1)), "n_steps": HORIZON}
        return self.reset()[0], reward, True, False, info


def test_cfgrl_save_and_load_go_on_bit_equal_with_the_optimizer(tmp_path: Path) -> None:
    settings = {"sizes": SIZES, "trainable": "lora", "lora_rank": 2, "num_inference_steps": 2}
    algorithm = CFGRL(
        "Pi0Policy", vec(OneChunkEnv), groups_per_iteration=1, policy_kwargs=settings, seed=0
    )
    algorithm.learn(8)
    assert algorithm._n_updates > 0
    algorithm.save(tmp_path / "cfgrl")
    again = CFGRL.load(tmp_path / "cfgrl", device="cpu")
    for policy in (algorithm.policy, again.policy):
        train(policy, 2)
    expected = algorithm.policy.state_dict()
    for name, value in again.policy.state_dict().items():
        assert torch.equal(value, expected[name]), name


# Errors -------------------------------------------------------------------------------------------


def test_missing_peft_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"needs the peft package: pip install 'cfgrl-gym\[lora\]"):
        lora_policy()


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="lora_rank must be at least 1; got 0"):
        add_lora(make_model("token"), rank=0)
