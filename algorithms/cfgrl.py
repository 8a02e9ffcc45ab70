"""CFGRL, reinforcement learning by guidance, as an SB3 algorithm."""

from dataclasses import replace
from time import perf_counter
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from cfgrl_gym.algorithms.checks import check_parameters, check_stride
from cfgrl_gym.algorithms.collector import Collector, Episode
from cfgrl_gym.algorithms.flow import interpolate
from cfgrl_gym.algorithms.groups import (
    PLAN,
    UPDATE,
    GroupPlan,
    Randomness,
    Selection,
    draw_plan,
    groups_needed,
    select_groups,
)
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
from cfgrl_gym.algorithms.metrics import TaskSuccesses, UpdateMetrics, rollout_metrics
from cfgrl_gym.algorithms.mlp_policy import MlpPolicy
from cfgrl_gym.algorithms.policies import FlowPolicy
from cfgrl_gym.algorithms.saving.model_zip import PickleFreeSaving
from cfgrl_gym.algorithms.vec_envs.supported import as_vec_env, init_states
from cfgrl_gym.algorithms.windows import Replay, WindowBatch, label_windows

SelfCFGRL = TypeVar("SelfCFGRL", bound="CFGRL")

# What SB3 would need for a value function, an entropy bonus and exploration noise.
_UNUSED: dict[str, Any] = dict(
    n_steps=0, gamma=1, gae_lambda=1, ent_coef=0, vf_coef=0, use_sde=False, sde_sample_freq=-1
)


class CFGRL(PickleFreeSaving, OnPolicyAlgorithm):
    """Classifier-free guidance reinforcement learning (Frans et al. 2025, arXiv 2505.23458).

    Groups of K episodes from one start give leave-one-out advantages; the advantage of each
    action window says whether it is optimal (o = 1) or not (∅); the policy learns both by plain
    flow matching with condition dropout. Guidance by `policy.cfg_scale` is the policy
    improvement: it needs no value function, no ratio and no weights.

    An optimizer step with a loss or gradient that isn't finite is skipped and counted. After
    `metrics.MAX_SKIPPED_STEPS` in a row `learn` raises `NonFiniteError`, with the weights as they
    were before the first of them.

    :param policy: "MlpPolicy", "Pi0Policy" or a subclass of `FlowPolicy`
    :param env: the environment (if registered in Gymnasium, can be str; None for loading)
    :param learning_rate: a number, or a function of the progress remaining (from 1 to 0)
    :param rloo_batch_size: K, episodes of a group, all from the same start
    :param groups_per_iteration: groups asked for before each update
    :param enable_dynamic_sampling: discard a group whose K returns are all equal, try another
    :param early_stop_percentage: with dynamic sampling, the share of `groups_per_iteration` that
        suffices (rounded up)
    :param max_groups_tried: with dynamic sampling, give up after this many groups.
        None: three times `groups_per_iteration`
    :param dropout_prob: probability with which a condition becomes ∅, each time it is used
    :param label_source: "episode_rloo": the episode's advantage; "window_rloo": leave-one-out
        reward-to-go; "window_return": reward inside the window against the group's mean
    :param label_threshold: a window whose advantage reaches this is optimal
    :param negatives: label of the others: "null" is ∅, "zero" is o = 0
    :param positive_share: share of the optimal windows among those that an epoch draws, whatever
        share they have of all. None: every window once an epoch
    :param cfg_scale: guidance while collecting. None: the policy's own `cfg_scale`
    :param n_epochs: passes over the windows in each update
    :param batch_size: windows of one forward pass; fewer where the device's memory is short
    :param gradient_accumulation_steps: forward passes of one optimizer step
    :param max_grad_norm: gradients are clipped to this norm
    :param window_stride: control steps between windows. None: the chunk. Less than a chunk needs
        an environment that gives the observations inside it (`observation_stride`)
    :param replay_iterations: learn from the windows of this many earlier iterations too, with the
        labels they had then. They are not saved: a loaded model begins without
    :param device_memory: GiB of the device's memory that the policy, its update and the prefixes
        kept on it may take. None: all that is free
    :param prefix_memory: GiB of the host's memory for prefixes (what a frozen VLM computes of an
        observation) kept from acting to the update; those that find no room are computed again.
        None: half of what is free
    :param stats_window_size: episodes over which the rollout statistics are averaged
    :param tensorboard_log: log folder of TensorBoard (None: no log)
    :param policy_kwargs: additional arguments of the policy
    :param verbose: 0 no output, 1 info messages, 2 debug messages
    :param seed: of everything random. None: a fresh one
    :param device: "auto", "cpu", "cuda", ...
    :param _init_setup_model: whether to build the network at creation
    :raises ValueError: for parameters, environments or wrappers that CFGRL can't work with
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": MlpPolicy}
    policy: FlowPolicy  # type: ignore[assignment]

    def __init__(
        self,
        policy: str | type[FlowPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule = 3e-4,
        rloo_batch_size: int = 8,
        groups_per_iteration: int = 4,
        enable_dynamic_sampling: bool = True,
        early_stop_percentage: float = 0.8,
        max_groups_tried: int | None = None,
        dropout_prob: float = 0.1,
        label_source: LabelSource = "episode_rloo",
        label_threshold: float = 0.0,
        negatives: Negatives = "null",
        positive_share: float | None = None,
        cfg_scale: float | None = None,
        n_epochs: int = 4,
        batch_size: int = 64,
        gradient_accumulation_steps: int = 1,
        max_grad_norm: float = 1.0,
        window_stride: int | None = None,
        replay_iterations: int = 0,
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
        self.rloo_batch_size = rloo_batch_size
        self.groups_per_iteration = groups_per_iteration
        self.enable_dynamic_sampling = enable_dynamic_sampling
        self.early_stop_percentage = early_stop_percentage
        self.max_groups_tried = max_groups_tried
        self.dropout_prob = dropout_prob
        self.label_source = label_source
        self.label_threshold = label_threshold
        self.negatives = negatives
        self.positive_share = positive_share
        self.cfg_scale = cfg_scale
        self.n_epochs = n_epochs
        self.batch_size = batch_size
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.window_stride = window_stride
        self.replay_iterations = replay_iterations
        self.device_memory = device_memory
        self.prefix_memory = prefix_memory
        super().__init__(
            policy=policy,  # type: ignore[arg-type]
            env=env,  # type: ignore[arg-type]
            learning_rate=learning_rate,
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
        fresh = np.random.SeedSequence().generate_state(1)
        self.randomness = Randomness(int(fresh[0]) if seed is None else seed)
        self.iteration = 0  # how many are finished
        self.num_control_steps = 0
        self.num_episodes = 0  # of the groups kept and discarded, of all iterations
        self.task_successes = TaskSuccesses(stats_window_size)
        self.skipped_in_a_row = 0  # optimizer steps that weren't finite
        self.windows: WindowBatch | None = None  # what the next update learns from
        if _init_setup_model:
            self._setup_model()

    _wrap_env = staticmethod(as_vec_env)

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        if policy_name == "Pi0Policy":
            from cfgrl_gym.algorithms import Pi0Policy  # imports transformers

            return Pi0Policy
        return super()._get_policy_from_name(policy_name)

    def _setup_model(self) -> None:
        check_parameters(vars(self))
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space, self.action_space, self.lr_schedule, **self.policy_kwargs
        )
        check_weights_fit(self.policy, self.device)
        self.policy = self.policy.to(self.device)
        check_stride(self.stride, self.policy.chunk_size)
        self.replay = Replay()
        self._prefixes = PrefixCache(self.policy)  # without room until `learn` has a plan
        self._micro_batches = MicroBatches(self.batch_size)

    @property
    def stride(self) -> int:
        """Control steps between windows."""
        return self.policy.chunk_size if self.window_stride is None else self.window_stride

    # Collect ----------------------------------------------------------------------------------

    def plan(self, env: VecEnv) -> GroupPlan:
        """The groups of this iteration: as many as may be tried."""
        count = self.groups_per_iteration
        if self.enable_dynamic_sampling:
            count = self.max_groups_tried or 3 * count
        rng = self.randomness.rng(PLAN, self.iteration)
        return draw_plan(rng, count, self.rloo_batch_size, init_states(env))

    def label(self, groups: list[list[Episode]]) -> WindowBatch | None:
        """The labelled windows of these groups of K episodes: what an update learns from."""
        labelling = Labelling(self.label_source, self.label_threshold, self.negatives)
        return label_windows(groups, self.policy, self.stride, labelling)

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback) -> bool:  # type: ignore[override]
        """Run groups of episodes until enough are valid, and label their windows.

        :return: False if the callback asked to stop
        """
        policy, sampling = self.policy, self.enable_dynamic_sampling
        policy.set_training_mode(False)
        self.windows = None
        self.replay.keep_last(self.replay_iterations)
        # Those of replayed windows are computed anew, as after a resumption: a prefix is rounded
        # differently in another batch.
        self._prefixes.keep_only(())
        plan = self.plan(env)
        needed = groups_needed(self.groups_per_iteration, sampling, self.early_stop_percentage)
        noise = self.randomness.noise(self.iteration, (policy.horizon, policy.action_width))
        collector = Collector(env, policy, plan, noise, self.cfg_scale, self._prefixes)
        selection = Selection([], [], complete=False)
        begun_at = self.num_timesteps
        callback.on_rollout_start()
        try:
            collector.reset()
            while not selection.complete:
                new_obs, rewards, dones, infos = collector.step()
                self.num_timesteps = begun_at + collector.num_chunks
                callback.update_locals(locals())
                if not callback.on_step():
                    return False
                before = selection.discarded
                selection = select_groups(plan, collector.returns, needed, sampling)
                if selection.discarded != before:  # a look at every chunk there is
                    collector.forget_prefixes(selection.discarded)
        finally:
            collector.close()
            groups = {group.index for group in plan.groups}
            collector.forget_prefixes(groups - set(selection.kept))

        windows = self.label([collector.episodes(group) for group in selection.kept])
        # Only what was decided on counts: the same whoever ran it, and how often.
        tried = sorted((*selection.kept, *selection.discarded))
        decided = [episode for group in tried for episode in collector.episodes(group)]
        self.num_timesteps = begun_at + sum(len(episode.chunks) for episode in decided)
        self._count(decided)
        for name, value in rollout_metrics(collector, decided, selection, windows).items():
            self.logger.record(name, value)
        self.windows = None if windows is None else self.replay.add(windows)
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _count(self, episodes: list[Episode]) -> None:
        """Add episodes to what is counted, and to the statistics that SB3 averages."""
        assert self.ep_info_buffer is not None
        assert self.ep_success_buffer is not None
        self.ep_info_buffer.extend({"r": e.total_reward, "l": len(e.chunks)} for e in episodes)
        self.ep_success_buffer.extend(e.success for e in episodes if e.success is not None)
        self.task_successes.add(episodes)
        self.num_episodes += len(episodes)
        self.num_control_steps += sum(len(episode.rewards) for episode in episodes)
        counts = {"episodes": self.num_episodes, "control_steps": self.num_control_steps}
        for name, value in (counts | self.task_successes.rates()).items():
            self.logger.record(f"rollout/{name}", value)

    # Update -----------------------------------------------------------------------------------

    def train(self) -> None:
        """Flow matching on the labelled windows, with condition dropout."""
        if self.windows is None:
            raise RuntimeError(
                "there are no windows to learn from; call learn, which collects them"
            )
        began = perf_counter()
        policy, windows, prefixes = self.policy, self.windows, self._prefixes
        policy.set_training_mode(True)
        self._update_learning_rate(policy.optimizer)
        generator = self.randomness.generator(UPDATE, self.iteration)
        metrics = UpdateMetrics(self.skipped_in_a_row)

        def loss(batch: WindowBatch, t: Tensor, noise: Tensor) -> Tensor:
            """Mean square of v(x_t, t, o) - (noise - actions) for each window, (n,)."""
            return policy.flow_matching_loss(
                batch.observations,
                batch.model_actions,
                batch.action_is_pad,
                batch.labels,
                t,
                noise,
                prefixes.recall(batch.observations, batch.prefix_keys),
            )

        for _ in range(self.n_epochs):
            order = draw_epoch(windows.labels, self.positive_share, generator)
            for indices in order.split(self.batch_size * self.gradient_accumulation_steps):
                batch = windows[indices]
                labels = drop_condition(batch.labels, self.dropout_prob, generator)
                t, noise = policy.draw_flow(len(batch), generator)
                dropped = replace(batch, labels=labels)
                losses = self._micro_batches.backward(policy.optimizer, loss, dropped, t, noise)
                norm = clip_grad_norm_(policy.parameters(), self.max_grad_norm)
                if metrics.is_sound(losses, norm):
                    policy.optimizer.step()
                    policy.after_optimizer_step()
                    metrics.add(losses, norm, batch.labels, labels)
                    self._n_updates += 1

        self.skipped_in_a_row = metrics.skipped_in_a_row
        for name, value in metrics.summary().items():
            self.logger.record(name, value)
        probe = windows[order[: self._micro_batches.size]]
        t, noise = policy.draw_flow(len(probe), generator)
        x_t = interpolate(probe.model_actions, noise, t)
        prefix = prefixes.recall(probe.observations, probe.prefix_keys)
        gap = policy.guidance_gap(probe.observations, x_t, t, prefix)  # v_1 - v_∅
        self.logger.record("train/guidance_gap", gap.mean().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("time/seconds_update", perf_counter() - began)

    # Learn ------------------------------------------------------------------------------------

    def learn(
        self: SelfCFGRL,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "CFGRL",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        max_iterations: int | None = None,
    ) -> SelfCFGRL:
        """Collect, label and update until `total_timesteps` environment steps were made, or after
        `max_iterations` collections and updates.

        Steps are counted as in SB3, summed over environments; a chunk of actions is one. Those of
        the groups that an iteration kept or discarded count, not what else was still running when
        they were complete, or was lost with a worker. Unlike in SB3's `OnPolicyAlgorithm`, an
        iteration's update is logged with its rollout, and the learning rate is that of the
        iteration's beginning: an iteration has as many steps as its episodes take, so its end may
        lie beyond `total_timesteps`.
        """
        if reset_num_timesteps:
            self.num_control_steps = self.num_episodes = 0
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        self._micro_batches = plan_memory(
            self._prefixes, self.batch_size, self.device_memory, self.prefix_memory, self.verbose
        )
        callback.on_training_start(locals(), globals())
        assert self.env is not None
        iteration = 0
        while self.num_timesteps < total_timesteps and iteration != max_iterations:
            self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
            if not self.collect_rollouts(self.env, callback):
                break
            if self.windows is None:
                self.logger.warn("no group had different returns; the update is skipped")
            else:
                self.train()
            self.iteration += 1
            iteration += 1
            if log_interval is not None and iteration % log_interval == 0:
                self.dump_logs(self.iteration)
        if log_interval is not None and iteration % log_interval != 0:
            self.dump_logs(self.iteration)
        callback.on_training_end()
        return self
