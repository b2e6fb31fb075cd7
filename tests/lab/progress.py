"""How far a long command is, said every few seconds."""

from __future__ import annotations

import time

EVERY_SECONDS = 10.0


class Progress:
    """Prints what it is given, when the last line is EVERY_SECONDS old."""

    def __init__(self, command: str) -> None:
        self._command = command
        self._began = self._last = time.monotonic()

    def say(self, text: str) -> None:
        """Print at once."""
        self._last = time.monotonic()
        print(f"{self._command}: [{self._last - self._began:.0f} s] {text}", flush=True)

    def at(self, text: str) -> None:
        if time.monotonic() - self._last >= EVERY_SECONDS:
            self.say(text)
