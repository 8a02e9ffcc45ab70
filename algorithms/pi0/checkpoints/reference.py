"""Writes and reads the reference's weights in a policy folder: those in which it may differ."""

import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cfgrl_gym.algorithms.pi0.checkpoints.files import refuse
from cfgrl_gym.algorithms.pi0.lora import merged_state_dict
from cfgrl_gym.algorithms.pi0.model import Pi0ForCFGRL
from cfgrl_gym.algorithms.reference_weights import ReferenceWeights

REFERENCE_FILE = "reference.safetensors"
MODEL = "model."  # what a policy's names have before those of its model
_OF_ADAPTED_LAYER = re.compile(r"\.(lora_[AB]\.\w+|base_layer)\.")


def write_reference(folder: Path, model: Pi0ForCFGRL, reference: ReferenceWeights | None) -> None:
    """Write the weights under the model's own names, with adapters merged; nothing if none are
    held: then the reference is the policy itself, and an earlier file is removed."""
    file = folder / REFERENCE_FILE
    if reference is None or not reference.held:
        file.unlink(missing_ok=True)
        return
    names = {_OF_ADAPTED_LAYER.sub(".", name.removeprefix(MODEL)) for name in reference.copied}
    adapted = any(".lora_A." in name for name in reference.copied)
    with reference.in_place():
        state = merged_state_dict(model) if adapted else model.state_dict()
        save_file({name: state[name].contiguous() for name in sorted(names)}, file)


def read_reference(file: Path, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Read the weights, by the names of a policy's parameters.

    :raises ValueError: the file is damaged, or another model's
    """
    remedy = "save the policy again, or remove the file: the reference is the policy itself then"
    weights = {}
    problem = f"'{file}' is damaged or of another model"
    with refuse(problem, remedy), safe_open(file, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 (no mapping: it has keys() only)
            name, value = MODEL + key, tensors.get_tensor(key)
            if name not in parameters:  # an adapted layer's
                name = re.sub(r"\.(\w+)$", r".base_layer.\1", name)
            if value.shape != parameters[name].shape or not value.is_floating_point():
                raise ValueError(f"{key} is {tuple(value.shape)}, {value.dtype}")
            weights[name] = value.clone()  # not mapped: the file may be overwritten
    return weights
