"""Trainings of the study: which there are, and running those that aren't done yet.

Each is a run folder as `cfgrl train` leaves it, under <study>/<part>/<name>; a folder with a
`done` file is complete and isn't run again, another is begun anew.
"""

import contextlib
import multiprocessing
import os
import shutil
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

from study_settings import EVALUATION_SEED, N_ENVS, SUITE
from tqdm import tqdm

DONE_FILE = "done"
TRIES = 3
ALGORITHMS = ("CFGRL", "FilteredBC", "AdvantageWeighted")


@dataclass(frozen=True)
class Training:
    """One training, then an evaluation of what it gave.

    :param folder: of the run
    :param algorithm: one of `ALGORITHMS`
    :param options: of `cfgrl train`, where they aren't the command's defaults
    :param sweep: values of cfg_scale to evaluate at the end, in the folder `eval`; empty: none
    """

    folder: Path
    algorithm: str
    options: dict[str, Any] = field(default_factory=dict)
    sweep: tuple[float, ...] = ()


@dataclass(frozen=True)
class EvaluationOf:
    """An evaluation of a policy that is there already.

    :param options: of `cfgrl eval`
    """

    folder: Path
    options: dict[str, Any] = field(default_factory=dict)


Job = Training | EvaluationOf


def evaluation_of(
    policy: Path, folder: Path, task: int, scales: Sequence[float], **changed: Any
) -> EvaluationOf:
    """An evaluation of a training's policy on its task, all 50 states, at each cfg_scale.

    :param policy: the training's folder
    :param folder: for the results
    :param changed: what else the caller wants, or changes
    """
    options = {
        "policy": str(policy),
        "suite": SUITE,
        "task_id": task,
        "cfg_scale": list(scales),
        "n_envs": N_ENVS,
        "seed": EVALUATION_SEED,
        "video": False,
    }
    return EvaluationOf(folder, options | changed)


def run_jobs(jobs: Sequence[Job], processes: int) -> None:
    """Run those that aren't done, `processes` at a time, each in a process on one core.

    A run whose process dies (software rendering can end one) is begun again, twice at most.

    :raises RuntimeError: some failed; the others are done, and a further call takes up from there
    """
    waiting = [job for job in jobs if not (job.folder / DONE_FILE).is_file()]
    spawn = multiprocessing.get_context("spawn")
    cores: Queue[int] = Queue()
    for slot in range(processes):
        cores.put(slot)

    def run(job: Job) -> str:
        core = cores.get()
        try:
            for _ in range(TRIES):
                process = spawn.Process(target=_run, args=(job, core))
                process.start()
                process.join()
                if process.exitcode is not None and process.exitcode >= 0:
                    break
            done = (job.folder / DONE_FILE).is_file()
            return "done" if done else f"failed with exit code {process.exitcode}"
        finally:
            cores.put(core)

    failed = []
    with ThreadPoolExecutor(processes) as pool, tqdm(total=len(waiting), desc="study") as bar:
        futures = {pool.submit(run, job): job.folder.name for job in waiting}
        for future in as_completed(futures):
            outcome = future.result()
            failed += [] if outcome == "done" else [futures[future]]
            tqdm.write(f"{futures[future]}: {outcome}")
            bar.update()
    if failed:
        raise RuntimeError(
            f"{len(failed)} run(s) failed, see their .log files: {', '.join(failed)}"
        )


def _run(job: Job, slot: int) -> None:
    shutil.rmtree(job.folder, ignore_errors=True)  # what an interrupted run left
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    log = job.folder.with_suffix(".log")
    with (
        log.open("w", buffering=1) as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        try:
            _one_core(slot)
            _train(job) if isinstance(job, Training) else _evaluate(job)
        except Exception:
            traceback.print_exc()
            sys.exit(1)
    (job.folder / DONE_FILE).touch()


def _train(job: Training) -> None:
    from controls import AdvantageWeighted, FilteredBC

    from cfgrl_gym.algorithms import CFGRL
    from cfgrl_gym.cli import eval, train
    from cfgrl_gym.cli.configs import EvalConfig, TrainConfig

    algorithm = {a.__name__: a for a in (CFGRL, FilteredBC, AdvantageWeighted)}[job.algorithm]
    config = TrainConfig(**job.options, out=str(job.folder), video=False)
    train.run(config, algorithm)
    if job.sweep:
        eval.run(
            EvalConfig(
                policy=str(job.folder),
                suite=config.suite,
                task_id=config.task_id,
                cfg_scale=list(job.sweep),
                n_envs=config.n_envs,
                num_inference_steps=config.num_inference_steps,
                seed=EVALUATION_SEED,
                out=str(job.folder / "eval"),
            )
        )


def _evaluate(job: EvaluationOf) -> None:
    from cfgrl_gym.cli import eval
    from cfgrl_gym.cli.configs import EvalConfig

    eval.run(EvalConfig(**job.options, out=str(job.folder)))


def _one_core(slot: int) -> None:
    """Several runs side by side are faster than each on all cores."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[slot % len(cores)]})
    import torch

    torch.set_num_threads(1)
