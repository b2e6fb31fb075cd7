"""The answer as people read it and as programs do. Pure."""

from __future__ import annotations

from typing import Any

from ..units import MIB
from .judge import memory_limit, priority, thread_limit
from .report import Evidence, RankReport

_SHORT_GPU = 17


def rows(found: Evidence) -> list[dict[str, object]]:
    """One for each rank, by GPU; cells by the names of the command's columns, None for what is not known."""
    return [_row(found, rank) for rank in sorted(found.ranks, key=lambda rank: (rank.gpu, rank.rank))]


def _row(found: Evidence, rank: RankReport) -> dict[str, object]:
    limit = memory_limit(rank, found.daemon(rank))
    return {
        "node": found.node,
        "gpu": f"{rank.gpu[:_SHORT_GPU]} {rank.profile}".strip() or "none",
        "uuid": rank.gpu,
        "rank": rank.rank,
        "pid": rank.pid,
        "server": found.server(rank) or "none",
        "sms": f"{rank.multiprocessors or '-'}/{found.card(rank) or '-'}",
        "free": rank.free_bytes // MIB if rank.multiprocessors else None,
        "limit": limit // MIB if limit else None,
        "priority": priority(rank, found.daemon(rank)),
        "cpu_numa": rank.cpu_numa,
        "gpu_numa": rank.gpu_numa,
    }


def summary(found: Evidence) -> str:
    """What to say when nothing is wrong."""
    if len(found.expected) == 1:
        return "1 rank, a client of MPS"
    return f"{len(found.expected)} ranks, all clients, each GPU's ranks share one server"


def document(found: Evidence, problems: list[str]) -> dict[str, Any]:
    """The report for programs. Sizes are in bytes; ``server`` is null for a rank that is no client."""
    return {
        "node": found.node,
        "problems": problems,
        "ranks": [_rank(found, rank) for rank in sorted(found.ranks, key=lambda rank: rank.rank)],
        "daemons": [
            {
                "pipe_directory": directory,
                "problem": answer.problem or None,
                "active_thread_percentage": answer.threads or None,
                "gpus": list(answer.gpus),
                "clients": len(answer.clients),
            }
            for directory, answer in sorted(found.daemons.items())
        ],
    }


def _rank(found: Evidence, rank: RankReport) -> dict[str, Any]:
    daemon = found.daemon(rank)
    return {
        "rank": rank.rank,
        "pid": rank.pid,
        "gpu": rank.gpu or None,
        "mig_profile": rank.profile or None,
        "visible": [gpu for gpu in rank.visible.split(",") if gpu],
        "client": bool(found.server(rank)),
        "server": found.server(rank) or None,
        "pipe_directory": rank.pipe_directory,
        "multiprocessors": rank.multiprocessors or None,
        "card_multiprocessors": found.card(rank) or None,
        "thread_percentage": thread_limit(rank, daemon),
        "free_bytes": rank.free_bytes if rank.multiprocessors else None,
        "total_bytes": rank.total_bytes or None,
        "limit_bytes": memory_limit(rank, daemon),
        "priority": priority(rank, daemon),
        "cpu_numa": rank.cpu_numa or None,
        "gpu_numa": rank.gpu_numa or None,
        "error": rank.error or None,
    }
