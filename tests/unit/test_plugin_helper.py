"""How the plugin takes the end of a program that it started: only what it knows of it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from pathlib import Path

import pytest

SPANK = Path(__file__).parents[2] / "spank"
LATE, DIED = -1, -2  # spank/helper.h


@pytest.fixture(scope="module")
def helper(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("helper") / "helper.so"
    flags = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-g", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, "-o", library, SPANK / "helper.c"], check=True)
    return ctypes.CDLL(str(library))


def start(helper: ctypes.CDLL, script: str) -> int:
    arguments = (ctypes.c_char_p * 4)(b"/bin/sh", b"-c", script.encode(), None)
    environment = (ctypes.c_char_p * 2)(b"PATH=/usr/bin:/bin", None)
    pid: int = helper.helper_start(os.geteuid(), arguments, environment, -1)
    assert pid > 0
    return pid


def end(helper: ctypes.CDLL, pid: int, tries: int = 1000) -> int:
    status: int = helper.helper_end(pid, ctypes.byref(ctypes.c_int(tries)))
    return status


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", DIED)])
def test_a_helper_ends_as_it_did(helper: ctypes.CDLL, script: str, status: int) -> None:
    assert end(helper, start(helper, script)) == status


def test_one_that_is_late_is_killed(helper: ctypes.CDLL) -> None:
    pid = start(helper, "sleep 60")
    assert end(helper, pid, tries=5) == LATE
    try:  # on a busy machine the kill takes longer than the plugin waits for it
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    except ChildProcessError:
        pass


def test_one_that_was_never_started_died(helper: ctypes.CDLL) -> None:
    assert end(helper, -1) == DIED


@pytest.mark.parametrize("tries", [0, 1000])
def test_one_that_somebody_else_waited_for_was_not_late(helper: ctypes.CDLL, tries: int) -> None:
    """A plugin with a thread, say: what it found is not known, and no server is blamed for it."""
    pid = start(helper, "exit 0")
    os.waitpid(pid, 0)
    assert end(helper, pid, tries) == DIED
