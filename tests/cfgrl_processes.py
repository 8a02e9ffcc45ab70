"""`cfgrl` as a process of its own, and waiting for what it does."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

PATIENCE = 300  # seconds, on a busy machine


def cfgrl(*words: str, **options: Any) -> "subprocess.Popen[str]":
    # A shell's background jobs ignore Ctrl-C, and what they start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(
        [sys.executable, "-m", "cfgrl_gym", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **options,
    )


def wait_until(happened: Callable[[], Any], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
