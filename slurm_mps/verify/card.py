"""A program of its own that prints how many SMs the only visible GPU has; run as no MPS client (see ``look``)."""

from __future__ import annotations

import os
import sys


def main() -> int:
    sys.path.append(os.path.abspath(f"{__file__}/../../.."))  # last: it may not hide a module
    from slurm_mps.node.cuda import Cuda

    sys.stdout.write(str(Cuda().multiprocessors(0)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
