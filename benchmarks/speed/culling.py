"""What leaving unseen meshes out of the images (`culling.py`) gains of a chunk.

One process, chunks of 50 control steps with both images at their end, in turns with and without
culling: the same actions from the same start.

    python benchmarks/speed/culling.py    # about five minutes
"""

from contextlib import closing, nullcontext
from statistics import median
from typing import Any
from unittest.mock import patch

import gymnasium as gym
import numpy as np
from timing_common import CHUNK, IMAGE_SIZE, arguments, random_actions, seconds, write_timing
from tqdm import tqdm

from cfgrl_gym.envs.culling import Culler

# libero_goal has a mirror in its stove, the bowls and plates of libero_spatial are large meshes.
TASKS = (("libero_object", 0), ("libero_goal", 0), ("libero_10", 0), ("libero_spatial", 0))


def measure(suite: str, task_id: int, pairs: int) -> dict[str, Any]:
    """Time chunks and their images with and without culling, in pairs."""
    found: dict[str, list[dict[str, float]]] = {"culled": [], "whole": []}
    images: dict[str, Any] = {}
    with closing(
        gym.make(
            "cfgrl_gym:LiberoChunked-v0",
            suite=suite,
            task_id=task_id,
            image_size=IMAGE_SIZE,
            max_episode_steps=10 * CHUNK,
        )
    ) as env:

        def chunk(actions: np.ndarray) -> dict[str, float]:
            env.reset(options={"init_state_id": 0})
            spent = seconds(lambda: images.update(env.step(actions)[0]))
            return {"chunk_s": spent, "images_s": seconds(env.unwrapped.simulator.images)}

        for pair in range(-1, pairs):  # the first one makes models and contexts
            actions = random_actions(CHUNK, pair + 1).astype(np.float32)
            whole: dict[str, Any] = {}
            for kind in ("culled", "whole") if pair % 2 else ("whole", "culled"):
                everything = patch.object(Culler, "culled", lambda *_: nullcontext())
                with everything if kind == "whole" else nullcontext():
                    values = chunk(actions)
                if whole:
                    assert all(np.array_equal(whole[key], images[key]) for key in whole)
                whole = dict(images)
                if pair >= 0:
                    found[kind].append(values)
    row: dict[str, Any] = {"suite": suite, "task_id": task_id}
    for value in ("chunk_s", "images_s"):
        culled, drawn = (np.array([one[value] for one in found[kind]]) for kind in found)
        row[value] = {
            "culled": median(culled),
            "whole": median(drawn),
            "gain": 1 - median(culled) / median(drawn),
            "gain_of_pairs": median(1 - culled / drawn),
        }
    return row | {"repetitions": found}


def main() -> None:
    parser = arguments(__doc__, "culling.json")
    parser.add_argument("--pairs", type=int, default=20, help="of chunks, a task (%(default)s)")
    args = parser.parse_args()
    rows = [measure(suite, task, args.pairs) for suite, task in tqdm(TASKS, unit="task")]
    write_timing(args.out, image_size=IMAGE_SIZE, chunk=CHUNK, tasks=rows)
    for row in rows:
        chunk, images = row["chunk_s"], row["images_s"]
        print(
            f"{row['suite']:>14} {row['task_id']}: chunk {chunk['whole']:.3f} s, culled "
            f"{chunk['culled']:.3f} s: {chunk['gain']:.1%} less (pair by pair "
            f"{chunk['gain_of_pairs']:.1%}); images {images['gain']:.1%} less"
        )


if __name__ == "__main__":
    main()
