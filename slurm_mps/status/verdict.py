"""What the prolog told a job's tasks, read back: the job's control daemons, their GPUs and limits.

Only root can write it; the job's user can read it. The plugin reads the same file (spank/verdict.c).
"""

from __future__ import annotations

import os

from ..errors import RequestError
from ..plain import read_plain
from ..record import record
from ..state import STATE_DIRECTORY, VERDICT_VERSION
from ..units import parse_memory
from ..wordfile import DamagedFileError, decode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

JOBS = f"{STATE_DIRECTORY}/jobs"
_LIMIT_BYTES = 32768


@record
class DaemonPlace:
    """Where a control daemon is, which GPUs (UUIDs, in its own order) it serves, and what it gives each client."""

    name: str
    pipe_directory: str
    log_directory: str
    memory_bytes: int | None
    gpus: tuple[str, ...]


@record
class JobVerdict:
    """What a job was told on this node. status: ``ready``, or ``refused`` or ``without`` and then a message."""

    status: str
    message: str = ""
    threads: str = ""  #: percent of a GPU's threads that each client may use
    auto: tuple[str, ...] = ()  #: what its steps divide: ``threads``, ``memory``
    daemons: tuple[DaemonPlace, ...] = ()


def _daemon(words: str, gpus: Sequence[str]) -> DaemonPlace:
    pipe, log, limit = words.split(" ")
    memory = None if limit == "-" else parse_memory(limit)
    name = os.path.basename(pipe)
    return DaemonPlace(name if name.startswith("gpu-") else "", pipe, log, memory, tuple(gpus))


def _whole(verdict: JobVerdict) -> JobVerdict:
    """One that has all its parts, as the plugin wants them (spank/verdict.c) and as far as they are read here.

    Raises: ValueError.
    """
    if verdict.status == "ready":
        whole = bool(verdict.threads and verdict.daemons) and all(place.gpus for place in verdict.daemons)
    else:
        whole = verdict.status in ("refused", "without") and bool(verdict.message)
    if not whole:
        raise ValueError(verdict.status)
    return verdict


def parse_verdict(data: bytes) -> JobVerdict:
    """Read a verdict's file.

    Raises: NodeError when it is damaged, or of a newer slurm-mps.
    """
    lines = [line.partition(" ")[::2] for line in decode(data, "verdict", VERDICT_VERSION)]
    known = dict(lines)
    gpus = [value.split(" ")[2] for key, value in lines if key == "gpu" and value.count(" ") >= 2]
    daemons = [value for key, value in lines if key == "daemon"]
    per_gpu = known.get("daemons") == "per-gpu"
    served = [[gpu] for gpu in gpus] if per_gpu else [gpus]
    try:
        found = tuple(_daemon(words, its) for words, its in zip(daemons, served, strict=bool(daemons)))
        return _whole(
            JobVerdict(
                status=known["status"],
                message=known.get("message", ""),
                threads=known.get("thread_percentage", ""),
                auto=tuple(value for key, value in lines if key == "auto"),
                daemons=found,
            )
        )
    except (KeyError, ValueError, RequestError):
        raise DamagedFileError("a verdict that makes no sense") from None


def read_verdict(job_id: int) -> JobVerdict | None:
    """What a job was told; None where there is nothing of it that we may see.

    Raises: NodeError when it cannot be understood.
    """
    try:
        return parse_verdict(read_plain(f"{JOBS}/{job_id}/verdict", _LIMIT_BYTES, roots=True))
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return None
