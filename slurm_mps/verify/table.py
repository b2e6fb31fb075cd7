"""The answer as people read it and as programs do. Pure."""

from __future__ import annotations

from ..units import MIB
from .judge import memory_limit, thread_limit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .judge import Findings
    from .report import Report

_SHORT_GPU = 17


def _order(rank: Report) -> tuple[str, str, int]:
    return rank.host, rank.gpu, rank.rank


def rows(found: Findings) -> list[dict[str, object]]:
    """One for each rank, by node and GPU; cells by the names of the command's columns, None for what is not known."""
    return [_row(found, rank) for rank in sorted(found.ranks, key=_order)]


def _row(found: Findings, rank: Report) -> dict[str, object]:
    limit = memory_limit(rank, found.daemon(rank))
    total = found.cards.get(rank.gpu, 0)
    return {
        "node": rank.host,
        "gpu": rank.gpu[:_SHORT_GPU] or "none",
        "uuid": rank.gpu,
        "rank": rank.rank,
        "pid": rank.pid,
        "server": found.server(rank) or "none",
        "sms": f"{rank.multiprocessors or '-'}/{total or '-'}",
        "free": rank.free_bytes // MIB if rank.multiprocessors else None,
        "limit": limit // MIB if limit else None,
        "cpu_numa": rank.cpu_numa,
        "gpu_numa": rank.gpu_numa,
    }


def summary(found: Findings) -> str:
    """What to say when nothing is wrong."""
    if found.size == 1:
        return "1 rank, a client of MPS"
    return f"{found.size} ranks, all clients, each GPU's ranks share one server"


def document(found: Findings, problems: list[str]) -> dict[str, Any]:
    """The report for programs. Sizes are in bytes; ``server`` is null for a rank that is no client."""
    return {
        "problems": problems,
        "ranks": [_rank(found, rank) for rank in sorted(found.ranks, key=lambda rank: rank.rank)],
        "daemons": [
            {
                "host": host,
                "pipe_directory": directory,
                "problem": answer.problem or None,
                "active_thread_percentage": answer.threads or None,
                "gpus": list(answer.gpus),
                "clients": len(answer.clients),
            }
            for (host, directory), answer in sorted(found.daemons.items())
        ],
    }


def _rank(found: Findings, rank: Report) -> dict[str, Any]:
    daemon = found.daemon(rank)
    return {
        "rank": rank.rank,
        "host": rank.host,
        "pid": rank.pid,
        "gpu": rank.gpu or None,
        "visible": [gpu for gpu in rank.visible.split(",") if gpu],
        "client": bool(found.server(rank)),
        "server": found.server(rank) or None,
        "pipe_directory": rank.pipe_directory,
        "multiprocessors": rank.multiprocessors or None,
        "card_multiprocessors": found.cards.get(rank.gpu) or None,
        "thread_percentage": thread_limit(rank, daemon),
        "free_bytes": rank.free_bytes if rank.multiprocessors else None,
        "total_bytes": rank.total_bytes or None,
        "limit_bytes": memory_limit(rank, daemon),
        "cpu_numa": rank.cpu_numa or None,
        "gpu_numa": rank.gpu_numa or None,
        "error": rank.error or None,
    }
