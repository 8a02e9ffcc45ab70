"""Evaluates a policy on the benchmark's initial states, also during training, and makes videos."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter
from types import MappingProxyType
from typing import Any

import gymnasium as gym
import imageio
import numpy as np
from stable_baselines3.common.logger import Logger, make_output_format
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from cfgrl_gym.algorithms import CFGRL
from cfgrl_gym.algorithms.distributed.ranks import ALONE, Ranks
from cfgrl_gym.algorithms.evaluation import EpisodeOutcome, evaluate
from cfgrl_gym.algorithms.groups import Start
from cfgrl_gym.algorithms.policies import FlowPolicy
from cfgrl_gym.cli.configs import TrainConfig
from cfgrl_gym.cli.environments import ENVIRONMENT
from cfgrl_gym.cli.reporting.rates import Rate
from cfgrl_gym.cli.run_folder import EVALUATIONS_FILE
from cfgrl_gym.cli.run_logs import progress_bar
from cfgrl_gym.envs.suites import load_init_states, select_tasks
from cfgrl_gym.whole_files import whole_file


def find_starts(
    suite: str, task_id: Any, episodes: int | None, init_states: list[int] | None = None
) -> list[Start]:
    """List the starts of all episodes to run, task by task.

    :param episodes: number of initial states of each task, from the first; None: all
    :param init_states: exactly these states instead
    :raises ValueError: tasks or initial states don't exist
    """
    starts = []
    for task in select_tasks(suite, task_id):
        count = len(load_init_states(suite, task.task_id))
        first = range(count if episodes is None else episodes)
        for state in first if init_states is None else init_states:
            if not 0 <= state < count:
                raise ValueError(
                    f"{suite} task {task.task_id} has the initial states 0 to {count - 1}; "
                    f"{state} was asked for: ask for fewer episodes or other states"
                )
            starts.append(Start(task_id=task.task_id, init_state_id=state))
    return starts


def as_list(given: float | list[float] | None) -> list[float]:
    """Return an option's one or several values as a list, empty for None."""
    if given is None:
        return []
    return [float(value) for value in (given if isinstance(given, list) else [given])]


def measure(
    policy: FlowPolicy,
    env: VecEnv,
    starts: Sequence[Start],
    scale: float,
    seed: int,
    check: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
    on_outcome: Callable[[int, EpisodeOutcome], None] = lambda index, outcome: None,
    known: Mapping[int, EpisodeOutcome] = MappingProxyType({}),
) -> dict[str, Any]:
    """Evaluate one cfg_scale, with a progress bar, and return its part of the result files.

    :param check: called after every episode; it may end the evaluation by an exception
    :param ranks: the processes that share the starts; the first one shows the bar of its part
    :param on_outcome: and `known`: see `evaluate`
    """
    own = ranks.part(len(starts))
    done = [known[index].success for index in own if index in known]
    with progress_bar(
        f"cfg_scale {scale:g}", len(own), "episode", shown=ranks.first, initial=len(done)
    ) as bar:

        def count(index: int, outcome: EpisodeOutcome) -> None:
            on_outcome(index, outcome)
            done.append(outcome.success)
            bar.set_postfix(success=f"{sum(done)}/{len(done)}", refresh=False)
            bar.update()
            check()

        evaluation = evaluate(
            policy,
            env,
            starts,
            cfg_scale=scale,
            seed=seed,
            on_outcome=count,
            known=known,
            ranks=ranks,
        )
    by_task: dict[int, list[bool]] = {}
    for episode in evaluation.episodes:
        assert episode.task_id is not None
        by_task.setdefault(episode.task_id, []).append(episode.success)
    return {
        "cfg_scale": scale,
        **Rate(evaluation.successes, len(evaluation.episodes)).as_json(),
        "guidance_gap": evaluation.guidance_gap,
        "tasks": {str(t): Rate(sum(done), len(done)).as_json() for t, done in by_task.items()},
        "episodes": [asdict(episode) for episode in evaluation.episodes],
    }


class Evaluations:
    """Evaluates a policy during its training, and writes evaluations.json and TensorBoard events.

    :param folder: the run's folder
    :param env: environments with the benchmark's settings
    :param seconds: training time before this process, if it resumes an earlier run
    :param done_before: iteration from which the run resumes; the file's evaluations of earlier
        iterations are kept, those of this and later ones dropped
    :param ranks: the processes that share the starts; the first one writes
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        env: VecEnv,
        starts: Sequence[Start],
        seconds: float = 0.0,
        done_before: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.file = folder / EVALUATIONS_FILE
        self.config = config
        self.env = env
        self.starts = starts
        self._began = perf_counter() - seconds
        self._seconds_here = 0.0
        self.done: list[dict[str, Any]] = []
        if done_before and self.file.is_file():
            earlier = json.loads(self.file.read_text(encoding="utf-8"))["evaluations"]
            self.done = [e for e in earlier if e["iteration"] < done_before]
        outputs = [make_output_format("tensorboard", str(folder))] if ranks.first else []
        self.logger = Logger(str(folder), outputs)

    @property
    def training_seconds(self) -> float:
        """Return the seconds of training so far, without the evaluations."""
        return perf_counter() - self._began - self._seconds_here

    def run(self, model: CFGRL, iteration: int, check: Callable[[], None]) -> float:
        """Evaluate, unless this iteration was evaluated already, and return the success rate of the
        best cfg_scale.

        :param check: called after every episode; it may end the evaluation by an exception
        """
        if not self.done or self.done[-1]["iteration"] != iteration:
            began, seconds = perf_counter(), self.training_seconds
            training = model.policy.training
            scales = as_list(self.config.eval_cfg_scale) or [model.policy.cfg_scale]
            seed = self.config.seed  # the same noise each time
            given = model.policy, self.env, self.starts
            results = [measure(*given, w, seed, check, self.ranks) for w in scales]
            model.policy.set_training_mode(training)
            self._seconds_here += perf_counter() - began
            self.done.append(
                {
                    "iteration": iteration,
                    "episodes": model.statistics.num_episodes,
                    "timesteps": model.num_timesteps,
                    "control_steps": model.statistics.num_control_steps,
                    "seconds": seconds,
                    "results": results,
                }
            )
            if self.ranks.first:
                content = {"suite": self.config.suite, "evaluations": self.done}
                with whole_file(self.file) as new:
                    new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            for result in results:
                for name in ("success_rate", "guidance_gap"):
                    self.logger.record(f"eval/{name}/w_{result['cfg_scale']:g}", result[name])
            self.logger.dump(model.num_timesteps)
        return max(float(result["success_rate"]) for result in self.done[-1]["results"])


class _KeepFrames(gym.Wrapper[Any, Any, Any, Any]):
    """Collects the frames of the first episode before the vectorized environment resets it."""

    def __init__(self, env: gym.Env[Any, Any], frames: list[np.ndarray]) -> None:
        super().__init__(env)
        self.frames = frames
        self.over = False

    def step(self, action: Any) -> Any:
        result = super().step(action)
        if not self.over:
            self.frames += self.env.render()  # type: ignore[arg-type]  # since the last call
        self.over = self.over or result[2] or result[3]
        return result


def record_episode(
    policy: FlowPolicy,
    arguments: dict[str, Any],
    start: Start,
    path: Path,
    cfg_scale: float | None,
    seed: int,
) -> bool:
    """Run one episode as `evaluate` does, and write it as a video.

    :param arguments: arguments of `LiberoChunked-v0`
    :param path: path of the video, ending in .mp4
    :return: whether it succeeded
    """
    frames: list[np.ndarray] = []
    arguments = arguments | {"render_mode": "rgb_array_list"}
    make = partial(gym.make, ENVIRONMENT, **arguments)
    env = DummyVecEnv([lambda: _KeepFrames(make(), frames)])
    try:
        evaluation = evaluate(policy, env, [start], cfg_scale=cfg_scale, seed=seed)
    finally:
        env.close()
    imageio.mimwrite(path, frames, fps=20)  # type: ignore[arg-type]
    print(f"video: {path}")
    return evaluation.episodes[0].success
