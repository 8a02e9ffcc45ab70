"""CFGRL against its controls where no method was tuned: a bandit, Pendulum and FetchReach.

Every method starts from the same policy (`small_tasks.py`), runs as many episodes and makes as many
optimizer steps. CFGRL has its defaults, but without dynamic sampling, which would change the number
of episodes. At the end each policy is evaluated on held-out starts, the same for all.

Writes <results>/other_envs.json after each training. A training that is in the file already, with
the same options, isn't run again, so that a stopped run goes on and more seeds can be added later.

    python benchmarks/study/other_envs.py --help
"""

import argparse
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from methods import METHODS, Method
from results import is_there, read_rows, write_result
from settings import new_parser
from small_tasks import NET_ARCH, TASKS, make_envs, starting_policy
from tqdm import tqdm

from cfgrl_gym.algorithms import MlpPolicy
from cfgrl_gym.algorithms.evaluation import Evaluation, evaluate, wilson_interval
from cfgrl_gym.algorithms.groups import Start
from cfgrl_gym.algorithms.policies import FlowPolicy

PART = "other_envs"
GROUP_SIZE = 8  # K, CFGRL's default
SMALL_SHARE = 5  # a small study evaluates on as many starts divided by this
EVALUATION_SEED = 1000
TRAINING, HELD_OUT = 0, 1000  # numbers of the first environment

# Methods that differ from CFGRL on LIBERO only: `midway` needs snapshots.
ELSEWHERE = {name: method for name, method in METHODS.items() if name != "midway"}


def options_of(task: str, method: Method) -> dict[str, Any]:
    """Return the options of a method's trainings on a task, in JSON's types."""
    return {
        "rloo_batch_size": GROUP_SIZE,
        "groups_per_iteration": TASKS[task].groups,
        "enable_dynamic_sampling": False,
        "policy_kwargs": {"net_arch": list(NET_ARCH), **method.policy_options},
        **method.options,
    }


def evaluation_json(evaluation: Evaluation, cfg_scale: float) -> dict[str, Any]:
    """Write an evaluation as JSON."""
    returns = [episode.episode_return for episode in evaluation.episodes]
    return {
        "cfg_scale": cfg_scale,
        "successes": evaluation.successes,
        "n_episodes": len(returns),
        "mean_return": round(float(np.mean(returns)), 4),
        "guidance_gap": round(evaluation.guidance_gap, 5),
    }


def evaluated(name: str, policy: FlowPolicy, cfg_scale: float, count: int) -> dict[str, Any]:
    """Evaluate a policy on so many held-out starts of a task: reset seeds 0, 1, 2, ..."""
    starts = [Start(seed=seed) for seed in range(count)]
    envs = make_envs(name, HELD_OUT)
    return evaluation_json(
        evaluate(policy, envs, starts, cfg_scale=cfg_scale, seed=EVALUATION_SEED), cfg_scale
    )


@cache
def start_of(name: str, seed: int, count: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the weights that a seed's trainings start from, and their evaluation at w = 0."""
    envs = make_envs(name)
    policy = MlpPolicy(
        envs.observation_space, envs.action_space, lambda _: 0.0, net_arch=list(NET_ARCH)
    )
    weights = starting_policy(name, seed)
    policy.load_state_dict(weights)
    return weights, evaluated(name, policy, 0.0, count)


def run(cell: Mapping[str, Any], method: Method) -> dict[str, Any]:
    """Train and evaluate one method on one task with one seed."""
    name, seed, count = cell["task"], cell["seed"], cell["evaluations"]
    weights, before = start_of(name, seed, count)
    began = perf_counter()
    model = method.algorithm(
        "MlpPolicy",
        make_envs(name, TRAINING + 100 * seed),
        stats_window_size=GROUP_SIZE * TASKS[name].groups,  # the episodes of one iteration
        seed=seed,
        device="cpu",
        **cell["options"],
    )
    model.policy.load_state_dict(weights)
    iterations = []
    for _ in range(cell["n_iterations"]):
        model.learn(1, reset_num_timesteps=False, max_iterations=1)
        iterations.append(
            {
                "episodes": model.statistics.num_episodes,
                "optimizer_steps": model._n_updates,
                "success_rate": float(np.mean(model.ep_success_buffer or np.nan)),
                "mean_return": float(np.mean([info["r"] for info in model.ep_info_buffer or ()])),
            }
        )
    seconds = perf_counter() - began
    after = [evaluated(name, model.policy, w, count) for w in cell["scales"]]
    outcome = {"iterations": iterations, "before": before, "after": after}
    return {**cell, **outcome, "seconds_training": round(seconds, 1)}


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pool the seeds of each task, method and cfg_scale."""
    pooled: dict[tuple[Any, ...], list[tuple[int, dict[str, Any]]]] = {}
    for row in runs:
        cell = (row["task"], row["n_iterations"])
        pooled.setdefault((*cell, "start", 0.0), []).append((row["seed"], row["before"]))
        for result in row["after"]:
            key = (*cell, row["method"], result["cfg_scale"])
            pooled.setdefault(key, []).append((row["seed"], result))
    rows = []
    for (task, iterations, method, cfg_scale), results in pooled.items():
        of_seeds = dict(results)  # the start is the same for every method
        counts = [(r["successes"], r["n_episodes"]) for r in of_seeds.values()]
        successes, episodes = (sum(column) for column in zip(*counts, strict=True))
        rows.append(
            {
                "task": task,
                "iterations": iterations,
                "method": method,
                "cfg_scale": cfg_scale,
                "seeds": sorted(of_seeds),
                "success_rate": successes / episodes,
                "interval": wilson_interval(successes, episodes),
                "success_rate_of_seeds": [s / n for s, n in counts],
                "mean_return": float(np.mean([r["mean_return"] for r in of_seeds.values()])),
            }
        )
    return rows


def parse() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    folder = "for the JSON (default: benchmarks/results; --small: the folder small in it)"
    add("--results", type=Path, help=folder)
    add("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS), help="only these")
    add("--methods", nargs="*", default=list(ELSEWHERE), choices=list(ELSEWHERE), help="only these")
    add("--seeds", type=int, default=3, help="trainings of each method (default: %(default)s)")
    add("--iterations", type=int, default=4, help="of each training (default: %(default)s)")
    add("--small", action="store_true", help="one seed and one iteration: under five minutes")
    study = parser.parse_args()
    if study.small:
        study.seeds, study.iterations = 1, 1
    study.results = study.results or Path("benchmarks/results", "small" if study.small else "")
    return study


def main() -> None:
    study = parse()
    torch.set_num_threads(1)
    path = study.results / f"{PART}.json"
    runs = read_rows(path, "runs")
    cells = [
        {
            "task": task,
            "method": method,
            "seed": seed,
            "n_iterations": study.iterations,
            "options": options_of(task, METHODS[method]),
            "scales": list(METHODS[method].scales),
            "evaluations": TASKS[task].evaluations // (SMALL_SHARE if study.small else 1),
        }
        for seed in range(study.seeds)
        for task in study.tasks
        for method in study.methods
    ]
    waiting = [cell for cell in cells if not is_there(cell, runs)]
    with tqdm(waiting, desc="trainings") as bar:
        for cell in bar:
            bar.set_postfix_str(f"{cell['task']}, {cell['method']}, seed {cell['seed']}")
            runs.append(run(cell, METHODS[cell["method"]]))
            write_result(path, summary=summary(runs), runs=runs)
    for row in summary(runs):
        low, high = row["interval"]
        print(
            f"{row['task']:<9}{row['method']:<29}w = {row['cfg_scale']:g}  "
            f"success {row['success_rate']:.0%} ({low:.0%} to {high:.0%}), "
            f"return {row['mean_return']:.2f}, {len(row['seeds'])} seeds"
        )


if __name__ == "__main__":
    main()
