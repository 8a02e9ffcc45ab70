"""Defines the two sizes of PI0: `tiny`, for a CPU, and `pi0`, the full 3.3 B model."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from cfgrl_gym.algorithms.pi0.condition import Pi0CFGRLConfig
from cfgrl_gym.algorithms.pi0.model import Pi0ForCFGRL
from cfgrl_gym.algorithms.pi0.tokenizer import BYTE_IMAGE_TOKEN_ID, BYTE_VOCAB_SIZE
from cfgrl_gym.wrappers.norm_stats import ACTION_DIM, STATE_DIM

Preset = Literal["tiny", "pi0"]
PRESETS = get_args(Preset)


@dataclass(frozen=True)
class TinySizes:
    """Holds the sizes of the tiny preset.

    :param image_size: side of the square images the model sees, in pixels
    :param patch_size: side of a patch in pixels; there are (image_size / patch_size)² tokens for
        each camera
    :param hidden_size: width of vision tower, language model and expert
    :param vision_layers: layers of the vision tower
    :param num_layers: layers of the language model, and of the expert (they share attention, so the
        number is the same)
    :param num_heads: attention heads of every layer
    :param mlp_ratio: width of every MLP, as a multiple of hidden_size
    :param max_action_dim: the model's action width. The default is the seven real dimensions, with
        no padding: padded ones have no loss and only disturb a small model
    :param max_state_dim: the model's state width
    """

    image_size: int = 112
    patch_size: int = 16
    hidden_size: int = 128
    vision_layers: int = 2
    num_layers: int = 4
    num_heads: int = 4
    mlp_ratio: int = 2
    max_action_dim: int = ACTION_DIM
    max_state_dim: int = STATE_DIM

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 2·num_heads "
                f"({2 * self.num_heads}): rotary embeddings need an even width for each head"
            )


def tiny_config(sizes: TinySizes, horizon: int, condition_mode: str = "token") -> Pi0CFGRLConfig:
    """Build the configuration of a PI0 of these sizes, with the byte-level vocabulary."""
    shared = {
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.mlp_ratio * sizes.hidden_size,
        "num_attention_heads": sizes.num_heads,
    }
    gemma = {
        **shared,
        "model_type": "gemma",
        "num_hidden_layers": sizes.num_layers,
        "num_key_value_heads": 1,
        "head_dim": sizes.hidden_size // sizes.num_heads,
        "vocab_size": BYTE_VOCAB_SIZE,
        "initializer_range": sizes.hidden_size**-0.5,
    }
    vision = {
        **shared,
        "model_type": "siglip_vision_model",
        "num_hidden_layers": sizes.vision_layers,
        "image_size": sizes.image_size,
        "patch_size": sizes.patch_size,
        "vision_use_head": False,
    }
    return Pi0CFGRLConfig(
        vlm_config={
            "model_type": "paligemma",
            "text_config": gemma,
            "vision_config": vision,
            "projection_dim": sizes.hidden_size,
            "image_token_id": BYTE_IMAGE_TOKEN_ID,
        },
        dit_config=dict(gemma),
        chunk_size=horizon,
        max_action_dim=sizes.max_action_dim,
        max_state_dim=sizes.max_state_dim,
        condition_mode=condition_mode,
    )


def new_model(
    config: Pi0CFGRLConfig, seed: int | None, vlm_dtype: torch.dtype = torch.float32
) -> Pi0ForCFGRL:
    """Build a randomly initialised model.

    :param seed: seed of the initial weights; the global generator is left unchanged. None draws
        from the global generator
    :param vlm_dtype: dtype of the VLM's weights; the others are float32
    """
    config.set_float32()
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        model = Pi0ForCFGRL(config)
    model.drop_unused_embeddings()
    model.cast_vlm(vlm_dtype)
    return model
