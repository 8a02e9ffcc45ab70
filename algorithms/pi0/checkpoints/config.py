"""Derives a PI0's configuration from the shapes of a checkpoint's tensors, or checks it by them.

LeRobot's and openpi's config.json name variants ("gemma_2b") but no sizes; the headers of the
weight files hold every shape, and reading them is cheap. transformers' config.json has the sizes,
but the model is built from them before its weights are read. Sizes that differ from the tensors'
are therefore refused first, because such a model could take all memory.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PI0Config

from cfgrl_gym.algorithms.pi0.checkpoints.files import refuse
from cfgrl_gym.algorithms.pi0.condition import (
    CHECKPOINT_MODE,
    CONDITION_VERSION,
    Pi0CFGRLConfig,
    is_conditional,
)

Shapes = Mapping[str, tuple[int, ...]]

VISION_HEAD_DIM = 72  # SigLIP So400m: 1152 / 16 heads
LONGEST_CHUNK = 10_000  # no tensor shows the horizon; this many actions are minutes of motion
# Settings that choose code (at worst a kernel fetched from the hub) or extra outputs of a forward
# pass: no file may set these.
_NOT_FOR_A_FILE = (
    *("attn_implementation", "experts_implementation", "auto_map", "use_kernels"),
    *("output_attentions", "output_hidden_states", "return_dict"),
)

# Sizes by part of the model: what the configuration says, the tensors that show it (the end of
# their names, the first that is there counts), and the axis.
_Rows = tuple[tuple[str, tuple[str, ...], int], ...]
_GEMMA: _Rows = (
    ("hidden_size", ("layers.0.self_attn.q_proj.weight",), 1),
    ("intermediate_size", ("layers.0.mlp.gate_proj.weight",), 0),
    ("num_attention_heads * head_dim", ("layers.0.self_attn.q_proj.weight",), 0),
    ("num_key_value_heads * head_dim", ("layers.0.self_attn.k_proj.weight",), 0),
)
_SHOWN: dict[str, _Rows] = {
    "vision": (
        ("hidden_size", ("patch_embedding.weight",), 0),
        ("num_channels", ("patch_embedding.weight",), 1),
        ("patch_size", ("patch_embedding.weight",), 2),
        ("patches", ("position_embedding.weight",), 0),
        ("intermediate_size", ("layers.0.mlp.fc1.weight",), 0),
    ),
    "expert": _GEMMA,
    "text": (*_GEMMA, ("vocab_size", ("embed_tokens.weight", "lm_head.weight"), 0)),
    "vlm": (("projection_dim", ("multi_modal_projector.linear.weight",), 0),),
    "model": (
        ("max_state_dim", ("state_proj.weight",), 1),
        ("max_action_dim", ("action_in_proj.weight",), 1),
    ),
}


def read_shapes(files: Sequence[Path]) -> Shapes:
    """Read the shape of every tensor from the files' headers.

    :raises ValueError: a file isn't a safetensors file, or is truncated
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
    """Derive the configuration of a model whose config.json gives no sizes.

    :param folder: for error messages
    :param fields: settings that no shape shows, such as chunk_size
    :raises ValueError: a tensor that is needed is missing
    """
    sizes = _sizes(shapes)
    for part, rows in _SHOWN.items():
        for size, (end, *_), _ in rows:
            if (part, size) not in sizes:
                raise ValueError(
                    f"checkpoint '{folder}' lacks the tensor '{end}' of its {part} (it has "
                    f"{len(shapes)} tensors), without which the model's sizes can't be known; "
                    "is it a complete PI0 checkpoint?"
                )
    content = PI0Config().to_dict()
    parts = _parts(content)
    for (part, size), shown in sizes.items():
        if size in parts[part]:
            parts[part][size] = shown
    vocab_size = sizes["text", "vocab_size"]
    for part in ("text", "expert"):
        head_dim = sizes[part, "num_key_value_heads * head_dim"]  # PI0 has one key-value head
        heads = sizes[part, "num_attention_heads * head_dim"] // head_dim
        parts[part] |= {"num_attention_heads": heads, "num_key_value_heads": 1}
        parts[part] |= {"head_dim": head_dim, "vocab_size": vocab_size}
    vision = parts["vision"]
    vision["num_attention_heads"] = max(1, sizes["vision", "hidden_size"] // VISION_HEAD_DIM)
    vision["image_size"] = vision["patch_size"] * math.isqrt(sizes["vision", "patches"])
    # Beyond the vocabulary, so that no token of a text is taken for an image.
    parts["vlm"]["image_token_index"] = vocab_size
    return _checked(folder, {**content, **(fields or {})}, shapes)


def config_from_file(folder: Path, raw: dict[str, Any], shapes: Shapes) -> Pi0CFGRLConfig:
    """Build the configuration that transformers' config.json describes.

    :param raw: content of config.json
    :raises ValueError: it isn't PI0's, or doesn't fit this checkpoint
    """
    if raw.get("quantization_config") is not None:
        raise ValueError(
            f"checkpoint '{folder}' is quantised (quantization_config), which can't be fine-tuned "
            "here; take the checkpoint it was made from"
        )
    return _checked(folder, _without_choices(raw), shapes)


def _without_choices(raw: Any) -> Any:
    """Return a configuration without the settings that no file may choose."""
    if isinstance(raw, list):
        return [_without_choices(value) for value in raw]
    if not isinstance(raw, dict):
        return raw
    return {
        key: _without_choices(value)
        for key, value in raw.items()
        if not key.lstrip("_").startswith(_NOT_FOR_A_FILE)
    }


def _checked(folder: Path, content: dict[str, Any], shapes: Shapes) -> Pi0CFGRLConfig:
    """Build a PI0 configuration and check its sizes.

    :raises ValueError: it isn't a PI0 configuration, or its sizes differ from the tensors'
    """
    if not is_conditional(shapes):  # a new condition will be made
        content = {
            "condition_mode": CHECKPOINT_MODE,
            **content,
            "condition_version": CONDITION_VERSION,
        }
    with refuse(f"'{folder / 'config.json'}' is no PI0 configuration"):
        config = Pi0CFGRLConfig.from_dict(content)
    wrong, parts = [], _parts(config.to_dict())
    for (part, size), shown in _sizes(shapes).items():
        given = _configured(parts[part], size)
        if type(given) is not int or given != shown:
            wrong.append(f"{part} {size} {given!r}, not {shown}")
    chunk = config.chunk_size
    if type(chunk) is not int or not 1 <= chunk <= LONGEST_CHUNK:
        wrong.append(f"chunk_size {chunk!r}, not 1 to {LONGEST_CHUNK}")
    if wrong:
        raise ValueError(
            f"'{folder / 'config.json'}' doesn't fit the checkpoint's tensors: {'; '.join(wrong)}; "
            "download both again"
        )
    return config


def _sizes(shapes: Shapes) -> dict[tuple[str, str], int]:
    """Return every size that a tensor shows, by (part, name in the configuration)."""
    tensors: dict[str, dict[str, tuple[int, ...]]] = {part: {} for part in _SHOWN}
    for name, shape in shapes.items():
        vision, expert = "vision_tower." in name, "gemma_expert." in name or "dit." in name
        part = "vision" if vision else "expert" if expert else "text"
        tensors[part][name] = shape
        if part == "text":
            tensors["vlm"][name] = tensors["model"][name] = shape
    sizes = {}
    for part in ("vision", "expert", "text"):
        numbers = {name.partition("layers.")[2].partition(".")[0] for name in tensors[part]}
        sizes[part, "num_hidden_layers"] = sum(number.isdecimal() for number in numbers)
    for part, rows in _SHOWN.items():
        for size, ends, axis in rows:
            found = (s for end in ends for name, s in tensors[part].items() if name.endswith(end))
            shape = next(found, ())
            if axis < len(shape):
                sizes[part, size] = shape[axis]
    return sizes


def _parts(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the configuration of each part that `_SHOWN` names."""
    vlm = content["vlm_config"]
    vision, text, expert = vlm["vision_config"], vlm["text_config"], content["dit_config"]
    return {"vision": vision, "text": text, "expert": expert, "vlm": vlm, "model": content}


def _configured(part: dict[str, Any], size: str) -> Any:
    """Return a part's configured size, or a factor of it that isn't a positive integer."""
    if size == "patches":
        return (part["image_size"] // part["patch_size"]) ** 2
    factors = [part[name] for name in size.split(" * ")]
    wrong = [factor for factor in factors if type(factor) is not int or factor < 1]
    return wrong[0] if wrong else math.prod(factors)
