"""Joins the process group of a command that torchrun or `accelerate launch` started."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from cfgrl_gym.algorithms.distributed.ranks import Ranks

# Set by torchrun (torch.distributed.run, "Environment Variables") and by accelerate.
SIZE_VARIABLE, LOCAL_RANK_VARIABLE = "WORLD_SIZE", "LOCAL_RANK"


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Initialise torch.distributed inside the block, if this process is one of several ranks.

    Each rank of a machine gets a GPU of its own, where there are some.
    """
    if int(os.environ.get(SIZE_VARIABLE, 1)) == 1 or dist.is_initialized():
        yield Ranks.current()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ[LOCAL_RANK_VARIABLE]) % torch.cuda.device_count())
    dist.init_process_group()  # gloo, and NCCL for what is on GPUs
    try:
        yield Ranks.current()
    finally:
        dist.destroy_process_group()
