"""What a check is and what it can say; every check registers itself here under its id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .facts import Facts

    Body = Callable[[Facts], Iterator["Said"]]

PROBLEM, WARNING, FINE, NOT_CHECKED = "problem", "warning", "fine", "not checked"
ANYWHERE, COMPUTE, GPU_NODE = "anywhere", "on a compute node", "on a node with GPUs"


@dataclass(frozen=True)
class Said:
    """What a check found: a severity, what is so, the line or command that cures it; `why` if not the check's own."""

    severity: str
    what: str
    cure: str = ""
    why: str = ""


def problem(what: str, cure: str, why: str = "") -> Said:
    """Jobs with MPS fail, drain the node, or run without it."""
    return Said(PROBLEM, what, cure, why)


def warning(what: str, cure: str, why: str = "") -> Said:
    """It works now, and will bite: under load, after a reboot, or somebody else."""
    return Said(WARNING, what, cure, why)


def fine(what: str) -> Said:
    """Worth telling, and as it should be."""
    return Said(FINE, what)


@dataclass(frozen=True)
class Check:
    """One thing to look at: its id, the question, why it matters, where it applies."""

    id: str
    question: str
    why: str
    where: str
    body: Body


@dataclass(frozen=True)
class Finding:
    """What came of a check. `why` and `cure` are empty where all is well; `page` explains the check."""

    check: str
    severity: str
    what: str
    why: str
    cure: str
    page: str
    needs_root: bool = False


CHECKS: dict[str, Check] = {}


def check(check_id: str, question: str, *, why: str, where: str = ANYWHERE) -> Callable[[Body], Body]:
    """Register a check. Its body yields what it found; nothing means that all is well."""

    def register(body: Body) -> Body:
        CHECKS[check_id] = Check(check_id, question, why, where, body)
        return body

    return register
