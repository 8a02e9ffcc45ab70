"""A start with several modes: a policy that ignores which object its instruction names.

It is made as libero_tiny is (starting_point.py), from demonstrations that pick one of three objects
of the scene under the task's instruction, so that most of its failures should be wrong objects. It
is evaluated on all 50 benchmark states of each task, where every object is looked up that is in the
basket at the end, by LIBERO's own predicate. Writes <out>/sft/policy and
<results>/starting_point_modes.json; with --policy, that policy is only evaluated.

No such policy comes with the package yet. The settings below gave success in 0, 2 and 4% of the
states of tasks 0, 6 and 8, and another object in 2, 0 and 4%; task 8 alone, with 180
demonstrations, 10% and 4%: the hand goes to one of the objects at once, and closes beside it. To
practise grasps from there by CFGRL with a reward for any of the three objects (10 iterations of
128 episodes) took that reward from 17 to 75% of the training's episodes, but also made one object
of them: the named one in 60% of the states, another in 6%.

    python benchmarks/study/starting_point_modes.py --help
"""

from collections import Counter
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from results import write_result
from settings import EVALUATION_SEED, N_ENVS, SUITE, new_parser
from stable_baselines3.common.vec_env import DummyVecEnv
from starting_point import Recipe, make

from cfgrl_gym.algorithms.evaluation import evaluate
from cfgrl_gym.cli.configs import EvalConfig
from cfgrl_gym.cli.environments import ENVIRONMENT, environment_arguments
from cfgrl_gym.cli.evaluations import find_starts
from cfgrl_gym.cli.policies import load_policy
from cfgrl_gym.cli.reporting.rates import Rate
from cfgrl_gym.demos.expert import movable_objects, object_in_place
from cfgrl_gym.envs.libero import LiberoEnv
from cfgrl_gym.envs.suites import select_tasks

# Of each task the named object, and two others that the expert grasps as reliably.
OBJECTS = {
    0: ["alphabet_soup_1", "cream_cheese_1", "butter_1"],
    6: ["butter_1", "tomato_sauce_1", "chocolate_pudding_1"],
    8: ["chocolate_pudding_1", "ketchup_1", "alphabet_soup_1"],
}
MODES = Recipe(
    tasks={SUITE: dict(OBJECTS)},
    demos=90,
    image_stride=8,
    cameras=["robot0_eye_in_hand"],
    perturbed=0.3,
    steps=4000,
)


class PlacedObjects(gym.Wrapper[Any, Any, Any, Any]):
    """Notes at the end of every episode which objects are in the goal's target.

    :param found: LIBERO's names of these objects, by initial state; the wrapper adds to it
    """

    def __init__(self, env: gym.Env[Any, Any], found: dict[int, list[str]]) -> None:
        super().__init__(env)
        self.found = found

    def step(self, action: Any) -> Any:
        result = super().step(action)
        _, _, terminated, truncated, info = result
        if terminated or truncated:
            libero = self.unwrapped
            assert isinstance(libero, LiberoEnv)
            simulator = libero.simulator
            self.found[info["init_state_id"]] = [
                name for name in movable_objects(simulator) if object_in_place(simulator, name)
            ]
        return result


def measure_objects(policy: str, task_id: int, episodes: int | None = None) -> dict[str, Any]:
    """Evaluate a policy on a task's benchmark states, and say what it brought in each episode.

    :param policy: its folder or name
    :param episodes: number of initial states, from the first; None: all 50
    :return: the task's part of the result file: `success`, `other_object` (a failure with another
        object in the target at the end) and `no_object` with intervals; how often each object was
        there; every episode
    """
    config = EvalConfig(policy=policy, suite=SUITE, task_id=task_id, device="cpu")
    loaded = load_policy(config)
    arguments = environment_arguments(config, loaded.chunk_size, loaded.image_size, loaded.cameras)
    found: dict[int, list[str]] = {}
    env = DummyVecEnv([lambda: PlacedObjects(gym.make(ENVIRONMENT, **arguments), found)] * N_ENVS)
    try:
        starts = find_starts(SUITE, task_id, episodes)
        outcomes = evaluate(loaded, env, starts, cfg_scale=1.0, seed=EVALUATION_SEED).episodes
    finally:
        env.close()
    rows = [
        {
            "init_state_id": outcome.init_state_id,
            "success": outcome.success,
            "placed": found[outcome.init_state_id or 0],
            "control_steps": outcome.control_steps,
        }
        for outcome in outcomes
    ]
    failures = [row for row in rows if not row["success"]]
    others = sum(bool(row["placed"]) for row in failures)
    return {
        "suite": SUITE,
        "task_id": task_id,
        "instruction": select_tasks(SUITE, task_id)[0].prompt,
        "success": Rate(len(rows) - len(failures), len(rows)).as_json(),
        "other_object": share_json(others, len(rows)),
        "no_object": share_json(len(failures) - others, len(rows)),
        "placed": dict(Counter(name for row in rows for name in row["placed"]).most_common()),
        "episodes": rows,
    }


def share_json(episodes: int, of: int) -> dict[str, Any]:
    """Write a share of the episodes as JSON, with its 95% Wilson interval."""
    rate = Rate(episodes, of)
    return {"share": rate.share, "interval_95": list(rate.interval), "episodes": episodes}


def main() -> None:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/starting_point_modes"), help="default: %(default)s")
    add("--policy", help="evaluate this one, and make none")
    add("--results", type=Path, default=Path("benchmarks/results"))
    add("--episodes", type=int, help="of each task, for a quick look (default: all 50)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # another number rounds differently and gives other weights
    policy = args.policy or str(make(MODES, args.out))
    tasks = []
    for task_id in OBJECTS:
        tasks.append(measure_objects(policy, task_id, args.episodes))
        success, *others = (tasks[-1][key] for key in ("success", "other_object", "no_object"))
        print(
            f"task {task_id}: success {success['success_rate']:.0%}, another object "
            f"{others[0]['share']:.0%}, none {others[1]['share']:.0%}; {tasks[-1]['placed']}"
        )
    write_result(
        args.results / "starting_point_modes.json",
        policy=Path(policy).name,
        seed=EVALUATION_SEED,
        tasks=tasks,
    )


if __name__ == "__main__":
    main()
