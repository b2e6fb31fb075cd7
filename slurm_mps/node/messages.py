"""What prolog and epilog say: to the admin through syslog, and to whoever reads slurmd's log through stderr."""

from __future__ import annotations

import sys


def tell_admin(message: str) -> None:
    """Write one line to syslog (identifier ``slurm-mps``) and to stderr; control characters cannot forge a second."""
    import syslog  # most jobs have nothing to say

    line = "".join(c if c.isprintable() else "?" for c in message)
    print(f"slurm-mps: {line}", file=sys.stderr)
    syslog.openlog("slurm-mps", syslog.LOG_PID, syslog.LOG_DAEMON)
    syslog.syslog(syslog.LOG_ERR, line)
