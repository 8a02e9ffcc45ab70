"""How much memory there is for a policy and its training."""

import psutil
import torch
from torch import Tensor, nn

GIB = 2**30


def held_bytes(module: nn.Module) -> dict[str, int]:
    """Bytes of parameters and buffers by type of device, such as "cpu"."""
    held: dict[str, int] = {}
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    for tensor in tensors:
        kind = tensor.device.type
        held[kind] = held.get(kind, 0) + tensor.numel() * tensor.element_size()
    return held


def available_host_bytes() -> int:
    """What the system can give without swapping."""
    return int(psutil.virtual_memory().available)


def available_bytes(device: torch.device, module: nn.Module) -> int:
    """Bytes on `device` for `module` and all that training it needs, what it holds now included.

    On CUDA: what the driver says is free, and what this process's allocator holds for `module` or
    for nothing. On the CPU: `available_host_bytes`, and what `module` holds.
    """
    held = held_bytes(module).get(device.type, 0)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        others = torch.cuda.memory_allocated(device) - held
        return free + torch.cuda.memory_reserved(device) - others
    return available_host_bytes() + held


def check_weights_fit(module: nn.Module, device: torch.device) -> None:
    """:raises MemoryError: a GPU has no room for the module's parameters and buffers"""
    if device.type != "cuda":
        return
    needed, free = sum(held_bytes(module).values()), available_bytes(device, module)
    if needed > free:
        raise MemoryError(
            f"the policy's weights take {needed / GIB:.2f} GiB, but {device} has {free / GIB:.2f} "
            "GiB free; take a device with more memory, vlm_dtype='bfloat16' for half of a float32 "
            "vision-language model, or device='cpu'"
        )
