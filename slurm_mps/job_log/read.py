"""Finds a job's logs and reads their events. Every read is bounded."""

from __future__ import annotations

import os

from ..node.reading import read_plain
from ..record import record
from .events import Event, read_events
from .lines import parse_lines

CONTROL_LOG, SERVER_LOG = "control.log", "server.log"
LIMIT_BYTES = 32 * 1024**2  #: of one log; it is longer than the daemon lets it grow by default


@record
class DaemonLogs:
    """A control daemon's logs: its name ("" for one that serves all of the job's GPUs), and their directory."""

    name: str
    directory: str


def find_logs(root: str, job_id: int | str) -> list[DaemonLogs]:
    """The logs of a job below the site's log directory; empty where there are none.

    Raises: PermissionError when they are another user's.
    """
    own = f"{root}/{job_id}"
    try:
        names = sorted(os.listdir(own))
    except (FileNotFoundError, NotADirectoryError):
        return []
    parts = [name for name in names if name.startswith("gpu-") and name[4:].isdigit()]
    whole = [DaemonLogs("", own)] if {CONTROL_LOG, SERVER_LOG} & set(names) else []
    return whole + [DaemonLogs(name, f"{own}/{name}") for name in sorted(parts, key=lambda part: int(part[4:]))]


def read_log(directory: str, name: str, limit_bytes: int = LIMIT_BYTES) -> bytes:
    """The end of a log; nothing where there is none.

    Raises: NodeError for what is no plain file; PermissionError.
    """
    try:
        return read_plain(f"{directory}/{name}", limit_bytes, tail=True)
    except (FileNotFoundError, NotADirectoryError):
        return b""


def events_of(logs: DaemonLogs, limit_bytes: int = LIMIT_BYTES) -> list[Event]:
    """The events of a control daemon's logs.

    Raises: NodeError, PermissionError.
    """
    control, server = (parse_lines(read_log(logs.directory, name, limit_bytes)) for name in (CONTROL_LOG, SERVER_LOG))
    return read_events(control, server)
