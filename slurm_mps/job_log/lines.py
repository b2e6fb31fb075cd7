"""Lines of control.log and server.log. Pure.

[2026-11-23 02:13:43.580 Server   589] Client {PID: 586, Context: 1} encountered a fatal GPU error.
"""

from __future__ import annotations

from collections.abc import Iterator
from time import mktime

from ..record import record
from ..units import small_number

_TEXT_MAX = 400
_MINUTE = len("[2026-11-23 02:13")
_SECONDS = len("[2026-11-23 02:13:43.580")


@record
class Line:
    """One line: when (seconds since 1970), which of NVIDIA's programs, its pid, and what it says."""

    seconds: float
    who: str
    pid: int
    text: str


def parse_lines(data: bytes) -> Iterator[Line]:
    """The lines of a log. Other text, such as the half line that a tail begins with, is left out."""
    minutes: dict[str, float] = {}
    for raw in data.decode("ascii", "replace").split("\n"):
        head, bracket, text = raw.partition("] ")
        minute, seconds = head[1:_MINUTE], head[_MINUTE + 1 : _SECONDS]
        who, _, pid = head[_SECONDS + 1 :].partition(" ")
        number = small_number(pid.strip())
        if not bracket or number is None or who not in ("Control", "Server", "Other"):
            continue
        try:
            if minute not in minutes:
                minutes[minute] = _minute(minute)
            when = minutes[minute] + float(seconds)
        except (ValueError, OverflowError):
            continue
        yield Line(when, who, number, text[:_TEXT_MAX])


def _minute(text: str) -> float:
    """``2026-11-23 02:13`` of the node's clock, in seconds since 1970; strptime would cost more than all the rest.

    Raises: ValueError, OverflowError.
    """
    day, _, time = text.partition(" ")
    year, month, mday = map(int, day.split("-"))
    hour, minute = map(int, time.split(":"))
    return mktime((year, month, mday, hour, minute, 0, 0, 0, -1))
