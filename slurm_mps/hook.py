"""Entry of the prolog and epilog scripts: ``python3 -I -S .../slurm_mps/hook.py prolog|epilog [asked]``.

``asked``: the script has sent quit to the job's control daemons.

Started with -I -S, so that neither the environment nor site-packages can put code in place of the standard library's;
the directory that holds the package comes last on the path.
"""

from __future__ import annotations

import gc
import os
import resource
import sys


def main() -> int:
    """Run a hook with a known umask and directory. Returns its exit status."""
    gc.disable()  # a process of a tenth of a second; looking for garbage takes 1 ms of it
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # last: it may not hide a module
    os.umask(0o022)
    os.chdir("/")
    _give_up_privileges()
    if sys.argv[1] == "prolog":
        from slurm_mps.job.prolog import Prolog

        return Prolog(os.environ).run()
    from slurm_mps.job.epilog import Epilog

    return Epilog(os.environ, asked=sys.argv[2:] == ["asked"]).run()


def _give_up_privileges() -> None:
    """Give up what slurmd may have and daemon and server must not: core files, which would hold a user's data, and an
    exemption from the kernel's OOM killer.
    """
    from slurm_mps.node.processes import be_killable

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    be_killable()


if __name__ == "__main__":
    os._exit(main())  # the process is over; tearing the interpreter and the driver down takes longer than the rest
