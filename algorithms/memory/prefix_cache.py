"""Keeps prefixes that were computed for acting until the update has used them."""

from collections.abc import Iterable, Sequence
from itertools import count, islice
from typing import Any

import torch

from cfgrl_gym.algorithms.guidance import BRANCHES
from cfgrl_gym.algorithms.memory.device import GIB
from cfgrl_gym.algorithms.memory.micro_batches import is_out_of_memory
from cfgrl_gym.algorithms.policies import FlowPolicy, Prefixes, PrefixRow

Name = tuple[int, int]  # of a kept prefix: its sample's key, and its label (`prefix_label`)


class PrefixCache:
    """Keeps the prefixes of samples within a budget: on the policy's device first, then in the
    host's memory (pinned, if the device is a GPU).

    The prefix of a sample for which there is no room is computed again each time it is used. Where
    labels have prefixes of their own, each is kept apart, and computed when it is first asked for.

    :param policy: the policy that computes the prefixes; nothing is kept unless its `frozen_prefix`
        says that training leaves them unchanged
    :param device_bytes: and `host_bytes`: see `resize`
    """

    def __init__(self, policy: FlowPolicy, device_bytes: int = 0, host_bytes: int = 0) -> None:
        self.policy = policy
        self.on_gpu = policy.device.type != "cpu"
        self._keys = count()
        self.resize(device_bytes, host_bytes)

    def __contains__(self, key: int) -> bool:
        return any(kept == key for kept, _ in self._kept)

    def __str__(self) -> str:
        if not self.policy.frozen_prefix:
            return "no prefixes are kept, because the vision-language model trains"
        return " and ".join(
            f"{free / GIB:.2f} GiB for prefixes in the {place}'s memory"
            for place, free in self.free.items()
            if place == "host" or self.on_gpu
        )

    def resize(self, device_bytes: int, host_bytes: int) -> None:
        """Drop all prefixes, and set the room on a GPU and in the host's memory."""
        self.room = device_bytes, host_bytes
        self.free = {"device": device_bytes if self.on_gpu else 0, "host": host_bytes}
        self._kept: dict[Name, tuple[str, PrefixRow]] = {}

    def new_keys(self, number: int) -> list[int]:
        """Return new keys for this many samples; nothing is kept under them yet."""
        return list(islice(self._keys, number))

    def keep(self, prefixes: Prefixes, number: int) -> list[int]:
        """Copy the prefixes of a batch's first samples while there is room; return the keys.

        :param prefixes: the batch's, by label
        """
        keys, policy = self.new_keys(number), self.policy
        if policy.frozen_prefix:
            distinct = {policy.prefix_label(label): prefix for label, prefix in prefixes.items()}
            for label, prefix in distinct.items():
                names = [(key, label) for key in keys]
                self._fill(names, policy.split_prefix(prefix)[:number])
        return keys

    def drop(self, keys: Iterable[int]) -> None:
        """Drop the prefixes under these keys, as far as they were kept."""
        dropped = set(keys)
        for name in [name for name in self._kept if name[0] in dropped]:
            place, row = self._kept.pop(name)
            self.free[place] += _size(row)

    def keep_only(self, keys: Iterable[int]) -> None:
        """Drop all prefixes but those under these keys."""
        self.drop({key for key, _ in self._kept} - set(keys))

    @torch.no_grad()
    def recall(
        self, observations: Any, keys: Sequence[int] | torch.Tensor, labels: torch.Tensor
    ) -> Any:
        """Return a batch's prefix, computing (and keeping, if there is room) what wasn't kept.

        :param observations: batched as the environment gives them, one row for each of `keys`
        :param labels: int64 (batch,), whose prefixes are wanted: in an update those after condition
            dropout
        :return: None for a policy whose prefix is not frozen: its loss computes it with gradients
        """
        policy = self.policy
        if not policy.frozen_prefix:
            return None
        own = [policy.prefix_label(int(label)) for label in labels]
        names = [(int(key), label) for key, label in zip(keys, own, strict=True)]
        rows = [self._kept[name][1] if name in self._kept else None for name in names]
        missing = [i for i, row in enumerate(rows) if row is None]
        if missing:
            inputs = policy.encode_observation(_rows(observations, missing))
            with policy.autocast():
                wanted = torch.tensor([own[i] for i in missing], device=policy.device)
                prefix = policy.encode_prefix(inputs, wanted)
            computed = policy.split_prefix(prefix)
            self._fill([names[i] for i in missing], computed)
            if len(missing) == len(rows):
                return prefix
            for i, row in zip(missing, computed, strict=True):
                rows[i] = row
        return policy.join_prefix([self._to_device(row) for row in rows if row is not None])

    def recall_branches(
        self, observations: Any, keys: Sequence[int] | torch.Tensor
    ) -> Prefixes | None:
        """Return a batch's prefixes under both labels that guidance combines; see `recall`."""
        policy = self.policy
        if not policy.frozen_prefix:
            return None
        distinct = {
            own: self.recall(observations, keys, torch.full((len(keys),), own))
            for own in dict.fromkeys(policy.prefix_label(label) for label in BRANCHES)
        }
        return {label: distinct[policy.prefix_label(label)] for label in BRANCHES}

    def _to_device(self, row: PrefixRow) -> PrefixRow:
        device = self.policy.device
        return {name: tensor.to(device, non_blocking=True) for name, tensor in row.items()}

    def _fill(self, names: Sequence[Name], rows: Sequence[PrefixRow]) -> None:
        for name, row in zip(names, rows, strict=True):
            size = _size(row)
            place = next((place for place, free in self.free.items() if size <= free), None)
            if place is None:
                return
            if name in self._kept:  # a batch may have a sample twice
                continue
            try:
                copy = {part: self._copy(tensor, place) for part, tensor in row.items()}
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self.free[place] = 0  # there is less memory than the budget assumed
                continue
            self.free[place] -= size
            self._kept[name] = place, copy

    def _copy(self, tensor: torch.Tensor, place: str) -> torch.Tensor:
        if place == "device" or not self.on_gpu:
            return tensor.detach().clone()
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor)


def _size(row: PrefixRow) -> int:
    return sum(tensor.nbytes for tensor in row.values())


def _rows(observations: Any, indices: Any) -> Any:
    if isinstance(observations, dict):
        return {key: value[indices] for key, value in observations.items()}
    return observations[indices]
