"""A hook that dies or fails anywhere: what it changed is on disk before it is changed, so the next one puts it back.

The points are found, not listed: a small library in front of libc (tests/torture/strike.c) counts the calls by which a
hook changes something, and at the one asked for kills the process or makes the call fail.
"""

from __future__ import annotations

import shutil
import signal
from dataclasses import dataclass
from time import monotonic, sleep
from typing import TYPE_CHECKING

import pytest

from tests.harness.gpunode import EPILOG, PROLOG, GpuNode, asked, job_environment
from tests.harness.site import STATE_DIRECTORY
from tests.torture.strike import LIBRARY, LOG, build_library

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.harness.machine import Result

BRINGS_UP = "mkdirat renameat fsetxattr posix_spawn poll"
TAKES_DOWN = "unlinkat renameat posix_spawn poll"
NEEDS_ROOM = "mkdirat renameat fsetxattr write"
ENOSPC, EAGAIN = 28, 11
SHORT = "[deadlines]\nquit = 0.5\nsignal = 0.5\n"


@dataclass
class StruckNode:
    """A node whose hooks can be struck at any call that changes something."""

    node: GpuNode

    def run(self, script: str, on: str, **settings: int) -> Result:
        self.node.machine.path(LOG).unlink(missing_ok=True)
        words = [f"LD_PRELOAD={LIBRARY}", f"STRIKE_LOG={LOG}", f"STRIKE_ON={on}"]
        words += [f"STRIKE_{name.upper()}={value}" for name, value in settings.items()]
        return self.node.run("env", *words, script, env=job_environment(4711, gpus="0", **asked("25", "8G")))

    def calls(self, script: str, on: str) -> list[str]:
        """What an undisturbed run of the script calls, in order."""
        self.run(script, on).check()
        return self.node.machine.read(LOG).split()

    def assert_as_before(self, what: str) -> None:
        assert (self.node.files(), self.node.mps_processes()) == ([], []), what
        assert self.node.compute_modes() == [2, 0], what


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_library(tmp_path_factory.mktemp("strike"))


@pytest.fixture
def struck_node(library: Path) -> Iterator[StruckNode]:
    with GpuNode(gpus=2) as node:
        shutil.copy(library, node.machine.path(LIBRARY))
        node.set_compute_modes(2)
        node.configure(SHORT)
        node.prolog(1).check()  # makes the state directory and compiles the configuration
        node.epilog(1).check()
        yield StruckNode(node)


def eventually(condition: Callable[[], bool]) -> bool:
    end = monotonic() + 20
    while monotonic() < end:
        if condition():
            return True
        sleep(0.005)
    return False


# ----------------------------------------------------------------------------------------------- at every change


@pytest.mark.parametrize("then", ["epilog", "prolog"])
def test_wherever_the_prolog_is_killed_the_next_hook_puts_everything_right(struck_node: StruckNode, then: str) -> None:
    """Killed before any of its changes, a prolog leaves what an epilog undoes, or a second prolog brings up anew."""
    node = struck_node.node
    calls = struck_node.calls(PROLOG, BRINGS_UP)
    assert set(BRINGS_UP.split()) == set(calls)
    node.epilog(4711).check()
    every = 1 if then == "epilog" else 2
    for at, call in list(enumerate(calls, 1))[::every]:
        where = f"killed before change {at} of {len(calls)}, {call}"
        assert struck_node.run(PROLOG, BRINGS_UP, at=at).returncode == -signal.SIGKILL, where
        if node.compute_modes()[0] != 2:
            ledgers = [node.machine.read(path) for path in node.files() if "/gpus/" in path]
            assert ["mode_found 2" in ledger for ledger in ledgers] == [True], where
        if then == "prolog":
            assert node.prolog(4711, gpus="0", **asked("50")).returncode == 0, where
            assert " sms=66 " in node.client(4711).stdout, where
        assert node.epilog(4711).stderr == "", where
        struck_node.assert_as_before(where)


def test_wherever_the_epilog_is_killed_a_second_one_finishes(struck_node: StruckNode) -> None:
    """Killed before any of its changes, an epilog can be gone on with by the next, also when its daemon is left."""
    node = struck_node.node
    node.prolog(4711, gpus="0").check()
    calls = struck_node.calls(EPILOG, TAKES_DOWN)
    assert set(TAKES_DOWN.split()) == set(calls)
    for at, call in enumerate(calls, 1):
        where = f"killed before change {at} of {len(calls)}, {call}"
        node.prolog(4711, gpus="0").check()
        assert struck_node.run(EPILOG, TAKES_DOWN, at=at).returncode == -signal.SIGKILL, where
        assert node.epilog(4711).stderr == "", where
        struck_node.assert_as_before(where)


@pytest.mark.parametrize("stays", [0, 1], ids=["once", "from then on"])
def test_a_prolog_that_finds_no_room_leaves_nothing(struck_node: StruckNode, stays: int) -> None:
    """When any of its writes fails for want of space, once or for good, a prolog exits 1 with the node as before."""
    node = struck_node.node
    calls = struck_node.calls(PROLOG, NEEDS_ROOM)
    node.epilog(4711).check()
    for at, call in enumerate(calls, 1):
        where = f"no space at call {at} of {len(calls)}, {call}"
        result = struck_node.run(PROLOG, NEEDS_ROOM, at=at, error=ENOSPC, stays=stays)
        if ("its logs are not written" in result.stderr or "was started twice" in result.stderr) and not stays:
            assert result.returncode == 0, where  # a log is not worth a job, and what is begun ahead is tried again
            node.epilog(4711).check()
        else:
            assert result.returncode == 1, where
        assert "No space left on device" in result.stderr, where
        assert "a bug" not in result.stderr, where
        struck_node.assert_as_before(f"{where}: {result.stderr}")


def test_a_prolog_that_cannot_start_processes_leaves_nothing(struck_node: StruckNode) -> None:
    """Where a process cannot be started for a moment, a prolog exits 1 with the node as before, or has all it needs."""
    node = struck_node.node
    calls = struck_node.calls(PROLOG, "posix_spawn")
    node.epilog(4711).check()
    came_to = []
    for at in range(1, len(calls) + 1):
        result = struck_node.run(PROLOG, "posix_spawn", at=at, error=EAGAIN)
        assert "temporarily unavailable" in result.stderr, at
        came_to.append(result.returncode)
        if result.returncode == 0:
            assert " sms=32 free=8047 " in node.client(4711).stdout, at
            node.epilog(4711).check()
        struck_node.assert_as_before(f"call {at}: {result.stderr}")
    assert came_to == [0, 1, 0], "the daemon is started twice; limits; a server that is not started ahead is no fault"


# ------------------------------------------------------------------------------------------ in the middle of a wait


@pytest.mark.parametrize(
    ("fault", "reached"),
    [
        ("nvml.init=hang", lambda node: node.machine.path(f"{STATE_DIRECTORY}/jobs/4711/config").exists()),
        ("daemon.start=hang", lambda node: bool(node.mps_processes())),
        ("command.set_default_active_thread_percentage=hang", lambda node: len(node.mps_processes()) == 2),
        ("command.start_server=hang", lambda node: len(node.mps_processes()) == 2),
        ("command.*=hang", lambda node: len(node.mps_processes()) == 2),
        ("server.start=hang", lambda node: {p.uid for p in node.mps_processes()} == {0, 20001}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_epilog_alone_restores_what_a_prolog_killed_while_it_hung_left(
    gpu_node: GpuNode, fault: str, reached: Callable[[GpuNode], bool]
) -> None:
    """A prolog that Slurm kills while driver or daemon hangs is undone by the epilog, while the daemon still hangs."""
    gpu_node.configure(SHORT)
    gpu_node.fault(fault)
    prolog = gpu_node.start(PROLOG, env=job_environment(4711, gpus="0", **asked("25", "8G")))
    assert eventually(lambda: reached(gpu_node))
    gpu_node.machine.signal(prolog, signal.SIGKILL)
    prolog.wait(5)
    if fault == "nvml.init=hang":
        gpu_node.fault()  # nothing can be asked of a driver that hangs: test_hooks_takedown.py
    result = gpu_node.epilog(4711)
    assert (result.returncode, result.stderr) == (0, "")
    assert (gpu_node.files(), gpu_node.mps_processes()) == ([], [])
    assert gpu_node.compute_modes() == [0, 0, 0, 0]
