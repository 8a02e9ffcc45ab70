"""A checkpoint's config.json, taken only as far as it fits the checkpoint's tensors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cfgrl_gym.algorithms.pi0.checkpoints.sizes import Shapes, read_config
from cfgrl_gym.algorithms.pi0.condition import Pi0CFGRLConfig

LONGEST_CHUNK = 10_000  # no tensor tells the horizon; this many actions are minutes of motion
# They choose code, at worst a kernel that is fetched from the hub, or what a pass gives out beside
# its result; neither is a file's to choose.
_NOT_ITS_TO_CHOOSE = (
    *("attn_implementation", "experts_implementation", "auto_map", "use_kernels"),
    *("output_attentions", "output_hidden_states", "return_dict"),
)


def config_from_file(folder: Path, raw: dict[str, Any], shapes: Shapes) -> Pi0CFGRLConfig:
    """transformers' config.json as a configuration.

    A model of the configured sizes is made before its weights are compared: sizes that aren't the
    tensors' are refused here, before they can take all memory.

    :param raw: its content
    :raises ValueError: not a PI0's, or not of this checkpoint
    """
    if raw.get("quantization_config") is not None:
        raise ValueError(
            f"checkpoint '{folder}' is quantised (quantization_config), which can't be fine-tuned "
            "here; take the checkpoint it was made from"
        )
    config = read_config(folder, _description(raw))
    check_sizes(folder, config, shapes)
    return config


def _description(raw: Any) -> Any:
    """What describes the model: all but `_NOT_ITS_TO_CHOOSE`."""
    if isinstance(raw, list):
        return [_description(value) for value in raw]
    if not isinstance(raw, dict):
        return raw
    return {
        key: _description(value)
        for key, value in raw.items()
        if not key.lstrip("_").startswith(_NOT_ITS_TO_CHOOSE)
    }


def check_sizes(folder: Path, config: Pi0CFGRLConfig, shapes: Shapes) -> None:
    """:raises ValueError: the configuration's sizes aren't those of the tensors."""
    wrong = [
        f"{name} {given!r}, not {wanted}"
        for name, given, wanted in _sizes(config, shapes)
        if type(given) is not int or given != wanted
    ]
    chunk = config.chunk_size
    if type(chunk) is not int or not 1 <= chunk <= LONGEST_CHUNK:
        wrong.append(f"chunk_size {chunk!r}, not 1 to {LONGEST_CHUNK}")
    if wrong:
        raise ValueError(
            f"'{folder / 'config.json'}' doesn't fit the checkpoint's tensors: {'; '.join(wrong)}; "
            "download both again"
        )


def _sizes(config: Any, shapes: Shapes) -> Iterator[tuple[str, Any, int]]:
    """(name, configured, as the tensors have it) of every size that a tensor tells."""
    towers: dict[str, dict[str, tuple[int, ...]]] = {"vision": {}, "expert": {}, "text": {}}
    for name, shape in shapes.items():
        vision, expert = "vision_tower." in name, "gemma_expert." in name or "dit." in name
        towers["vision" if vision else "expert" if expert else "text"][name] = shape
    configs = {
        "vision": config.vlm_config.vision_config,
        "expert": config.dit_config,
        "text": config.vlm_config.text_config,
    }
    for tower, tensors in towers.items():
        part = configs[tower]
        numbers = {
            int(name.partition("layers.")[2].partition(".")[0])
            for name in tensors
            if name.partition("layers.")[2].partition(".")[0].isdecimal()
        }
        yield f"{tower} num_hidden_layers", part.num_hidden_layers, len(numbers)
        for suffix, axis, size in _TOLD[tower]:
            found = next((shape for name, shape in tensors.items() if name.endswith(suffix)), None)
            if found is not None and axis < len(found):
                yield f"{tower} {size}", _configured(part, size), found[axis]
    for suffix, name in (("state_proj", "max_state_dim"), ("action_in_proj", "max_action_dim")):
        for tensor, shape in shapes.items():
            if tensor.endswith(f"{suffix}.weight") and len(shape) == 2:
                yield name, getattr(config, name), shape[1]


_GEMMA = (
    ("layers.0.self_attn.q_proj.weight", 0, "num_attention_heads * head_dim"),
    ("layers.0.self_attn.k_proj.weight", 0, "num_key_value_heads * head_dim"),
    ("layers.0.self_attn.q_proj.weight", 1, "hidden_size"),
    ("layers.0.mlp.gate_proj.weight", 0, "intermediate_size"),
)
_TOLD: dict[str, tuple[tuple[str, int, str], ...]] = {
    "vision": (
        ("patch_embedding.weight", 0, "hidden_size"),
        ("patch_embedding.weight", 1, "num_channels"),
        ("patch_embedding.weight", 2, "patch_size"),
        ("position_embedding.weight", 0, "patches"),
        ("layers.0.mlp.fc1.weight", 0, "intermediate_size"),
    ),
    "expert": _GEMMA,
    "text": (
        *_GEMMA,
        ("embed_tokens.weight", 0, "vocab_size"),
        ("multi_modal_projector.linear.weight", 0, "hidden_size"),
    ),
}


def _configured(part: Any, size: str) -> Any:
    if size == "patches":
        return (part.image_size // part.patch_size) ** 2
    product = 1
    for name in size.split(" * "):
        value = getattr(part, name)
        if type(value) is not int or value < 1:
            return value
        product *= value
    return product
