"""A copy of a policy that trains with FSDP2: each rank holds a share of everything that trains."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cfgrl_gym.algorithms.distributed.ranks import RankLostError, Ranks, reaching_others
from cfgrl_gym.algorithms.policies import FlowPolicy

if dist.is_available():
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def is_sharded(module: nn.Module) -> bool:
    """Return whether each rank has only its share of the module's trained weights."""
    return dist.is_available() and isinstance(module, FSDPModule)


def whole(value: Any) -> Any:
    """Return a tensor whole, if every rank has a share of it (then all have to ask)."""
    return value.full_tensor() if dist.is_available() and isinstance(value, DTensor) else value


@contextmanager
def sharded(policy: FlowPolicy, ranks: Ranks) -> Iterator[FlowPolicy]:
    """Give the block a copy of the policy of which each rank has a share, with all ranks together.

    Weights, gradients, optimizer state, average and reference are shared out as far as they train;
    frozen weights are the policy's own. `flow_matching_loss` is what the copy can compute, in the
    same number of passes on all ranks. After the block the policy has the results, the state of the
    optimizer on the first rank only and on the host, from where the next copy gets it: so that rank
    saves as if it were alone. If the block raises, the policy is left as it was.

    :raises RankLostError: another rank is gone
    """
    policy.set_training_mode(False)
    with reaching_others():
        shards = _shard(policy, ranks)
    try:
        yield shards
    except RuntimeError as error:  # FSDP's own, or any other of the block; gloo's name their file
        if isinstance(error, dist.DistError) or "/gloo/" in str(error):
            raise RankLostError from error
        raise
    with reaching_others():
        _gather(policy, shards, ranks)


def backward_together(
    ranks: Ranks,
    size: int,
    optimizer: torch.optim.Optimizer,
    loss: Callable[..., Tensor],
    samples: Sequence[Any],
    blank: Callable[[], Sequence[Any]],
    batch_size: int,
) -> Tensor:
    """Set the gradients to those of the sum of all ranks' losses divided by `batch_size`.

    All ranks make as many passes as the one with the most samples.

    :param size: most samples of a pass
    :param loss: some of the samples -> the loss of each, (n,)
    :param samples: arguments of `loss`, each indexed by rows, int64 (n,)
    :param blank: makes a sample with any contents, for a pass for which this rank has none left
    :return: every sample's loss on this rank, (n,), detached
    """
    optimizer.zero_grad()
    count = len(samples[0])
    passes = max(ranks.gather(-(-count // size)))
    losses = [torch.empty(0)]
    for rows in torch.arange(count).tensor_split(passes):
        if len(rows):
            computed = loss(*(sample[rows] for sample in samples))
            losses.append(computed.detach().cpu())
        else:
            computed = 0 * loss(*blank())
        # FSDP averages the gradients of the ranks.
        (computed.sum() * ranks.size / batch_size).backward()
    return torch.cat(losses)


def keep_state_on_host(optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Move an optimizer's state to where `sharded` leaves it: the first rank's host."""
    for state in optimizer.state.values():
        state.update({name: _on_host(value) for name, value in state.items()})
    if not ranks.first:
        optimizer.state.clear()


def _shard(policy: FlowPolicy, ranks: Ranks) -> FlowPolicy:
    shards = policy.copy_to_train(bare=True)
    device = policy.device.type
    backend = dist.get_backend()
    mesh = (
        DeviceMesh.from_group(ranks.host, device)
        if backend == "gloo"
        else init_device_mesh(device, (ranks.size,))
    )
    frozen = {p for p in shards.parameters() if not p.requires_grad}
    for unit in (*shards.fsdp_units(), shards):
        if any(p.requires_grad for p in unit.parameters()):
            fully_shard(unit, mesh=mesh, ignored_params=frozen)
    register_fsdp_forward_method(shards, "flow_matching_loss")
    shards.optimizer = _shard_optimizer(policy, shards, ranks, mesh)

    shards.copy_weights()
    if policy.reference is not None and shards.reference is not None:
        for name in policy.reference.copied:
            shards.reference.copy(name)
    own = shards.state_dict()
    shards.load_state_dict(
        {
            name: _share(value, mesh) if isinstance(own.get(name), DTensor) else value
            for name, value in policy.state_dict().items()
        }
    )
    return shards


def _gather(policy: FlowPolicy, shards: FlowPolicy, ranks: Ranks) -> None:
    shards.set_training_mode(False)
    shares = {n: v for n, v in shards.state_dict().items() if isinstance(v, DTensor)}
    # One after the other: the device has room for a few.
    one_by_one = ((name, value.full_tensor()) for name, value in shares.items())
    policy.take_weights(one_by_one, shards.reference is not None and shards.reference.held)
    for own, trained in zip(
        policy.optimizer.param_groups, shards.optimizer.param_groups, strict=True
    ):
        own.update({name: value for name, value in trained.items() if name != "params"})
        for parameter, share in zip(own["params"], trained["params"], strict=True):
            state = {}
            for name, value in shards.optimizer.state.get(share, {}).items():
                full = whole(value)
                state[name] = _on_host(full) if ranks.first else None
            if ranks.first and state:
                policy.optimizer.state[parameter] = state
    policy.set_training_mode(True)  # as after every update


def _share(value: Tensor, mesh: "DeviceMesh") -> Tensor:
    """Return this rank's share of a tensor that all ranks have."""
    return distribute_tensor(value.detach(), mesh, [Shard(0)], src_data_rank=None)


def _on_host(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _shard_optimizer(
    policy: FlowPolicy, shards: FlowPolicy, ranks: Ranks, mesh: "DeviceMesh"
) -> torch.optim.Optimizer:
    """Make the optimizer of the shares, with the state that the first rank's has."""
    optimizer = policy.optimizer
    names = {id(parameter): name for name, parameter in policy.named_parameters()}
    shares = dict(shards.named_parameters())
    groups = [
        {**group, "params": [shares[names[id(p)]] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    made = type(optimizer)(groups, lr=groups[0]["lr"], **policy.optimizer_kwargs)  # type: ignore[call-arg]
    state = {names[id(parameter)]: values for parameter, values in optimizer.state.items()}
    told = {  # of what is as large as a weight, only its dtype
        name: {k: v.dtype if _is_like(v, shares[name]) else v for k, v in values.items()}
        for name, values in state.items()
    }
    for name, values in ranks.gather(told)[0].items():
        share = shares[name]
        for kind, value in values.items():
            if isinstance(value, torch.dtype):
                empty = torch.empty(share.shape, dtype=value)
                value = state[name][kind] if ranks.first else empty
                value = distribute_tensor(value.to(share.device), mesh, [Shard(0)])
            made.state[share][kind] = value
    return made


def _is_like(value: Any, share: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == share.shape
