"""What the study's runs have in common: the policy they start from, tasks, budget, seeds."""

import argparse
from pathlib import Path
from typing import Any

START = "libero_tiny"
SUITE = "libero_object"
MAIN_TASK = 8
OTHER_TASKS = (0, 6)
# Benchmark states that trainings start from; evaluations are on all 50, and the other half of them
# no training has seen.
TRAINING_STATES = tuple(range(25))
NOISE_SEEDS = (1000, 1001, 1002, 1003)  # of evaluations; trainings have the small ones
EVALUATION_SEED = NOISE_SEEDS[0]
N_ENVS = 8
ITERATIONS, GROUPS = 4, 8  # of each training, and of K = 8 episodes in each iteration


def training_options(
    task: int, seed: int, iterations: int, groups: int, *, cfg_scale: float, **changed: Any
) -> dict[str, Any]:
    """Options of `cfgrl train` for one training of the study.

    :param cfg_scale: guidance while collecting
    :param changed: what else the caller wants, or changes
    """
    return {
        "policy": START,
        "suite": SUITE,
        "task_id": task,
        "init_states": list(TRAINING_STATES),
        "max_episode_steps": 160,  # a success takes about 110; evaluations have LIBERO's 280
        "n_envs": N_ENVS,
        "total_timesteps": 10**9,
        "max_iterations": iterations,
        "groups_per_iteration": groups,
        "enable_dynamic_sampling": False,  # so that each run has as many episodes
        "trainable": "expert",
        "learning_rate": 5e-4,
        "ema_decay": 0.98,
        "n_epochs": 12,
        "replay_iterations": 2,
        "positive_share": 0.9,
        "cfg_scale": cfg_scale,
        "seed": seed,
        **changed,
    }


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """Make a command line whose help shows a script's docstring as it is."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def parse_study(description: str | None) -> argparse.Namespace:
    """Parse the command line that all parts of the study share.

    :return: where runs and results go, and how large the study is; `seeds` as a range
    """
    parser = new_parser(description)
    add = parser.add_argument
    folder = "runs (default: runs/study; --small: runs/study_small)"
    add("--study", dest="folder", metavar="FOLDER", type=Path, help=folder)
    results = "JSON and pictures (default: benchmarks/results; --small: the folder small in it)"
    add("--results", type=Path, help=results)
    add("--jobs", type=int, default=2, help="runs at the same time (default: %(default)s)")
    task = "with several seeds and all ablations (default: %(default)s)"
    add("--task_id", dest="main_task", metavar="TASK", type=int, default=MAIN_TASK, help=task)
    add("--other_tasks", type=int, nargs="*", default=list(OTHER_TASKS), help="with one seed")
    add("--seeds", type=int, default=3, help="of the main task (default: %(default)s)")
    add("--iterations", type=int, default=ITERATIONS, help="of each training")
    add("--groups", type=int, default=GROUPS, help="of 8 episodes, each iteration")
    add("--small", action="store_true", help="one task, one seed, 2 iterations of 8 groups")
    add("--cells", nargs="*", default=[], help="of the ablations, only these, such as K=2")
    study = parser.parse_args()
    if study.small:
        study.seeds, study.other_tasks, study.iterations, study.groups = 1, [], 2, 8
    study.seeds = range(study.seeds)
    # Trainings of a small study have the whole one's names, and must not be taken for them.
    study.folder = study.folder or Path("runs/study_small" if study.small else "runs/study")
    study.results = study.results or Path("benchmarks/results", "small" if study.small else "")
    return study
