"""The command line, `cfgrl`: demonstrations, warm start, training, evaluation, reports, a check-up.

Each command is a function of one typed configuration: `cfgrl_gym.cli.train.run(TrainConfig(...))`.
"""

import os
import sys
from collections.abc import Sequence

from cfgrl_gym.cli.parser import parse
from cfgrl_gym.cli.stopping import Stopped
from cfgrl_gym.envs.installation import LiberoNotInstalledError
from cfgrl_gym.envs.render_backend import RenderingUnavailableError

TRACEBACK_VARIABLE = "CFGRL_TRACEBACK"
USAGE_ERROR, INTERRUPTED = 2, 130

# What a user can put right, with a message that says how. Anything else keeps its traceback.
_EXPECTED = (
    ValueError,
    OSError,
    MemoryError,
    FloatingPointError,
    LiberoNotInstalledError,
    RenderingUnavailableError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status.

    :param argv: without the program's name; None takes this process's
    """
    try:
        return parse(sys.argv[1:] if argv is None else argv)()
    except KeyboardInterrupt:
        return _interrupted()
    except (EOFError, ConnectionError) as error:
        if _follows_interrupt(error):  # Ctrl-C ends the environment processes too
            return _interrupted()
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        # A worker's own traceback, with its lines
        print(f"cfgrl: error: {error or 'an environment process died'}", file=sys.stderr)
        return USAGE_ERROR
    except Stopped as stopped:
        print(f"cfgrl: {stopped}", file=sys.stderr)
        return 128 + stopped.number
    except _EXPECTED as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        return _report(str(error) or repr(error))


def _follows_interrupt(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


def _interrupted() -> int:
    print("cfgrl: interrupted", file=sys.stderr)
    return INTERRUPTED


def _report(message: str) -> int:
    print(f"cfgrl: error: {' '.join(message.split())}", file=sys.stderr)
    return USAGE_ERROR
