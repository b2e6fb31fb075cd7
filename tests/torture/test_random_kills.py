"""A few kills at random instants, the same each time; `make torture` tries as many as its time allows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .random_kills import attempt, draw
from .strike import StruckNode, build_library

if TYPE_CHECKING:
    from pathlib import Path

SEED, TRIES = 1, 8


def test_a_kill_at_any_instant_leaves_nothing(tmp_path: Path) -> None:
    """Hooks, daemons and servers of one to three jobs die at once; the next hooks, or reconcile, leave the node as it
    was, and none of them fails."""
    with StruckNode(build_library(tmp_path)) as node:
        node.prepare()
        assert [wrong for number in range(TRIES) for wrong in attempt(node, draw(SEED, number))] == []
