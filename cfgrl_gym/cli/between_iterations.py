"""What `cfgrl train` does beside learning: progress, evaluations, checkpoints, an orderly end."""

from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from cfgrl_gym.algorithms import CFGRL
from cfgrl_gym.algorithms.saving.checkpoints import CheckpointStore
from cfgrl_gym.cli.configs import TrainConfig
from cfgrl_gym.cli.evaluations import Evaluations
from cfgrl_gym.cli.run_logs import log_sizes, progress_bar
from cfgrl_gym.cli.stopping import StopRequests


class BetweenIterations(BaseCallback):
    """Saves and evaluates between iterations, shows the progress, and looks whether to stop.

    :param folder: of the run
    :param checkpoints: where to save
    :param evaluations: None: there are none
    :param stop: looked at after every step of the environments
    """

    model: CFGRL

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        checkpoints: CheckpointStore,
        evaluations: Evaluations | None,
        stop: StopRequests,
    ) -> None:
        super().__init__()
        # Where iterations are counted, nobody knows how many steps they will take.
        total = None if config.max_iterations else config.total_timesteps
        self.bar = progress_bar("train", total, "step")
        self.config = config
        self.folder = folder
        self.checkpoints = checkpoints
        self.evaluations = evaluations
        self.stop = stop
        self._timesteps_before = 0  # this iteration

    def save_checkpoint(self) -> None:
        """Unless this iteration's is there already.

        In the middle of a collection it is the state before it.
        """
        iteration = self.model.iteration
        if iteration in self.checkpoints.iterations():
            return
        self.model.num_timesteps = self._timesteps_before
        loggers = [self.model.logger]
        about: dict[str, Any] = {"seconds": 0.0}
        if self.evaluations is not None:
            loggers.append(self.evaluations.logger)
            about["seconds"] = self.evaluations.training_seconds
        about["log_sizes"] = log_sizes(self.folder, loggers)
        self.checkpoints.save(self.model, about)

    def _on_training_start(self) -> None:
        self._timesteps_before = self.num_timesteps

    def _on_rollout_start(self) -> None:
        config, iteration = self.config, self.model.iteration
        self._timesteps_before = self.num_timesteps
        if iteration and config.save_every and iteration % config.save_every == 0:
            self.save_checkpoint()
        if config.eval_every and iteration % config.eval_every == 0:
            self._evaluate()
        if config.max_iterations:
            self.bar.set_description(f"iteration {iteration + 1} of {config.max_iterations}")

    def _on_step(self) -> bool:
        self.bar.update(self.num_timesteps - self.bar.n)
        self.stop.check()
        return True

    def _on_rollout_end(self) -> None:
        recent = self.model.ep_success_buffer
        if recent:
            self.bar.set_postfix(success=f"{sum(recent) / len(recent):.2f}", refresh=False)
        if self.evaluations is None:  # then the collection says how good the policy was
            rate = self.logger.name_to_value["rollout/iteration_success_rate"]
            self.checkpoints.rate(self.model.iteration, rate)

    def _on_training_end(self) -> None:
        self._timesteps_before = self.num_timesteps
        self.save_checkpoint()
        self._evaluate()

    def _evaluate(self) -> None:
        if self.evaluations is not None:
            rate = self.evaluations.run(self.model, self.model.iteration, self.stop.check)
            self.checkpoints.rate(self.model.iteration, rate)
