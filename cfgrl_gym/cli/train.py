"""`cfgrl train`: CFGRL on LIBERO."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger, make_output_format
from stable_baselines3.common.vec_env import VecEnv
from tqdm import tqdm

from cfgrl_gym.algorithms import CFGRL
from cfgrl_gym.algorithms.groups import Start
from cfgrl_gym.algorithms.pi0 import Pi0Policy
from cfgrl_gym.cli.configs import TrainConfig
from cfgrl_gym.cli.environments import environment_arguments, vec_env
from cfgrl_gym.cli.evaluations import Evaluations, as_list, find_starts
from cfgrl_gym.cli.policies import (
    Checkpoint,
    find_checkpoint,
    policy_arguments,
    saving_when_stopped,
)
from cfgrl_gym.cli.progress import progress_bar
from cfgrl_gym.cli.run_folder import (
    MODEL_FILE,
    POLICY_FOLDER,
    VIDEO_FILE,
    choose_folder,
    create_folder,
    replace_folder,
)
from cfgrl_gym.cli.video import record_episode
from cfgrl_gym.envs.suites import select_tasks

# What is worth a line on the terminal; the files have all of it.
_LINE = {
    "success": "rollout/success_rate",
    "kept": "rollout/groups_kept",
    "discarded": "rollout/groups_discarded",
    "loss": "train/loss",
    "gap": "train/guidance_gap",
}


class _IterationLine(KVWriter):
    """A line for every iteration, above the progress bar."""

    def write(
        self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0
    ) -> None:
        shown = [f"{n} {key_values[key]:.4g}" for n, key in _LINE.items() if key in key_values]
        tqdm.write(f"step {step}: " + ", ".join(shown))

    def close(self) -> None:
        """Nothing is held."""


class _Progress(BaseCallback):
    """Progress bar with the success rate; saves and evaluates between iterations."""

    def __init__(self, config: TrainConfig, folder: Path, evaluations: Evaluations | None) -> None:
        super().__init__()
        # Where iterations are counted, nobody knows how many steps they will take.
        total = None if config.max_iterations else config.total_timesteps
        self.bar = progress_bar("train", total, "step")
        self.config = config
        self.folder = folder
        self.evaluations = evaluations
        self.iteration = 0

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def _on_rollout_start(self) -> None:
        save_every, eval_every = self.config.save_every, self.config.eval_every
        if save_every and self.iteration and self.iteration % save_every == 0:
            save(self.model, self.folder)  # type: ignore[arg-type]
        if eval_every and self.iteration % eval_every == 0:
            self._evaluate()
        self.iteration += 1
        if self.config.max_iterations:
            self.bar.set_description(f"iteration {self.iteration} of {self.config.max_iterations}")

    def _on_training_end(self) -> None:
        self._evaluate()

    def _evaluate(self) -> None:
        if self.evaluations is not None:
            self.evaluations.run(self.model, self.iteration)  # type: ignore[arg-type]

    def _on_step(self) -> bool:
        self.bar.update(self.num_timesteps - self.bar.n)
        return True

    def _on_rollout_end(self) -> None:
        recent = self.model.ep_success_buffer
        if recent:
            self.bar.set_postfix(success=f"{sum(recent) / len(recent):.2f}", refresh=False)


def save(model: CFGRL, folder: Path) -> None:
    """Write the policy folder and SB3's model.zip, which needs no other file to be loaded."""
    policy = model.policy
    assert isinstance(policy, Pi0Policy)
    replace_folder(folder / POLICY_FOLDER, policy.save_pretrained)
    new = folder / f".new-{MODEL_FILE}"
    model.save(new)
    new.replace(folder / MODEL_FILE)


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


@contextmanager
def _evaluations(
    config: TrainConfig, checkpoint: Checkpoint, folder: Path, starts: list[Start]
) -> Iterator[Evaluations | None]:
    """On the benchmark's states and with its time limit, whatever is trained on."""
    if not starts:
        yield None
        return
    arguments = _environment_arguments(config, checkpoint) | {"max_episode_steps": None}
    with vec_env(arguments, config.n_envs) as env:
        evaluations = Evaluations(
            folder, config.suite, env, starts, as_list(config.eval_cfg_scale), config.seed
        )
        try:
            yield evaluations
        finally:
            evaluations.close()


def _environment_arguments(config: TrainConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    return environment_arguments(
        config,
        chunk_size=checkpoint.horizon,
        image_size=checkpoint.image_size,
        slots=checkpoint.cameras,
    )


def run(config: TrainConfig, algorithm: type[CFGRL] = CFGRL) -> Path:
    """Train and save; returns the run folder.

    :param algorithm: CFGRL, or what is to be compared with it
    :raises ValueError: options that don't fit together
    :raises FileNotFoundError: no such policy
    :raises FileExistsError: the run folder has something in it
    """
    tasks = select_tasks(config.suite, config.task_id)
    evaluated: list[Start] = []
    if config.eval_every is not None:
        evaluated = find_starts(config.suite, config.task_id, config.eval_episodes)
    out = choose_folder("train", config.out)
    checkpoint = find_checkpoint(config.policy, config.preset)
    arguments = _environment_arguments(config, checkpoint)
    arguments["init_states"] = config.init_states
    stride = config.window_stride
    if stride is not None and stride < arguments["chunk_size"]:
        arguments["observation_stride"] = stride
    with vec_env(arguments, config.n_envs) as env:
        model = _model(algorithm, config, env, policy_arguments(config, checkpoint))
        create_folder(out, config, algorithm=algorithm.__name__)
        about = f"chunks of {arguments['chunk_size']} actions, {env.num_envs} environment(s)"
        print(f"{about}, {model.device}; results in {out}")
        formats = [make_output_format(name, str(out)) for name in ("csv", "json", "tensorboard")]
        model.set_logger(Logger(str(out), [*formats, _IterationLine()]))
        with (
            _evaluations(config, checkpoint, out, evaluated) as evaluations,
            _Progress(config, out, evaluations) as progress,
            saving_when_stopped(lambda: save(model, out)),
        ):
            model.learn(
                config.total_timesteps, callback=progress, max_iterations=config.max_iterations
            )
        model.logger.close()
        save(model, out)
    print(f"policy: {out / POLICY_FOLDER}")
    if config.video:
        start = Start(task_id=tasks[0].task_id, init_state_id=0)
        record_episode(
            model.policy, arguments, start, out / VIDEO_FILE, config.cfg_scale, config.seed
        )
    return out
