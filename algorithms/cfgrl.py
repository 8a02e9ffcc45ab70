"""Implements CFGRL, reinforcement learning by guidance, as an SB3 algorithm."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import update_learning_rate
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from cfgrl_gym.algorithms.checks import (
    check_copies,
    check_curriculum,
    check_env,
    check_fsdp,
    check_gives_snapshots,
    check_label_source,
    check_parameters,
    check_policy_kwargs,
    check_ranks,
    check_starts,
    check_stride,
)
from cfgrl_gym.algorithms.collector import Collector, Episode, Outcome
from cfgrl_gym.algorithms.distributed.agreement import check_agreement
from cfgrl_gym.algorithms.distributed.layout import Layout
from cfgrl_gym.algorithms.distributed.ranks import Ranks
from cfgrl_gym.algorithms.distributed.shards import (
    backward_together,
    is_sharded,
    keep_state_on_host,
    sharded,
    whole,
)
from cfgrl_gym.algorithms.flow import POSITIVE
from cfgrl_gym.algorithms.groups import (
    MIDWAY,
    UPDATE,
    VALUE,
    GroupPlan,
    Randomness,
    groups_needed,
)
from cfgrl_gym.algorithms.iteration_loop import IterationLoop
from cfgrl_gym.algorithms.labels import (
    Labelling,
    LabelSource,
    Negatives,
    draw_epoch,
    drop_condition,
)
from cfgrl_gym.algorithms.memory.device import check_weights_fit
from cfgrl_gym.algorithms.memory.micro_batches import MicroBatches
from cfgrl_gym.algorithms.memory.plan import plan_memory
from cfgrl_gym.algorithms.memory.prefix_cache import PrefixCache
from cfgrl_gym.algorithms.metrics import EpisodeStatistics, UpdateMetrics, rollout_metrics
from cfgrl_gym.algorithms.midway import midway_plan
from cfgrl_gym.algorithms.mlp_policy import MlpPolicy
from cfgrl_gym.algorithms.policies import FlowPolicy
from cfgrl_gym.algorithms.start_schedule import StartSchedule
from cfgrl_gym.algorithms.value import ValueSource
from cfgrl_gym.algorithms.vec_envs.supported import init_states
from cfgrl_gym.algorithms.windows import (
    Replay,
    WindowBatch,
    blank_windows,
    join_windows,
    label_windows,
)

# What SB3 would need for a value function, an entropy bonus and exploration noise.
_UNUSED: dict[str, Any] = dict(
    n_steps=0, gae_lambda=1, ent_coef=0, vf_coef=0, use_sde=False, sde_sample_freq=-1
)


class CFGRL(IterationLoop):
    """Trains a policy by classifier-free guidance RL (Frans et al. 2025, arXiv 2505.23458).

    Groups of K episodes from the same start give leave-one-out advantages; the advantage of each
    action window decides whether it is labelled optimal (o = 1) or not (∅); the policy learns both
    by plain flow matching with condition dropout. Guidance with the scale `policy.cfg_scale` is the
    policy improvement: it needs no value function, no likelihood ratio and no loss weights.

    An optimizer step whose loss or gradient isn't finite is skipped and counted. After
    `metrics.MAX_SKIPPED_STEPS` such steps in a row, `learn` raises `NonFiniteError`; the weights
    are then those from before the first of them.

    :param policy: "MlpPolicy", "Pi0Policy" or a subclass of `FlowPolicy`
    :param env: the environment (if registered in Gymnasium, can be str; None for loading)
    :param learning_rate: a number, or a function of the progress remaining (from 1 to 0). None: the
        policy's `default_learning_rate`, which depends on its size
    :param rloo_batch_size: K, episodes of a group, all from the same start
    :param groups_per_iteration: groups to collect before each update
    :param enable_dynamic_sampling: discard a group whose K returns are all equal and try another
    :param early_stop_percentage: with dynamic sampling, the share of `groups_per_iteration` that
        suffices (rounded up)
    :param max_groups_tried: with dynamic sampling, give up after this many groups.
        None: three times `groups_per_iteration`
    :param curriculum: with several tasks, begin more groups in those whose success is uncertain,
        by its variance over the last `stats_window_size` episodes, and fewer where it always or
        never comes; a fifth of the groups stays shared evenly. False: tasks take turns
    :param gamma: discount of a reward for each control step before it in its episode. Below 1,
        what succeeds sooner is better, so that a group in which all succeed teaches speed
    :param midway_groups: besides, as many groups whose K episodes continue from a moment of an
        episode of this iteration, where success and failure are still possible: the advantage then
        tells how good the chunk after that moment was, and that chunk alone is learned from. Needs
        an environment that gives snapshots, as LIBERO's here do
    :param dropout_prob: probability with which a condition is replaced by ∅, each time it is used
    :param label_source: "episode_rloo": the episode's advantage; "window_rloo": leave-one-out
        reward-to-go; "window_return": reward inside the window against the group's mean; "success":
        whether the episode succeeded, whatever the others of its group did; "value":
        by how much the window raised the expected return, as a value head on frozen features
        estimates it (RECAP, which labels 30 to 40% optimal: `optimal_share`). The log has its error
        beside that of a constant; groups of equal returns then teach as well, if dynamic sampling
        is off
    :param label_threshold: a window whose advantage reaches this is optimal
    :param optimal_share: at most this share of a task's windows is optimal, those of the highest
        advantages (and those equal to the last of them). None: all that reach `label_threshold`
    :param negatives: label of the windows that are not optimal: "null" is ∅, "zero" is o = 0
    :param positive_share: share of optimal windows among those that an epoch draws, whatever their
        share of all windows is; with 1 and no dropout, v_∅ learns nothing. None: draw every window
        once per epoch
    :param null_rate: share of an epoch's draws that are of all windows alike and train ∅, which so
        becomes the policy of all that was collected; the other draws train conditions, and none is
        dropped. None: ∅ learns from windows that aren't optimal and from dropped conditions
    :param cfg_scale: guidance scale while collecting. None: the policy's own `cfg_scale`
    :param rollout_noise: standard deviation of the noise that a chunk is denoised from while
        collecting; more than 1 explores more than the policy does otherwise
    :param n_epochs: passes over the windows in each update
    :param batch_size: windows per forward pass; fewer where the device's memory is short
    :param gradient_accumulation_steps: forward passes per optimizer step
    :param max_grad_norm: gradients are clipped to this norm
    :param window_stride: control steps between windows. None: the length of a chunk. Less needs an
        environment that returns the observations inside a chunk (`observation_stride`)
    :param replay_iterations: learn from the windows of this many earlier iterations too, with the
        labels they had then. They are not saved: a loaded model begins without them
    :param overlap: update while the next iteration's episodes are collected, by a policy that lacks
        this update: worth it where simulation and update need different hardware. The update has a
        copy of what trains and of the optimizer, and no prefixes from acting. An interrupted
        training resumes exactly, and `learn` ends with the last update
    :param fsdp: with several ranks, update a copy of what trains of which each rank has only its
        share (FSDP2): of weights, gradients, optimizer state, average and reference. For
        `trainable="all"` at full size. The whole policy acts on every rank all the same
    :param device_memory: GiB of the device's memory for policy, update and prefixes. None: all free
    :param prefix_memory: GiB of the host's memory for prefixes (what a frozen VLM computes of an
        observation) kept from acting to the update; those that find no room are computed again.
        None: half of what is free
    :param stats_window_size: episodes over which the rollout statistics are averaged
    :param tensorboard_log: log folder of TensorBoard (None: no log)
    :param policy_kwargs: additional arguments of the policy
    :param verbose: 0 no output, 1 info messages, 2 debug messages
    :param seed: seed of all random numbers. None: a fresh one
    :param device: "auto", "cpu", "cuda", ...
    :param _init_setup_model: whether to build the network at creation
    :raises ValueError: for parameters, environments or wrappers that CFGRL can't work with
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": MlpPolicy}

    def __init__(
        self,
        policy: str | type[FlowPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule | None = None,
        rloo_batch_size: int = 8,
        groups_per_iteration: int = 8,
        enable_dynamic_sampling: bool = True,
        early_stop_percentage: float = 0.8,
        max_groups_tried: int | None = None,
        curriculum: bool = False,
        gamma: float = 1.0,
        midway_groups: int = 0,
        dropout_prob: float = 0.1,
        label_source: LabelSource = "episode_rloo",
        label_threshold: float = 0.0,
        optimal_share: float | None = None,
        negatives: Negatives = "null",
        positive_share: float | None = 0.9,
        null_rate: float | None = None,
        cfg_scale: float | None = None,
        rollout_noise: float = 1.0,
        n_epochs: int = 12,
        batch_size: int = 64,
        gradient_accumulation_steps: int = 1,
        max_grad_norm: float = 1.0,
        window_stride: int | None = None,
        replay_iterations: int = 2,
        overlap: bool = False,
        fsdp: bool = False,
        device_memory: float | None = None,
        prefix_memory: float | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        check_parameters(locals())
        self.ranks = Ranks.current()
        if self.ranks.size > 1:
            drawn = self.ranks.gather(Randomness.of(seed).seed)[0]
            seed = drawn if seed is None else seed
        self.rloo_batch_size = rloo_batch_size
        self.groups_per_iteration = groups_per_iteration
        self.enable_dynamic_sampling = enable_dynamic_sampling
        self.early_stop_percentage = early_stop_percentage
        self.max_groups_tried = max_groups_tried
        self.curriculum = curriculum
        self.midway_groups = midway_groups
        self.dropout_prob = dropout_prob
        self.label_source = label_source
        self.label_threshold = label_threshold
        self.optimal_share = optimal_share
        self.negatives = negatives
        self.positive_share = positive_share
        self.null_rate = null_rate
        self.cfg_scale = cfg_scale
        self.rollout_noise = rollout_noise
        self.n_epochs = n_epochs
        self.batch_size = batch_size
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.window_stride = window_stride
        self.replay_iterations = replay_iterations
        self.overlap = overlap
        self.fsdp = fsdp
        self.device_memory = device_memory
        self.prefix_memory = prefix_memory
        super().__init__(
            # By name, SB3 would recommend policies of its own for other observations.
            policy=self._get_policy_from_name(policy) if isinstance(policy, str) else policy,  # type: ignore[arg-type]
            env=env,  # type: ignore[arg-type]
            learning_rate=learning_rate,  # type: ignore[arg-type]
            gamma=gamma,
            max_grad_norm=max_grad_norm,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
            **_UNUSED,
        )
        self.randomness = Randomness.of(seed)
        self.iteration = 0  # iterations that are finished
        self.statistics = EpisodeStatistics(stats_window_size)
        self.skipped_in_a_row = 0  # optimizer steps that weren't finite
        self.windows: WindowBatch | None = None  # what the next update learns from
        self.untrained = False
        if _init_setup_model:
            check_env(self.env)
            self._setup_model()

    def _setup_model(self) -> None:
        check_policy_kwargs(self.policy_class, self.policy_kwargs)
        given = self.learning_rate
        self.learning_rate = 0.0 if given is None else given
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space, self.action_space, self.lr_schedule, **self.policy_kwargs
        )
        check_weights_fit(self.policy, self.device)
        self.policy = self.policy.to(self.device)
        if given is None:
            self.learning_rate = self.policy.default_learning_rate
            self._setup_lr_schedule()
            update_learning_rate(self.policy.optimizer, self.learning_rate)
        check_stride(self.stride, self.policy.chunk_size)
        check_label_source(self.label_source, self.policy)
        self.replay = Replay()
        self._prefixes = PrefixCache(self.policy)  # without room until `learn` has a plan
        self._room = (0, 0)  # for prefixes, in bytes on a GPU and on the host
        self._ranks_of_updates: Ranks | None = None  # with a process group of their own
        self._micro_batches = MicroBatches(self.batch_size)

    def _setup_learn(self, *arguments: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        env = check_env(self.env)
        check_parameters(vars(self))  # attributes may have been set since
        check_stride(self.stride, self.policy.chunk_size)
        check_label_source(self.label_source, self.policy)
        if self.midway_groups:
            check_gives_snapshots(env)
        if self.curriculum:
            check_curriculum(init_states(env))
        if self.overlap:
            check_copies(self.policy, "overlap")
        if self.ranks.size > 1:
            check_ranks(self.ranks, vars(self))
            same: dict[str, Any] = {"iteration": self.iteration, "tasks": init_states(env)}
            if self.fsdp:
                check_fsdp(self.policy, self.overlap)
                keep_state_on_host(self.policy.optimizer, self.ranks)
            else:  # the first rank has all of it, if there was an update with fsdp
                same["the size of the optimizer's state"] = len(self.policy.optimizer.state)
            check_agreement(self.ranks, self, **same)
        self._micro_batches = plan_memory(
            self._prefixes,
            self.batch_size,
            self.device_memory,
            self.prefix_memory,
            self.verbose,
            copied=self.overlap,
            ranks=self.ranks.size if self.fsdp else 1,
        )
        self._room = self._prefixes.room
        if self.overlap:
            self._prefixes.resize(0, 0)  # the update's copy of the model has them
        return super()._setup_learn(*arguments, **kwargs)

    @property
    def stride(self) -> int:
        """Return the control steps between two windows."""
        return self.policy.chunk_size if self.window_stride is None else self.window_stride

    def plan(self, env: VecEnv) -> GroupPlan:
        """Draw the groups that this iteration may try, and set how many of them suffice."""
        asked, sampling = self.groups_per_iteration, self.enable_dynamic_sampling
        tried = (self.max_groups_tried or 3 * asked) if sampling else asked
        schedule = StartSchedule(self.randomness, init_states(env))
        successes = self.statistics.recent if self.curriculum else None
        return GroupPlan(
            schedule.draw(tried, self.statistics.groups, successes),
            self.rloo_batch_size,
            groups_needed(asked, sampling, self.early_stop_percentage),
            sampling,
            self.gamma,
        )

    def label(
        self,
        groups: list[list[Episode]],
        reach: int | None = None,
        others: Sequence[WindowBatch | None] = (),
    ) -> WindowBatch | None:
        """Return the labelled windows of these groups of K episodes, which the update uses.

        :param reach: only the windows that begin before this control step
        :param others: windows of this iteration that were labelled before
        """
        labelling = Labelling(
            self.label_source, self.label_threshold, self.negatives, self.gamma, self.optimal_share
        )
        source = None
        if self.label_source == "value":
            generator = self.randomness.generator(VALUE, self.iteration)
            size = self._micro_batches.size
            known = [b.value_data for b in (*self.replay.batches, *others) if b and b.value_data]
            source = ValueSource(self._prefixes, size, self.gamma, generator, known)
        return label_windows(groups, self.policy, self.stride, labelling, reach, source, self.ranks)

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback) -> bool:  # type: ignore[override]
        """Run groups of episodes until enough are valid, and label their windows.

        :return: False if the callback asked to stop
        """
        self.policy.set_training_mode(False)
        with self.ranks.together():
            callback.on_rollout_start()
        behind = int(self.untrained)
        with self.update_beside() as wait_for_update:
            # The prefixes of replayed windows are computed again, as they are after a resumption: a
            # prefix is rounded differently in another batch.
            self._prefixes.keep_only(())
            self.windows, self.untrained = None, False
            collector = self._collector(env, self.plan(env), snapshots=self.midway_groups > 0)
            if not self.run_plan(collector, env, callback):
                return False
            wait_for_update()
            if self.overlap:
                self._record({"rollout/updates_behind": behind})
            with self.ranks.together():
                return self._take(collector, env, callback)

    def _take(self, collector: Collector, env: VecEnv, callback: BaseCallback) -> bool:
        """Label the windows of the groups that were kept, and count the episodes."""
        check_starts(collector.kept)
        parts = [self.label(collector.kept)]
        midway = None
        if self.midway_groups:
            rng = self.randomness.rng(MIDWAY, self.iteration)
            plan = midway_plan(rng, collector.plan, collector.kept, self.midway_groups)
            midway = self._collector(env, plan)
            if plan.groups and not self.run_plan(midway, env, callback):
                return False
            parts.append(self.label(midway.kept, self.policy.chunk_size, parts))
            self.statistics.add(self._outcomes(midway))

        labelled = [part for part in parts if part is not None]
        windows = join_windows(labelled) if labelled else None
        if any(self.ranks.gather(windows is not None)) and windows is None:
            windows = blank_windows(self.policy, 0)  # other ranks have some
        self.replay.keep_last(self.replay_iterations)
        self.windows = None if windows is None else self.replay.add(windows)
        if self.windows is not None and self.positive_share == 1:
            optimal = bool((self.windows.labels == POSITIVE).any())
            self.windows = self.windows if any(self.ranks.gather(optimal)) else None
        self.untrained = self.overlap and self.windows is not None
        self._prefixes.keep_only([] if windows is None else windows.prefix_keys.tolist())
        episodes = self._outcomes(collector)
        self.statistics.add(episodes)
        metrics = rollout_metrics(self.ranks, episodes, collector, midway, windows)
        self._record(self.statistics.metrics() | metrics)
        infos = [episode.info for episode in episodes]
        self._update_info_buffer(infos, np.ones(len(infos), bool))
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _collector(self, env: VecEnv, plan: GroupPlan, snapshots: bool = False) -> Collector:
        shape = (self.policy.horizon, self.policy.action_width)
        noise = self.randomness.noise(self.iteration, shape, self.rollout_noise)
        return Collector(
            env, self.policy, plan, noise, self.cfg_scale, self._prefixes, snapshots, self.ranks
        )

    def _outcomes(self, collector: Collector) -> list[Outcome]:
        """Return the outcomes of all ranks' episodes, in the order of the plan."""
        own = [episode.outcome for episode in collector.decided]
        return sorted(self.ranks.joined(own), key=lambda outcome: outcome.place)

    def copy_to_train(self) -> "CFGRL":
        trainer = super().copy_to_train()
        trainer.ranks = self._ranks_apart()
        trainer._prefixes = PrefixCache(trainer.policy, *self._room)
        return trainer

    def _ranks_apart(self) -> Ranks:
        self._ranks_of_updates = self._ranks_of_updates or self.ranks.apart()
        return self._ranks_of_updates

    def window_losses(self, batch: WindowBatch, t: Tensor, noise: Tensor) -> Tensor:
        """Return the mean square of v(x_t, t, o) - (noise - actions) of each window, (n,)."""
        prefix = self._prefixes.recall(batch.observations, batch.prefix_keys, batch.labels)
        return self.policy.flow_matching_loss(*batch.samples, t, noise, prefix)

    def train(self) -> None:
        """Update the policy by flow matching on the labelled windows, with condition dropout."""
        if self.windows is None:
            raise RuntimeError("there are no windows to learn from; call learn, which collects")
        began = perf_counter()
        generator = self.randomness.generator(UPDATE, self.iteration)
        layout = Layout.of(self.ranks, self.windows.labels, self.replay)
        metrics = UpdateMetrics(self.skipped_in_a_row)
        with self._shared():
            drawn = self._optimize(self.windows, layout, metrics, generator)
        self.skipped_in_a_row = metrics.skipped_in_a_row
        gap = self._guidance_gap(self.windows, layout, drawn, generator)
        self._record(metrics.summary() | {"train/guidance_gap": gap})
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("time/seconds_update", perf_counter() - began)

    @contextmanager
    def _shared(self) -> Iterator[None]:
        """Inside, with `fsdp`, have a policy of which each of several ranks has a share."""
        if not self.fsdp or self.ranks.size == 1:
            yield
            return
        policy = self.policy
        # A group of its own, because DTensor's caches keep it for good.
        ranks = self._ranks_apart()
        try:
            with sharded(policy, ranks) as self.policy:
                yield
        finally:
            self.policy = policy
            gc.collect()  # FSDP's cycles, which hold all that the shares take

    def _optimize(
        self,
        windows: WindowBatch,
        layout: Layout,
        metrics: UpdateMetrics,
        generator: torch.Generator,
    ) -> Tensor:
        """Make the optimizer steps of an update.

        :return: the windows drawn in the last epoch, as indices in the whole order
        """
        policy = self.policy
        policy.before_update()
        policy.set_training_mode(True)
        self._update_learning_rate(policy.optimizer)
        dropout = self.dropout_prob if self.null_rate is None else 0.0
        size = self.batch_size * self.gradient_accumulation_steps

        for _ in range(self.n_epochs):
            epoch = draw_epoch(layout.labels, self.positive_share, self.null_rate, generator)
            for indices, drawn in zip(*(part.split(size) for part in epoch), strict=True):
                labels = drop_condition(drawn, dropout, generator)
                t, noise = policy.draw_flow(len(indices), generator)
                here, rows = layout.find(indices)
                batch = replace(windows[rows], labels=labels[here])
                losses = self._backward((batch, t[here], noise[here]), len(indices))
                losses = self.ranks.sum_gradients(policy, losses, here)
                norm = whole(clip_grad_norm_(policy.parameters(), self.max_grad_norm))
                if metrics.is_sound(losses, norm):
                    policy.optimizer.step()
                    policy.after_optimizer_step()
                    metrics.add(losses, norm, drawn, labels)
                    self._n_updates += 1
        return epoch[0]

    def _backward(self, samples: tuple[WindowBatch, Tensor, Tensor], batch_size: int) -> Tensor:
        """Compute the gradients of this rank's samples of a batch, and return their losses."""
        of_step = self.policy.optimizer, self.window_losses
        if not is_sharded(self.policy):
            return self._micro_batches.backward(*of_step, *samples, batch_size=batch_size)

        def blank() -> tuple[WindowBatch, Tensor, Tensor]:
            return blank_windows(self.policy, 1), *self.policy.draw_flow(1, torch.Generator())

        return backward_together(
            self.ranks, self._micro_batches.size, *of_step, samples, blank, batch_size
        )

    def _guidance_gap(
        self, windows: WindowBatch, layout: Layout, drawn: Tensor, generator: torch.Generator
    ) -> float:
        """Return the mean distance between guidance's branches on a few of the drawn windows."""
        here, rows = layout.find(drawn[: min(self.ranks.gather(self._micro_batches.size))])
        t, noise = self.policy.draw_flow(len(here), generator)
        gaps = torch.empty(0)
        if len(rows):
            probe = windows[rows]
            known = self._prefixes.recall_branches(probe.observations, probe.prefix_keys)
            gaps = self.policy.guidance_gap(
                probe.observations, probe.model_actions, t[here], noise[here], known
            )
        return torch.cat(self.ranks.gather(gaps.cpu())).mean().item()

    def _record(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.logger.record(name, value)
