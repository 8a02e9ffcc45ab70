"""Ends a run on Ctrl-C or SIGTERM at a point where nothing is lost."""

import signal
import sys
from types import FrameType
from typing import Any


class Stopped(Exception):
    """Raised when a run was asked to end.

    :param number: the signal's number
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class StopRequests:
    """Records Ctrl-C and SIGTERM, so that a run can save its state before it ends.

    Until `defer` is called they end the run at once. After that it goes on to its next `check`, and
    only a second signal ends it at once. The signal is recorded because Python can lose the
    exception, for example if the signal comes during a finalizer.
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
        """Let the run go on to its next `check` after a signal, from now on.

        :raises Stopped: a signal has already come
        """
        self._deferred = True
        self.check()

    def check(self) -> None:
        """Do nothing, unless the run was asked to end.

        :raises Stopped: a signal has come
        """
        if self.received is not None:
            raise Stopped(self.received)
