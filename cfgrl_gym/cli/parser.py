"""From a command line to the function to call, with all options checked."""

import argparse
import contextlib
import importlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import jsonargparse
import yaml

from cfgrl_gym._version import __version__
from cfgrl_gym.cli import configs

CONFIG_FILE = "config.yaml"  # that a run folder holds
_CHANGED_BY_RESUMING = ("--total_timesteps", "--max_iterations")
LARGEST_FILE = 2**20  # bytes of a configuration file
LONGEST_MESSAGE = 1000
_CONFIG_HELP = "YAML file with any of the options below; the command line overrides it"

# jsonargparse's messages in one line, without Python's names for types.
_PLAINER = (
    (
        r"Does not validate against any of the Union subtypes Subtypes: \[(.*)\] Errors: .*"
        r"Given value: ",
        r"Expected one of \1. Got value: ",
    ),
    (r"<class '(\w+)'>", r"\1"),
    (r"typing\.Literal", "Literal"),
    (r"NoneType", "null"),
)


@dataclass(frozen=True)
class Command:
    """A subcommand: its module has `run(config)`.

    `words` is the option that takes what stands on the command line without an option's name.
    """

    name: str
    summary: str
    description: str
    example: str
    config: type | None
    words: str | None = None


COMMANDS = (
    Command(
        "demos",
        "record scripted demonstrations",
        "Record demonstrations of a scripted pick-and-place expert on real LIBERO, in LIBERO's "
        "HDF5 format,\none file for each task. The expert knows the tasks of libero_object and "
        "others of that kind.",
        "cfgrl demos --suite libero_object --task_id [0,5] --demos 50 --image_size 112 --workers 4",
        configs.DemosConfig,
    ),
    Command(
        "sft",
        "fit a policy to demonstrations (warm start)",
        "Supervised warm start: flow matching on demonstrations, the project's or LIBERO's own.\n"
        "The policy is saved under <out>/policy, with its normalisation statistics.",
        "cfgrl sft --demos demos/libero_object --horizon 16 --steps 3000 --out runs/sft",
        configs.SftConfig,
    ),
    Command(
        "train",
        "train a policy with CFGRL",
        "Reinforcement learning by classifier-free guidance, from a policy that succeeds now and "
        "then.\nWrites <out>/policy, <out>/model.zip (Stable-Baselines3), metrics, TensorBoard "
        "events and a video.",
        "cfgrl train --policy runs/sft --task_id 0 --n_envs 8 --total_timesteps 20000",
        configs.TrainConfig,
    ),
    Command(
        "eval",
        "measure a policy's success rate",
        "Success rate over the benchmark's initial states, with its 95% Wilson interval.\n"
        "Writes every episode to <out>/eval.json, and a video of the first.",
        "cfgrl eval --policy runs/train --task_id 0 --episodes 20 --cfg_scale [1,1.5,2,3]",
        configs.EvalConfig,
    ),
    Command(
        "report",
        "turn runs into one HTML page",
        "One self-contained HTML page of trainings and evaluations: success before and after with "
        "95%\nintervals, learning curves, guidance sweeps, ablations, where the time goes, checks, "
        "filmstrips,\nconfigurations. It opens from disk, without a network, and holds its figures "
        "as JSON too.\nTrainings that differ only in their seed are pooled. An evaluation inside a "
        "training's folder came\nafter it; one of the policy that a training started from was "
        "before it.",
        "cfgrl report runs/study --out report.html --title 'Dropout on libero_object'",
        configs.ReportConfig,
        words="runs",
    ),
    Command(
        "doctor",
        "check the installation",
        "Check the installation piece by piece, and say how to put right what is wrong.\n"
        "The exit status is 1 if something is.\n\n"
        "With --exactness, the simulator is also held against LIBERO's own OffScreenRenderEnv on "
        "this machine:\nthe same actions on one task of each suite (libero_spatial, _object, "
        "_goal, _10, _90, and one of\nLIBERO-PRO), state, success and observations compared bit "
        "for bit at every step, and images.",
        "cfgrl doctor --exactness",
        None,
    ),
)


class _Formatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions and examples keep their line breaks."""


class _Parser(jsonargparse.ArgumentParser):
    """Says in one line what is wrong, and exits with status 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        prog = parser.prog.replace(" [options]", "")
        text = " ".join(message.split()).replace("Parser key ", "option ")
        for pattern, replacement in _PLAINER:
            text = re.sub(pattern, replacement, text)
        _refuse(text, prog)


def _refuse(text: str, prog: str) -> NoReturn:
    shown = text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}..."
    print(f"cfgrl: error: {shown} (see {prog} --help)", file=sys.stderr)
    sys.exit(2)


def _check_file(name: str) -> None:
    """A configuration file, before anything is made of it.

    :raises ValueError: too big, or with aliases: a few lines of them are more than any memory holds
    :raises OSError: it can't be read
    """
    path = Path(name)
    if not path.is_file():
        return  # said by who reads it
    with path.open("rb") as file:
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise ValueError(f"it has more than {LARGEST_FILE} bytes")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in Python can take minutes
    with contextlib.suppress(yaml.YAMLError):  # also said by who reads it
        events = yaml.parse(content.decode(), Loader=loader)
        if any(isinstance(event, yaml.AliasEvent) for event in events):
            raise ValueError("it has YAML aliases (*name), which are not supported")


def _metavar(command: Command) -> str:
    return f"{command.words.upper()[:-1]}... " if command.words else ""


def build_parser() -> jsonargparse.ArgumentParser:
    """The parser of `cfgrl` with all its subcommands."""
    parser = _Parser(
        prog="cfgrl",
        formatter_class=_Formatter,
        allow_abbrev=False,
        version=__version__,
        description="CFGRL for PI0 on LIBERO: demonstrations, warm start, training, evaluation, "
        "reports.",
        epilog="The environment variable CFGRL_TRACEBACK=1 shows tracebacks of errors.",
    )
    commands = parser.add_subcommands(required=True, dest="command", metavar="command")
    for command in COMMANDS:
        sub = _Parser(
            formatter_class=_Formatter,
            allow_abbrev=False,
            usage=f"cfgrl {command.name} {_metavar(command)}[options]",
            description=command.description,
            epilog=f"example:\n  {command.example}",
        )
        if command.config is None:
            sub.add_argument("--json", action="store_true", help="print JSON instead of lines")
            sub.add_argument(
                "--exactness",
                action="store_true",
                help="compare the simulator with LIBERO's own as well (one to three minutes)",
            )
        else:
            sub.add_argument("--config", action="config", metavar="FILE", help=_CONFIG_HELP)
            sub.add_class_arguments(command.config, None)
        commands.add_subcommand(command.name, sub, help=command.summary)
    return parser


def parse(argv: Sequence[str]) -> Callable[[], int]:
    """The checked command, ready to run; it returns the exit status.

    :raises SystemExit: with status 2 for a command line that is wrong, 0 after --help
    """
    parser = build_parser()
    words = _resume(_name_words(_arrange(argv)))
    for option, value in zip(words, [*words[1:], ""], strict=False):
        name, _, file = option.partition("=")
        if name == "--config":
            try:
                _check_file(file or value)
            except (ValueError, OSError, RecursionError) as error:
                _refuse(f"configuration file '{file or value}': {error}", f"cfgrl {words[0]}")
    try:
        arguments = parser.parse_args(words)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, for one
        _refuse(str(error), "cfgrl")
    command = next(c for c in COMMANDS if c.name == arguments.command)
    values = arguments[command.name]
    config: Any = None
    if command.config is not None:
        try:
            config = _configuration(command.config, values)
        except ValueError as error:
            _refuse(str(error), f"cfgrl {command.name}")

    def run() -> int:
        module = importlib.import_module(f"cfgrl_gym.cli.{command.name}")
        if config is None:
            status: int = module.run(as_json=values.json, exactness=values.exactness)
            return status
        module.run(config)
        return 0

    return run


def _configuration(kind: type, values: Any) -> Any:
    given = {}
    for name, hint in get_type_hints(kind).items():
        given[name], allowed = values[name], get_args(hint)
        # jsonargparse lets null through for any type
        if given[name] is None and type(None) not in allowed:
            if "null" not in allowed:
                raise ValueError(f"{name} must not be null")
            given[name] = "null"  # a word that YAML reads as nothing, such as negatives: null
    return kind(**given)


def _arrange(argv: Sequence[str]) -> list[str]:
    """Configuration files first, so that options override them; --n-envs is --n_envs."""
    files: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            word = "--" + name[2:].replace("-", "_") + equals + value
            if name == "--config":
                files += [word] if equals else [word, *[w for w in [next(words, None)] if w]]
                continue
        rest.append(word)
    return rest[:1] + files + rest[1:]


def _resume(argv: list[str]) -> list[str]:
    """`train --resume RUN` as that, with the run's own configuration file."""
    given = [word for word in argv if word.partition("=")[0] == "--resume"]
    if argv[:1] != ["train"] or not given:
        return argv
    place = argv.index(given[0])
    value = given[0].partition("=")[2] or "".join(argv[place + 1 : place + 2])
    names = {word.partition("=")[0] for word in argv[1:] if word.startswith("--")}
    others = sorted(names - {"--resume", *_CHANGED_BY_RESUMING, "--help"})
    file = Path(value) / CONFIG_FILE
    problem = None
    if others:
        allowed = " and ".join(_CHANGED_BY_RESUMING)
        problem = (
            f"--resume goes on with the options that the run began with; beside it only {allowed} "
            f"can be given, not {', '.join(others)}"
        )
    elif "--help" not in names and not file.is_file():
        problem = f"no run to resume: '{file}' does not exist; give a folder that train wrote"
    if problem is not None:
        _refuse(problem, "cfgrl train")
    return ["train", "--config", str(file), *argv[1:]] if "--help" not in names else argv


def _name_words(argv: list[str]) -> list[str]:
    """`report A B --out C` as `report --out C --runs ["A", "B"]`."""
    command = next((c for c in COMMANDS if c.words and c.name in argv[:1]), None)
    if command is None:
        return argv
    words: list[str] = []
    rest: list[str] = []
    arguments = iter(argv[1:])
    for argument in arguments:
        if not argument.startswith("-"):
            words.append(argument)
            continue
        rest.append(argument)
        valued = argument.startswith("--") and "=" not in argument
        if valued and argument not in ("--help", "--print_config"):
            rest += [value for value in [next(arguments, None)] if value is not None]
    if not words:
        return argv
    given = [a for a in rest if a.partition("=")[0].rstrip("+") == f"--{command.words}"]
    if given:
        text = f"give all of {command.words} in one way, not {words[0]!r} and {given[0]} both"
        _refuse(text, f"cfgrl {command.name}")
    return [command.name, *rest, f"--{command.words}", json.dumps(words)]
