"""Computes the metrics of an iteration, under SB3's names."""

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence

import torch
from stable_baselines3.common.utils import safe_mean
from torch import Tensor

from cfgrl_gym.algorithms.collector import Collector, Outcome
from cfgrl_gym.algorithms.distributed.ranks import Ranks
from cfgrl_gym.algorithms.flow import NULL, POSITIVE, NonFiniteError
from cfgrl_gym.algorithms.windows import WindowBatch


class EpisodeStatistics:
    """Counts the episodes of all finished iterations, and keeps each task's recent successes.

    :param window: number of a task's recent episodes that its success rate is computed from
    :param recent: successes of each task so far, the latest last
    :param groups: groups of each task so far; of an environment without tasks, under None
    """

    def __init__(
        self,
        window: int,
        recent: Mapping[str, Sequence[bool]] | None = None,
        groups: Iterable[tuple[int | None, int]] = (),
    ) -> None:
        self.window = window
        self.groups = Counter(dict(groups))
        self.num_episodes = 0
        self.num_control_steps = 0
        self.recent = {int(t): deque(done, window) for t, done in (recent or {}).items()}

    def add(self, episodes: Sequence[Outcome]) -> None:
        """Count the episodes, and record the success of those that have a task and report it, but
        not of those that began midway."""
        self.num_episodes += len(episodes)
        self.num_control_steps += sum(episode.control_steps for episode in episodes)
        groups = {e.place[0]: e.task_id for e in episodes if not e.midway}
        self.groups.update(groups.values())
        for episode in episodes:
            task = episode.task_id
            if task is not None and episode.success is not None and not episode.midway:
                self.recent.setdefault(task, deque(maxlen=self.window)).append(episode.success)

    def metrics(self) -> dict[str, float]:
        """Return the counts and each task's success rate, under the names they are logged with."""
        counts = {"episodes": self.num_episodes, "control_steps": self.num_control_steps}
        rates = {f"success_rate/task_{task}": safe_mean(done) for task, done in self.recent.items()}
        return {f"rollout/{name}": value for name, value in (counts | rates).items()}

    def successes(self) -> dict[str, list[bool]]:
        """Return the recent successes in JSON's types, as the constructor takes them (`recent`)."""
        return {str(task): list(done) for task, done in self.recent.items()}


def rollout_metrics(
    ranks: Ranks,
    episodes: Sequence[Outcome],
    collector: Collector,
    midway: Collector | None,
    windows: WindowBatch | None,
) -> dict[str, float]:
    """Return the groups, labels (before condition dropout) and speed of one collection.

    :param ranks: that collected; times are averages over them, which work side by side
    :param episodes: those of all ranks
    :param midway: the collection of the groups that continued from the middle of episodes
    """
    selection = collector.selection
    both = [collector] if midway is None else [collector, midway]
    names = ("episodes_lost", "control_steps", "seconds_simulation", "seconds_inference")
    own = [sum(getattr(each, name) for each in both) for name in names]
    lost, control_steps, *seconds = map(sum, zip(*ranks.gather(own), strict=True))
    simulation, inference = (spent / ranks.size for spent in seconds)
    metrics: dict[str, float] = {
        "rollout/groups_kept": len(selection.kept),
        "rollout/groups_discarded": len(selection.discarded),
        "rollout/iteration_success_rate": sum(e.succeeded for e in episodes) / len(episodes),
        "rollout/unstable_episodes": sum(e.unstable for e in episodes),
        "rollout/episodes_lost": lost,
        "time/control_steps_per_second": control_steps / (simulation + inference),
        "time/seconds_simulation": simulation,
        "time/seconds_inference": inference,
    }
    if midway is not None:
        metrics["rollout/midway_groups"] = len(midway.plan.groups)
        metrics["rollout/midway_groups_kept"] = len(midway.selection.kept)
    if windows is not None:
        labels = torch.cat(ranks.gather(windows.labels))
        metrics["rollout/positive_share"] = (labels == POSITIVE).float().mean().item()
        metrics["rollout/null_share"] = (labels == NULL).float().mean().item()
        if windows.value_data is not None:
            returns, values = windows.value_data["returns"], windows.value_data["values"]
            metrics["rollout/value_error"] = (values - returns).square().mean().sqrt().item()
            # The error of the mean return, which knows nothing of an observation.
            metrics["rollout/return_spread"] = returns.std(correction=0).item()
    return metrics


MAX_SKIPPED_STEPS = 10  # in a row: too many to be outliers


class UpdateMetrics:
    """Averages metrics over one update; a sample counts each time it is used."""

    def __init__(self, skipped_in_a_row: int = 0) -> None:
        self.skipped_steps = 0
        self.skipped_in_a_row = skipped_in_a_row  # up to now, across updates
        self.losses: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.dropped: list[Tensor] = []
        self.grad_norms: list[float] = []

    def is_sound(self, losses: Tensor, grad_norm: Tensor) -> bool:
        """Return whether loss and gradient are finite; count the step as skipped if they aren't.

        :raises NonFiniteError: too many steps in a row were skipped
        """
        if bool(losses.isfinite().all()) and bool(grad_norm.isfinite()):
            self.skipped_in_a_row = 0
            return True
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == MAX_SKIPPED_STEPS:
            raise NonFiniteError(
                f"{MAX_SKIPPED_STEPS} optimizer steps in a row had a loss or a gradient that isn't "
                f"finite (the last: loss {losses.float().mean().item()}, gradient norm "
                f"{grad_norm.item()}). None of them changed the weights. Try a lower "
                "learning_rate, and look for observations or actions that aren't finite"
            )
        return False

    def add(self, losses: Tensor, grad_norm: Tensor, labels: Tensor, dropped: Tensor) -> None:
        """Add one optimizer step: losses (batch,), norm of their mean's gradient, and labels before
        and after condition dropout, int64 (batch,)."""
        self.losses.append(losses.float().cpu())
        self.grad_norms.append(grad_norm.item())
        self.labels.append(labels)
        self.dropped.append(dropped)

    def summary(self) -> dict[str, float]:
        """Return the loss in total and by branch, the number of conditions and of dropped ones, the
        gradient norm and the number of skipped steps; only the last if all steps were skipped."""
        if not self.losses:
            return {"train/skipped_steps": self.skipped_steps}
        loss, labels, dropped = map(torch.cat, (self.losses, self.labels, self.dropped))
        metrics = {
            "train/loss": loss.mean().item(),
            "train/skipped_steps": self.skipped_steps,
            "train/grad_norm": sum(self.grad_norms) / len(self.grad_norms),
        }
        for name, label in (("positive", POSITIVE), ("null", NULL)):
            if (dropped == label).any():
                metrics[f"train/loss_{name}"] = loss[dropped == label].mean().item()
        conditioned = labels != NULL
        if conditioned.any():
            count = conditioned.sum().item()
            became_null = (dropped == NULL)[conditioned].sum().item()
            metrics["train/conditioned_count"] = count
            metrics["train/dropout_count"] = became_null
            metrics["train/dropout_rate"] = became_null / count
        return metrics
