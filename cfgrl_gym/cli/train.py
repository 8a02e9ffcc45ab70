"""`cfgrl train`: CFGRL on LIBERO."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from stable_baselines3.common.vec_env import VecEnv

from cfgrl_gym.algorithms import CFGRL
from cfgrl_gym.algorithms.flow import NonFiniteError
from cfgrl_gym.algorithms.groups import Start
from cfgrl_gym.algorithms.pi0 import Pi0Policy
from cfgrl_gym.algorithms.saving.checkpoints import CheckpointStore, load_checkpoint
from cfgrl_gym.algorithms.vec_envs.worker import WorkerError
from cfgrl_gym.cli.between_iterations import BetweenIterations, IterationLine
from cfgrl_gym.cli.configs import TrainConfig
from cfgrl_gym.cli.environments import environment_arguments, vec_env
from cfgrl_gym.cli.evaluations import Evaluations, as_list, find_starts
from cfgrl_gym.cli.policies import Checkpoint, find_checkpoint, policy_arguments
from cfgrl_gym.cli.run_folder import (
    CHECKPOINTS_FOLDER,
    MODEL_FILE,
    POLICY_FOLDER,
    VIDEO_FILE,
    choose_folder,
    create_folder,
    locked,
)
from cfgrl_gym.cli.run_logs import cut_logs, open_logs
from cfgrl_gym.cli.stopping import Stopped, StopRequests
from cfgrl_gym.cli.video import record_episode
from cfgrl_gym.envs.suites import select_tasks
from cfgrl_gym.whole_files import whole_folder


def save(model: CFGRL, folder: Path) -> None:
    """Write the policy folder and SB3's model.zip, which needs no other file to be loaded."""
    policy = model.policy
    assert isinstance(policy, Pi0Policy)
    with whole_folder(folder / POLICY_FOLDER) as new:
        policy.save_pretrained(new)
    model.save(folder / MODEL_FILE)


def _model(
    algorithm: type[CFGRL], config: TrainConfig, env: VecEnv, policy_kwargs: dict[str, Any]
) -> CFGRL:
    return algorithm(
        "Pi0Policy",
        env,
        learning_rate=config.learning_rate,
        rloo_batch_size=config.rloo_batch_size,
        groups_per_iteration=config.groups_per_iteration,
        enable_dynamic_sampling=config.enable_dynamic_sampling,
        early_stop_percentage=config.early_stop_percentage,
        max_groups_tried=config.max_groups_tried,
        dropout_prob=config.dropout_prob,
        label_source=config.label_source,
        label_threshold=config.label_threshold,
        negatives=config.negatives,
        positive_share=config.positive_share,
        cfg_scale=config.cfg_scale,
        n_epochs=config.n_epochs,
        batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        max_grad_norm=config.max_grad_norm,
        window_stride=config.window_stride,
        replay_iterations=config.replay_iterations,
        device_memory=config.device_memory,
        prefix_memory=config.prefix_memory,
        policy_kwargs=policy_kwargs,
        seed=config.seed,
        device=config.device,
    )


def _environment_arguments(config: TrainConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    return environment_arguments(
        config,
        chunk_size=checkpoint.horizon,
        image_size=checkpoint.image_size,
        slots=checkpoint.cameras,
    )


@contextmanager
def _evaluations(
    config: TrainConfig, checkpoint: Checkpoint, folder: Path, starts: list[Start], **resumed: Any
) -> Iterator[Evaluations | None]:
    """On the benchmark's states and with its time limit, whatever is trained on.

    :param resumed: what `Evaluations` has to know of an earlier process
    """
    if not starts:
        yield None
        return
    arguments = _environment_arguments(config, checkpoint) | {"max_episode_steps": None}
    scales = as_list(config.eval_cfg_scale)
    with vec_env(arguments, config.n_envs) as env:
        evaluations = Evaluations(folder, config.suite, env, starts, scales, config.seed, **resumed)
        try:
            yield evaluations
        finally:
            evaluations.close()


def _take_up(model: CFGRL, checkpoints: CheckpointStore, folder: Path) -> dict[str, Any]:
    """Bring model and logs to the last checkpoint, or the beginning where there is none."""
    about: dict[str, Any] = {"seconds": 0.0, "log_sizes": {}}
    iterations = checkpoints.iterations()
    if iterations:
        about = load_checkpoint(model, checkpoints.path(iterations[-1]))
    cut_logs(folder, about["log_sizes"])
    print(f"resumed after iteration {model.iteration}")
    return {"seconds": about["seconds"], "done_before": model.iteration}


def run(config: TrainConfig, algorithm: type[CFGRL] = CFGRL) -> Path:
    """Train and save, or go on with a training; returns the run folder.

    :param algorithm: CFGRL, or what is to be compared with it
    :raises ValueError: options that don't fit together, or a checkpoint that is damaged
    :raises FileNotFoundError: no such policy
    :raises FileExistsError: the run folder has something in it, or another process writes there
    :raises Stopped: by Ctrl-C or SIGTERM; the state is saved
    :raises WorkerError: an environment keeps failing; the state is saved
    :raises NonFiniteError: the numbers aren't finite any more; the policy is saved as it was before
    """
    tasks = select_tasks(config.suite, config.task_id)
    evaluated: list[Start] = []
    if config.eval_every is not None:
        evaluated = find_starts(config.suite, config.task_id, config.eval_episodes)
    resume = config.resume is not None
    out = Path(str(config.resume)) if resume else choose_folder("train", config.out)
    checkpoint = find_checkpoint(config.policy, config.preset)
    arguments = _environment_arguments(config, checkpoint)
    arguments["init_states"] = config.init_states
    stride = config.window_stride
    if stride is not None and stride < arguments["chunk_size"]:
        arguments["observation_stride"] = stride
    checkpoints = CheckpointStore(out / CHECKPOINTS_FOLDER, config.keep_checkpoints)
    with ExitStack() as stack:
        if resume:
            stack.enter_context(locked(out))
        env = stack.enter_context(vec_env(arguments, config.n_envs))
        model = _model(algorithm, config, env, policy_arguments(config, checkpoint))
        if not resume:
            create_folder(out, config, algorithm=algorithm.__name__)
            stack.enter_context(locked(out))
        stop = stack.enter_context(StopRequests())
        about = f"chunks of {arguments['chunk_size']} actions, {env.num_envs} environment(s)"
        print(f"{about}, {model.device}; results in {out}")
        resumed = _take_up(model, checkpoints, out) if resume else {}
        model.set_logger(open_logs(out, IterationLine()))
        stack.callback(model.logger.close)
        evaluations = stack.enter_context(
            _evaluations(config, checkpoint, out, evaluated, **resumed)
        )
        between = BetweenIterations(config, out, checkpoints, evaluations, stop)
        _learn(model, config, out, stack.enter_context(between))
    print(f"policy: {out / POLICY_FOLDER}")
    if config.video:
        start = Start(task_id=tasks[0].task_id, init_state_id=0)
        record_episode(
            model.policy, arguments, start, out / VIDEO_FILE, config.cfg_scale, config.seed
        )
    return out


def _learn(model: CFGRL, config: TrainConfig, out: Path, between: BetweenIterations) -> None:
    """To the end, or to a state from which `--resume` goes on."""
    iterations = config.max_iterations
    between.init_callback(model)  # SB3 resets the environments first, and that may fail already
    try:
        model.learn(
            config.total_timesteps - model.num_timesteps,  # SB3 counts on from those that were made
            callback=between,
            max_iterations=None if iterations is None else max(0, iterations - model.iteration),
            reset_num_timesteps=False,
        )
    except (Stopped, WorkerError) as error:
        between.save_checkpoint()
        save(model, out)
        print(f"saved; go on with: cfgrl train --resume {out}", file=sys.stderr)
        raise error
    except NonFiniteError:
        save(model, out)
        raise
    save(model, out)
