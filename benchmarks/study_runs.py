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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from study_settings import EVALUATION_SEED
from tqdm import tqdm

DONE_FILE = "done"
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


def run_jobs(jobs: Sequence[Job], processes: int) -> None:
    """Run those that aren't done, `processes` at a time, each on one core.

    :raises RuntimeError: some failed; the others are done, and a further call takes up from there
    """
    waiting = [job for job in jobs if not (job.folder / DONE_FILE).is_file()]
    if not waiting:
        return
    context = multiprocessing.get_context("spawn")
    failed = []
    # One job a process: what a run leaves in memory ends with it.
    with context.Pool(processes, maxtasksperchild=1) as pool:
        done = pool.imap_unordered(_run, waiting)
        for name, error in tqdm(done, "study", len(waiting), unit="run"):
            tqdm.write(f"{name}: {error or 'done'}")
            failed += [name] if error else []
    if failed:
        raise RuntimeError(
            f"{len(failed)} run(s) failed, see their .log files: {', '.join(failed)}"
        )


def _run(job: Job) -> tuple[str, str | None]:
    shutil.rmtree(job.folder, ignore_errors=True)  # what an interrupted run left
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    log = job.folder.with_suffix(".log")
    with (
        log.open("w", buffering=1) as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        try:
            _train(job) if isinstance(job, Training) else _evaluate(job)
        except Exception as error:
            traceback.print_exc()
            return job.folder.name, repr(error)
    (job.folder / DONE_FILE).touch()
    return job.folder.name, None


def _train(job: Training) -> None:
    _one_core()
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
    _one_core()
    from cfgrl_gym.cli import eval
    from cfgrl_gym.cli.configs import EvalConfig

    eval.run(EvalConfig(**job.options, out=str(job.folder)))


def _one_core() -> None:
    """Several runs side by side are faster than each on all cores."""
    os.environ["LP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(Path(__file__).parent))
    import torch

    torch.set_num_threads(1)
