"""LeRobot's PI0 against ours: the same function, and a checkpoint that LeRobot itself wrote.

Runs where LeRobot's PI0 can be imported. Its modules are built at small sizes; the code is its own.
LeRobot computes the sinusoid of the time in float64, transformers' frequencies are float32 (angles
reach 1570 rad), which alone moves velocities by up to 1e-4: the comparison gives ours the same
sinusoid, and one test shows that the difference without it is no more than that.
"""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cfgrl_gym.algorithms.flow import NULL, euler
from cfgrl_gym.algorithms.pi0 import Pi0ForCFGRL
from cfgrl_gym.algorithms.pi0.checkpoints.formats import Source, read_source
from cfgrl_gym.algorithms.pi0.checkpoints.weights import load_model
from cfgrl_gym.algorithms.pi0.prefix import Prefix

lerobot: Any = pytest.importorskip("lerobot.policies.pi0.modeling_pi0")
pi_gemma: Any = pytest.importorskip("lerobot.policies.pi_gemma")
BATCH, HORIZON, VOCABULARY, IMAGE, TOKENS = 3, 5, 300, 28, 8
WIDTHS = {"gemma_2b": 64, "gemma_300m": 32}


@pytest.fixture(scope="module")
def theirs() -> Any:
    """LeRobot's policy with small modules and random weights."""
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.pi0.configuration_pi0 import PI0Config

    patch = pytest.MonkeyPatch()

    def small(variant: str) -> Any:
        return lerobot.GemmaConfig(
            width=WIDTHS[variant], depth=2, mlp_dim=48, num_heads=8, num_kv_heads=1, head_dim=16
        )

    vlm_class, expert_class = (
        lerobot.PaliGemmaForConditionalGenerationWithPiGemma,
        lerobot.PiGemmaForCausalLM,
    )

    def small_vlm(config: Any) -> Any:
        config.image_token_index = config.text_config.vocab_size = VOCABULARY
        config._vocab_size = VOCABULARY
        vision = config.vision_config
        vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads = 72, 2, 1
        vision.intermediate_size, vision.projection_dim = 40, WIDTHS["gemma_2b"]
        return vlm_class(config=config)

    def small_expert(config: Any) -> Any:
        config.vocab_size = VOCABULARY
        return expert_class(config=config)

    patch.setattr(lerobot, "get_gemma_config", small)
    patch.setattr(lerobot, "PaliGemmaForConditionalGenerationWithPiGemma", small_vlm)
    patch.setattr(lerobot, "PiGemmaForCausalLM", small_expert)
    torch.manual_seed(0)
    config = PI0Config(chunk_size=HORIZON, n_action_steps=HORIZON, image_resolution=(IMAGE, IMAGE))
    config.device = "cpu"
    config.input_features = {
        "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(8,)),
        "observation.images.image": PolicyFeature(FeatureType.VISUAL, (3, IMAGE, IMAGE)),
    }
    config.output_features = {"action": PolicyFeature(type=FeatureType.ACTION, shape=(7,))}
    policy = lerobot.PI0Policy(config).eval()
    patch.undo()
    return policy


@pytest.fixture(scope="module")
def source(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """What LeRobot's own save_pretrained wrote."""
    folder = tmp_path_factory.mktemp("lerobot")
    theirs.save_pretrained(folder)
    return read_source(folder)


@pytest.fixture(scope="module")
def ours(source: Source) -> Pi0ForCFGRL:
    return load_model(source, source.config, "float32").eval()


@pytest.fixture
def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(TOKENS)[None] < torch.tensor([[8], [5], [6]])
    return {
        "images": [torch.rand(BATCH, 3, IMAGE, IMAGE, generator=generator) * 2 - 1] * 2,
        "text": torch.randint(0, VOCABULARY, (BATCH, TOKENS), generator=generator),
        "mask": mask,
        "state": torch.randn(BATCH, 32, generator=generator),
        "actions": torch.randn(BATCH, HORIZON, 32, generator=generator),
        "noise": torch.randn(BATCH, HORIZON, 32, generator=generator),
        "t": torch.rand(BATCH, generator=generator),
    }


def in_float64(ours: Pi0ForCFGRL, patch: pytest.MonkeyPatch) -> None:
    """The sinusoid as LeRobot's create_sinusoidal_pos_embedding computes it."""
    config: Any = ours.config
    half = config.dit_config.hidden_size // 2
    fraction = torch.linspace(0.0, 1.0, half, dtype=torch.float64)
    period = config.min_period * (config.max_period / config.min_period) ** fraction

    def sinusoid(time: Tensor) -> Tensor:
        angle = 2 * torch.pi / period * time.double()[:, None]
        return torch.cat([angle.sin(), angle.cos()], 1).float()

    patch.setattr(ours.embed_action_time.sinusoid_embeds, "forward", sinusoid)


def prefix_of(ours: Pi0ForCFGRL, inputs: dict[str, Any]) -> Prefix:
    pixels = torch.stack(inputs["images"], 1)
    image = torch.full((BATCH, 2 * (IMAGE // 14) ** 2), VOCABULARY)
    mask = torch.cat([torch.ones_like(image), inputs["mask"].long()], 1)
    ids = torch.cat([image, inputs["text"]], 1)
    return ours.encode_prefix(ids, pixels, torch.ones(BATCH, 2, dtype=torch.bool), mask)


def our_velocity(ours: Pi0ForCFGRL, inputs: dict[str, Any], x: Tensor, t: Tensor) -> Tensor:
    labels = torch.full((BATCH,), NULL)
    return ours.velocity(prefix_of(ours, inputs), inputs["state"], x, t, labels)


def their_errors(theirs: Any, inputs: dict[str, Any]) -> Tensor:
    """Squared errors of the velocity, (batch, horizon, width)."""
    masks = [torch.ones(BATCH, dtype=torch.bool)] * 2
    errors: Tensor = theirs.model.forward(
        inputs["images"],
        masks,
        inputs["text"],
        inputs["mask"],
        inputs["state"],
        inputs["actions"],
        inputs["noise"],
        inputs["t"],
    )
    return errors


def our_errors(ours: Pi0ForCFGRL, inputs: dict[str, Any]) -> Tensor:
    t = inputs["t"][:, None, None]
    x = t * inputs["noise"] + (1 - t) * inputs["actions"]
    velocity = our_velocity(ours, inputs, x, inputs["t"])
    return (velocity - (inputs["noise"] - inputs["actions"])).square()


@torch.no_grad()
def test_loss_and_velocity_are_lerobots(
    theirs: Any, ours: Pi0ForCFGRL, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = their_errors(theirs, inputs)
    # An error of 1e-5 in the velocity moves its square by 2e-5 times the residual.
    torch.testing.assert_close(our_errors(ours, inputs), expected, atol=2e-3, rtol=0)
    in_float64(ours, monkeypatch)
    torch.testing.assert_close(our_errors(ours, inputs).sqrt(), expected.sqrt(), atol=1e-5, rtol=0)
    torch.testing.assert_close(our_errors(ours, inputs).mean(), expected.mean(), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_chunk_is_lerobots(
    theirs: Any, ours: Pi0ForCFGRL, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # LeRobot 0.6.1 passes an argument that transformers has dropped since.
    make_mask = pi_gemma.create_causal_mask
    known = inspect.signature(make_mask).parameters
    monkeypatch.setattr(
        pi_gemma,
        "create_causal_mask",
        lambda **given: make_mask(**{k: v for k, v in given.items() if k in known}),
    )
    masks = [torch.ones(BATCH, dtype=torch.bool)] * 2
    expected = theirs.model.sample_actions(
        inputs["images"],
        masks,
        inputs["text"],
        inputs["mask"],
        inputs["state"],
        noise=inputs["noise"],
        num_steps=10,
    )
    in_float64(ours, monkeypatch)
    actual = euler(lambda x, t: our_velocity(ours, inputs, x, t), inputs["noise"], 10)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_gradients_are_lerobots(
    theirs: Any, ours: Pi0ForCFGRL, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_float64(ours, monkeypatch)
    for model, errors in ((theirs, their_errors(theirs, inputs)), (ours, our_errors(ours, inputs))):
        model.zero_grad()
        errors.mean().backward()
    for name in ("action_in_proj", "state_proj", "action_time_mlp_in", "action_time_mlp_out"):
        expected = getattr(theirs.model, name).weight.grad
        actual = getattr(ours.embed_action_time, name).weight.grad
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_settings_and_statistics_that_lerobot_wrote_are_read(source: Source) -> None:
    from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
    from lerobot.processor import NormalizerProcessorStep, PolicyProcessorPipeline

    assert (source.format, source.config.chunk_size, source.delta_actions) == (
        "lerobot",
        HORIZON,
        False,
    )
    assert source.norm_stats() is None
    step = NormalizerProcessorStep(
        features={
            "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(8,)),
            "action": PolicyFeature(type=FeatureType.ACTION, shape=(7,)),
        },
        norm_map={
            FeatureType.STATE: NormalizationMode.MEAN_STD,
            FeatureType.ACTION: NormalizationMode.MEAN_STD,
        },
        stats={
            "observation.state": {"mean": np.full(8, 0.5), "std": np.full(8, 2.0)},
            "action": {"mean": np.full(7, -0.5), "std": np.full(7, 3.0)},
        },
    )
    pipeline = PolicyProcessorPipeline(steps=[step], name="policy_preprocessor")
    pipeline.save_pretrained(source.folder)
    stats = read_source(Path(source.folder)).norm_stats()
    assert stats is not None
    assert (stats.state.mean, stats.actions.std) == ((0.5,) * 8, (3.0,) * 7)
