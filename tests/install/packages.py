"""The packages of this checkout, built once in a run of the tests, by whichever process of it asks first."""

from __future__ import annotations

import fcntl
import os
import subprocess
from typing import TYPE_CHECKING

from tests.harness.cluster import REPOSITORY

if TYPE_CHECKING:
    from pathlib import Path

#: The same in all processes of a run: pytest-xdist says which run it is.
_RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID") or str(os.getpid())


def package(kind: str) -> Path:
    """The path of the ``deb`` or ``rpm``; `make`'s last line is the path of what it built."""
    build = REPOSITORY / "build"
    note = build / f"{kind}-of-this-run"
    with (build / "packages.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        run, _, path = note.read_text().partition("\n") if note.exists() else ("", "", "")
        if run != _RUN:
            line = ["make", "-s", kind]
            done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, f"{done.stdout}{done.stderr}"
            path = done.stdout.splitlines()[-1]
            note.write_text(f"{_RUN}\n{path}")
    return REPOSITORY / path
