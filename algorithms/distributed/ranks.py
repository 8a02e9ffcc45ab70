"""The processes of torch.distributed that train one policy together."""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

if dist.is_available():
    # To be imported before there is a process group, which its functions would keep for good as the
    # default of their arguments: the first step of an optimizer imports it.
    import torch.distributed.nn.functional
    from torch.distributed.tensor import DTensor

T = TypeVar("T")
BUCKET_BYTES = 2**25  # of gradients that are summed in one go, the size that torch's DDP takes


class RankError(ConnectionError):
    """Another rank ends, so that this one can't go on."""

    def __init__(self, rank: int | None = None) -> None:
        which = "another rank" if rank is None else f"rank {rank}"
        super().__init__(f"{which} has ended, and its own output says why; all ranks have to end")


class RankLostError(RankError):
    """Another rank has ended without a word."""


class RanksStopped(Exception):
    """The callback of another rank asked to stop."""


@dataclass(frozen=True)
class _Leaving:
    """Sent in place of a value: the rank ends."""

    stopped: bool  # because its callback asked to; False: it failed


@dataclass(frozen=True)
class Ranks:
    """The processes that share the work, one by default.

    Every rank has its environments and a copy of the policy. All call the same methods in the same
    order. What they tell each other is on the host, but for gradients.

    :param rank: number of this process
    :param size: number of processes
    :param group: process group for what is on the host, which torch.distributed holds and this
        doesn't: gloo's threads end with the last reference, and a process that ends before them
        aborts where one still has a tensor. None: there is a single rank
    """

    rank: int = 0
    size: int = 1
    group: "weakref.ref[Any] | None" = None

    @classmethod
    def current(cls) -> "Ranks":
        """Return those of torch.distributed's default group, if it is initialised."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        gloo = dist.get_backend() == "gloo"
        return cls(
            dist.get_rank(),
            dist.get_world_size(),
            weakref.ref(dist.group.WORLD if gloo else dist.new_group(backend="gloo")),
        )

    def apart(self) -> "Ranks":
        """Return the same ranks with a process group of its own, to be used by another thread.

        All ranks have to call this, and in the same order.
        """
        if self.size == 1:
            return self
        return replace(self, group=weakref.ref(dist.new_group(backend="gloo")))

    @property
    def host(self) -> Any:
        """Return the process group for what is on the host.

        :raises ValueError: it was destroyed
        """
        group = None if self.group is None else self.group()
        if group is None:
            raise ValueError("the process group was destroyed; CFGRL needs it while it works")
        return group

    @property
    def first(self) -> bool:
        """Return whether this is the rank that logs, saves and prints."""
        return self.rank == 0

    def has(self, index: Any) -> Any:
        """Return whether this rank has the piece of work with this index: they take turns.

        :param index: an int, or a tensor of them for the answers of all
        """
        return index % self.size == self.rank

    def part(self, count: int) -> range:
        """Return which of so many things, in a row, are this rank's: a stretch of them."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in their order.

        :raises RankError: another rank failed or is gone
        :raises RanksStopped: the callback of another rank asked to stop
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with reaching_others():
            dist.all_gather_object(values, value, group=self.host)
        for rank, other in enumerate(values):
            if isinstance(other, _Leaving) and rank != self.rank:
                raise RanksStopped if other.stopped else RankError(rank)
        return values

    def joined(self, items: Sequence[T]) -> list[T]:
        """Return the items of all ranks."""
        return [item for part in self.gather(list(items)) for item in part]

    def leave(self, stopped: bool = False) -> None:
        """Let the others' next `gather` raise."""
        if self.size > 1:
            self.gather(_Leaving(stopped))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait for the others at the end of the block, and let them know if it raises.

        :raises RankError: another rank failed in it or is gone
        """
        try:
            yield
        except (RankError, RanksStopped):
            raise
        except BaseException:
            with suppress(RankError, RanksStopped):
                self.leave()
            raise
        self.gather(None)

    def check_equal(self, settings: Mapping[str, Any]) -> None:
        """Check that all ranks have these settings.

        :raises ValueError: on every rank, if one differs
        """
        others = self.gather(dict(settings))
        for name in settings:
            given = [other.get(name) for other in others]
            if any(value != given[0] for value in given):
                raise ValueError(
                    f"ranks must have the same settings, but {name} is "
                    f"{' and '.join(dict.fromkeys(f'{value!r:.100}' for value in given))}; start "
                    "all ranks with the same command and the same version"
                )

    def sum_gradients(self, module: nn.Module, losses: Tensor, here: Tensor) -> Tensor:
        """Add up the gradients of all ranks, each that of its samples in the batch. Those of which
        each rank has a share are added up already.

        :param losses: of the samples on this rank, (n,)
        :param here: which samples of the batch these are, bool (batch,)
        :return: the losses of the whole batch, (batch,)
        """
        if self.size == 1:
            return losses
        trained = [p for p in module.parameters() if p.requires_grad and not isinstance(p, DTensor)]
        group = self.host if dist.get_backend() == "gloo" else None  # None: NCCL's
        # In one go with the losses, because a gradient that no rank has stays None.
        device = next(module.parameters()).device
        shared = torch.zeros(len(here) + len(trained), device=device)
        shared[: len(here)][here.to(device)] = losses.float().to(device)
        has = [p.grad is not None for p in trained]
        shared[len(here) :] = torch.tensor(has, dtype=torch.float32)
        with reaching_others():
            dist.all_reduce(shared, group=group)
            somewhere = shared[len(here) :].tolist()
            trained = [p for p, ranks in zip(trained, somewhere, strict=True) if ranks]
            for parameter in trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            for bucket in _buckets([p.grad for p in trained if p.grad is not None]):
                flat = torch.cat([gradient.flatten() for gradient in bucket])
                dist.all_reduce(flat, group=group)
                sizes = [gradient.numel() for gradient in bucket]
                for gradient, part in zip(bucket, flat.split(sizes), strict=True):
                    gradient.copy_(part.view_as(gradient))
        return shared[: len(here)]


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Put together what is summed in one go: a tensor at a time takes gloo three times as long."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        full = sum(g.nbytes for g in bucket) + gradient.nbytes > BUCKET_BYTES
        if bucket and (full or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


ALONE = Ranks()


@contextmanager
def reaching_others() -> Iterator[None]:
    """Raise `RankLostError` where torch.distributed can't reach another rank."""
    try:
        yield
    except RuntimeError as error:  # what gloo and NCCL raise: a connection closed, a time-out
        raise RankLostError from error
