"""What an iteration reports, under SB3's names."""

import torch
from torch import Tensor

from cfgrl_gym.algorithms.collector import Collector
from cfgrl_gym.algorithms.flow import NULL, POSITIVE
from cfgrl_gym.algorithms.groups import Selection
from cfgrl_gym.algorithms.windows import WindowBatch


def rollout_metrics(
    collector: Collector, selection: Selection, windows: WindowBatch | None
) -> dict[str, float]:
    """Groups, labels (before condition dropout) and speed of one collection."""
    metrics: dict[str, float] = {
        "rollout/groups_kept": len(selection.kept),
        "rollout/groups_discarded": len(selection.discarded),
        "rollout/iteration_success_rate": sum(e.succeeded for e in collector.finished)
        / len(collector.finished),
        "rollout/unstable_episodes": sum(e.unstable for e in collector.finished),
        "time/control_steps_per_second": collector.control_steps
        / (collector.seconds_simulation + collector.seconds_inference),
        "time/seconds_simulation": collector.seconds_simulation,
        "time/seconds_inference": collector.seconds_inference,
    }
    if windows is not None:
        metrics["rollout/positive_share"] = (windows.labels == POSITIVE).float().mean().item()
        metrics["rollout/null_share"] = (windows.labels == NULL).float().mean().item()
    return metrics


class UpdateMetrics:
    """Means over one update, of all samples each time they were used."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.dropped: list[Tensor] = []
        self.grad_norms: list[float] = []

    def add(self, losses: Tensor, grad_norm: Tensor, labels: Tensor, dropped: Tensor) -> None:
        """One optimizer step: losses (batch,), norm of their mean's gradient, labels before and
        after condition dropout, int64 (batch,)."""
        self.losses.append(losses.float().cpu())
        self.grad_norms.append(grad_norm.item())
        self.labels.append(labels)
        self.dropped.append(dropped)

    def summary(self) -> dict[str, float]:
        """Loss in total and by branch, conditions and how many were dropped, gradient norm."""
        loss, labels, dropped = map(torch.cat, (self.losses, self.labels, self.dropped))
        metrics = {
            "train/loss": loss.mean().item(),
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
