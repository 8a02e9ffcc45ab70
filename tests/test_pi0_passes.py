"""The passes of acting and training: prefix, branches side by side, checkpointed, compiled."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from pi0_support import (
    HORIZON,
    MODES,
    SIZES,
    make_inputs,
    make_model,
    make_observation,
    make_policy,
    plain_pi0,
)
from torch.autograd.graph import saved_tensors_hooks

from cfgrl_gym.algorithms.flow import NEGATIVE, NULL, POSITIVE
from cfgrl_gym.algorithms.pi0 import Pi0ForCFGRL, Pi0Policy
from cfgrl_gym.algorithms.pi0.prefix import CACHE, Prefix, join
from cfgrl_gym.algorithms.pi0.presets import new_model, tiny_config

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
PREFIX = ("input_ids", "pixel_values", "pixel_attention_mask", "attention_mask")


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.fixture(params=MODES)
def model(request: pytest.FixtureRequest) -> Pi0ForCFGRL:
    return make_model(request.param)


def prefix_of(model: Pi0ForCFGRL, inputs: dict[str, torch.Tensor]) -> Prefix:
    return model.encode_prefix(*(inputs[name] for name in PREFIX))


@torch.no_grad()
def test_prefix_is_what_transformers_vlm_caches() -> None:
    model, inputs = make_model("token"), make_inputs()
    embeds = model.model.embed_prefix(*(inputs[name] for name in PREFIX[:3]))
    cache = plain_pi0(model).model.vlm(
        inputs_embeds=embeds,
        attention_mask=inputs["attention_mask"],
        position_ids=inputs["attention_mask"].cumsum(-1) - 1,
        token_type_ids=torch.zeros_like(inputs["input_ids"]),
        use_cache=True,
    )
    expected = Prefix.from_cache(getattr(cache, CACHE), inputs["attention_mask"])
    real = inputs["attention_mask"][:, None, None, None, :, None]
    close(prefix_of(model, inputs).keys_values * real, expected.keys_values * real, atol=1e-6)


@pytest.mark.parametrize("branches", [(NULL, POSITIVE), (POSITIVE, NULL, NEGATIVE), (POSITIVE,)])
@torch.no_grad()
def test_branches_side_by_side_are_those_of_separate_passes(
    model: Pi0ForCFGRL, branches: tuple[int, ...]
) -> None:
    inputs = make_inputs()
    velocities = model.branch_velocities(
        prefix_of(model, inputs), inputs["state"], inputs["noise"], inputs["timestep"], branches
    )
    for label, velocity in zip(branches, velocities, strict=True):
        close(velocity, model(**inputs, is_positive=label).logits)
        if label == NULL:
            close(velocity, plain_pi0(model)(**inputs).logits)


@torch.no_grad()
def test_a_branch_does_not_see_the_others() -> None:
    model, inputs = make_model("token"), make_inputs()
    arguments = [inputs["state"], inputs["noise"], inputs["timestep"], (NULL, POSITIVE)]
    prefix = prefix_of(model, inputs)
    null, positive = model.branch_velocities(prefix, *arguments)
    model.condition.embedding.fill_(1e4)
    null_again, positive_again = model.branch_velocities(prefix, *arguments)
    assert torch.equal(null, null_again)
    assert not torch.allclose(positive, positive_again, atol=1e-3)


@torch.no_grad()
def test_joined_prefixes_of_unequal_length_serve_each_row_as_before() -> None:
    model, inputs = make_model("token"), make_inputs(batch=2)
    shorter = {name: inputs[name][1:] for name in inputs}
    length = int(shorter["attention_mask"].sum())
    for name in ("input_ids", "attention_mask"):
        shorter[name] = shorter[name][:, :length]
    rows = [prefix_of(model, {k: v[:1] for k, v in inputs.items()}), prefix_of(model, shorter)]
    assert rows[0].attention_mask.shape != rows[1].attention_mask.shape
    velocity = model.velocity(
        join(rows), inputs["state"], inputs["noise"], inputs["timestep"], torch.tensor([1, NULL])
    )
    close(velocity, model(**inputs, is_positive=torch.tensor([1, NULL])).logits)


@torch.no_grad()
def test_eager_attention_gives_the_same(model: Pi0ForCFGRL) -> None:
    inputs, labels = make_inputs(), torch.tensor([1, NULL, 0, 1])
    expected = model(**inputs, is_positive=labels).logits
    model.set_attn_implementation("eager")
    close(model(**inputs, is_positive=labels).logits, expected)


@torch.no_grad()
def test_several_key_value_heads_are_those_of_transformers_too() -> None:
    config: Any = tiny_config(replace(SIZES, num_heads=4), HORIZON)
    for part in (config.dit_config, config.vlm_config.text_config):
        part.num_key_value_heads = 2
    model, inputs = new_model(config, seed=0).eval(), make_inputs()
    (velocity,) = model.branch_velocities(
        prefix_of(model, inputs), inputs["state"], inputs["noise"], inputs["timestep"], (NULL,)
    )
    close(velocity, plain_pi0(model)(**inputs).logits)


def gradients(policy: Pi0Policy) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of one loss, and the bytes kept for the backward pass (weights apart)."""
    policy.set_training_mode(True)
    t, noise = policy.draw_flow(3, torch.Generator().manual_seed(1))
    actions, is_pad = torch.zeros(3, HORIZON, 32), torch.zeros(3, HORIZON, dtype=torch.bool)
    weights = {parameter.data_ptr() for parameter in policy.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = policy.flow_matching_loss(
            make_observation(), actions, is_pad, torch.tensor([1, NULL, 1]), t, noise
        )
    losses.sum().backward()
    named = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    return named, sum(saved.values())


@pytest.mark.parametrize("trainable", ["all", "expert", "lora"])
def test_checkpointing_saves_memory_and_leaves_the_gradients(trainable: str) -> None:
    plain, less = (
        make_policy(trainable=trainable, gradient_checkpointing=on) for on in (False, True)
    )
    expected, whole = gradients(plain)
    actual, part = gradients(less)
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=1e-5)
    assert part < 0.7 * whole


def test_deterministic_prediction_ignores_batch_generator_and_what_came_before() -> None:
    policy = make_policy(cfg_scale=1.5)
    obs = make_observation()
    torch.manual_seed(0)
    first, _ = policy.predict(obs, deterministic=True)
    policy.predict(obs)
    torch.manual_seed(1)
    second, _ = policy.predict(obs, deterministic=True)
    assert (first == second).all()


def test_labelled_forward_refuses_arguments_it_cannot_honour() -> None:
    model, inputs = make_model("token"), make_inputs()
    with pytest.raises(ValueError, match="no position_ids"):
        model(**inputs, position_ids=inputs["attention_mask"].cumsum(-1), is_positive=1)
    mask = inputs.pop("attention_mask")
    assert mask.any()
    with pytest.raises(ValueError, match="pass attention_mask"):
        model(**inputs, is_positive=1)
