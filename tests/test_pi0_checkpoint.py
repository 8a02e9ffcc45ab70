"""Saving and loading of Pi0Policy, and the errors of wrong checkpoints."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pi0_folders import STATS, save_word_tokenizer
from pi0_support import (
    HORIZON,
    MODES,
    SIZES,
    make_model,
    make_observation,
    make_policy,
    make_spaces,
    plain_pi0,
)
from transformers import PI0ForConditionalGeneration

from cfgrl_gym.algorithms.pi0 import Pi0ForCFGRL, Pi0Policy
from cfgrl_gym.algorithms.pi0.tokenizer import ByteTokenizer, PaliGemmaTokenizer, tokenize


def predictions(policy: Pi0Policy) -> np.ndarray:
    actions: np.ndarray = policy.predict(make_observation(), deterministic=True)[0]
    return actions


def restore(checkpoint: Path | str, **kwargs: Any) -> Pi0Policy:
    return Pi0Policy(*make_spaces(), lambda _: 1e-3, checkpoint=checkpoint, **kwargs)


@pytest.mark.parametrize("mode", MODES)
def test_sb3_save_and_load_predict_bit_equal(mode: str, tmp_path: Path) -> None:
    policy = make_policy(
        mode, norm_stats=STATS, cfg_scale=1.7, delta_actions=True, num_inference_steps=4
    )
    policy.save(str(tmp_path / "policy"))
    again = Pi0Policy.load(str(tmp_path / "policy"), device="cpu", trusted=True)
    assert np.array_equal(predictions(again), predictions(policy))
    assert (again.cfg_scale, again.norm_stats) == (1.7, policy.norm_stats)


@pytest.mark.parametrize("mode", MODES)
def test_pretrained_folder_restores_the_policy_bit_equal(mode: str, tmp_path: Path) -> None:
    policy = make_policy(mode, norm_stats=STATS, delta_actions=True, use_prefix_dropout=True)
    policy.save_pretrained(tmp_path)
    again = restore(tmp_path, cfg_scale=policy.cfg_scale)
    assert again.config.trainable == "expert"  # of a checkpoint
    assert replace(again.config, trainable=policy.config.trainable) == policy.config
    assert again.horizon == HORIZON
    assert np.array_equal(predictions(again), predictions(policy))


def test_statistics_travel_with_the_state_dict() -> None:
    policy, other = make_policy(norm_stats=STATS), make_policy()
    other.load_state_dict(policy.state_dict())
    assert other.norm_stats == policy.norm_stats


def test_plain_pi0_checkpoint_serves_the_full_preset(tmp_path: Path) -> None:
    """The full preset's path, small: a plain PI0 folder with its tokenizer and statistics."""
    plain = plain_pi0(make_model("token"))
    del plain.config.condition_mode, plain.config.condition_version
    plain.save_pretrained(tmp_path)
    save_word_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="'pi0' needs normalisation statistics"):
        restore(tmp_path, preset="pi0")
    STATS.save(tmp_path)
    policy = restore(tmp_path, preset="pi0")
    assert policy.config.trainable == "expert"
    assert policy.config.delta_actions
    ids = policy.encode_observation(make_observation())["input_ids"]
    assert ids.shape == (3, policy.image_tokens + 48)
    assert ids[0, policy.image_tokens :][:5].tolist() == [2, 4, 5, 3, 6]  # <bos> pick up ? can
    null, positive = (
        policy.sample_actions(make_observation(), torch.zeros(3, HORIZON, 32), w)
        for w in (0.0, 1.0)
    )
    assert policy.config.condition_mode == "bias"  # by default, for it starts as an exact no-op
    assert torch.equal(null, positive)
    again_folder = tmp_path / "again"
    policy.save_pretrained(again_folder)
    again = restore(again_folder, preset="pi0")
    assert again.config.condition_mode == "bias"
    assert np.array_equal(predictions(again), predictions(policy))
    policy.save(str(tmp_path / "sb3"))
    loaded = Pi0Policy.load(str(tmp_path / "sb3"), device="cpu", trusted=True)
    assert np.array_equal(predictions(loaded), predictions(policy))


def test_a_token_of_an_earlier_version_is_refused_and_can_be_left_behind(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    policy = make_policy("token")
    policy.save_pretrained(old)
    config = json.loads((old / "config.json").read_text())
    assert config.pop("condition_version") == 2
    (old / "config.json").write_text(json.dumps(config))
    for load in (restore, Pi0ForCFGRL.from_pretrained):
        with pytest.raises(ValueError, match=r"'token' is of version 1, .* reads version 2.*Train"):
            load(old)
    # What the error says:
    PI0ForConditionalGeneration.from_pretrained(old).save_pretrained(new)
    for file in old.glob("*.json"):
        if not (new / file.name).exists():
            shutil.copy(file, new)
    restored, noise = restore(new), torch.zeros(3, HORIZON, 32)
    null, positive = (restored.sample_actions(make_observation(), noise, w) for w in (0.0, 1.0))
    assert torch.equal(null, policy.sample_actions(make_observation(), noise, 0.0))
    torch.testing.assert_close(positive, null, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["bias", "concat"])
def test_other_conditions_of_earlier_versions_mean_what_they_did(mode: str, tmp_path: Path) -> None:
    policy = make_policy(mode)
    policy.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["condition_version"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert np.array_equal(predictions(restore(tmp_path)), predictions(policy))


def test_wrong_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        restore(tmp_path / "nothing")
    plain = tmp_path / "plain"
    make_model("token").save_pretrained(plain)
    with pytest.raises(ValueError, match="pass preset='pi0'"):
        restore(plain)
    saved = tmp_path / "saved"
    make_policy("token").save_pretrained(saved)
    with pytest.raises(ValueError, match="is of preset 'tiny', not 'pi0'"):
        restore(saved, preset="pi0", norm_stats=STATS)
    with pytest.raises(ValueError, match="trained with condition_mode='token'"):
        restore(saved, condition_mode="bias")
    with pytest.raises(ValueError, match="a checkpoint brings its own"):
        restore(saved, sizes=SIZES)
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "model_type": "gemma"}))
    with pytest.raises(ValueError, match="type 'gemma', not 'pi0'"):
        restore(saved)
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "pi0_policy.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        restore(saved)


def test_byte_tokenizer_pads_to_a_fixed_length_and_marks_the_instruction() -> None:
    """The same for every batch, so that a prompt's length doesn't depend on those beside it."""
    ids, mask, instruction = tokenize(["ab", "é"], ByteTokenizer(), torch.device("cpu"))
    a, b, newline = (3 + ord(c) for c in "ab\n")
    pad = [0] * 92
    assert ids.tolist() == [[2, a, b, newline, *pad], [2, 3 + 0xC3, 3 + 0xA9, newline, *pad]]
    ids, mask, instruction = tokenize(["ab", ""], ByteTokenizer(), torch.device("cpu"))
    assert ids[1].tolist() == [2, newline, 0, 0, *pad]
    assert mask.tolist() == [[1, 1, 1, 1, *pad], [1, 1, 0, 0, *pad]]
    assert instruction.tolist() == [[0, 1, 1, 0, *pad], [0, 0, 0, 0, *pad]]
    for text, length in (("x" * 94, 96), ("x" * 95, 192), ("x" * 200, 256)):
        assert tokenize([text], ByteTokenizer(), torch.device("cpu"))[0].shape == (1, length)


def test_too_long_prompts_are_cut_with_a_warning_and_keep_their_newline() -> None:
    with pytest.warns(UserWarning, match="cut to 256"):
        ids, _, _ = tokenize(["x" * 300], ByteTokenizer(), torch.device("cpu"))
    assert ids.shape == (1, 256)
    assert ids[0, -1] == 3 + ord("\n")


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer.*download tokenizer\.json"):
        PaliGemmaTokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no tokenizer could be read.*put them into the checkpo"):
        PaliGemmaTokenizer(str(tmp_path))


def test_a_tokenizer_on_the_hub_while_offline_is_an_error_that_says_what_to_download(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"could not be had from the hub.*accept the lice"):
        PaliGemmaTokenizer("google/paligemma-3b-pt-224")
