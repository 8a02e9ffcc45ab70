"""One rank of a training, as a process of its own: rank_process.py RANK SIZE FOLDER JSON."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cfgrl_envs import QueueEnv, Rows, vec
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger

from cfgrl_gym.algorithms import CFGRL
from cfgrl_gym.algorithms.saving.checkpoints import CheckpointStore, load_checkpoint

STOP_AT = 60  # steps of the environments


class CountWindows(CFGRL):
    counts: list[int]  # of each update, on this rank

    dies_in_update = False

    def train(self) -> None:
        super().train()
        self.counts = [*getattr(self, "counts", ()), len(self.windows)]

    def window_losses(self, *arguments: Any) -> torch.Tensor:
        if self.dies_in_update and self._n_updates:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().window_losses(*arguments)


class Watch(BaseCallback):
    """Says when the training has begun, and stops or fails in the middle of an iteration."""

    def __init__(self, folder: Path, stop: str | None) -> None:
        super().__init__()
        self.folder, self.stop = folder, stop

    def _on_step(self) -> bool:
        (self.folder / "begun").touch()
        if self.stop == "error" and self.num_timesteps >= STOP_AT:
            raise OSError("a fault of the first rank")
        return not (self.stop == "callback" and self.num_timesteps >= STOP_AT)


def main(rank: int, size: int, folder: Path, given: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if size == 1:
        train(rank, folder, given)
        return
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    try:
        train(rank, folder, given)
    finally:
        dist.destroy_process_group()
    # Those that outlive the interpreter sometimes abort: "terminate called without an active
    # exception". They end with the last reference to the group; that of FSDP's, idle since the
    # update, stays in DTensor's caches.
    names = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]
    of_fsdp = 2 if given["options"].get("fsdp") else 0
    assert sum("gloo_runloop" in name for name in names) <= of_fsdp, names


def train(rank: int, folder: Path, given: dict[str, Any]) -> None:
    options = given["options"] | given.get("of_rank", {}).get(str(rank), {})
    if "optimizer" in options:
        kind = getattr(torch.optim, options.pop("optimizer"))
        options["policy_kwargs"] = options["policy_kwargs"] | {"optimizer_class": kind}
    if "pi0" in given:
        from pi0_support import SIZES, PromptEnv  # imports transformers, which takes seconds

        options["policy_kwargs"] = {"sizes": SIZES, "ema_decay": 0.9} | given["pi0"]
        model = CountWindows("Pi0Policy", vec(PromptEnv, 3), device="cpu", **options)
    else:
        model = CountWindows("MlpPolicy", vec(QueueEnv, 3), device="cpu", **options)
    model.dies_in_update = rank == given.get("dies_in_update")
    if "resume" in given:
        store = CheckpointStore(Path(given["resume"]))
        load_checkpoint(model, store.path(store.iterations()[-1]))
    log = Rows()
    model.set_logger(Logger(None, [log]))
    model.learn(
        10**9,
        callback=Watch(folder, given.get("stop")),
        max_iterations=given["iterations"],
        reset_num_timesteps="resume" not in given,
    )
    if "checkpoints" in given:
        CheckpointStore(Path(given["checkpoints"])).save(model)
    state = {"weights": model.policy.state_dict(), "training": model.training_state()}
    optimizer = model.policy.optimizer.state_dict()["state"]
    more = {"logged": log.rows, "windows": model.counts, "optimizer": optimizer}
    torch.save(state | more, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]))
