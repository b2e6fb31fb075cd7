"""A program of its own that prints how many SMs each visible GPU has; run as no MPS client (see ``look``)."""

from __future__ import annotations

import sys

from ..node.cuda import Cuda


def main() -> int:
    cuda = Cuda()
    for ordinal in range(cuda.device_count()):
        sys.stdout.write(f"{cuda.uuid(ordinal)} {cuda.multiprocessors(ordinal)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
