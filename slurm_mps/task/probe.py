"""A program that makes a context on each GPU of a control daemon, to see whether the daemon's server takes clients.

The plugin runs it as the job's user, before the tasks of a step that follows one that ended badly. Its argument is
for how many seconds it tries. The failed context of a first attempt repairs a server that a killed client poisoned
(O46); a server in FAULT takes clients again when the last victim has left (O34, O47). Exit status 0: the server took
a client, and will take the next; 3: it took none. Any other status says nothing about the server: this program did
not run.
"""

from __future__ import annotations

import os
import sys
from time import monotonic, sleep

_PAUSE_SECONDS = 0.1
_TAKES_NOBODY = 3  # spank/health.c
#: Errors of a healthy server: out of memory (2), and no room for another client (808).
_GOOD_NUMBERS = (2, 808)


def _is_let_in() -> bool:
    """Become a client on every GPU. After a failure a process cannot try again."""
    from slurm_mps.node.cuda import Cuda, CudaError  # which main() has found to be there

    try:
        cuda = Cuda()
        for ordinal in range(cuda.device_count()):
            cuda.open_device(ordinal)
    except CudaError as error:
        return error.number in _GOOD_NUMBERS
    except OSError:
        return False
    return True


def main() -> int:
    sys.path.append(os.path.abspath(f"{__file__}/../../.."))  # last: it may not hide a module
    import slurm_mps.node.cuda  # noqa: F401 - a part that is gone says nothing of the server

    end = monotonic() + int(sys.argv[1])
    while monotonic() < end:
        pid = os.fork()
        if pid == 0:
            os._exit(not _is_let_in())
        if os.waitpid(pid, 0)[1] == 0:
            return 0
        sleep(_PAUSE_SECONDS)
    return _TAKES_NOBODY


if __name__ == "__main__":
    sys.exit(main())
