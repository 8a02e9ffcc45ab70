"""Checkpoints in transformers', LeRobot's and openpi's formats, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pi0_folders import (
    EXPERT,
    FORMATS,
    LEROBOT_CONFIG,
    OPENPI_CONFIG,
    STATS,
    VLM,
    lerobot,
    openpi,
    openpi_tensors,
    small_config,
    write,
)
from pi0_support import (
    HORIZON,
    SIZES,
    make_observation,
    make_spaces,
    plain_pi0,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PI0Config, PI0ForConditionalGeneration

from cfgrl_gym.algorithms.pi0 import NormStats, Pi0ForCFGRL, Pi0Policy
from cfgrl_gym.algorithms.pi0.checkpoints.config import config_from_shapes
from cfgrl_gym.algorithms.pi0.checkpoints.formats import read_source
from cfgrl_gym.algorithms.pi0.condition import Pi0CFGRLConfig
from cfgrl_gym.algorithms.pi0.presets import new_model
from cfgrl_gym.cli.policies import find_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def model() -> Pi0ForCFGRL:
    return new_model(small_config(), seed=0).eval()


def policy_of(folder: Path | str, **kwargs: Any) -> Pi0Policy:
    kwargs = {"norm_stats": STATS, "vlm_dtype": "float32", **kwargs}
    return Pi0Policy(*make_spaces(), lambda _: 1e-3, preset="pi0", checkpoint=folder, **kwargs)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_velocity_of_transformers_own_model(
    form: str, model: Pi0ForCFGRL, tmp_path: Path
) -> None:
    policy = policy_of(FORMATS[form](tmp_path, model), condition_mode="concat")
    assert read_source(tmp_path).format == form
    assert policy.horizon == HORIZON
    assert policy.config.trainable == "expert"
    assert policy.config.delta_actions == (form != "lerobot")
    inputs = policy.encode_observation(make_observation())
    noise = torch.randn(3, HORIZON, 32, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.2, 0.5, 0.9])
    names = ("state", "input_ids", "pixel_values", "attention_mask", "pixel_attention_mask")
    expected = plain_pi0(model)(
        **{name: inputs[name] for name in names}, noise=noise, timestep=t
    ).logits
    actual = policy.predict_velocity(make_observation(), noise, t)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", FORMATS)
def test_norm_stats_in_the_folder_are_taken_in_every_format(
    form: str, model: Pi0ForCFGRL, tmp_path: Path
) -> None:
    FORMATS[form](tmp_path, model)
    with pytest.raises(ValueError, match="needs normalisation statistics"):
        policy_of(tmp_path, norm_stats=None)
    STATS.save(tmp_path)
    np.testing.assert_allclose(
        policy_of(tmp_path, norm_stats=None).norm_stats.state.std, STATS.state.std, rtol=1e-6
    )


def test_openpis_statistics_come_from_its_assets(model: Pi0ForCFGRL, tmp_path: Path) -> None:
    assets = openpi(tmp_path, model) / "assets" / "physical-intelligence" / "libero"
    assets.mkdir(parents=True)
    content = {
        "norm_stats": {  # openpi pads them
            part: {"mean": [0.5] * size + [0.0] * 20, "std": [2.0] * size + [0.0] * 20}
            for part, size in (("state", 8), ("actions", 7))
        }
    }
    (assets / "norm_stats.json").write_text(json.dumps(content))
    stats = policy_of(tmp_path, norm_stats=None).norm_stats
    assert (stats.state.mean, stats.actions.std) == ((0.5,) * 8, (2.0,) * 7)
    other = tmp_path / "assets" / "droid"
    other.mkdir()
    (other / "norm_stats.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"has 2 norm_stats\.json: .*droid"):
        policy_of(tmp_path, norm_stats=None)


def lerobot_vectors(length: int = 8) -> dict[str, Tensor]:
    return {
        "observation.state.mean": torch.full((length,), 0.1),
        "observation.state.std": torch.full((length,), 0.7),
        "action.mean": torch.full((7,), -0.2),
        "action.std": torch.full((7,), 0.3),
        "observation.images.image.mean": torch.zeros(3, 1, 1),
    }


def write_processor(folder: Path, vectors: dict[str, Tensor]) -> None:
    state = "policy_preprocessor_step_5_normalizer_processor.safetensors"
    steps = [
        {"registry_name": "tokenizer_processor", "config": {"tokenizer_name": "google/nowhere"}},
        {"registry_name": "normalizer_processor", "config": {}, "state_file": state},
    ]
    (folder / "policy_preprocessor.json").write_text(json.dumps({"steps": steps}))
    save_file(vectors, folder / state)


def test_lerobots_statistics_come_from_its_preprocessor(model: Pi0ForCFGRL, tmp_path: Path) -> None:
    write_processor(lerobot(tmp_path, model), lerobot_vectors())
    stats = policy_of(tmp_path, norm_stats=None).norm_stats
    np.testing.assert_allclose(stats.state.std, (0.7,) * 8, rtol=1e-6)
    np.testing.assert_allclose(stats.actions.mean, (-0.2,) * 7, rtol=1e-6)


def test_lerobots_older_statistics_come_from_the_weights_file(
    model: Pi0ForCFGRL, tmp_path: Path
) -> None:
    folder = lerobot(tmp_path, model)
    tensors = load_file(folder / "model.safetensors")
    for part, name in (
        ("normalize_inputs", "observation_state"),
        ("normalize_targets", "action"),
        ("unnormalize_outputs", "action"),
    ):
        size = 8 if name == "observation_state" else 7
        tensors[f"{part}.buffer_{name}.mean"] = torch.full((size,), 0.4)
        tensors[f"{part}.buffer_{name}.std"] = torch.full((size,), 0.6)
    save_file(tensors, folder / "model.safetensors")
    stats = policy_of(folder, norm_stats=None).norm_stats
    np.testing.assert_allclose(stats.state.mean, (0.4,) * 8, rtol=1e-6)
    np.testing.assert_allclose(stats.actions.std, (0.6,) * 7, rtol=1e-6)


def test_statistics_of_the_wrong_length_are_refused(model: Pi0ForCFGRL, tmp_path: Path) -> None:
    write_processor(lerobot(tmp_path, model), lerobot_vectors(length=6))
    with pytest.raises(ValueError, match=r"observation\.state\.mean has 6 numbers; expected at le"):
        policy_of(tmp_path, norm_stats=None)


def test_lerobots_statistics_without_deviations_are_refused(
    model: Pi0ForCFGRL, tmp_path: Path
) -> None:
    folder, vectors = lerobot(tmp_path, model), lerobot_vectors()
    vectors["action.std"] = torch.tensor([0.3] * 6 + [0.0])
    write_processor(folder, vectors)
    with pytest.warns(UserWarning, match=rf"'{folder}': action: std is 0 in dimensions \[6\]"):
        policy_of(folder, norm_stats=None)
    vectors["action.std"] = torch.zeros(7)
    write_processor(folder, vectors)
    with pytest.raises(ValueError, match=rf"'{folder}': action: std is 0 in all 7 .*compute"):
        policy_of(folder, norm_stats=None)


def test_trained_embeddings_win_over_an_lm_head(model: Pi0ForCFGRL, tmp_path: Path) -> None:
    tensors = openpi_tensors(model)
    embeddings = tensors[f"{VLM}lm_head.weight"]
    tensors[f"{VLM}model.language_model.embed_tokens.weight"] = embeddings.clone()
    tensors[f"{VLM}lm_head.weight"] = embeddings + 1.0
    policy = policy_of(write(tmp_path, OPENPI_CONFIG, tensors))
    actual = policy.model.model.vlm.language_model.embed_tokens.weight
    assert torch.equal(actual, embeddings)


def test_sizes_read_from_the_full_models_shapes_are_pi0s() -> None:
    with torch.device("meta"):
        model = Pi0ForCFGRL(Pi0CFGRLConfig())
    model.drop_unused_embeddings()
    shapes = {name: tuple(t.shape) for name, t in openpi_tensors_of_meta(model).items()}
    config, expected = config_from_shapes(Path("x"), shapes), PI0Config()
    for part in ("dit_config", "vlm_config"):
        ours, theirs = getattr(config, part).to_dict(), getattr(expected, part).to_dict()
        for name in ("text_config", "vision_config"):
            if name in theirs:
                assert ours.pop(name) == theirs.pop(name)
        assert ours == theirs
    assert (config.max_state_dim, config.max_action_dim) == (32, 32)


def openpi_tensors_of_meta(model: Pi0ForCFGRL) -> dict[str, Tensor]:
    with torch.device("meta"):
        return openpi_tensors(model)


def test_bfloat16_is_the_vlms_alone_and_leaves_rotary_buffers(
    model: Pi0ForCFGRL, tmp_path: Path
) -> None:
    folder = lerobot(tmp_path / "base", model)
    policy, exact = policy_of(folder, vlm_dtype=None), policy_of(folder)
    assert policy.config.vlm_dtype == "bfloat16"
    wanted = model.state_dict()
    for name, parameter in policy.model.named_parameters():
        in_vlm = name.startswith("model.vlm.")
        assert parameter.dtype == (torch.bfloat16 if in_vlm else torch.float32), name
        if not in_vlm and not name.startswith("condition."):
            assert torch.equal(parameter, wanted[name]), name
    for name, buffer in policy.model.named_buffers():
        if "freq" in name:
            assert torch.equal(buffer, dict(model.named_buffers())[name]), name
    noise = torch.randn(3, HORIZON, 32, generator=torch.Generator().manual_seed(0))
    t, obs = torch.tensor([0.2, 0.5, 0.9]), make_observation()
    a, b = (p.predict_velocity(obs, noise, t) for p in (policy, exact))
    assert (a - b).norm() < 0.02 * b.norm()
    # and so it is after saving, and in float32 again
    policy.save_pretrained(tmp_path / "saved")
    for dtype in ("bfloat16", "float32"):
        again = policy_of(tmp_path / "saved", vlm_dtype=dtype)
        embeddings = again.model.model.vlm.language_model.embed_tokens.weight
        assert str(embeddings.dtype) == f"torch.{dtype}"
        assert again.model.model.dit.norm.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="needs vlm_dtype='float32'"):
        policy_of(folder, trainable="all", vlm_dtype="bfloat16")


@pytest.mark.parametrize("form", FORMATS)
def test_the_command_line_takes_every_format(form: str, model: Pi0ForCFGRL, tmp_path: Path) -> None:
    found = find_checkpoint(str(FORMATS[form](tmp_path, model)), None)
    assert (found.preset, found.horizon, found.image_size) == ("pi0", HORIZON, SIZES.image_size)


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [("pi05", "pi0.5"), ("pi0_fast", "pi0-FAST"), ("openvla", "OpenVLA"), ("bert", "type 'bert'")],
)
def test_other_models_are_named(kind: str, name: str, model: Pi0ForCFGRL, tmp_path: Path) -> None:
    lerobot(tmp_path, model, type=kind)
    with pytest.raises(ValueError, match=re.escape(name)):
        policy_of(tmp_path)


def test_openpis_pi05_is_told_by_its_tensors(model: Pi0ForCFGRL, tmp_path: Path) -> None:
    tensors = openpi_tensors(model)
    for old in ("state_proj", "action_time_mlp_in", "action_time_mlp_out"):
        for part in ("weight", "bias"):
            tensor = tensors.pop(f"{old}.{part}")
            tensors[f"{old.replace('action_time', 'time')}.{part}"] = tensor
    write(tmp_path, OPENPI_CONFIG, tensors)
    with pytest.raises(ValueError, match=r"is a pi0\.5 checkpoint"):
        policy_of(tmp_path)


def test_missing_and_superfluous_tensors_are_counted_and_named(
    model: Pi0ForCFGRL, tmp_path: Path
) -> None:
    tensors = openpi_tensors(model)
    gone = [name for name in tensors if "gemma_expert.model.layers.1.mlp" in name]
    for name in gone:
        del tensors[name]
    tensors["value_head.weight"] = torch.zeros(2)
    write(tmp_path, OPENPI_CONFIG, tensors)
    with pytest.raises(ValueError, match=r"lacks 3 tensors \(.*layers\.1\.mlp") as caught:
        policy_of(tmp_path)
    assert "has unknown 1 tensor (value_head.weight)" in str(caught.value)


def test_tensors_of_another_shape_are_named(model: Pi0ForCFGRL, tmp_path: Path) -> None:
    tensors = openpi_tensors(model)
    tensors["action_out_proj.bias"] = torch.zeros(5)
    write(tmp_path, OPENPI_CONFIG, tensors)
    with pytest.raises(ValueError, match=r"in another shape 1 tensor \(.*action_out_proj\.bias"):
        policy_of(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization_mapping": {"STATE": "QUANTILES"}}, "normalises STATE by QUANTILES"),
        ({"use_relative_actions": True}, "has relative actions"),
    ],
)
def test_lerobot_settings_that_mean_something_else_are_refused(
    changes: dict[str, Any], message: str, model: Pi0ForCFGRL, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        policy_of(lerobot(tmp_path, model, **changes))


def test_lerobots_relative_actions_are_our_delta(model: Pi0ForCFGRL, tmp_path: Path) -> None:
    names = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
    folder = lerobot(
        tmp_path,
        model,
        use_relative_actions=True,
        action_feature_names=names,
        relative_exclude_joints=["gripper"],
    )
    assert policy_of(folder).config.delta_actions


def test_folders_without_readable_weights_say_what_to_do(
    model: Pi0ForCFGRL, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        policy_of(tmp_path / "nothing")
    (tmp_path / "params").mkdir()
    with pytest.raises(ValueError, match=r"convert_jax_model_to_pytorch\.py"):
        policy_of(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds pytorch_model\.bin, which can run code"):
        policy_of(tmp_path)
    folder = openpi(tmp_path / "cut", model)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="unfinished download"):
        policy_of(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        policy_of(folder)


def test_local_folders_ask_no_network(
    model: Pi0ForCFGRL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was asked for")

    folder = lerobot(tmp_path, model)
    STATS.save(folder)
    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    assert isinstance(policy_of(folder, norm_stats=None).norm_stats, NormStats)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_lerobots_names_are_written_as_they_were_read(
    prefix: str, model: Pi0ForCFGRL, tmp_path: Path
) -> None:
    tensors = {f"{prefix}{name}": tensor for name, tensor in openpi_tensors(model).items()}
    write(tmp_path / "in", LEROBOT_CONFIG, tensors)
    policy_of(tmp_path / "in").save_pretrained(tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    del tensors[f"{prefix}{EXPERT}lm_head.weight"]  # nothing reads it
    assert set(written) - set(tensors) == {f"{prefix}condition.embedding"}
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("form", FORMATS)
def test_plain_transformers_reloads_what_a_bfloat16_vlm_saves(
    form: str, model: Pi0ForCFGRL, tmp_path: Path
) -> None:
    policy = policy_of(FORMATS[form](tmp_path / "in", model), vlm_dtype=None)
    policy.save_pretrained(tmp_path / "out")
    plain = PI0ForConditionalGeneration.from_pretrained(tmp_path / "out")
    for name, parameter in policy.model.named_parameters():
        if not name.startswith("condition."):
            assert torch.equal(plain.get_parameter(name), parameter.float()), name
    again = policy_of(tmp_path / "out", vlm_dtype=None)
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(again.model.get_parameter(name), parameter), name
