"""The denoising steps through torch.compile."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def compiled(branch_velocities: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """`Pi0ForCFGRL.branch_velocities`, compiled for each shape it is called with; on a GPU as CUDA
    graphs.

    Not as one obligatory graph (`fullgraph`): that makes the ninth shape an error (torch's
    recompile_limit), and a collection has a batch size for each number of environments that are
    still busy. Without it the shapes after the eighth run as they are.
    """
    graph = torch.compile(branch_velocities, dynamic=False, mode="reduce-overhead")

    def call(*args: Any) -> tuple[Tensor, ...]:
        # A CUDA graph writes the outputs of every call to the same memory.
        return tuple(velocity.clone() for velocity in graph(*args))

    return call
