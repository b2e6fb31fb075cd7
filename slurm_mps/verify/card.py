"""A program of its own that prints how many SMs the only visible GPU has; run as no MPS client (see ``look``).

Its argument says where the CUDA driver is searched for, as LD_LIBRARY_PATH does.
"""

from __future__ import annotations

import os
import sys


def main() -> int:
    sys.path.append(os.path.abspath(f"{__file__}/../../.."))  # last: it may not hide a module
    from slurm_mps.node.cuda import Cuda

    sys.stdout.write(str(Cuda(sys.argv[1]).multiprocessors(0)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
