"""Prologs, epilogs, reconcile, crashes, reboots and admins in any order: the node is always as a plain model says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.torture.strike import StruckNode, build_library

from .joined_life import JoinedLife
from .life import Life

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

SHORT = settings(
    max_examples=4,
    stateful_step_count=16,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def test_in_any_order_the_node_is_as_the_model_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same few orders each time; `make torture` goes through as many new ones as its time allows."""
    with StruckNode(build_library(tmp_path)) as node:
        node.prepare()
        monkeypatch.setattr(Life, "node", node, raising=False)
        run_state_machine_as_test(Life, settings=SHORT)
        assert Life.orders >= 4


def test_joined_jobs_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Likewise of jobs that share a daemon."""
    with StruckNode(build_library(tmp_path)) as node:
        node.prepare()
        monkeypatch.setattr(JoinedLife, "node", node, raising=False)
        run_state_machine_as_test(JoinedLife, settings=SHORT)
        assert JoinedLife.orders >= 4
