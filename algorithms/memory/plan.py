"""Decides before a run starts how its updates will use the memory."""

import warnings
from collections.abc import Sequence

from torch import nn

from cfgrl_gym.algorithms.memory.device import (
    GIB,
    available_bytes,
    available_host_bytes,
    size_of,
)
from cfgrl_gym.algorithms.memory.micro_batches import MicroBatches
from cfgrl_gym.algorithms.memory.prefix_cache import PrefixCache
from cfgrl_gym.algorithms.policies import FlowPolicy


def plan_memory(
    prefixes: PrefixCache,
    batch_size: int,
    device_memory: float | None,
    prefix_memory: float | None,
    verbose: int,
    copied: bool = False,
    ranks: int = 1,
) -> MicroBatches:
    """Find micro-batches that fit, and resize the prefix cache to the memory that is left.

    :param prefixes: the cache
    :param batch_size: largest number of windows in one forward pass
    :param device_memory: GiB of the device's memory to use; None: all that is free
    :param prefix_memory: GiB of the host's memory for prefixes; None: half of what is free
    :param verbose: 1 or more: print the plan
    :param copied: an update has a copy of the policy beside it
    :param ranks: that share what an update trains, which each has besides the whole policy (FSDP2)
    :raises MemoryError: the device can't hold an update
    """
    policy = prefixes.policy
    free = available_bytes(policy.device, policy)
    if device_memory is not None:
        free = min(free, int(device_memory * GIB))
    if copied:
        free -= size_of_copy(policy)
    saved = 0
    if ranks > 1:
        saved = saved_by_sharing(policy, policy.fsdp_units(), size_of_copy(policy), ranks)
    plan = policy.plan_update(batch_size, free + saved)
    if plan.batch_size < batch_size:
        warnings.warn(
            f"batches of {batch_size} don't fit in {free / GIB:.1f} GiB: going on with "
            f"micro-batches of {plan.batch_size}, which changes memory and speed only",
            stacklevel=3,
        )
    host = available_host_bytes() // 2 if prefix_memory is None else int(prefix_memory * GIB)
    prefixes.resize(plan.room, host)
    if verbose and plan.needed is not None:
        print(
            f"Memory: an update on micro-batches of {plan.batch_size} needs about "
            f"{(plan.needed - saved) / GIB:.2f} of {free / GIB:.2f} GiB; {prefixes}"
        )
    return MicroBatches(plan.batch_size)


def saved_by_sharing(module: nn.Module, units: Sequence[nn.Module], copied: int, ranks: int) -> int:
    """Return the bytes that FSDP saves each rank of an update's gradients and AdamW's averages.

    Less what it takes: a share of gradients and of a copy, and weights and gradients that are
    gathered at a time, those of no unit, of one unit and of the next.

    :param module: that trains
    :param units: see `FlowPolicy.fsdp_units`
    :param copied: bytes of all that is shared out, but for gradients
    """
    trained, *apart = (
        size_of(p for p in each.parameters() if p.requires_grad) for each in (module, *units)
    )
    gathered = trained - sum(apart) + 2 * max(apart, default=0)
    return 3 * trained - (copied + trained) // ranks - 2 * gathered


def size_of_copy(policy: FlowPolicy) -> int:
    """Return the bytes of what `copy_to_train` copies: weights that train, AdamW's two averages of
    each, the moving average and guidance's reference."""
    trained = size_of(p for p in policy.parameters() if p.requires_grad)
    reference = 0 if policy.reference is None else policy.reference.size
    return trained * (3 if policy.average is None else 4) + reference
