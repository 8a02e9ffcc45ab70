"""Updates a copy of a model in a thread, beside the collection of the next episodes."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from time import perf_counter
from typing import TypeVar

import torch
from stable_baselines3.common.logger import Logger

from cfgrl_gym.algorithms.distributed.ranks import Ranks
from cfgrl_gym.algorithms.saving.model_zip import PickleFreeSaving
from cfgrl_gym.algorithms.windows import WindowBatch

SelfUpdates = TypeVar("SelfUpdates", bound="UpdatesBeside")


class UpdatesBeside(PickleFreeSaving):
    """Serves as the part of CFGRL that updates a policy while it acts.

    What acts, is saved and is seen by callbacks is the model, as it was before the update. What
    trains is a copy of it, which shares the weights that don't train.

    :ivar untrained: whether `windows` wait for their update
    """

    iteration: int
    windows: WindowBatch | None
    ranks: Ranks
    untrained: bool

    def train(self) -> None:
        """Update the policy by `windows`."""
        raise NotImplementedError

    def copy_to_train(self: SelfUpdates) -> SelfUpdates:
        """Copy the model for one update: its policy, with the optimizer; all else is shared."""
        trainer = copy(self)
        trainer.policy = self.policy.copy_to_train()
        trainer.set_logger(Logger(None, []))
        trainer.iteration -= 1  # the one that collected the windows
        return trainer

    @contextmanager
    def update_beside(self) -> Iterator[Callable[[], None]]:
        """Update by the windows that wait, if any do, beside what the block does.

        The block has to call what it is given once it needs no time beside the update: that waits
        for its end. After the block the model takes the update over. If the block or the update
        raises, the model is left as it was, with the windows waiting.
        """
        if not self.untrained:
            yield lambda: None
            return
        waiting = self.windows
        trainer = self.copy_to_train()
        before = dict(vars(trainer))
        times = {"time/seconds_waiting": 0.0}
        with ThreadPoolExecutor(1, "update") as thread:  # whose exit waits for the update
            update = thread.submit(_train, trainer, self.policy.device)

            def wait() -> None:
                began = perf_counter()
                update.result()
                times["time/seconds_waiting"] = perf_counter() - began

            try:
                yield wait
                update.result()
            except BaseException:
                self.windows, self.untrained = waiting, True
                raise
        changed = {n: v for n, v in vars(trainer).items() if v is not before.get(n)}
        changed.pop("windows", None)  # the update's; the block has left the next one's
        vars(self).update(changed)
        self.policy.take_over(trainer.policy)
        for name, value in (trainer.logger.name_to_value | times).items():
            self.logger.record(name, value, trainer.logger.name_to_excluded.get(name))


def _train(trainer: UpdatesBeside, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # each thread has its own
    trainer.train()
