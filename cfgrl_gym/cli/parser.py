"""Parses a command line into the function to call, with all options checked."""

import argparse
import contextlib
import importlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import jsonargparse
import yaml

from cfgrl_gym._version import __version__
from cfgrl_gym.cli.run_folder import CONFIG_FILE

_PLACES = ("--vec_env", "--ray_address")  # where environments run
# Of the commands that have --resume, what may be given beside it.
_CHANGED_BY_RESUMING = {
    "train": ("--total_timesteps", "--max_iterations", *_PLACES),
    "eval": _PLACES,
}
_FLAGS = ("--help", "--print_config")  # take no value
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
    (r"Parser key ", "option "),
    (r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1"),
    (r"(?:typing|collections\.abc)\.(\w+)", r"\1"),
    (r"NoneType", "null"),
)


# The module of this name has the command's `run`, and its docstring the rest of its help.
COMMANDS = {
    "demos": "record scripted demonstrations",
    "sft": "fit a policy to demonstrations (warm start)",
    "train": "train a policy with CFGRL",
    "eval": "measure a policy's success rate",
    "report": "turn runs into one HTML page",
    "doctor": "check the installation",
}


class _Formatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Formats help with the line breaks of descriptions and examples, and values as in YAML."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = super()._get_help_string(action) or ""
        for python, in_yaml in (("None", "null"), ("True", "true"), ("False", "false")):
            text = re.sub(rf"\b{python}\b", in_yaml, text)
        return text


class _Parser(jsonargparse.ArgumentParser):
    """Reports an error in one line and exits with status 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        _refuse(message, self.prog)


def _refuse(message: str, prog: str) -> NoReturn:
    text = " ".join(message.split())
    for pattern, replacement in _PLAINER:
        text = re.sub(pattern, replacement, text)
    shown = text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}..."
    print(f"cfgrl: error: {shown} (see {prog} --help)", file=sys.stderr)
    sys.exit(2)


def build_parser() -> jsonargparse.ArgumentParser:
    """Make the parser of `cfgrl` itself, which knows the commands but not their options."""
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
    for name, summary in COMMANDS.items():
        commands.add_subcommand(name, _Parser(), help=summary)
    return parser


def _command_parser(name: str, description: str, config: Any) -> jsonargparse.ArgumentParser:
    prog = f"cfgrl {name}"
    parser = _Parser(
        prog=prog,
        formatter_class=_Formatter,
        allow_abbrev=False,
        usage=f"{prog} {'RUN... ' if name == 'report' else ''}[options]",
        description=description,
    )
    if config is None:
        parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
        parser.add_argument(
            "--exactness",
            action="store_true",
            help="compare the simulator with LIBERO's own as well (one to three minutes)",
        )
        return parser
    parser.add_argument("--config", action="config", metavar="FILE", help=_CONFIG_HELP)
    taken = {name for parameters in config.taken for name in parameters.names}
    parser.add_argument_group(prog).add_class_arguments(config, None, as_group=False, skip=taken)
    for parameters in config.taken:
        group = parser.add_argument_group(parameters.title)
        skip = set(parameters.all) - set(parameters.names)
        group.add_class_arguments(parameters.owner, None, as_group=False, skip=skip)
    return parser


def parse(argv: Sequence[str]) -> Callable[[], int]:
    """Return a function that runs the checked command and returns the exit status.

    :raises SystemExit: with status 2 for an invalid command line, 0 after --help
    """
    name = build_parser().parse_args(argv[:1]).command
    module = importlib.import_module(f"cfgrl_gym.cli.{name}")
    kind: Any = None
    if name != "doctor":  # which works without torch
        kind = getattr(importlib.import_module("cfgrl_gym.cli.configs"), f"{name.title()}Config")
    parser = _command_parser(name, module.__doc__ or "", kind)
    config: Any = None
    try:
        values = parser.parse_args(_arrange(name, argv[1:]))
        if kind is not None:
            config = _configuration(kind, values)
    except (ValueError, OSError, RecursionError) as error:
        _refuse(str(error), parser.prog)

    def run() -> int:
        if config is None:
            return int(module.run(as_json=values.json, exactness=values.exactness))
        module.run(config)
        return 0

    return run


def _configuration(kind: Any, values: jsonargparse.Namespace) -> Any:
    given, hints = {}, get_type_hints(kind)
    for option in fields(kind):
        value, allowed = values[option.name], get_args(hints[option.name])
        # jsonargparse lets null through for any type
        if value is None and type(None) not in allowed:
            if "null" not in allowed:
                raise ValueError(f"{option.name} must not be null")
            value = "null"  # the word that YAML reads as None, as in negatives: null
        given[option.name] = value
    return kind(**given)


def _arrange(command: str, argv: Sequence[str]) -> list[str]:
    """Return the command line in the form that jsonargparse takes.

    Configuration files come first, so that options override them; --n-envs is --n_envs; `report A
    B` is `report --runs ["A", "B"]`; `train --resume RUN` has the run's own configuration file.

    :raises ValueError: options don't go together, or a file can't be read
    """
    options, words = _split(argv)
    names = {name for name, _ in options}
    if "--help" in names:
        return ["--help"]
    if command == "report" and words:
        if names & {"--runs", "--runs+"}:
            raise ValueError(f"give all of runs in one way, not {words[0]!r} and --runs both")
        options, words = [*options, ("--runs", json.dumps(words))], []
    if command in _CHANGED_BY_RESUMING and "--resume" in names:
        options.insert(0, ("--config", _config_to_resume(command, dict(options))))
    options.sort(key=lambda option: option[0] != "--config")
    for name, file in options:
        if name == "--config" and file:
            try:
                _check_file(Path(file))
            except (ValueError, OSError, RecursionError) as error:
                raise ValueError(f"configuration file '{file}': {error}") from error
    arranged = [name if value is None else f"{name}={value}" for name, value in options]
    return [*arranged, *words]


def _split(argv: Sequence[str]) -> tuple[list[tuple[str, str | None]], list[str]]:
    """Return options with their values, None for those without one, and the words that are left."""
    options: list[tuple[str, str | None]] = []
    words: list[str] = []
    for text in argv:
        last, value = options[-1] if options else ("", "")
        if text.startswith("--"):
            name, equals, given = text.partition("=")
            options.append((f"--{name[2:].replace('-', '_')}", given if equals else None))
        elif value is None and last not in _FLAGS:
            options[-1] = last, text
        elif text == "-h":
            options.append(("--help", None))
        else:
            words.append(text)
    return options, words


def _config_to_resume(command: str, given: dict[str, str | None]) -> str:
    """Return the configuration file of the run to resume.

    :raises ValueError: there is none, or options are given that a resumed run can't change
    """
    changed = _CHANGED_BY_RESUMING[command]
    others = sorted(set(given) - {"--resume", *changed})
    if others:
        allowed = ", ".join(changed)
        raise ValueError(
            f"--resume goes on with the options that the run began with; beside it only {allowed} "
            f"can be given, not {', '.join(others)}"
        )
    file = Path(given["--resume"] or "") / CONFIG_FILE
    if not file.is_file():
        raise ValueError(
            f"no run to resume: '{file}' does not exist; give a folder that {command} wrote"
        )
    return str(file)


def _check_file(path: Path) -> None:
    """Refuse a configuration file that could take jsonargparse minutes to read, or all memory.

    :raises ValueError: it is too big, or has aliases, a few lines of which can fill any memory
    :raises OSError: it can't be read
    """
    if not path.is_file():
        return  # jsonargparse says so
    with path.open("rb") as file:
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise ValueError(f"it has more than {LARGEST_FILE} bytes")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in Python can take minutes
    with contextlib.suppress(yaml.YAMLError):  # jsonargparse says so
        events = yaml.parse(content.decode(), Loader=loader)
        if any(isinstance(event, yaml.AliasEvent) for event in events):
            raise ValueError("it has YAML aliases (*name), which are not supported")
