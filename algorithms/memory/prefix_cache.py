"""Keeping the prefixes that were computed to act until the update has used them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from cfgrl_gym.algorithms.memory.device import GIB
from cfgrl_gym.algorithms.memory.out_of_memory import is_out_of_memory
from cfgrl_gym.algorithms.policies import FlowPolicy, PrefixRow


class KeptPrefix:
    """Room for the prefix of one sample, which may be empty. What it held is given back to the
    budget when it is emptied or nobody refers to it any more."""

    def __init__(self) -> None:
        self.row: PrefixRow | None = None
        self._give_back: Callable[[], None] = lambda: None

    def hold(self, row: PrefixRow, give_back: Callable[[], None]) -> None:
        self.row, self._give_back = row, give_back

    def clear(self) -> None:
        self.row, give_back = None, self._give_back
        self._give_back = lambda: None
        give_back()

    __del__ = clear


class PrefixMemory:
    """A budget for the prefixes of samples: on the policy's device first, then in the host's memory
    (pinned, where the device is a GPU). A sample that finds no room has its prefix computed again
    each time it is used.

    :param policy: whose prefixes these are; nothing is kept unless its `frozen_prefix` says that
        training leaves them as they are
    :param device_bytes: room on a GPU
    :param host_bytes: room in the host's memory
    """

    def __init__(self, policy: FlowPolicy, device_bytes: int, host_bytes: int) -> None:
        self.policy = policy
        self.on_gpu = policy.device.type != "cpu"
        self.free = {"device": device_bytes if self.on_gpu else 0, "host": host_bytes}

    def __str__(self) -> str:
        if not self.policy.frozen_prefix:
            return "no prefixes are kept, because the vision-language model trains"
        return " and ".join(
            f"{free / GIB:.2f} GiB for prefixes in the {place}'s memory"
            for place, free in self.free.items()
            if place == "host" or self.on_gpu
        )

    def keep(self, prefix: Any, batch: int) -> list[KeptPrefix]:
        """Copy the prefix's first `batch` samples, one by one, as far as there is room."""
        slots = [KeptPrefix() for _ in range(batch)]
        if self.policy.frozen_prefix:
            self._fill(slots, self.policy.split_prefix(prefix)[:batch])
        return slots

    @torch.no_grad()
    def recall(self, observations: Any, slots: Sequence[KeptPrefix]) -> Any:
        """The prefix of a batch: what was kept, and the rest computed (and kept, if there is room).

        :param observations: batched, as the environment gives them; rows as `slots`
        :return: None for a policy whose prefix is not frozen: its loss computes it with gradients
        """
        policy = self.policy
        if not policy.frozen_prefix:
            return None
        rows = [slot.row for slot in slots]
        missing = [i for i, row in enumerate(rows) if row is None]
        if missing:
            inputs = policy.encode_observation(_rows(observations, missing))
            with policy.autocast():
                prefix = policy.encode_prefix(inputs)
            if len(missing) == len(rows):
                self._fill(slots, policy.split_prefix(prefix))
                return prefix
            computed = policy.split_prefix(prefix)
            self._fill([slots[i] for i in missing], computed)
            for i, row in zip(missing, computed, strict=True):
                rows[i] = row
        return policy.join_prefix([self._to_device(row) for row in rows if row is not None])

    def _to_device(self, row: PrefixRow) -> PrefixRow:
        device = self.policy.device
        return {name: tensor.to(device, non_blocking=True) for name, tensor in row.items()}

    def _fill(self, slots: Sequence[KeptPrefix], rows: Sequence[PrefixRow]) -> None:
        for slot, row in zip(slots, rows, strict=True):
            size = sum(tensor.nbytes for tensor in row.values())
            place = next((place for place, free in self.free.items() if size <= free), None)
            if place is None:
                return
            try:
                copy = {name: self._copy(tensor, place) for name, tensor in row.items()}
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self.free[place] = 0  # the budget promised more than there is
                continue
            self.free[place] -= size
            slot.hold(copy, lambda place=place, size=size: self._give_back(place, size))  # type: ignore[misc]

    def _copy(self, tensor: torch.Tensor, place: str) -> torch.Tensor:
        if place == "device" or not self.on_gpu:
            return tensor.detach().clone()
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor)

    def _give_back(self, place: str, size: int) -> None:
        self.free[place] += size


def _rows(observations: Any, indices: Any) -> Any:
    if isinstance(observations, dict):
        return {key: value[indices] for key, value in observations.items()}
    return observations[indices]
