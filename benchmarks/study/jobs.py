"""The runs of the study, each in a process of its own, and only those that aren't done yet.

Each is a run folder as `cfgrl train` or `cfgrl eval` leaves it. A folder with a `done` file that
names the same options is complete and isn't run again, another is begun anew.
"""

import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from settings import EVALUATION_SEED, N_ENVS, SUITE
from tqdm import tqdm

from cfgrl_gym.algorithms import CFGRL
from cfgrl_gym.cli import eval, train
from cfgrl_gym.cli.configs import EvalConfig, TrainConfig

DONE_FILE = "done"
TRIES = 3


@dataclass(frozen=True, eq=False)
class Job:
    """One training or one evaluation.

    :param folder: of the run
    :param options: of `cfgrl train` or `cfgrl eval`, where they aren't the command's defaults
    :param algorithm: to train with; None: an evaluation
    :param after: what has to be done before, on the same core
    """

    folder: Path
    options: dict[str, Any]
    algorithm: type[CFGRL] | None = None
    after: "Job | None" = None

    @property
    def identity(self) -> str:
        """What a finished run's `done` file has: how it was made."""
        name = None if self.algorithm is None else self.algorithm.__name__
        return json.dumps({"algorithm": name} | self.options, sort_keys=True)

    @property
    def done(self) -> bool:
        file = self.folder / DONE_FILE
        mine = file.is_file() and file.read_text(encoding="utf-8") == self.identity
        return mine and (self.after is None or self.after.done)


def evaluation(
    policy: Path | str,
    folder: Path,
    task: int,
    scales: Sequence[float],
    after: Job | None = None,
    **changed: Any,
) -> Job:
    """Make a job that evaluates a policy on all 50 states of a task, at each cfg_scale.

    :param policy: its folder, or the run that trained it
    :param folder: for the results
    :param after: the training of that run, if it may have to be done first
    :param changed: options of `cfgrl eval` that the caller wants besides, or otherwise
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
    return Job(folder, options | changed, after=after)


def run_jobs(
    jobs: Sequence[Job], processes: int, finished: Callable[[Job], None] = lambda job: None
) -> None:
    """Run those that aren't done, `processes` at a time, each in a process on one core.

    A run whose process dies (software rendering can end one) is begun again, twice at most.

    :param finished: called with each that is done, as it gets done
    :raises RuntimeError: some failed; the others are done, and a further call takes up from there
    """
    waiting = [job for job in jobs if not job.done]
    spawn = multiprocessing.get_context("spawn")
    cores: Queue[int] = Queue()
    for slot in range(processes):
        cores.put(slot)

    def run_on(core: int, job: Job) -> str:
        if job.after is not None and not job.after.done:
            outcome = run_on(core, job.after)
            if not job.after.done:
                return outcome
        for _ in range(TRIES):
            process = spawn.Process(target=_run, args=(job, core))
            process.start()
            process.join()
            if process.exitcode is not None and process.exitcode >= 0:
                break
        return "done" if job.done else f"failed with exit code {process.exitcode}"

    def run(job: Job) -> str:
        core = cores.get()
        try:
            return run_on(core, job)
        finally:
            cores.put(core)

    failed = []
    with ThreadPoolExecutor(processes) as pool, tqdm(total=len(waiting), desc="study") as bar:
        futures = {pool.submit(run, job): job for job in waiting}
        for future in as_completed(futures):
            job, outcome = futures[future], future.result()
            failed += [] if job.done else [str(job.folder)]
            tqdm.write(f"{job.folder}: {outcome}")
            if job.done:
                finished(job)
            bar.update()
    if failed:
        raise RuntimeError(
            f"{len(failed)} run(s) failed, see their .log files: {', '.join(failed)}"
        )


def _run(job: Job, slot: int) -> None:
    shutil.rmtree(job.folder, ignore_errors=True)  # what an interrupted run left
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    log = job.folder.with_name(f"{job.folder.name}.log")
    with (
        log.open("w", buffering=1) as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        try:
            # Several runs side by side are faster than each on all cores.
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[slot % len(cores)]})
            torch.set_num_threads(1)
            out = str(job.folder)
            if job.algorithm is None:
                eval.run(EvalConfig(**job.options, out=out))
            else:
                train.run(TrainConfig(**job.options, out=out, video=False), job.algorithm)
        except Exception:
            traceback.print_exc()
            sys.exit(1)
    (job.folder / DONE_FILE).write_text(job.identity, encoding="utf-8")
