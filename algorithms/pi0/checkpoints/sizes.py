"""The sizes of a PI0 from the shapes of its tensors.

LeRobot's and openpi's config.json name variants ("gemma_2b") but no sizes; the headers of the
weight files hold every shape, and reading them costs nothing.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PI0Config

from cfgrl_gym.algorithms.pi0.condition import Pi0CFGRLConfig

Shapes = Mapping[str, tuple[int, ...]]

PALIGEMMA = "paligemma_with_expert.paligemma."
EXPERT = "paligemma_with_expert.gemma_expert.model."
VISION_HEAD_DIM = 72  # SigLIP So400m: 1152 / 16 heads. PI0's Gemmas have one key-value head.


def read_shapes(files: Sequence[Path]) -> Shapes:
    """The shape of every tensor, from the files' headers.

    :raises ValueError: a file is no safetensors file, or cut short
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no mapping: it has keys() only)
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        except SafetensorError as error:
            raise ValueError(
                f"weight file '{file}' ({file.stat().st_size} bytes) can't be read ({error}); is "
                "it an unfinished download, or a git-lfs pointer?"
            ) from error
    return shapes


def config_from_shapes(
    folder: Path, shapes: Shapes, fields: Mapping[str, Any] | None = None
) -> Pi0CFGRLConfig:
    """The configuration of a model under LeRobot's and openpi's tensor names.

    :param folder: for error messages
    :param fields: what no shape tells, such as chunk_size
    :raises ValueError: a tensor that is needed isn't there
    """
    named = _Named(folder, {name.removeprefix("model."): size for name, size in shapes.items()})
    language = f"{PALIGEMMA}model.language_model."
    embeddings = (f"{language}embed_tokens.weight", f"{PALIGEMMA}lm_head.weight")
    vocab_size = named.shape(*embeddings)[0]
    text, expert = _gemma(named, language), _gemma(named, EXPERT)
    projector = named.shape(f"{PALIGEMMA}model.multi_modal_projector.linear.weight")
    content = PI0Config().to_dict()
    content["vlm_config"]["text_config"] |= {**text, "vocab_size": vocab_size}
    content["vlm_config"]["vision_config"] |= _siglip(named)
    content["vlm_config"]["projection_dim"] = projector[0]
    # One beyond the vocabulary, so that no word is taken for an image.
    content["vlm_config"]["image_token_index"] = vocab_size
    content["dit_config"] |= {**expert, "vocab_size": vocab_size}
    content["max_state_dim"] = named.shape("state_proj.weight")[1]
    content["max_action_dim"] = named.shape("action_in_proj.weight")[1]
    return read_config(folder, {**content, **(fields or {})})


def read_config(folder: Path, content: dict[str, Any]) -> Pi0CFGRLConfig:
    """:raises ValueError: transformers can't make a PI0 configuration of it."""
    try:
        return Pi0CFGRLConfig.from_dict(content)
    except MemoryError:
        raise
    except Exception as error:  # errors of many kinds
        raise ValueError(
            f"'{folder / 'config.json'}' is no PI0 configuration ({error!r:.300}); download the "
            "checkpoint again"
        ) from error


class _Named:
    """Shapes by name, with an error that says what is missing."""

    def __init__(self, folder: Path, shapes: Shapes) -> None:
        self.folder = folder
        self.shapes = shapes

    def shape(self, *names: str) -> tuple[int, ...]:
        for name in names:
            if name in self.shapes:
                return self.shapes[name]
        raise ValueError(
            f"checkpoint '{self.folder}' lacks the tensor '{names[0]}' (it has "
            f"{len(self.shapes)} tensors), without which the model's sizes can't be known; "
            "is it a complete PI0 checkpoint?"
        )

    def layers(self, prefix: str) -> int:
        pattern = re.compile(re.escape(prefix) + r"layers\.(\d+)\.")
        found = (pattern.match(name) for name in self.shapes)
        return 1 + max((int(match[1]) for match in found if match), default=-1)


def _gemma(named: _Named, prefix: str) -> dict[str, int]:
    attention = f"{prefix}layers.0.self_attn."
    head_dim = named.shape(f"{attention}k_proj.weight")[0]
    return {
        "hidden_size": named.shape(f"{prefix}norm.weight")[0],
        "num_hidden_layers": named.layers(prefix),
        "intermediate_size": named.shape(f"{prefix}layers.0.mlp.gate_proj.weight")[0],
        "num_attention_heads": named.shape(f"{attention}q_proj.weight")[0] // head_dim,
        "num_key_value_heads": 1,
        "head_dim": head_dim,
    }


def _siglip(named: _Named) -> dict[str, int]:
    tower = f"{PALIGEMMA}model.vision_tower."
    if any(name.startswith(f"{tower}vision_model.") for name in named.shapes):
        tower += "vision_model."
    hidden, _, patch, _ = named.shape(f"{tower}embeddings.patch_embedding.weight")
    positions = named.shape(f"{tower}embeddings.position_embedding.weight")[0]
    return {
        "hidden_size": hidden,
        "num_hidden_layers": named.layers(f"{tower}encoder."),
        "intermediate_size": named.shape(f"{tower}encoder.layers.0.mlp.fc1.weight")[0],
        "num_attention_heads": max(1, hidden // VISION_HEAD_DIM),
        "patch_size": patch,
        "image_size": patch * round(positions**0.5),
    }
