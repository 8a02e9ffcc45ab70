"""Ending a run by Ctrl-C or SIGTERM where nothing is lost."""

import signal
import sys
from types import FrameType
from typing import Any


class Stopped(Exception):
    """A run was asked to end.

    :param number: of the signal
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class StopRequests:
    """Notes Ctrl-C and SIGTERM. They end the run at once, until `defer` says that it has a state to
    save: then it goes on to a point where it can, and a second one ends it at once.

    Python loses an exception of a signal that comes in a finalizer, for one; what was noted stays.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        if not self._deferred:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        name = signal.Signals(number).name
        print(
            f"\n{name}: saving and ending (at once, without saving, if it comes again)",
            file=sys.stderr,
            flush=True,
        )

    def defer(self) -> None:
        """Let the run go on to its next `check` from now on.

        :raises Stopped: a signal has come before
        """
        self._deferred = True
        self.check()

    def check(self) -> None:
        """Do nothing, unless the run is asked to end.

        :raises Stopped: a signal has come
        """
        if self.received is not None:
            raise Stopped(self.received)
