"""Finds the process that listens on a control daemon's socket."""

from __future__ import annotations

import _socket  # socket costs every prolog 4 ms

_UCRED_BYTES, _PID_BYTES = 12, 4  # struct ucred: pid, uid, gid
#: Somebody does, whose queue is full.
BUSY = 0


def listener(pipe_directory: str) -> int | None:
    """The pid of the process that listens, from the kernel (O39); BUSY when its queue is full; None when nobody
    listens.

    The connection is closed at once: a silent connection that stays open makes the daemon deaf (O50).
    """
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_NONBLOCK)
    try:
        connection.connect(f"{pipe_directory}/control")
        peer = connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, _UCRED_BYTES)
    except BlockingIOError:
        return BUSY
    except OSError:
        return None
    finally:
        connection.close()
    return int.from_bytes(peer[:_PID_BYTES], "little")
