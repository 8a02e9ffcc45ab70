"""What Ctrl-C does to the process that workers are forked from, and to workers that begin.

The server imports this before anything else; no other process does. Without it, a Ctrl-C while
workers import the user's script, before they can decline it, ends them with a traceback each.
"""

import multiprocessing
import os
import signal
import sys
from types import FrameType

_SERVER = os.getpid()
_WORKER_MODULE = "cfgrl_gym.algorithms.vec_envs.worker"


def _leave_to_parent(number: int, frame: FrameType | None) -> None:
    """Ignore the signal, but not in processes that others have the same server fork."""
    worker = sys.modules.get(_WORKER_MODULE)
    mine = worker is not None and multiprocessing.current_process().name == worker.PROCESS_NAME
    if not mine and os.getpid() != _SERVER:
        signal.default_int_handler(number, frame)


signal.signal(signal.SIGINT, _leave_to_parent)
