"""Entry of the prolog and epilog scripts: ``python3 -I -S .../slurm_mps/hook.py prolog|epilog``.

Started with -I -S, so that neither the environment nor site-packages can put code in place of the standard library's;
the directory that holds the package comes last on the path.
"""

from __future__ import annotations

import gc
import os
import sys


def main() -> int:
    """Run a hook with a known umask and directory. Returns its exit status."""
    gc.disable()  # a process of a tenth of a second; looking for garbage takes 1 ms of it
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # last: it may not hide a module
    from slurm_mps.node.gpus import Gpus

    gpus = Gpus()
    if sys.argv[1] == "prolog":
        gpus.open_ahead()  # while Python imports the rest
    from slurm_mps import hooks

    os.umask(0o022)
    os.chdir("/")
    run = {"prolog": hooks.prolog, "epilog": hooks.epilog}[sys.argv[1]]
    return run(os.environ, gpus)


if __name__ == "__main__":
    os._exit(main())  # the process is over; tearing the interpreter and the driver down takes longer than the rest
