"""Ranks of a step begin what is measured at the same time. Standard library alone: it runs inside jobs."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_LEAD_SECONDS = 0.3  # from the last rank's coming to the window
_PATIENCE_SECONDS = 90.0


def meet(place: Path, ranks: int) -> float:
    """Wait for all `ranks`, each of which adds a byte to the file `place`.

    Returns: the time (since the epoch) at which the window opens, the same for each, set by who came last.
    Raises: TimeoutError when somebody does not come.
    """
    os.umask(0)  # another user's rank adds its byte to the same file
    with place.open("ab", buffering=0) as file:
        file.write(b".")
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while (status := place.stat()).st_size < ranks:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{place}: {status.st_size} of {ranks} ranks came in {_PATIENCE_SECONDS:g} s")
        time.sleep(0.01)
    return status.st_mtime + _LEAD_SECONDS
