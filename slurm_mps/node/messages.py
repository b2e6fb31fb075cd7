"""What prolog and epilog say: to the admin through syslog, and to whoever reads slurmd's log through stderr."""

from __future__ import annotations

import os


def tell_admin(message: str) -> None:
    """Write one line to syslog (identifier ``slurm-mps``) and to stderr; control characters cannot forge a second.

    A message that nobody takes, on a closed or full stderr, costs nothing but itself.
    """
    import syslog  # most jobs have nothing to say

    line = "".join(c if c.isprintable() else "?" for c in message)
    try:
        os.write(2, f"slurm-mps: {line}\n".encode("utf-8", "replace"))
    except OSError:
        pass
    syslog.openlog("slurm-mps", syslog.LOG_PID, syslog.LOG_DAEMON)
    syslog.syslog(syslog.LOG_ERR, line.encode("utf-8", "replace").decode())
