"""Messages of prolog and epilog: to syslog, and on stderr, which slurmd logs."""

from __future__ import annotations

import os
import select

_LINE_MAX = 2000  # less than a pipe takes in one piece (PIPE_BUF)


def _write(fd: int, data: bytes) -> None:
    """Write if that does not block; otherwise the message is lost."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    try:
        if poll.poll(0):
            os.write(fd, data)
    except OSError:
        pass


def _log(line: str) -> None:
    """Send a line to the system's log, as syslog(3) does but without ever waiting for who reads it."""
    try:
        import socket  # most jobs have nothing to say

        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as log:
            log.sendto(f"<27>slurm-mps[{os.getpid()}]: {line}".encode("utf-8", "replace"), "/dev/log")
    except (OSError, ImportError):
        pass


def one_line(message: str) -> str:
    """A message in which no control character can forge a second line."""
    return "".join(c if c.isprintable() else "?" for c in message)[:_LINE_MAX]


def tell_admin(message: str) -> None:
    """Write one line to syslog (identifier ``slurm-mps``) and to stderr."""
    line = one_line(message)
    _write(2, f"slurm-mps: {line}\n".encode("utf-8", "replace"))
    _log(line)
