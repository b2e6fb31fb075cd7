"""Readers of files that others wrote, for commands that change nothing. They run as the command's user."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from threading import Thread
from time import monotonic

from ..errors import NodeError
from . import processes

_SIZE_MAX = 16 * 2**20
_ENVIRONMENT_SECONDS = 0.5

_readers: dict[int, Thread] = {}


def read_plain(path: str, limit_bytes: int, *, tail: bool = False, roots: bool = False) -> bytes:
    """The first bytes of a plain file, or with `tail` the last ones; never waits for a fifo, follows no link.

    Raises: FileNotFoundError, PermissionError; NodeError for what is no plain file, or with `roots` not root's.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        raise
    except OSError as error:
        raise NodeError(f"{path}: {os.strerror(error.errno or 0)}") from None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or (roots and status.st_uid != 0):
        os.close(fd)
        raise NodeError(f"{path} is no plain file{' of root' if roots else ''}")
    with open(fd, "rb", buffering=0) as file:
        if tail:
            file.seek(max(0, status.st_size - limit_bytes))
        return file.read(limit_bytes) or b""


def read_text(path: str, limit_bytes: int = _SIZE_MAX) -> str:
    """Read a file of the system's, through links: waits for nobody, and reads nothing but a regular file.

    Raises: OSError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a file", path)
        return file.read(limit_bytes).decode("utf-8", "replace")


def environments_of(pids: Iterable[int]) -> dict[int, dict[str, str]]:
    """The environments of those processes that can be read in half a second.

    A process's user can make a reader of its memory wait for ever. A thread that waits is left behind, one for each
    process.
    """
    found: dict[int, dict[str, str]] = {}

    def read(pid: int) -> None:
        found[pid] = processes.environment_of(pid)
        _readers.pop(pid, None)

    end = monotonic() + _ENVIRONMENT_SECONDS
    started = [
        _readers.setdefault(pid, Thread(target=read, args=(pid,), daemon=True)) for pid in set(pids) - _readers.keys()
    ]
    for reader in started:
        reader.start()
    for reader in started:
        reader.join(max(0.0, end - monotonic()))
    return dict(found)
