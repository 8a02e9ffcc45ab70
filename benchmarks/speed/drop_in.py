"""`cfgrl_gym.envs.OffScreenRenderEnv` beside LIBERO's own, in the loop of LIBERO's evaluation.

Both environments are in one process, in turns: reset, `set_init_state`, then control steps of which
the program reads both images, and control steps of which it reads none. LIBERO renders in either
case. Rates are LIBERO's time to the drop-in's, of the medians over all rounds.

    python benchmarks/speed/drop_in.py   # about 8 minutes on 2 idle cores
"""

from functools import partial
from itertools import product
from statistics import median
from typing import Any

import numpy as np
from timing_common import arguments, random_actions, seconds, write_timing

from cfgrl_gym.envs import OffScreenRenderEnv
from cfgrl_gym.envs.installation import import_libero
from cfgrl_gym.envs.simulator import IMAGE_KEYS
from cfgrl_gym.envs.suites import load_init_states, select_tasks

TASKS = (
    *(("libero_spatial", 0), ("libero_object", 0), ("libero_goal", 0)),
    *(("libero_10", 0), ("libero_90", 0)),
)
SIZES = (128, 256)  # LIBERO's default, and what openpi's evaluation renders
STEPS = 10  # of each kind in a round


def measure(suite: str, task_id: int, rounds: int, size: int) -> dict[str, Any]:
    """Time both on one task; the first round of each warms up and isn't counted."""
    (task,) = select_tasks(suite, task_id)
    states = load_init_states(suite, task_id)
    kinds = {
        "libero": import_libero("envs.env_wrapper").OffScreenRenderEnv,
        "drop_in": OffScreenRenderEnv,
    }
    settings = {"camera_heights": size, "camera_widths": size}
    envs = {
        name: kind(bddl_file_name=str(task.bddl_file), **settings) for name, kind in kinds.items()
    }
    spent: dict[str, dict[str, list[float]]] = {}
    actions = random_actions(2 * STEPS, seed=0)
    for number in range(rounds + 1):
        for name, env in envs.items():
            of_round: dict[str, list[float]] = {"reset": [], "read": [], "unread": []}
            env.seed(7)
            of_round["reset"].append(seconds(env.reset))
            env.set_init_state(states[number % len(states)])
            for action in actions[:STEPS]:

                def read(env: Any = env, action: np.ndarray = action) -> None:
                    observation = env.step(action)[0]
                    for image in IMAGE_KEYS:
                        np.asarray(observation[image])

                of_round["read"].append(seconds(read))
            for action in actions[STEPS:]:
                of_round["unread"].append(seconds(partial(env.step, action)))
            if number:
                for what, times in of_round.items():
                    spent.setdefault(what, {}).setdefault(name, []).extend(times)
    for env in envs.values():
        env.close()
    medians = {what: {name: median(t) for name, t in of.items()} for what, of in spent.items()}
    ratios = {what: of["libero"] / of["drop_in"] for what, of in medians.items()}
    return {
        "suite": suite,
        "task_id": task_id,
        "size": size,
        "ratios": ratios,
        "median_seconds": medians,
        "seconds": spent,
    }


def main() -> None:
    parser = arguments(__doc__, "drop_in.json")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="of images %(default)s")
    args = parser.parse_args()
    tasks = []
    for size, (suite, task_id) in product(args.sizes, TASKS):
        tasks.append(measure(suite, task_id, args.rounds, size))
        ratios = "  ".join(f"{what} {ratio:.1f}" for what, ratio in tasks[-1]["ratios"].items())
        print(f"{suite} {task_id}, {size} px: {ratios}", flush=True)
    write_timing(args.out, rounds=args.rounds, tasks=tasks)


if __name__ == "__main__":
    main()
