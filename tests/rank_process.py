"""One rank of a training, as a process of its own: python rank_process.py RANK SIZE FOLDER JSON."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cfgrl_envs import QueueEnv, vec

from cfgrl_gym.algorithms import CFGRL


def main(rank: int, size: int, folder: Path, given: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if size > 1:
        store = f"file://{folder / 'store'}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    options = given["options"] | given.get("of_rank", {}).get(str(rank), {})
    env = vec(QueueEnv, given.get("n_envs", 3))
    model = CFGRL("MlpPolicy", env, device="cpu", **options)
    model.learn(10**9, max_iterations=given["iterations"])
    state = {"weights": model.policy.state_dict(), "training": model.training_state()}
    state["logged"] = dict(model.logger.name_to_value)
    torch.save(state, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]))
