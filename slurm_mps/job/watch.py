"""The watch of a process: it ends the process when its time is over, even where the process hangs."""

from __future__ import annotations

import _thread
import os
from time import monotonic, sleep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_POLL_SECONDS = 0.1
_LAST_WORDS_SECONDS = 0.5
#: Shares of the whole time: what is brought up must be so after the first, and what is undone after the second.
BRING_UP_SHARE, UNDO_SHARE = 0.6, 0.9


class Watch:
    """Ends this process when its time is over, even if it hangs where no other deadline reaches: in the driver, in a
    write that nobody reads. Counts from the start of the hook; the site's deadline may come later than the default.
    """

    def __init__(self, seconds: float, give_up: Callable[[str], int]) -> None:
        self._started = monotonic()
        self._seconds = seconds
        self._give_up = give_up
        _thread.start_new_thread(self._wait, ())

    def set(self, seconds: float) -> None:
        self._seconds = seconds

    def restart(self, seconds: float) -> None:
        """Give the next piece of work a time of its own."""
        self._started = monotonic()
        self._seconds = seconds

    @property
    def left(self) -> float:
        """Seconds until what is brought up must be so."""
        return max(0.0, self.at(BRING_UP_SHARE) - monotonic())

    @property
    def spent(self) -> float:
        """Seconds since the start, without Python's own."""
        return monotonic() - self._started

    def at(self, share: float) -> float:
        """The monotonic time at which this share of the whole time is over."""
        return self._started + share * self._seconds

    def _until_last_words(self) -> float:
        reserved = min(_LAST_WORDS_SECONDS, (1 - UNDO_SHARE) * self._seconds)
        return self.at(1.0) - reserved - monotonic()

    def _wait(self) -> None:
        while (left := self._until_last_words()) > 0:
            sleep(min(left, _POLL_SECONDS))
        status = [1]
        done = _thread.allocate_lock()
        done.acquire()

        def last_words() -> None:
            status[0] = self._give_up(f"not done after {self._seconds:g} s; the NVIDIA driver may hang")
            done.release()

        _thread.start_new_thread(last_words, ())
        done.acquire(timeout=_LAST_WORDS_SECONDS)
        os._exit(status[0])
