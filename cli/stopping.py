"""Handle SIGINT and SIGTERM: the first signal makes a command save its work and stop, the second
one stops it at once."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

__all__ = ["StopWhenDone", "Stopped", "stop_at_once"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal asked the program to stop.

    Args:
        number: the number of the signal; the exit status is 128 more.
        hint: the message for the user.
    """

    def __init__(self, number: int, hint: str = "stopped") -> None:
        super().__init__(hint)
        self.number = number


def _raise(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


def stop_at_once() -> None:
    """Make each signal raise `Stopped` from now on."""
    for number in SIGNALS:
        signal.signal(number, _raise)


class StopWhenDone:
    """A context in which the first signal makes calls of this object return True.

    The second signal raises `Stopped`.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self) -> bool:
        return self.number is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            raise Stopped(number)
        self.number = number

    def __enter__(self) -> StopWhenDone:
        self.before: Any = [signal.signal(number, self._note) for number in SIGNALS]
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in zip(SIGNALS, self.before, strict=True):
            signal.signal(number, handler)
