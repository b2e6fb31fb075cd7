"""Reads a job's verdict for commands, which run as root or as the job's user. The hooks never import this module."""

from __future__ import annotations

from ..node.reading import read_plain
from .verdict import JOBS, Verdict, parse_verdict

_LIMIT_BYTES = 32768


def read_verdict(job_id: int) -> Verdict | None:
    """Read a job's verdict; None where the job has none here, or the caller may not read it.

    Raises: NodeError when the file is damaged, or of a newer version.
    """
    try:
        return parse_verdict(read_plain(f"{JOBS}/{job_id}/verdict", _LIMIT_BYTES, roots=True))
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return None
