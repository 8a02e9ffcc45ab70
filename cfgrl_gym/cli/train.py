"""Train a policy that succeeds some of the time by classifier-free guidance (CFGRL).

Writes <out>/policy, <out>/model.zip (Stable-Baselines3), metrics, TensorBoard events and a video.

example:
  cfgrl train --policy runs/sft --task_id 0 --n_envs 8 --total_timesteps 20000
  torchrun --nproc-per-node 2 -m cfgrl_gym train --policy runs/sft --task_id 0 --n_envs 8
"""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from cfgrl_gym.algorithms import CFGRL
from cfgrl_gym.algorithms.distributed.ranks import RankError, RankLostError, Ranks
from cfgrl_gym.algorithms.flow import NonFiniteError
from cfgrl_gym.algorithms.groups import Start
from cfgrl_gym.algorithms.pi0 import Pi0Policy
from cfgrl_gym.algorithms.saving.checkpoints import CheckpointStore, load_checkpoint
from cfgrl_gym.algorithms.vec_envs.requests import WorkerError
from cfgrl_gym.cli.configs import TrainConfig
from cfgrl_gym.cli.environments import environment_arguments, vec_env
from cfgrl_gym.cli.evaluations import Evaluations, find_starts, record_episode
from cfgrl_gym.cli.launch import process_group
from cfgrl_gym.cli.policies import find_checkpoint, policy_arguments
from cfgrl_gym.cli.run_folder import (
    CHECKPOINTS_FOLDER,
    MODEL_FILE,
    POLICY_FOLDER,
    VIDEO_FILE,
    choose_folder,
    create_folder,
    locked,
)
from cfgrl_gym.cli.run_logs import IterationLine, cut_logs, log_sizes, open_logs, progress_bar
from cfgrl_gym.cli.stopping import Stopped, StopRequests
from cfgrl_gym.envs.suites import select_tasks
from cfgrl_gym.whole_files import whole_folder


def save(model: CFGRL, folder: Path) -> None:
    """Write the policy folder and SB3's model.zip, which needs no other file to be loaded."""
    if not model.ranks.first:
        return
    policy = model.policy
    assert isinstance(policy, Pi0Policy)
    with whole_folder(folder / POLICY_FOLDER) as new:
        policy.save_pretrained(new)
    model.save(folder / MODEL_FILE)


class BetweenIterations(BaseCallback):
    """Saves and evaluates between iterations, shows the progress, and checks for stop requests.

    :param folder: the run's folder
    :param checkpoints: the store that checkpoints are saved to
    :param evaluations: evaluations to run; None: no evaluations
    :param stop: stop requests, checked after every step of the environments
    :param ranks: that share the training; the first one writes
    """

    model: CFGRL
    on_every_rank = True  # an evaluation is shared, and a checkpoint has what all ranks have

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        checkpoints: CheckpointStore,
        evaluations: Evaluations | None,
        stop: StopRequests,
        ranks: Ranks,
    ) -> None:
        super().__init__()
        # If the run is limited by iterations, the number of steps isn't known in advance.
        total = None if config.max_iterations else config.total_timesteps
        self.bar = progress_bar("train", total, "step", shown=ranks.first)
        self.ranks = ranks
        self.config = config
        self.folder = folder
        self.checkpoints = checkpoints
        self.evaluations = evaluations
        self.stop = stop
        self._timesteps_before = 0  # environment steps before this iteration

    def save_checkpoint(self) -> None:
        """Save this iteration's checkpoint, unless there is one.

        During a collection, the state saved is the one before the collection.
        """
        iteration = self.model.iteration
        there = iteration in self.checkpoints.iterations()
        if self.ranks.gather(there)[0]:  # as the first rank sees it, which writes them
            return
        self.model.num_timesteps = self._timesteps_before
        loggers = [self.model.logger]
        about: dict[str, Any] = {"seconds": 0.0}
        if self.evaluations is not None:
            loggers.append(self.evaluations.logger)
            about["seconds"] = self.evaluations.training_seconds
        if self.ranks.first:
            about["log_sizes"] = log_sizes(self.folder, loggers)
        self.checkpoints.save(self.model, about)

    def _on_training_start(self) -> None:
        self._timesteps_before = self.model.num_timesteps

    def _on_rollout_start(self) -> None:
        config, iteration = self.config, self.model.iteration
        self._timesteps_before = self.model.num_timesteps
        if iteration and config.save_every and iteration % config.save_every == 0:
            self.save_checkpoint()
        if config.eval_every and iteration % config.eval_every == 0:
            self._evaluate()
        if config.max_iterations:
            self.bar.set_description(f"iteration {iteration + 1} of {config.max_iterations}")

    def _on_step(self) -> bool:
        self.bar.update(self.model.num_timesteps - self.bar.n)
        self.stop.check()
        return True

    def _on_rollout_end(self) -> None:
        recent = self.model.ep_success_buffer
        if recent:
            self.bar.set_postfix(success=f"{sum(recent) / len(recent):.2f}", refresh=False)
        if (
            self.evaluations is None and self.ranks.first
        ):  # then the policy is rated by the collection's success
            rate = self.logger.name_to_value["rollout/iteration_success_rate"]
            self.checkpoints.rate(self.model.iteration, rate)

    def _on_training_end(self) -> None:
        self._timesteps_before = self.model.num_timesteps
        self.save_checkpoint()
        self._evaluate()

    def _evaluate(self) -> None:
        if self.evaluations is not None:
            rate = self.evaluations.run(self.model, self.model.iteration, self.stop.check)
            if self.ranks.first:
                self.checkpoints.rate(self.model.iteration, rate)


def _take_up(model: CFGRL, checkpoints: CheckpointStore, folder: Path) -> dict[str, Any]:
    """Restore model and logs to the last checkpoint, or to the beginning if there is none.

    :return: arguments of `Evaluations` that depend on the earlier process
    """
    about: dict[str, Any] = {"seconds": 0.0, "log_sizes": {}}
    iterations = checkpoints.iterations()
    if iterations:
        about = load_checkpoint(model, checkpoints.path(iterations[-1]))
    if model.ranks.first:
        cut_logs(folder, about["log_sizes"])
        print(f"resumed after iteration {model.iteration}")
    return {"seconds": about["seconds"], "done_before": model.iteration}


def run(config: TrainConfig, algorithm: type[CFGRL] = CFGRL) -> Path:
    """Train and save, or resume a training, and return the run folder.

    :param algorithm: CFGRL, or an algorithm to compare with it
    :raises ValueError: options don't fit together, or a checkpoint is damaged
    :raises FileNotFoundError: there is no such policy
    :raises FileExistsError: the run folder isn't empty, or another process writes there
    :raises Stopped: Ctrl-C or SIGTERM ended the run; the state is saved
    :raises WorkerError: an environment keeps failing; the state is saved
    :raises RankError: another rank was stopped or failed; the state is saved
    :raises RankLostError: another rank is gone; the last checkpoint is intact
    :raises NonFiniteError: losses or gradients aren't finite; the policy from before is saved
    """
    tasks = select_tasks(config.suite, config.task_id)
    evaluated: list[Start] = []
    if config.eval_every is not None:
        evaluated = find_starts(config.suite, config.task_id, config.eval_episodes)
    resume = config.resume is not None
    with ExitStack() as stack:
        ranks = stack.enter_context(process_group())
        with ranks.together():
            out = Path(str(config.resume)) if resume else choose_folder("train", config.out)
        out = ranks.gather(out)[0]
        checkpoint = find_checkpoint(config.policy, config.preset)
        arguments = environment_arguments(
            config, checkpoint.horizon, checkpoint.image_size, checkpoint.cameras
        )
        stride = config.window_stride
        inside = stride is not None and stride < arguments["chunk_size"]
        observed = {"observation_stride": stride if inside else None}
        checkpoints = CheckpointStore(out / CHECKPOINTS_FOLDER, config.keep_checkpoints)
        stop = stack.enter_context(StopRequests())
        if resume and ranks.first:
            stack.enter_context(locked(out))
        env = stack.enter_context(vec_env(arguments | observed, config))
        model = algorithm(
            "Pi0Policy",
            env,
            learning_rate=config.learning_rate,
            policy_kwargs=policy_arguments(config, checkpoint),
            seed=config.seed,
            device=config.device,
            **config.arguments_of(CFGRL),
        )
        with ranks.together():
            if not resume and ranks.first:
                create_folder(out, config, algorithm=algorithm.__name__)
                stack.enter_context(locked(out))
            stop.defer()
            resumed = _take_up(model, checkpoints, out) if resume else {}
        if ranks.first:
            shared = f" on each of {ranks.size} ranks" if ranks.size > 1 else ""
            about = f"chunks of {arguments['chunk_size']} actions, {env.num_envs} environment(s)"
            print(f"{about}{shared}, {model.device}; results in {out}")
            model.set_logger(open_logs(out, IterationLine()))
            stack.callback(model.logger.close)
        evaluations = None
        if evaluated:  # with the benchmark's states and time limit, whatever those of the training
            benchmark = {"init_states": "benchmark", "max_episode_steps": None}
            other = stack.enter_context(vec_env(arguments | benchmark, config))
            evaluations = Evaluations(out, config, other, evaluated, **resumed, ranks=ranks)
            stack.callback(evaluations.logger.close)
        between = BetweenIterations(config, out, checkpoints, evaluations, stop, ranks)
        stack.callback(between.bar.close)
        _learn(model, config, out, between)
    if ranks.first:
        print(f"policy: {out / POLICY_FOLDER}")
    if config.video and ranks.first:
        start = Start(task_id=tasks[0].task_id, init_state_id=0)
        record_episode(
            model.policy, arguments, start, out / VIDEO_FILE, config.cfg_scale, config.seed
        )
    return out


def _learn(model: CFGRL, config: TrainConfig, out: Path, between: BetweenIterations) -> None:
    """Learn to the end, or save a state from which `--resume` goes on."""
    iterations = config.max_iterations
    try:
        model.learn(
            config.total_timesteps - model.num_timesteps,  # SB3 adds those made before
            callback=between,
            max_iterations=None if iterations is None else max(0, iterations - model.iteration),
            reset_num_timesteps=False,
        )
    except RankLostError:
        if model.ranks.first:
            print(f"go on with: cfgrl train --resume {out}", file=sys.stderr)
        raise
    except (Stopped, WorkerError, RankError) as error:
        between.save_checkpoint()
        save(model, out)
        if model.ranks.first:
            print(f"saved; go on with: cfgrl train --resume {out}", file=sys.stderr)
        raise error
    except NonFiniteError:
        save(model, out)
        raise
    save(model, out)
