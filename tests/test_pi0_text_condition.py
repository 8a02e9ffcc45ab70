"""The condition as words in the prompt, against transformers' PI0 with the prompts written out."""

import json
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pi0_folders import STATS, openpi, small_config
from pi0_support import (
    HORIZON,
    SIZES,
    PromptEnv,
    make_inputs,
    make_observation,
    make_policy,
    make_spaces,
    plain_pi0,
)
from stable_baselines3.common.vec_env import DummyVecEnv
from test_cli_options import printed_config
from test_prefix_cache import SMALL, count_vlm_passes
from test_warm_start import demonstration
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import PI0ForConditionalGeneration, PreTrainedTokenizerFast

from cfgrl_gym.algorithms import CFGRL
from cfgrl_gym.algorithms.flow import NEGATIVE, NULL, POSITIVE, euler, guide, masked_mse
from cfgrl_gym.algorithms.memory.prefix_cache import PrefixCache
from cfgrl_gym.algorithms.pi0 import CONDITION_MODES, Pi0Policy
from cfgrl_gym.algorithms.pi0.label_prompts import WORDS
from cfgrl_gym.algorithms.pi0.presets import new_model
from cfgrl_gym.algorithms.pi0.tokenizer import (
    BYTE_IMAGE_TOKEN_ID,
    ByteTokenizer,
    PaliGemmaTokenizer,
    tokenize,
)
from cfgrl_gym.algorithms.warm_start import WarmStartConfig, warm_start
from cfgrl_gym.wrappers.prompt import encode_prompt

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
INSTRUCTIONS = ("pick up the can", "open the drawer", "close it")  # make_observation's
AFTER = {POSITIVE: " Advantage: positive", NEGATIVE: " Advantage: negative", NULL: ""}
MIXED = torch.tensor([POSITIVE, NULL, NEGATIVE])
T = torch.tensor([0.2, 0.5, 0.9])
OBS = make_observation()
PLENTY = 2**30


def text_policy(**kwargs: Any) -> Pi0Policy:
    return make_policy("text", **kwargs)


def noise(seed: int = 4) -> Tensor:
    return torch.randn(3, HORIZON, 32, generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("cfg_scale", [0.0, 1.0, 2.0])
def test_an_action_does_not_depend_on_the_instruction_beside_it(cfg_scale: float) -> None:
    """Bit for bit, or an episode would depend on the tasks of the other environments."""
    policy, longest = text_policy(), "put the white mug on the left plate and the mug on the right"
    alone = policy.sample_actions(OBS, noise(), cfg_scale)
    for beside in ("stop", longest, longest + " and the other one beside it"):
        prompts = np.stack([encode_prompt(INSTRUCTIONS[0]), *[encode_prompt(beside)] * 2])
        actions = policy.sample_actions({**OBS, "prompt": prompts}, noise(), cfg_scale)
        assert torch.equal(actions[0], alone[0])
        assert not torch.equal(actions[1], alone[1])


@torch.no_grad()
def by_hand(
    policy: Pi0Policy, x_t: Tensor, t: Tensor, labels: Any, instructions: Any = INSTRUCTIONS
) -> Tensor:
    """transformers' own forward, row by row without padding, on the bytes of the whole prompt."""
    plain = plain_pi0(policy.model)
    inputs = policy.encode_observation(OBS)
    velocities = []
    for i, label in enumerate(torch.as_tensor(labels).expand(3).tolist()):
        prompt = f"{instructions[i]}{AFTER[label]}\n".encode()
        ids = [BYTE_IMAGE_TOKEN_ID] * policy.image_tokens + [2] + [3 + byte for byte in prompt]
        row = slice(i, i + 1)
        output = plain(
            state=inputs["state"][row],
            noise=x_t[row],
            timestep=t[row],
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            pixel_values=inputs["pixel_values"][row],
            pixel_attention_mask=inputs["pixel_attention_mask"][row],
        )
        velocities.append(output.logits)
    return torch.cat(velocities)


def test_it_is_a_condition_mode_without_parameters() -> None:
    assert "text" in CONDITION_MODES
    assert text_policy().model.condition.state_dict() == {}


@pytest.mark.parametrize("label", [None, NEGATIVE, POSITIVE])
def test_each_label_is_transformers_pi0_on_its_prompt(label: int | None) -> None:
    policy = text_policy()
    own = NULL if label is None else label
    actual = policy.predict_velocity(OBS, noise(), T, label)
    close(actual, by_hand(policy, noise(), T, own))
    for other in {NULL, NEGATIVE, POSITIVE} - {own}:
        assert (actual - by_hand(policy, noise(), T, other)).abs().max() > 1e-3


def test_every_row_of_a_mixed_batch_has_the_prompt_of_its_label() -> None:
    policy = text_policy()
    expected = by_hand(policy, noise(), T, MIXED)
    close(policy.predict_velocity(OBS, noise(), T, MIXED), expected)
    is_pad = torch.zeros(3, HORIZON, dtype=torch.bool)
    actions, drawn = noise(5), noise(6)
    x_t = T[:, None, None] * drawn + (1 - T[:, None, None]) * actions
    loss = policy.flow_matching_loss(OBS, actions, is_pad, MIXED, T, drawn)
    velocity = by_hand(policy, x_t, T, MIXED)
    close(loss, masked_mse(velocity, drawn - actions, is_pad, 7))


@pytest.mark.parametrize("vlm_dtype", ["float32", "bfloat16"])
def test_null_is_the_policy_without_a_condition_bit_for_bit(vlm_dtype: str) -> None:
    policy = text_policy(trainable="expert", vlm_dtype=vlm_dtype)
    plain = make_policy("bias", randomise=False, trainable="expert", vlm_dtype=vlm_dtype)
    state = {k: v for k, v in plain.state_dict().items() if "condition" not in k}
    policy.load_state_dict(state, strict=False)
    ours, theirs = (p.act(OBS, noise=noise(), cfg_scale=0.0) for p in (policy, plain))
    assert torch.equal(ours.model_actions, theirs.model_actions)
    velocities = [p.predict_velocity(OBS, noise(), T, None) for p in (policy, plain)]
    assert torch.equal(*velocities)
    assert not torch.equal(policy.act(OBS, noise=noise()).actions, ours.actions)


@pytest.mark.parametrize("guidance", ["velocity", "action"])
def test_guidance_combines_the_branches_of_two_prompts(guidance: Any) -> None:
    policy = text_policy(guidance=guidance, num_inference_steps=3)
    branch = {label: partial(by_hand, policy, labels=label) for label in (NULL, POSITIVE)}
    if guidance == "action":
        null, positive = (euler(branch[label], noise(), 3) for label in (NULL, POSITIVE))
        expected = guide(null, positive, 2.0)
    else:
        expected = euler(
            lambda x, t: guide(branch[NULL](x, t), branch[POSITIVE](x, t), 2.0), noise(), 3
        )
    close(policy.act(OBS, noise=noise(), cfg_scale=2.0).model_actions, expected)
    for w, label in ((1.0, POSITIVE), (0.0, NULL)):
        single = policy.act(OBS, noise=noise(), cfg_scale=w).model_actions
        close(single, euler(branch[label], noise(), 3))


def test_guidance_gap_is_the_distance_of_the_two_prompts_velocities() -> None:
    policy = text_policy(trainable="expert")
    actions = torch.zeros(3, HORIZON, 32)
    x_t = T[:, None, None] * noise()
    difference = by_hand(policy, x_t, T, POSITIVE) - by_hand(policy, x_t, T, NULL)
    expected = difference[..., :7].square().mean((1, 2)).sqrt()
    memory = PrefixCache(policy, 0, PLENTY)
    known = memory.recall_branches(OBS, memory.new_keys(3))
    for prefixes in (None, known):
        close(policy.guidance_gap(OBS, actions, T, noise(), prefixes), expected)


def test_images_are_embedded_once_and_one_branch_computes_one_prompt() -> None:
    policy = text_policy()
    texts, images = count_vlm_passes(policy), []
    policy.model.model.vlm.vision_tower.register_forward_hook(lambda *_: images.append(1))
    for w, prompts in ((2.0, 2), (1.0, 1), (0.0, 1)):
        texts.clear()
        images.clear()
        policy.act(OBS, noise=noise(), cfg_scale=w)
        assert (len(texts), len(images)) == (prompts, 1)


def test_prefix_dropout_hides_the_instruction_from_null_only() -> None:
    policy = text_policy(use_prefix_dropout=True)
    instructions = [INSTRUCTIONS[0], "", INSTRUCTIONS[2]]
    expected = by_hand(policy, noise(), T, MIXED, instructions)
    close(policy.predict_velocity(OBS, noise(), T, MIXED), expected)


# From acting to the update -------------------------------------------------------------------


def gradients(policy: Pi0Policy, labels: Tensor, prefix: Any) -> list[Tensor]:
    policy.zero_grad()
    is_pad = torch.zeros(3, HORIZON, dtype=torch.bool)
    losses = policy.flow_matching_loss(OBS, noise(1), is_pad, labels, T, noise(2), prefix)
    losses.sum().backward()
    return [losses.detach(), *(p.grad.clone() for p in policy.parameters() if p.grad is not None)]


def test_kept_prefixes_belong_to_an_observation_and_a_label() -> None:
    policy = text_policy(trainable="expert")
    memory = PrefixCache(policy, 0, PLENTY)
    passes = count_vlm_passes(policy)
    keys = memory.keep(policy.act(OBS, cfg_scale=2.0).prefixes, 3)  # of v_∅ and v_1
    assert passes == [3, 3]
    fresh = {}
    for labels in (MIXED, torch.full((3,), NULL), torch.full((3,), POSITIVE), -MIXED.abs() + 1):
        fresh[labels] = gradients(policy, labels, None)
    passes.clear()
    for labels, expected in fresh.items():
        recalled = memory.recall(OBS, keys, labels)
        for a, b in zip(gradients(policy, labels, recalled), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    # Only o = 0 was new, which acting doesn't use: one row of MIXED, and all rows of the last.
    assert passes == [1, 2]
    losses = [values[0] for values in fresh.values()]
    assert (losses[0] - losses[1])[0].abs() > 1e-4  # another prompt is another loss
    memory.drop(keys[:2])
    assert [key in memory for key in keys] == [False, False, True]
    memory.keep_only(())
    assert memory.free["host"] == PLENTY


def test_one_branch_keeps_one_prefix_and_little_room_is_no_error() -> None:
    policy = text_policy(trainable="expert")
    prefixes = policy.act(OBS, cfg_scale=1.0).prefixes
    assert list(prefixes) == [POSITIVE]
    row = policy.split_prefix(prefixes[POSITIVE])[0]
    memory = PrefixCache(policy, 0, sum(part.nbytes for part in row.values()))
    keys = memory.keep(prefixes, 3)
    assert [key in memory for key in keys] == [True, False, False]
    for labels in (MIXED, -MIXED):
        recalled = memory.recall(OBS, keys, labels.clamp(min=NULL))
        expected = gradients(policy, labels, None)
        for a, b in zip(gradients(policy, labels, recalled), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def algorithm(**kwargs: Any) -> CFGRL:
    policy_kwargs = {"sizes": SIZES, "trainable": "expert", "condition_mode": "text"}
    options = SMALL | {"dropout_prob": 0.5, "negatives": "zero", "n_epochs": 2} | kwargs
    return CFGRL("Pi0Policy", DummyVecEnv([PromptEnv] * 2), policy_kwargs=policy_kwargs, **options)


def without_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loss computes its prefixes itself, from the labels that it is given."""
    for name in ("recall", "recall_branches"):
        monkeypatch.setattr(PrefixCache, name, lambda *_: None)


def test_a_whole_iteration_learns_the_same_from_kept_and_from_new_prefixes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = algorithm().policy.parameters_to_vector()
    kept, little_room = algorithm().learn(1), algorithm(prefix_memory=1e-4).learn(1)
    without_cache(monkeypatch)
    fresh = algorithm().learn(1)
    assert kept.windows is not None
    assert set(kept.windows.labels.tolist()) == {NEGATIVE, POSITIVE}
    expected = fresh.policy.parameters_to_vector()
    assert np.abs(expected - start).max() > 1e-3
    for other in (kept, little_room):
        np.testing.assert_allclose(other.policy.parameters_to_vector(), expected, atol=1e-4)
        gap = other.logger.name_to_value["train/guidance_gap"]
        assert gap == pytest.approx(fresh.logger.name_to_value["train/guidance_gap"], abs=1e-4)


# Training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", ["expert", "all"])
def test_training_teaches_what_the_words_mean(trainable: Any) -> None:
    """Under o = 1 the actions are 1, under ∅ they are -1; nothing else differs."""
    policy = text_policy(trainable=trainable)
    obs = {key: np.repeat(value[:1], 8, 0) for key, value in OBS.items()}
    labels = torch.tensor([POSITIVE, NULL] * 4)
    actions = torch.where(labels == POSITIVE, 1.0, -1.0)[:, None, None].expand(8, HORIZON, 32)
    is_pad = torch.zeros(8, HORIZON, dtype=torch.bool)
    memory = PrefixCache(policy, 0, PLENTY)
    keys = memory.new_keys(8)

    def gap() -> float:
        t, drawn = policy.draw_flow(8, torch.Generator().manual_seed(1))
        return policy.guidance_gap(obs, 0 * actions, t, drawn).mean().item()

    before = gap()
    policy.set_training_mode(True)
    generator = torch.Generator().manual_seed(0)
    for group in policy.optimizer.param_groups:
        group["lr"] = 3e-3
    for _ in range(100):
        t, drawn = policy.draw_flow(8, generator)
        prefix = memory.recall(obs, keys, labels)
        loss = policy.flow_matching_loss(obs, actions, is_pad, labels, t, drawn, prefix)
        policy.optimizer.zero_grad()
        loss.mean().backward()
        policy.optimizer.step()
        policy.after_optimizer_step()
    policy.set_training_mode(False)
    assert gap() > 3 * before
    positive, null = (policy.act(obs, cfg_scale=w).actions.mean().item() for w in (1.0, 0.0))
    assert positive > 0.5
    assert null < -0.5


def test_guidance_from_a_reference_has_the_references_own_prompt() -> None:
    policy = text_policy(trainable="all", cfg_reference="start", ema_decay=None)
    start = deepcopy(policy)
    policy.before_update()
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.05)

    def field(x: Tensor, t: Tensor) -> Tensor:
        return guide(by_hand(start, x, t, NULL), by_hand(policy, x, t, POSITIVE), 2.0)

    steps = policy.num_inference_steps = 2
    actual = policy.act(OBS, noise=noise(), cfg_scale=2.0).model_actions
    close(actual, euler(field, noise(), steps), atol=1e-4)
    assert not torch.allclose(
        actual,
        euler(
            lambda x, t: guide(by_hand(policy, x, t, NULL), by_hand(policy, x, t, 1), 2.0),
            noise(),
            steps,
        ),
        atol=1e-3,
    )


def test_a_warm_start_fits_both_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    demos = [demonstration(20, 0), demonstration(13, 1)]
    config = WarmStartConfig(steps=12, batch_size=8, dropout_prob=0.5, learning_rate=3e-3)
    policy = text_policy(trainable="expert")
    passes = count_vlm_passes(policy)
    losses = warm_start(policy, demos, config)
    assert sum(passes) <= 2 * 33  # each window's two prompts once
    without_cache(monkeypatch)
    np.testing.assert_allclose(
        losses, warm_start(text_policy(trainable="expert"), demos, config), atol=1e-4
    )


def test_compiled_steps_of_two_prompts_may_share_their_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As replays of a CUDA graph do."""

    def graph(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        memory: dict[int, Tensor] = {}

        def call(*args: Any) -> tuple[Tensor, ...]:
            outputs = function(*args)
            return tuple(memory.setdefault(i, o.clone()).copy_(o) for i, o in enumerate(outputs))

        return call

    expected = text_policy().act(OBS, noise=noise(), cfg_scale=1.5).model_actions
    monkeypatch.setattr(torch, "compile", graph)
    compiled = text_policy(compile_denoising=True)
    close(compiled.act(OBS, noise=noise(), cfg_scale=1.5).model_actions, expected)


def test_an_updates_memory_counts_both_prefixes() -> None:
    text, bias = (
        make_policy(mode, trainable="expert").plan_update(4, PLENTY) for mode in ("text", "bias")
    )
    tokens = 2 * 4 + 256
    prefix = 4 * tokens * SIZES.num_layers * 2 * (SIZES.hidden_size // SIZES.num_heads) * 4
    assert text.needed is not None
    assert bias.needed is not None
    assert 0.8 * prefix < text.needed - bias.needed < 1.2 * prefix


# Saving ---------------------------------------------------------------------------------------


def test_a_saved_policy_acts_as_trained(tmp_path: Path) -> None:
    whole = algorithm(seed=5).learn(1)
    policy = whole.policy
    policy.set_training_mode(False)
    expected = policy.act(OBS, noise=noise(), cfg_scale=2.0).actions
    policy.save_pretrained(tmp_path / "folder")
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["condition_mode"] == "text"
    whole.save(tmp_path / "model.zip")
    folder = Pi0Policy(*make_spaces(), lambda _: 1e-3, checkpoint=tmp_path / "folder")
    for again in (folder, CFGRL.load(tmp_path / "model.zip", device="cpu").policy):
        again.set_training_mode(False)
        assert again.config.condition_mode == "text"
        assert torch.equal(again.act(OBS, noise=noise(), cfg_scale=2.0).actions, expected)
    plain = PI0ForConditionalGeneration.from_pretrained(tmp_path / "folder")
    assert plain(**make_inputs()).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"trained with condition_mode='text', not 'bias'"):
        Pi0Policy(
            *make_spaces(), lambda _: 1, checkpoint=tmp_path / "folder", condition_mode="bias"
        )


def test_a_checkpoint_with_another_condition_is_refused(tmp_path: Path) -> None:
    make_policy("bias").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"trained with condition_mode='bias', not 'text'"):
        Pi0Policy(*make_spaces(), lambda _: 1, checkpoint=tmp_path, condition_mode="text")


def test_a_label_without_its_words_is_refused_by_the_model() -> None:
    model, inputs = text_policy().model, make_inputs()
    assert torch.equal(model(**inputs, is_positive=None).logits, plain_pi0(model)(**inputs).logits)
    with pytest.raises(ValueError, match="the condition is words in the prompt"):
        model(**inputs, is_positive=1)


def test_the_command_line_takes_it(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--policy", "libero_tiny", "--condition_mode", "text"]
    assert printed_config(arguments, capsys)["condition_mode"] == "text"


# Tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [NEGATIVE, POSITIVE])
def test_a_long_instruction_is_cut_before_the_words(label: int) -> None:
    with pytest.warns(UserWarning, match="of 321 tokens cut to 256"):
        ids, mask, between = tokenize(
            ["x" * 299], ByteTokenizer(), torch.device("cpu"), [WORDS[label]]
        )
    end = [3 + byte for byte in f"{AFTER[label]}\n".encode()]
    assert ids[0].tolist() == [2] + [3 + ord("x")] * (255 - len(end)) + end
    assert mask.sum() == 256
    assert between.sum() == 254


def paligemma_like(folder: Path, *words: str) -> PaliGemmaTokenizer:
    """Word by word, with spaces as "▁" before a word, as PaliGemma has them."""
    known = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", "pick", "▁up", "▁the", "▁can", *words]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(known)}, unk_token="<unk>"))
    tokenizer.normalizer = Replace(" ", "▁")
    tokenizer.pre_tokenizer = Split("▁", "merged_with_next")
    tokenizer.add_tokens(["\n", ":"])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return PaliGemmaTokenizer(str(folder))


def test_paligemmas_tokens_are_those_of_the_whole_prompt(tmp_path: Path) -> None:
    tokenizer = paligemma_like(tmp_path, "▁Advantage", "▁positive", "▁negative")
    plain = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for label in (POSITIVE, NEGATIVE):
        ids, mask, _ = tokenize(["pick up the can"], tokenizer, torch.device("cpu"), [WORDS[label]])
        whole = plain.encode(f"pick up the can{AFTER[label]}\n", add_special_tokens=False)
        assert len(whole) == 4 + 3 + 1
        assert plain.unk_token_id not in whole
        assert ids[0, mask[0] == 1].tolist() == [2, *whole]
        assert ids.shape == (1, 48)
        with pytest.warns(UserWarning, match="cut to 48"):
            cut, _, _ = tokenize(["pick" + " up" * 60], tokenizer, mask.device, [WORDS[label]])
        assert cut[0, -4:].tolist() == whole[-4:]


def test_a_foreign_checkpoint_takes_it_if_its_tokenizer_has_the_words(tmp_path: Path) -> None:
    model = new_model(small_config(), 0)
    make = partial(
        Pi0Policy,
        *make_spaces(),
        lambda _: 1.0,
        preset="pi0",
        checkpoint=openpi(tmp_path, model),
        norm_stats=STATS,
        horizon=HORIZON,
        delta_actions=False,
        vlm_dtype="float32",
        condition_mode="text",
    )
    with pytest.raises(ValueError, match=r"needs a tokenizer that knows .*Advantage: positive"):
        make()
    paligemma_like(tmp_path, "▁Advantage", "▁positive", "▁negative")
    policy, null = make(), model.eval()
    inputs = policy.encode_observation(OBS)
    names = ("state", "input_ids", "attention_mask", "pixel_values", "pixel_attention_mask")
    expected = plain_pi0(null)(
        **{name: inputs[name] for name in names}, noise=noise(), timestep=T
    ).logits
    close(policy.predict_velocity(OBS, noise(), T, None), expected)
    positive, negative = (policy.predict_velocity(OBS, noise(), T, label) for label in (1, 0))
    assert (positive - negative).abs().max() > 1e-4
