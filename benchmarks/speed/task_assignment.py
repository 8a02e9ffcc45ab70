"""How often tasks are built, and how long episodes take, where environments keep their tasks.

The same episodes of libero_tiny over all tasks of libero_object, twice in turns: with environments
that say which tasks they have built (`LiberoEnv.built_tasks`), so that each goes on with its own,
and with the same ones where that is hidden, so that episodes run in the order of the plan. The
outcomes must be equal.

    python benchmarks/speed/task_assignment.py    # about ten minutes on 2 cores
"""

import functools
from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from timing_common import arguments, seconds, write_timing

from cfgrl_gym import WorkerVecEnv
from cfgrl_gym.algorithms.evaluation import Evaluation, evaluate
from cfgrl_gym.algorithms.groups import Randomness
from cfgrl_gym.algorithms.start_schedule import StartSchedule
from cfgrl_gym.cli.configs import EvalConfig
from cfgrl_gym.cli.environments import ENVIRONMENT, environment_arguments
from cfgrl_gym.cli.policies import load_policy
from cfgrl_gym.envs.libero import LiberoEnv

KEPT, HIDDEN = "kept", "in the plan's order"


class CountBuilds(gym.Wrapper[Any, Any, Any, Any]):
    """Counts the resets to a task that its environment hasn't built."""

    builds = 0

    def reset(self, **kwargs: Any) -> Any:
        libero = self.unwrapped
        assert isinstance(libero, LiberoEnv)
        before = libero.built_tasks
        result = super().reset(**kwargs)
        self.builds += result[1]["task_id"] not in before
        return result


class Hidden(VecEnvWrapper):
    """Doesn't say which tasks are built."""

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        return self.venv.step_wait()

    def has_attr(self, attr_name: str) -> bool:
        return attr_name != "built_tasks" and self.venv.has_attr(attr_name)


def make(options: dict[str, Any]) -> gym.Env:
    return CountBuilds(gym.make(ENVIRONMENT, **options))


def main() -> None:
    parser = arguments(__doc__, "task_assignment.json")
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of starts and noise (%(default)s)")
    add("--n_envs", type=int, default=4, help="(%(default)s)")
    add("--groups", type=int, default=20, help="starts, two of each task (%(default)s)")
    add("--group_size", type=int, default=4, help="episodes of each start (%(default)s)")
    add("--steps", type=int, default=112, help="of an episode at most (%(default)s)")
    add("--rounds", type=int, default=2, help="of each kind (%(default)s)")
    args = parser.parse_args()
    config = EvalConfig(policy="libero_tiny", task_id="all", device="cpu", n_envs=args.n_envs)
    policy = load_policy(config)
    options = environment_arguments(config, policy.chunk_size, policy.image_size, policy.cameras)
    options["max_episode_steps"] = args.steps
    runs: list[dict[str, Any]] = []
    outcomes: list[Evaluation] = []
    for number in range(args.rounds):
        for kind in (KEPT, HIDDEN) if number % 2 == 0 else (HIDDEN, KEPT):
            env: VecEnv = WorkerVecEnv([functools.partial(make, options)] * args.n_envs)
            env = Hidden(env) if kind == HIDDEN else env
            states = {
                task: env.env_method("init_state_ids", task, indices=[0])[0] for task in range(10)
            }
            groups = StartSchedule(Randomness(args.seed), states).draw(args.groups, {})
            starts = [group.start for group in groups for _ in range(args.group_size)]

            def run(env: VecEnv = env, starts: list[Any] = starts) -> None:
                outcomes.append(evaluate(policy, env, starts, cfg_scale=1.0, seed=args.seed))

            spent = seconds(run)
            runs.append({"kind": kind, "seconds": spent, "builds": sum(env.get_attr("builds"))})
            env.close()
            print(runs[-1], flush=True)
    equal = all(outcome == outcomes[0] for outcome in outcomes)
    mean = {
        kind: sum(run["seconds"] for run in runs if run["kind"] == kind) / args.rounds
        for kind in (KEPT, HIDDEN)
    }
    print(f"equal: {equal}; seconds {mean}, ratio {mean[HIDDEN] / mean[KEPT]:.2f}")
    write_timing(
        args.out,
        settings=vars(args) | {"out": None},
        equal=equal,
        runs=runs,
        ratio=mean[HIDDEN] / mean[KEPT],
    )


if __name__ == "__main__":
    main()
