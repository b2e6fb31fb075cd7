"""A check, and its findings. Every check registers itself here under its id."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .facts import Facts

Body = Callable[[Facts], Iterator["Finding"]]

PROBLEM, WARNING, FINE, NOT_CHECKED = "problem", "warning", "fine", "not checked"
ANYWHERE, COMPUTE, GPU_NODE = "anywhere", "on a compute node", "on a node with GPUs"


@dataclass(frozen=True)
class Finding:
    """A check's result: its severity, the fact, why that matters, and the line or command that fixes it.

    A check's body leaves `check` empty, and `why` where the check's own reason applies. Without a fault `why` and
    `fix` are empty. `needs_root`: not checked, and root could check it.
    """

    severity: str
    what: str
    fix: str = ""
    why: str = ""
    check: str = ""
    needs_root: bool = False


def problem(what: str, fix: str, why: str = "") -> Finding:
    """Jobs with MPS fail, drain the node, or run without MPS."""
    return Finding(PROBLEM, what, fix, why)


def warning(what: str, fix: str, why: str = "") -> Finding:
    """Jobs with MPS work now, and will not under load, after a reboot, or for another user."""
    return Finding(WARNING, what, fix, why)


def fine(what: str) -> Finding:
    """No fault, and a fact worth reporting."""
    return Finding(FINE, what)


@dataclass(frozen=True)
class Check:
    """One thing to look at: its id, the question, why it matters, where it applies."""

    id: str
    question: str
    why: str
    where: str
    body: Body


CHECKS: dict[str, Check] = {}


def check(check_id: str, question: str, *, why: str, where: str = ANYWHERE) -> Callable[[Body], Body]:
    """Register a check. Its body yields findings, and none where there is no fault."""

    def register(body: Body) -> Body:
        CHECKS[check_id] = Check(check_id, question, why, where, body)
        return body

    return register
