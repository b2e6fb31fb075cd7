"""Who listens on a control daemon's socket."""

from __future__ import annotations

import socket
import struct

_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid
#: Somebody does, whose queue is full.
BUSY = 0


def listener(pipe_directory: str) -> int | None:
    """The pid of the daemon, by the kernel's word (O39); BUSY when it takes no more connections now; None for nobody.

    The connection is closed at once: one that is held open and says nothing makes the daemon deaf (O50).
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as connection:
        try:
            connection.connect(f"{pipe_directory}/control")
            peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        except BlockingIOError:
            return BUSY
        except OSError:
            return None
    pid: int = _CREDENTIALS.unpack(peer)[0]
    return pid
