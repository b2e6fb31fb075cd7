"""What a job's tasks were told on this node, for commands that only look, run by root or by the job's user."""

from __future__ import annotations

from ..node.reading import read_plain
from .verdict import JOBS, Verdict, parse_verdict

_LIMIT_BYTES = 32768


def read_verdict(job_id: int) -> Verdict | None:
    """Read a job's verdict; None where there is nothing of it that we may see.

    Raises: NodeError when it cannot be understood.
    """
    try:
        return parse_verdict(read_plain(f"{JOBS}/{job_id}/verdict", _LIMIT_BYTES, roots=True))
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return None
