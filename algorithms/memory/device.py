"""Measures how much memory there is for a policy and its training."""

from collections.abc import Iterable

import psutil
import torch
from torch import Tensor, nn

GIB = 2**30


def weights_of(module: nn.Module) -> list[Tensor]:
    """Return the module's parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return the number of bytes that tensors occupy."""
    return sum(tensor.nbytes for tensor in tensors)


def available_host_bytes() -> int:
    """Return the host memory that is free without swapping."""
    return int(psutil.virtual_memory().available)


def available_bytes(device: torch.device, module: nn.Module) -> int:
    """Return the bytes on `device` for `module` and its training, including the weights there.

    On CUDA: what the driver reports as free, plus what this process's allocator has reserved for
    `module` or not given out. On the CPU: `available_host_bytes`, plus what `module` occupies.
    """
    held = size_of(tensor for tensor in weights_of(module) if tensor.device.type == device.type)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        others = torch.cuda.memory_allocated(device) - held
        return free + torch.cuda.memory_reserved(device) - others
    return available_host_bytes() + held


def check_weights_fit(module: nn.Module, device: torch.device) -> None:
    """Check that a module's parameters and buffers fit on a GPU.

    :raises MemoryError: they don't
    """
    if device.type != "cuda":
        return
    needed, free = size_of(weights_of(module)), available_bytes(device, module)
    if needed > free:
        raise MemoryError(
            f"the policy's weights take {needed / GIB:.2f} GiB, but {device} has {free / GIB:.2f} "
            "GiB free; take a device with more memory, vlm_dtype='bfloat16' for half of a float32 "
            "vision-language model, or device='cpu'"
        )
