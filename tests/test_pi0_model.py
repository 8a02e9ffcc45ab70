"""The conditional PI0 against transformers' own, and ∅ against everything."""

import logging
import warnings

import pytest
import torch
from pi0_support import (
    HORIZON,
    IMAGE_SIZE,
    MODES,
    TOKENS_PER_IMAGE,
    make_inputs,
    make_model,
    plain_pi0,
    randomise_condition,
    rows,
)
from transformers import PI0ForConditionalGeneration

from cfgrl_gym.algorithms.flow import NEGATIVE, NULL, POSITIVE, euler
from cfgrl_gym.algorithms.pi0 import Pi0ForCFGRL
from cfgrl_gym.algorithms.pi0.condition import as_labels
from cfgrl_gym.algorithms.pi0.presets import TinySizes

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
PREFIX = ("input_ids", "pixel_values", "pixel_attention_mask", "attention_mask")
MIXED = torch.tensor([POSITIVE, NULL, NEGATIVE, NULL])


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.fixture(params=MODES)
def model(request: pytest.FixtureRequest) -> Pi0ForCFGRL:
    return make_model(request.param)


@torch.no_grad()
def test_null_velocity_is_that_of_transformers_pi0(model: Pi0ForCFGRL) -> None:
    inputs = make_inputs()
    close(model(**inputs).logits, plain_pi0(model)(**inputs).logits)


@torch.no_grad()
def test_null_rows_of_a_mixed_batch_are_those_of_transformers_pi0(model: Pi0ForCFGRL) -> None:
    inputs = make_inputs()
    mixed = model(**inputs, is_positive=MIXED).logits
    close(mixed[MIXED == NULL], plain_pi0(model)(**inputs).logits[MIXED == NULL])


@torch.no_grad()
def test_null_loss_is_that_of_transformers_pi0(model: Pi0ForCFGRL) -> None:
    inputs = make_inputs()
    actions = torch.randn(4, HORIZON, 32, generator=torch.Generator().manual_seed(3))
    close(
        model(**inputs, actions=actions).loss,
        plain_pi0(model)(**inputs, actions=actions).loss,
    )


@torch.no_grad()
def test_chunk_from_the_cached_prefix_is_that_of_transformers_sampler(model: Pi0ForCFGRL) -> None:
    inputs = make_inputs()
    noise = inputs.pop("noise")
    inputs.pop("timestep")
    expected = plain_pi0(model).sample_actions(**inputs, noise=noise, num_steps=10)
    state = inputs.pop("state")
    prefix = model.encode_prefix(**inputs)

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return model(
            state=state,
            noise=x,
            timestep=t,
            attention_mask=prefix.attention_mask,
            cache=prefix.to_cache(),
        ).logits

    close(euler(velocity, noise, 10), expected)


@torch.no_grad()
def test_null_output_ignores_every_condition_parameter(model: Pi0ForCFGRL) -> None:
    inputs = make_inputs()
    null = MIXED == NULL
    before, mixed_before = model(**inputs).logits, model(**inputs, is_positive=MIXED).logits
    randomise_condition(model, scale=100.0, seed=9)
    mixed_after = model(**inputs, is_positive=MIXED).logits
    assert torch.equal(before, model(**inputs).logits)
    assert torch.equal(mixed_before[null], mixed_after[null])
    assert not torch.allclose(mixed_before[~null], mixed_after[~null], atol=1e-3)
    for parameter in model.condition.parameters():
        parameter.fill_(float("nan"))
    assert torch.equal(mixed_before[null], model(**inputs, is_positive=MIXED).logits[null])


def test_null_rows_give_condition_parameters_exactly_zero_gradient(model: Pi0ForCFGRL) -> None:
    inputs = make_inputs()
    velocity = model(**inputs, is_positive=MIXED).logits
    velocity[MIXED == NULL].square().sum().backward()
    for parameter in model.condition.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    model.zero_grad()
    model(**inputs, is_positive=None).logits.square().sum().backward()
    assert all(parameter.grad is None for parameter in model.condition.parameters())


def test_labelled_rows_train_their_own_embedding_only(model: Pi0ForCFGRL) -> None:
    labels = torch.tensor([POSITIVE, NULL, POSITIVE, NULL])
    model(**make_inputs(), is_positive=labels).logits.square().sum().backward()
    gradient = model.condition.embedding.grad
    assert gradient[POSITIVE].abs().max() > 0
    assert torch.equal(gradient[NEGATIVE], torch.zeros_like(gradient[NEGATIVE]))


@torch.no_grad()
def test_rows_of_a_mixed_batch_equal_the_same_rows_alone(model: Pi0ForCFGRL) -> None:
    inputs = make_inputs()
    mixed = model(**inputs, is_positive=MIXED).logits
    for i, label in enumerate(MIXED.tolist()):
        alone = model(**rows(inputs, [i]), is_positive=None if label == NULL else label).logits
        close(mixed[i : i + 1], alone)


@torch.no_grad()
def test_the_three_labels_give_three_velocities(model: Pi0ForCFGRL) -> None:
    inputs = make_inputs()
    v = [model(**inputs, is_positive=label).logits for label in (None, 0, 1)]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (v[first] - v[second]).abs().max() > 1e-3


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_a_fresh_condition_is_a_no_op(mode: str) -> None:
    model, inputs = make_model(mode, randomise=False), make_inputs()
    expected = plain_pi0(model)(**inputs).logits
    for label in (0, 1, MIXED):
        close(model(**inputs, is_positive=label).logits, expected, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_fresh_condition_learns_from_the_first_step(mode: str) -> None:
    model, inputs = make_model(mode, randomise=False), make_inputs()
    parameters = dict(model.condition.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, weight_decay=0)
    for step in range(2):
        optimizer.zero_grad()
        model(**inputs, is_positive=1).logits.square().sum().backward()
        largest = max(parameter.grad.abs().max() for parameter in parameters.values())
        assert largest > 1e-3, f"step {step}"
        optimizer.step()
    for name, parameter in parameters.items():
        moved = (parameter.detach() - before[name]).abs()
        assert (moved[POSITIVE] if name == "embedding" else moved).min() > 1e-4, name


@torch.no_grad()
def test_concat_equals_a_wider_projection() -> None:
    model, inputs = make_model("concat"), make_inputs()
    plain = plain_pi0(model)
    embedding, columns = model.condition.embedding[POSITIVE], model.condition.columns
    # The constant input c adds columns·c to the bias: the widened layer, folded.
    plain.embed_action_time.action_time_mlp_in.bias.add_(columns @ embedding)
    close(model(**inputs, is_positive=1).logits, plain(**inputs).logits)


@torch.no_grad()
def test_token_is_a_second_state_that_shares_the_attention_to_the_first() -> None:
    """Rebuilt from transformers' parts, with a mask and positions written out."""
    model, inputs = make_model("token"), make_inputs()
    state, noise, t = inputs.pop("state"), inputs.pop("noise"), inputs.pop("timestep")
    plain = plain_pi0(model)
    embeds = plain.embed_action_time(state, noise, t)
    token = embeds[:, :1] + model.condition.embedding[POSITIVE]
    suffix = torch.cat([embeds[:, :1], token, embeds[:, 1:]], 1)
    weights = torch.ones(HORIZON + 2, HORIZON + 2)
    weights[0, 1:] = 0  # the state sees itself
    weights[1, 2:] = 0  # the condition sees the state and itself
    weights[1:, :2] = 0.5
    there = inputs["attention_mask"]
    prefix = there[:, None].expand(-1, HORIZON + 2, -1)
    mask = torch.cat([prefix, weights.expand(4, -1, -1)], 2).log()[:, None]
    positions = torch.tensor([0, 0, *range(1, HORIZON + 1)])
    hidden = plain.model.dit(
        inputs_embeds=suffix,
        attention_mask=mask,
        position_ids=there.sum(1, keepdim=True) + positions,
        past_key_values=model.encode_prefix(**inputs).to_cache(),
    ).last_hidden_state[:, -HORIZON:]
    actual = model(state=state, noise=noise, timestep=t, **inputs, is_positive=1).logits
    close(actual, plain.action_out_proj(hidden))


@torch.no_grad()
def test_cached_prefix_equals_recomputing_it_and_survives_its_use(model: Pi0ForCFGRL) -> None:
    inputs = make_inputs()
    expected = model(**inputs, is_positive=MIXED).logits
    suffix = {key: inputs[key] for key in ("state", "noise", "timestep", "attention_mask")}
    prefix = model.encode_prefix(
        inputs["input_ids"],
        inputs["pixel_values"],
        inputs["pixel_attention_mask"],
        inputs["attention_mask"],
    )
    for _ in range(2):
        cache = prefix.to_cache()
        close(model(**suffix, cache=cache, is_positive=MIXED).logits, expected)
        close(model(**suffix, cache=cache).logits, model(**inputs).logits)


@torch.no_grad()
def test_missing_camera_may_be_dropped_or_masked(model: Pi0ForCFGRL) -> None:
    one = make_inputs(cameras=1)
    expected = model(**one, is_positive=MIXED).logits
    black = torch.full((4, 1, 3, IMAGE_SIZE, IMAGE_SIZE), -1.0)
    two = dict(one, pixel_values=torch.cat([one["pixel_values"], black], 1))
    slot_masked = dict(two, pixel_attention_mask=torch.tensor([[True, False]]).expand(4, -1))
    close(model(**slot_masked, is_positive=MIXED).logits, expected)
    gap = TOKENS_PER_IMAGE
    ids, mask = one["input_ids"], one["attention_mask"]
    tokens_masked = dict(
        two,
        pixel_attention_mask=torch.ones(4, 2, dtype=torch.bool),
        input_ids=torch.cat([ids[:, :gap], ids[:, :gap], ids[:, gap:]], 1),
        attention_mask=torch.cat([mask[:, :gap], mask[:, :gap] * 0, mask[:, gap:]], 1),
    )
    close(model(**tokens_masked, is_positive=MIXED).logits, expected)


@torch.no_grad()
def test_checkpoints_pass_between_transformers_and_us(model: Pi0ForCFGRL, tmp_path: object) -> None:
    inputs = make_inputs()
    model.save_pretrained(tmp_path)
    again = Pi0ForCFGRL.from_pretrained(tmp_path)
    assert again.condition.mode == model.condition.mode
    assert torch.equal(
        again(**inputs, is_positive=MIXED).logits, model(**inputs, is_positive=MIXED).logits
    )
    plain = PI0ForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(plain(**inputs).logits, model(**inputs).logits)
    plain.save_pretrained(tmp_path / "plain")
    ours = Pi0ForCFGRL.from_pretrained(tmp_path / "plain", condition_mode=model.condition.mode)
    assert torch.equal(ours(**inputs).logits, model(**inputs).logits)
    for parameter in ours.condition.parameters():
        assert parameter.isfinite().all()
    close(ours(**inputs, is_positive=1).logits, model(**inputs).logits)


def test_labels_at_the_door() -> None:
    device = torch.device("cpu")
    assert as_labels(None, 2, device).tolist() == [NULL, NULL]
    assert as_labels(torch.tensor([True, False]), 2, device).tolist() == [1, 0]
    for bad in (2, torch.tensor([0, 3]), torch.tensor([1]), torch.tensor([0.5, 1.0])):
        with pytest.raises(ValueError, match="is_positive"):
            as_labels(bad, 2, device)


def test_unknown_condition_mode_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="condition_mode must be one of"):
        make_model("film")
    with pytest.raises(ValueError, match="not a multiple of patch_size"):
        TinySizes(image_size=100, patch_size=16)
    with pytest.raises(ValueError, match="hidden_size"):
        TinySizes(hidden_size=100, num_heads=8)


@torch.no_grad()
def test_transformers_sampler_gives_the_condition_its_prefix(model: Pi0ForCFGRL) -> None:
    """`sample_actions` calls `forward` with a cache, under the name of its version."""
    inputs = make_inputs()
    noise = inputs.pop("noise")
    inputs.pop("timestep")
    sampled = model.sample_actions(**inputs, noise=noise, num_steps=3, is_positive=1)
    whole = euler(lambda x, t: model(**inputs, noise=x, timestep=t, is_positive=1).logits, noise, 3)
    close(sampled, whole)


@torch.no_grad()
def test_both_names_of_the_cache_are_taken(model: Pi0ForCFGRL) -> None:
    inputs = make_inputs()
    suffix = {key: inputs[key] for key in ("state", "noise", "timestep", "attention_mask")}
    prefix = model.encode_prefix(*(inputs[name] for name in PREFIX))
    for labels in (None, MIXED):
        new = model(**suffix, cache=prefix.to_cache(), is_positive=labels).logits
        old = model(**suffix, past_key_values=prefix.to_cache(), is_positive=labels).logits
        assert torch.equal(new, old)


@torch.no_grad()
def test_no_pass_uses_a_name_that_transformers_has_deprecated(
    model: Pi0ForCFGRL, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        logging.Logger, "warning_once", lambda self, message, *rest: said.append(message)
    )
    inputs = make_inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        for labels in (None, MIXED):
            model(**inputs, is_positive=labels)
            prefix = model.encode_prefix(*(inputs[name] for name in PREFIX))
            suffix = {key: inputs[key] for key in ("state", "noise", "timestep", "attention_mask")}
            model(**suffix, cache=prefix.to_cache(), is_positive=labels)
    assert not [message for message in said if "deprecated" in message]
