"""Defines the configuration of each command: its options, also those of its YAML file.

A command has options of its own, and takes others from the classes that it passes them to: their
names, types, defaults and explanations are only there. Hence importing this module imports torch
and transformers, which `cfgrl --help` does not need.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, make_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, get_type_hints

from cfgrl_gym.algorithms import CFGRL
from cfgrl_gym.algorithms.checks import check_parameters
from cfgrl_gym.algorithms.pi0 import Pi0Policy, TinySizes
from cfgrl_gym.algorithms.pi0.presets import Preset
from cfgrl_gym.algorithms.warm_start import WarmStartConfig
from cfgrl_gym.demos.recording import RecordingConfig
from cfgrl_gym.envs.libero import LiberoEnv
from cfgrl_gym.envs.suites import TaskIds

Camera = Literal["agentview", "robot0_eye_in_hand"]
LARGEST_SEED = 2**32 - 1  # NumPy's
# The smallest value of options with these names, in every command.
AT_LEAST_1 = {
    *("batch_size", "chunk_size", "demos", "episodes", "eval_episodes", "eval_every", "horizon"),
    *("image_stride", "keep_checkpoints", "log_every", "max_episode_steps", "max_iterations"),
    *("n_envs", "num_inference_steps", "save_every", "steps", "total_timesteps"),
    *("window_stride", "workers"),
}
LEAST = {"seed": 0, "image_size": 8} | dict.fromkeys(AT_LEAST_1, 1)
MORE_THAN_0 = ("learning_rate", "max_grad_norm")
Class = TypeVar("Class", bound=type)
_STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Parameters:
    """Selects the parameters of a class that a command has as options.

    :param owner: the class
    :param title: their heading in the command's help
    :param only: names of parameters that are options; empty: all
    :param skip: names of parameters that are not options, or that the command defines itself
    """

    def __init__(self, owner: type, title: str, *, only: str = "", skip: str = "") -> None:
        self.owner, self.title = owner, title
        self.all, self.hints = _constructor_parameters(owner)
        assert {*only.split(), *skip.split()} <= set(self.all)
        chosen = set(only.split() or self.all) - set(skip.split())
        self.names = [name for name in self.all if name in chosen]


def _constructor_parameters(
    owner: type,
) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """Return a constructor's parameters and their types, including the base class's if `**kwargs`
    are passed there, as jsonargparse does."""
    named: dict[str, inspect.Parameter] = {}
    hints: dict[str, Any] = {}
    for kind in owner.__mro__:
        if "__init__" not in vars(kind):
            continue
        init = vars(kind)["__init__"]
        _, *parameters = inspect.signature(init).parameters.values()  # without self
        named = {p.name: p for p in parameters if p.kind not in _STARRED} | named
        hints = get_type_hints(init) | hints
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
    return named, hints


@dataclass(frozen=True, kw_only=True)
class Options:
    """Serves as the base of the commands' configurations, and checks the range of numbers.

    :raises ValueError: a value can't be used in any run
    """

    taken: ClassVar[tuple[Parameters, ...]] = ()  # from other classes

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # an option taken from another class

    def __post_init__(self) -> None:
        for option in fields(self):
            name, given = option.name, getattr(self, option.name)
            if isinstance(given, (list, tuple)) and not given:
                raise ValueError(f"{name} must not be an empty list")
            for value in given if isinstance(given, (list, tuple)) else [given]:
                if isinstance(value, float) and not math.isfinite(value):
                    raise ValueError(f"{name} must be finite; got {value}")
                if isinstance(value, str) and "\0" in value:
                    raise ValueError(f"{name} must be without NUL characters; got {value!r}")
                if value == "" and name != "title":
                    raise ValueError(f"{name} must not be empty")
            if isinstance(given, int) and given < LEAST.get(name, given):
                raise ValueError(f"{name} must be at least {LEAST[name]}; got {given}")
            if name in MORE_THAN_0 and given is not None and given <= 0:
                raise ValueError(f"{name} must be more than 0; got {given}")
            if name == "seed" and given > LARGEST_SEED:
                raise ValueError(f"seed must be at most {LARGEST_SEED}; got {given}")

    def arguments_of(self, owner: type) -> dict[str, Any]:
        """Return the options that were taken from this class, with their values."""
        (names,) = (parameters.names for parameters in self.taken if parameters.owner is owner)
        return {name: getattr(self, name) for name in names}


def taking(*taken: Parameters) -> Callable[[Class], Class]:
    """Add parameters of other classes to a configuration's own options."""

    def extend(own: Class) -> Class:
        new: list[tuple[str, Any, Any]] = []
        for parameters in taken:
            hints = parameters.hints
            new += [(n, hints[n], parameters.all[n].default) for n in parameters.names]
        namespace = {"__doc__": own.__doc__, "__module__": own.__module__, "taken": taken}
        extended: Any = make_dataclass(
            own.__name__, new, bases=(own,), namespace=namespace, frozen=True, kw_only=True
        )
        return extended

    return extend


@taking(Parameters(RecordingConfig, "recording", skip="task_id"))
@dataclass(frozen=True, kw_only=True)
class DemosConfig(Options):
    """Holds the options of `cfgrl demos`.

    :param task_id: the task, several as [0,2,5], or all; each gets a file of its own
    :param out: folder; files are <out>/<suite>/<task>_demo.hdf5, and never overwritten
    """

    task_id: TaskIds = 0
    out: str = "./demos"


# Parameters of Pi0Policy that commands set themselves, or for which they have their own option.
_NOT_FROM_PI0 = (
    "observation_space action_space lr_schedule preset checkpoint norm_stats cfg_scale horizon "
    "sizes seed model_config base cameras optimizer_class optimizer_kwargs normalize_images "
    "action_width features_extractor_class features_extractor_kwargs features_extractor "
    "squash_output"
)


@taking(
    Parameters(WarmStartConfig, "optimization"),
    Parameters(
        Pi0Policy,
        "policy",
        skip=f"{_NOT_FROM_PI0} num_inference_steps guidance cfg_reference compile_denoising",
    ),
    Parameters(TinySizes, "sizes of a new tiny model", skip="max_action_dim max_state_dim"),
)
@dataclass(frozen=True, kw_only=True)
class SftConfig(Options):
    """Holds the options of `cfgrl sft`.

    :param demos: demonstrations: an HDF5 file, a folder that is searched, or a pattern such as
        'demos/libero_object/*.hdf5'; or several of these as [a,b]
    :param policy: policy folder, run folder or PI0 checkpoint to start from (with preset pi0, also
        a name on the Hugging Face hub). null: a new policy with random weights
    :param preset: tiny (for a CPU) or pi0 (the full 3.3 B model). null: the policy's, else tiny
    :param horizon: action steps that the model predicts. null: the policy's, else 50
    :param norm_stats: openpi's norm_stats.json. null: the policy's own, else computed from the
        demonstrations
    :param std_floor: smallest standard deviation in computed statistics
    :param cameras: cameras of a new tiny model: agentview, robot0_eye_in_hand (on the wrist, and
        cheaper to render without a GPU), or both. null: both
    :param log_every: steps between two rows of the metrics
    :param device: auto, cpu, cuda, ...
    :param out: run folder. null: runs/sft-<date-time>
    """

    demos: str | list[str]
    policy: str | None = None
    preset: Preset | None = None
    horizon: int | None = None
    norm_stats: str | None = None
    std_floor: float = 0.05
    cameras: list[Camera] | None = None
    log_every: int = 50
    device: str = "auto"
    out: str | None = None


@dataclass(frozen=True, kw_only=True)
class PolicyOptions(Options):
    """Holds options for a policy and its environments; sizes that are null are the policy's.

    :param policy: libero_tiny (comes with the package), a policy folder (what save_pretrained
        wrote), the run folder of `cfgrl sft` or `cfgrl train`, or a PI0 checkpoint (with preset
        pi0, also a name on the Hugging Face hub)
    :param preset: tiny or pi0. null: the folder's
    :param norm_stats: openpi's norm_stats.json. null: the policy folder's own
    :param chunk_size: actions executed open loop in one step. null: all that the policy predicts
    :param image_size: side of the camera images in pixels. null: the model's image size
    :param n_envs: number of environments; a worker that dies, hangs or fails is replaced
    :param vec_env: where they run: in processes, one for each processor, or ray (extra [ray]), in
        Ray actors, one for each CPU of the cluster
    :param ray_address: of the Ray cluster, host:port or auto; run on one of its nodes. null: what
        RAY_ADDRESS names, else Ray on this machine alone, listening on 127.0.0.1 only
    :param video: record an episode at the end (eval: a success and a failure, if there are any)
    :param device: auto, cpu, cuda, ...
    """

    policy: str
    preset: Preset | None = None
    norm_stats: str | None = None
    chunk_size: int | None = None
    image_size: int | None = None
    n_envs: int = 1
    vec_env: Literal["processes", "ray"] = "processes"
    ray_address: str | None = None
    video: bool = True
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ray_address is not None and self.vec_env != "ray":
            raise ValueError(
                f"ray_address is for vec_env ray; got {self.ray_address!r} with {self.vec_env!r}"
            )


@taking(
    Parameters(LiberoEnv, "environments", only="suite task_id max_episode_steps init_states"),
    Parameters(Pi0Policy, "policy", skip=_NOT_FROM_PI0),
    Parameters(
        CFGRL,
        "algorithm",
        skip="policy env learning_rate stats_window_size tensorboard_log policy_kwargs verbose "
        "seed device _init_setup_model",
    ),
)
@dataclass(frozen=True, kw_only=True)
class TrainConfig(PolicyOptions):
    """Holds the options of `cfgrl train`.

    :param total_timesteps: environment steps, summed over environments; a chunk of actions is one
        step. The iteration that reaches this number is completed
    :param max_iterations: end after this many iterations, unless total_timesteps is reached before
    :param learning_rate: constant learning rate. null: the policy's own, for its size
    :param eval_every: iterations between evaluations on the benchmark's initial states and with its
        time limit; the first is before training, the last after it. null: no evaluations
    :param eval_episodes: number of initial states of each task to evaluate on, from the first.
        null: all (LIBERO has 50)
    :param eval_cfg_scale: guidance scale in evaluations, or several as [1,1.5]. null: the policy's
        own
    :param save_every: iterations between checkpoints in <out>/checkpoints, from which a run that
        was stopped or killed goes on with --resume. null: only at the end of the run
    :param keep_checkpoints: number of latest checkpoints to keep, besides the best one
    :param seed: seed of all random numbers
    :param out: run folder. null: runs/train-<date-time>
    :param resume: go on with the run in this folder, from its last checkpoint and with its original
        options; only total_timesteps, max_iterations and where environments run may be given
        besides
    """

    total_timesteps: int = 10_000
    max_iterations: int | None = None
    learning_rate: float | None = None
    eval_every: int | None = None
    eval_episodes: int | None = None
    eval_cfg_scale: float | list[float] | None = None
    save_every: int | None = 1
    keep_checkpoints: int = 3
    seed: int = 0
    out: str | None = None
    resume: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_parameters(self.arguments_of(CFGRL))


@taking(
    Parameters(LiberoEnv, "environments", only="suite task_id max_episode_steps"),
    Parameters(
        Pi0Policy, "policy", only="delta_actions num_inference_steps guidance cfg_reference"
    ),
)
@dataclass(frozen=True, kw_only=True)
class EvalConfig(PolicyOptions):
    """Holds the options of `cfgrl eval`.

    :param episodes: number of initial states of each task to evaluate on, from the first. null: all
        (LIBERO has 50)
    :param init_states: exactly these initial states of each task, as [0,7,21], instead of episodes
    :param cfg_scale: guidance scale, or several to compare as [1,1.5,2]. null: the policy's own
    :param seed: seed of the sampling noise; the same for every cfg_scale
    :param out: run folder. null: runs/eval-<date-time>
    :param resume: go on with the evaluation in this folder, with its original options; only where
        environments run may be given besides
    """

    episodes: int | None = None
    init_states: list[int] | None = None
    cfg_scale: float | list[float] | None = None
    seed: int = 0
    out: str | None = None
    resume: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.episodes is not None and self.init_states is not None:
            raise ValueError("episodes and init_states exclude each other; give one of them")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Options):
    """Holds the options of `cfgrl report`.

    :param runs: a folder of `cfgrl train` or `cfgrl eval`, or one that is searched for them; or
        several as [a,b]. They may also be given without --runs: cfgrl report RUN RUN
    :param out: the HTML file; it replaces an earlier report, but no other file
    :param title: heading of the page
    :param embed_videos: put the videos themselves into the page beside their frames
    """

    runs: str | list[str]
    out: str = "report.html"
    title: str = "cfgrl-gym report"
    embed_videos: bool = False
