"""The configuration of each command: what its YAML file and its options may say.

Nothing here imports torch: `cfgrl --help` reads these classes.
"""

from dataclasses import dataclass
from typing import Literal

from cfgrl_gym.cli.option_checks import Options, at_least

TaskId = int | list[int] | Literal["all"]
Preset = Literal["tiny", "pi0"]
ConditionMode = Literal["token", "bias", "concat"]
Camera = Literal["agentview", "robot0_eye_in_hand"]
Trainable = Literal["expert", "all", "lora"]


@dataclass(frozen=True, kw_only=True)
class DemosConfig(Options):
    """Options of `cfgrl demos`.

    :param suite: suite of the tasks
    :param task_id: the task, several as [0,2,5], or all; each gets a file of its own
    :param demos: successful demonstrations of each task
    :param image_size: side of the two camera images in pixels
    :param image_stride: draw the images at every so manieth step only, which is faster; 1 draws
        all, as LIBERO's own files have
    :param perturbed: share of the demonstrations that start from a disturbed pose
    :param seed: of the placements and of the disturbances
    :param workers: processes that record at the same time (about 2 GB of memory each)
    :param out: folder; files are <out>/<suite>/<task>_demo.hdf5, never overwritten
    """

    suite: str = "libero_object"
    task_id: TaskId = 0
    demos: int = 50
    image_size: int = 128
    image_stride: int = 1
    perturbed: float = 0.8
    seed: int = 0
    workers: int = 2
    out: str = "./demos"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, demos=self.demos, image_stride=self.image_stride, workers=self.workers)
        at_least(8, image_size=self.image_size)


@dataclass(frozen=True, kw_only=True)
class SftConfig(Options):
    """Options of `cfgrl sft`.

    :param demos: demonstrations: an HDF5 file, a folder that is searched, or a pattern such as
        'demos/libero_object/*.hdf5'; or several of these as [a,b]
    :param policy: policy folder, run folder or PI0 checkpoint to start from (with preset pi0, also
        a name on the Hugging Face hub). null: a new policy with random weights
    :param preset: tiny (for a CPU) or pi0 (the full 3.3 B model). null: the policy's, else tiny
    :param condition_mode: how the optimality condition enters: token, bias or concat. null: the
        policy's, else token
    :param horizon: action steps that the model predicts. null: the policy's, else 50
    :param delta_actions: the model's actions are relative to the state in the first 6 dimensions.
        null: the policy's, else true for pi0 and false for tiny
    :param use_prefix_dropout: the unconditional branch doesn't see the instruction either. null:
        the policy's, else false
    :param trainable: expert (the VLM is frozen), all, or lora (adapters on language model and
        expert; needs peft). null: expert for a pi0 policy that is given, else all
    :param gradient_checkpointing: less memory for more time in the backward pass
    :param ema_decay: save an exponential moving average of the weights, of this decay a step. null:
        the weights themselves
    :param norm_stats: openpi's norm_stats.json. null: the policy's own, else computed from the
        demonstrations
    :param std_floor: least standard deviation in computed statistics
    :param cameras: of a new tiny model: which images it sees, agentview and robot0_eye_in_hand (the
        wrist's, the cheaper one to draw without a GPU). null: both
    :param image_size: of a new tiny model: side of the images it sees, in pixels
    :param patch_size: of a new tiny model: side of an image patch
    :param hidden_size: of a new tiny model: width
    :param vision_layers: of a new tiny model: layers of the vision tower
    :param num_layers: of a new tiny model: layers of language model and action expert
    :param num_heads: of a new tiny model: attention heads
    :param mlp_ratio: of a new tiny model: width of every MLP, in hidden sizes
    :param steps: optimizer steps
    :param batch_size: windows in each step
    :param learning_rate: its peak
    :param window_stride: control steps between the windows cut from a demonstration; only steps
        whose images were drawn are used
    :param dropout_prob: share of the samples whose condition is dropped
    :param max_grad_norm: gradients are clipped to this norm
    :param log_every: steps between two rows of the metrics
    :param seed: of a new model's weights and of the training
    :param device: auto, cpu, cuda, ...
    :param out: run folder. null: runs/sft-<date-time>
    """

    demos: str | list[str]
    policy: str | None = None
    preset: Preset | None = None
    condition_mode: ConditionMode | None = None
    horizon: int | None = None
    delta_actions: bool | None = None
    use_prefix_dropout: bool | None = None
    trainable: Trainable | None = None
    gradient_checkpointing: bool = False
    ema_decay: float | None = None
    norm_stats: str | None = None
    std_floor: float = 0.05
    cameras: list[Camera] | None = None
    image_size: int = 112
    patch_size: int = 16
    hidden_size: int = 128
    vision_layers: int = 2
    num_layers: int = 4
    num_heads: int = 4
    mlp_ratio: int = 2
    steps: int = 3000
    batch_size: int = 32
    learning_rate: float = 1e-3
    window_stride: int = 1
    dropout_prob: float = 0.1
    max_grad_norm: float = 1.0
    log_every: int = 50
    seed: int = 0
    device: str = "auto"
    out: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(
            1,
            steps=self.steps,
            batch_size=self.batch_size,
            window_stride=self.window_stride,
            log_every=self.log_every,
            horizon=self.horizon,
        )


@dataclass(frozen=True, kw_only=True)
class PolicyOptions(Options):
    """The policy that a command starts from.

    :param policy: libero_tiny (comes with the package), a policy folder (what save_pretrained
        wrote), the run folder of `cfgrl sft` or `cfgrl train`, or a PI0 checkpoint (with preset
        pi0, also a name on the Hugging Face hub)
    :param preset: tiny or pi0. null: what the folder says
    :param norm_stats: openpi's norm_stats.json. null: the policy folder's own
    :param delta_actions: the model's actions are relative to the state in the first 6 dimensions.
        null: what the folder says, else true for pi0
    :param num_inference_steps: denoising steps of the sampler
    :param guidance: velocity guides every denoising step; action combines two finished chunks
    :param device: auto, cpu, cuda, ...
    """

    policy: str
    preset: Preset | None = None
    norm_stats: str | None = None
    delta_actions: bool | None = None
    num_inference_steps: int = 10
    guidance: Literal["velocity", "action"] = "velocity"
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, num_inference_steps=self.num_inference_steps)


@dataclass(frozen=True, kw_only=True)
class LiberoOptions(Options):
    """The environments that a command runs.

    :param suite: suite of the tasks
    :param task_id: the task, several as [0,2,5], or all
    :param chunk_size: actions executed open loop in one step. null: all that the policy predicts
    :param image_size: side of the camera images in pixels. null: what the model sees
    :param max_episode_steps: time limit in control steps (20 a second). null: the suite's own
    :param n_envs: environments, in one worker process for each processor; a worker that dies, hangs
        or fails is replaced
    """

    suite: str = "libero_object"
    task_id: TaskId = 0
    chunk_size: int | None = None
    image_size: int | None = None
    max_episode_steps: int | None = None
    n_envs: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(
            1,
            chunk_size=self.chunk_size,
            max_episode_steps=self.max_episode_steps,
            n_envs=self.n_envs,
        )
        at_least(8, image_size=self.image_size)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LiberoOptions, PolicyOptions):
    """Options of `cfgrl train`.

    :param init_states: start from the states that the benchmark evaluates on (benchmark), from some
        of them as [0,1,2], so that others stay unseen, or from random placements (random)
    :param condition_mode: how the optimality condition enters, for a checkpoint that has none yet:
        token, bias or concat. null: the policy's, else token
    :param use_prefix_dropout: the unconditional branch doesn't see the instruction either. null:
        the policy's, else false
    :param trainable: expert (the VLM is frozen), all, or lora (adapters on language model and
        expert; needs peft). null: expert for pi0, all for tiny
    :param gradient_checkpointing: less memory for more time in the backward pass
    :param ema_decay: act with an exponential moving average of the weights, of this decay an
        optimizer step. null: with the weights themselves
    :param total_timesteps: environment steps, summed over environments; a chunk of actions is one.
        The iteration that reaches the number is finished
    :param max_iterations: end after so many iterations, if total_timesteps doesn't end it before
    :param learning_rate: of the optimizer, constant
    :param rloo_batch_size: K, episodes of a group, all from the same start
    :param groups_per_iteration: groups asked for before each update
    :param enable_dynamic_sampling: discard a group whose K returns are all equal, try another
    :param early_stop_percentage: with dynamic sampling, the share of groups_per_iteration that
        suffices
    :param max_groups_tried: with dynamic sampling, give up after this many groups. null: three
        times groups_per_iteration
    :param dropout_prob: probability with which a condition is dropped, each time it is used
    :param label_source: episode_rloo (the episode's advantage), window_rloo (leave-one-out
        reward-to-go) or window_return (reward in the window against the group's mean)
    :param label_threshold: a window whose advantage reaches this is optimal
    :param negatives: label of the others: null is the unconditional one, zero is o = 0
    :param positive_share: share of the optimal windows among those that an epoch draws, whatever
        share they have of all. null: every window once an epoch
    :param cfg_scale: guidance while collecting. null: the policy's own
    :param n_epochs: passes over the windows in each update
    :param batch_size: windows of one forward pass
    :param gradient_accumulation_steps: forward passes of one optimizer step
    :param max_grad_norm: gradients are clipped to this norm
    :param window_stride: control steps between windows. null: the chunk
    :param replay_iterations: learn from the windows of this many earlier iterations too
    :param device_memory: GiB of a GPU's memory that the run may use. null: all that is free
    :param prefix_memory: GiB of the host's memory for what a frozen VLM computed while acting, so
        that the update needs not compute it again. null: half of what is free
    :param eval_every: iterations between evaluations on the benchmark's initial states and with its
        time limit; the first is before training, the last after it. null: none
    :param eval_episodes: the first so many initial states of each task. null: all (LIBERO has 50)
    :param eval_cfg_scale: guidance in evaluations, or several values as [1,1.5]. null: the policy's
        own
    :param save_every: iterations between checkpoints in <out>/checkpoints, from which a run that
        was stopped or killed goes on with --resume. null: only at its end
    :param keep_checkpoints: keep the last so many, and the best one
    :param resume: go on with the run in this folder, from its last checkpoint and with the options
        that it began with; beside it only total_timesteps and max_iterations may be given
    :param video: record an episode at the end
    :param seed: of everything random
    :param out: run folder. null: runs/train-<date-time>
    """

    init_states: Literal["benchmark", "random"] | list[int] = "benchmark"
    condition_mode: ConditionMode | None = None
    use_prefix_dropout: bool | None = None
    trainable: Trainable | None = None
    gradient_checkpointing: bool = False
    ema_decay: float | None = None
    total_timesteps: int = 10_000
    max_iterations: int | None = None
    learning_rate: float = 3e-4
    rloo_batch_size: int = 8
    groups_per_iteration: int = 4
    enable_dynamic_sampling: bool = True
    early_stop_percentage: float = 0.8
    max_groups_tried: int | None = None
    dropout_prob: float = 0.1
    label_source: Literal["episode_rloo", "window_rloo", "window_return"] = "episode_rloo"
    label_threshold: float = 0.0
    negatives: Literal["null", "zero"] = "null"
    positive_share: float | None = None
    cfg_scale: float | None = None
    n_epochs: int = 4
    batch_size: int = 64
    gradient_accumulation_steps: int = 1
    max_grad_norm: float = 1.0
    window_stride: int | None = None
    replay_iterations: int = 0
    device_memory: float | None = None
    prefix_memory: float | None = None
    eval_every: int | None = None
    eval_episodes: int | None = None
    eval_cfg_scale: float | list[float] | None = None
    save_every: int | None = 1
    keep_checkpoints: int = 3
    video: bool = True
    seed: int = 0
    out: str | None = None
    resume: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(
            1,
            keep_checkpoints=self.keep_checkpoints,
            total_timesteps=self.total_timesteps,
            max_iterations=self.max_iterations,
            window_stride=self.window_stride,
            save_every=self.save_every,
            eval_every=self.eval_every,
            eval_episodes=self.eval_episodes,
        )
        if self.eval_cfg_scale == []:
            raise ValueError("eval_cfg_scale must not be an empty list")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(LiberoOptions, PolicyOptions):
    """Options of `cfgrl eval`. Its policy may also be the model.zip of `cfgrl train`, or one of the
    checkpoints in its run folder.

    :param episodes: the first so many initial states of each task. null: all (LIBERO has 50)
    :param init_states: exactly these initial states of each task, as [0,7,21], instead of episodes
    :param cfg_scale: guidance, or several values as [1,1.5,2] to compare. null: the policy's own
    :param video: record the first episode
    :param seed: of the sampling noise; equal for every cfg_scale
    :param out: run folder. null: runs/eval-<date-time>
    """

    episodes: int | None = None
    init_states: list[int] | None = None
    cfg_scale: float | list[float] | None = None
    video: bool = True
    seed: int = 0
    out: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, episodes=self.episodes)
        if self.episodes is not None and self.init_states is not None:
            raise ValueError("episodes and init_states exclude each other; give one of them")
        if self.init_states == [] or self.cfg_scale == []:
            raise ValueError("init_states and cfg_scale must not be empty lists")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Options):
    """Options of `cfgrl report`.

    :param runs: a folder of `cfgrl train` or `cfgrl eval`, or one that is searched for them; or
        several as [a,b]. Words without an option are these too: cfgrl report RUN RUN
    :param out: the HTML file; an earlier report is replaced, nothing else
    :param title: heading of the page
    :param embed_videos: put the videos themselves into the page beside their frames
    """

    runs: str | list[str]
    out: str = "report.html"
    title: str = "cfgrl-gym report"
    embed_videos: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runs:
            raise ValueError("runs must name at least one folder; got none")
