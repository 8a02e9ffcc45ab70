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
    """Within, the first Ctrl-C or SIGTERM is noted in `received` and the run goes on to a point
    where it can save its state; a second one ends it at once, as they usually do."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None
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
        name = signal.Signals(number).name
        print(
            f"\n{name}: saving and ending (at once, without saving, if it comes again)",
            file=sys.stderr,
            flush=True,
        )

    def check(self) -> None:
        """Do nothing, unless the run is asked to end.

        :raises Stopped: a signal has come
        """
        if self.received is not None:
            raise Stopped(self.received)
