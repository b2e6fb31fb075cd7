"""Prolog, epilog and reconcile, struck at every call that changes something (docs/decisions/0005)."""

from __future__ import annotations

import shutil
from collections import Counter
from errno import EAGAIN
from typing import TYPE_CHECKING

import pytest

from tests.harness.gpunode import EPILOG, PROLOG
from tests.harness.site import PYTHON, STATE_DIRECTORY

from .strike import (
    CAN_DIE,
    CAN_FAIL,
    CHANGES,
    FAULTS,
    LIBRARY,
    LOG,
    Scenario,
    StruckNode,
    joined_scenarios,
    scenarios,
    strike,
)
from .strike import build_library as build
from .trace import changes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TRACE = "/run/trace"
SCENARIOS = {scenario.name: scenario for scenario in (*scenarios(), *joined_scenarios())}


@pytest.fixture(scope="module")
def struck_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StruckNode]:
    library: Path = build(tmp_path_factory.mktemp("strike"))
    with StruckNode(library) as node:
        node.prepare()
        yield node


#: One of so many points; `make torture` strikes at all of them.
EVERY = {"prolog per-gpu": 14, "epilog per-gpu": 8, "reconcile per-gpu": 20, "prolog after a change of mps.toml": 60}
EVERY |= {
    "prolog joined, first": 16,
    "prolog joined, beside": 12,
    "epilog joined, not last": 8,
    "epilog joined, last": 12,
}
EVERY |= {"prolog joined, dead": 24, "reconcile joined": 24}
EVERY |= {"prolog joined, all users": 24, "epilog joined, all users": 16}


@pytest.mark.parametrize("name", EVERY)
def test_wherever_it_is_struck_the_next_one_leaves_the_node_as_before(struck_node: StruckNode, name: str) -> None:
    """Killed, or without room, descriptors, rights or a disk: no hook of the same job or reconcile fails after it."""
    scenario = SCENARIOS[name]
    wrong = []
    for number, fault in enumerate(FAULTS):
        calls = scenario.calls(struck_node, CAN_FAIL if FAULTS[fault] else CAN_DIE)
        step = EVERY[name] * (3 if FAULTS[fault] else 1)
        for at in range(1 + number, len(calls) + 1, step):
            wrong += strike(struck_node, scenario, fault, at, scenario.repairs[at % len(scenario.repairs)])
    assert wrong == []


def test_a_daemons_file_that_cannot_be_protected_is_a_fault_of_the_node(struck_node: StruckNode) -> None:
    """Said with the file and the system's words, and the daemon is ended; it was told as a bug in slurm-mps.

    Where the kernel lists no GPUs, for then all calls come in turn.
    """
    on = "posix_spawn fchmod"
    scenario = SCENARIOS["prolog per-node"]
    struck_node.run("mount", "-t", "tmpfs", "none", "/proc/driver").check()
    at = scenario.calls(struck_node, on).index("posix_spawn") + 2
    result = struck_node.struck(scenario.argv, scenario.environment, on, at=at, error=FAULTS["EIO"])
    struck_node.run("umount", "/proc/driver").check()
    assert result.returncode == 1
    assert "/pipe/nvidia-cuda-mps-control.pid: Input/output error" in result.stderr
    assert struck_node.left() == ""


def test_a_prolog_that_cannot_start_processes_leaves_nothing(struck_node: StruckNode) -> None:
    """Where a process cannot be started for a moment, a prolog exits 1 with the node as before, or has all it needs."""
    scenario = SCENARIOS["prolog per-node"]
    calls = scenario.calls(struck_node, "posix_spawn")
    came_to = []
    for at in range(1, len(calls) + 1):
        result = struck_node.struck(scenario.argv, scenario.environment, "posix_spawn", at=at, error=EAGAIN)
        assert "temporarily unavailable" in result.stderr, at
        came_to.append(result.returncode)
        if result.returncode == 0:
            assert " sms=32 free=8047 " in struck_node.client(4711).stdout, at
            struck_node.epilog(4711).check()
        assert struck_node.left() == "", f"call {at}: {result.stderr}"
    assert came_to == [1, 1, 0], "daemon; limits; a server that is not started ahead is no fault"


@pytest.mark.parametrize("name", ["prolog per-gpu", "epilog per-gpu", "reconcile per-gpu", "epilog joined, last"])
def test_no_change_bypasses_the_library(struck_node: StruckNode, name: str) -> None:
    """By strace's word, each system call by which a hook changes something is one that can be struck at."""
    scenario = SCENARIOS[name]
    if name.startswith("prolog"):
        scenario.prepare(struck_node)  # the configuration is compiled
        struck_node.run("rm", "-r", STATE_DIRECTORY).check()  # the first one makes more
    scenario.prepare(struck_node)
    struck_node.machine.path(LOG).unlink(missing_ok=True)
    result = struck_node.run(*traced(struck_node, scenario), env=scenario.environment)
    counted = Counter(struck_node.noted())
    assert (result.returncode, result.stderr) == (0, "")
    there = () if name.startswith("prolog") else ("lock",)
    seen, unknown = changes(struck_node.machine.read(TRACE), LOG, there)
    struck_node.run(EPILOG, env=scenario.environment or SCENARIOS["epilog per-gpu"].environment).check()
    assert unknown == []
    assert seen == counted
    assert sum(seen.values()) > 20


def traced(node: StruckNode, scenario: Scenario) -> list[str]:
    """The command line that runs it under strace, which follows its threads and leaves its children alone."""
    hook = [PYTHON, "-I", "-S", f"{node.package}/hook.py"]
    hooks = {PROLOG: [*hook, "prolog"], EPILOG: [*hook, "epilog"]}
    argv = hooks.get(scenario.argv[0], list(scenario.argv))
    given = {"LD_PRELOAD": LIBRARY, "STRIKE_LOG": LOG, "STRIKE_ON": CHANGES}
    strace = ["strace", "-f", "-b", "execve", "-qqq", "-y", "-s", "64", "-o", TRACE, "-e", "signal=none"]
    return [*strace, *(word for name, value in given.items() for word in ("-E", f"{name}={value}")), *argv]


def test_strace_is_there() -> None:
    """A missing tool is an error here: `make test` installs it."""
    assert shutil.which("strace")
