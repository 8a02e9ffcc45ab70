"""What the study's runs have in common: the policy they start from, tasks, budget, seeds."""

import argparse
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Budget:
    """How much each training of the study gets.

    :param iterations: of collection and update
    :param groups: of K = 8 episodes, each iteration
    """

    iterations: int = 4
    groups: int = 8


@dataclass(frozen=True)
class Study:
    """Where a study's runs and results go, and how large it is.

    :param folder: of the runs
    :param results: of the JSON and the pictures
    :param jobs: runs at the same time
    :param main_task: the task with several seeds and all ablations
    :param other_tasks: with one seed each
    :param seeds: of the main task
    :param small: one task and one seed, for a first look
    :param cells: of the ablations; empty: all
    """

    folder: Path
    results: Path
    jobs: int
    main_task: int
    other_tasks: tuple[int, ...]
    seeds: tuple[int, ...]
    budget: Budget
    small: bool
    cells: tuple[str, ...]


def training_options(
    task: int, seed: int, budget: Budget, *, cfg_scale: float, **changed: Any
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
        "max_iterations": budget.iterations,
        "groups_per_iteration": budget.groups,
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


def parse_study(description: str | None) -> Study:
    """The command line that all parts of the study share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--study", type=Path, help="runs (default: runs/study; --small: runs/study_small)")
    results = "JSON and pictures (default: benchmarks/results; --small: the folder small in it)"
    add("--results", type=Path, help=results)
    add("--jobs", type=int, default=2, help="runs at the same time (default: %(default)s)")
    add("--task_id", type=int, default=MAIN_TASK, help="the task with several seeds")
    add("--other_tasks", type=int, nargs="*", default=list(OTHER_TASKS), help="with one seed")
    add("--seeds", type=int, default=3, help="of the main task (default: %(default)s)")
    add("--iterations", type=int, default=Budget.iterations, help="of each training")
    add("--groups", type=int, default=Budget.groups, help="of 8 episodes, each iteration")
    add("--small", action="store_true", help="one task, one seed, 2 iterations of 8 groups")
    add("--cells", nargs="*", default=[], help="of the ablations, only these, such as K=2")
    given = parser.parse_args()
    if given.small:
        given.seeds, given.other_tasks, given.iterations, given.groups = 1, [], 2, 8
    # Trainings of a small study have the whole one's names, and must not be taken for them.
    return Study(
        folder=given.study or Path("runs/study_small" if given.small else "runs/study"),
        results=given.results or Path("benchmarks/results", "small" if given.small else ""),
        jobs=given.jobs,
        main_task=given.task_id,
        other_tasks=tuple(given.other_tasks),
        seeds=tuple(range(given.seeds)),
        budget=Budget(given.iterations, given.groups),
        small=given.small,
        cells=tuple(given.cells),
    )
