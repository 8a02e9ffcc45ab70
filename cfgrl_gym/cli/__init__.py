"""Implements the command line, `cfgrl`: demos, warm start, training, evaluation, reports, checks.

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

# Errors that a user can fix, whose messages say how. Any other error is shown with its traceback.
_EXPECTED = (
    ValueError,
    OSError,
    MemoryError,
    FloatingPointError,
    LiberoNotInstalledError,
    RenderingUnavailableError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return the exit status.

    :param argv: arguments without the program's name; None takes those of this process
    """
    try:
        return parse(sys.argv[1:] if argv is None else argv)()
    except Stopped as stopped:
        return _end(str(stopped), 128 + stopped.number)
    except KeyboardInterrupt:
        return _end("interrupted", INTERRUPTED)
    except (EOFError, ConnectionError, *_EXPECTED) as error:
        lost = isinstance(error, (EOFError, ConnectionError))
        if lost and _follows_interrupt(error):  # Ctrl-C ends the environment processes too
            return _end("interrupted", INTERRUPTED)
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        if lost:  # the message is a worker's own traceback, with its lines
            return _end(f"error: {error or 'an environment process died'}", USAGE_ERROR)
        return _end(f"error: {' '.join((str(error) or repr(error)).split())}", USAGE_ERROR)


def _follows_interrupt(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


def _end(message: str, status: int) -> int:
    print(f"cfgrl: {message}", file=sys.stderr)
    return status
