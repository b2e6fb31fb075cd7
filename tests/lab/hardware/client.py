"""A rank: a context on each device it sees, then one thing, and a line of what came of each.

Argument: ``hold``, ``fill`` (all memory that its limit leaves, of the first device), ``spin`` or ``fault`` (a kernel on
the last device); a number of seconds to stay afterwards; a file in which so many ranks meet before (FILE RANKS). Exit
status 3 when any call failed.
"""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path
from typing import Any

from tests.contract import cuda_client
from tests.lab.hardware.meeting import meet


def main() -> int:
    errand, seconds = sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
    report = cuda_client.look()
    if len(sys.argv) > 4:
        meet(Path(sys.argv[3]), int(sys.argv[4]))
    devices: Any = report["devices"]
    print(*(f"{d['uuid']} sms={d['sms']} free={d['free']}" for d in devices), report["failed"], flush=True)
    if report["failed"]:
        return 3
    error = 0
    if errand == "fill":
        pointer = ctypes.c_void_p()
        size = (int(str(devices[0]["free"])) - 8) << 20
        error = int(cuda_client.cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(size)))
        print(f"filled {size >> 20} MiB: error {error}", flush=True)
    elif errand in ("spin", "fault"):
        error = cuda_client.misbehave(errand, "spin launched")
    time.sleep(seconds)
    error = error or int(cuda_client.cuda.cuCtxSynchronize())
    print(f"ended with error {error}", flush=True)
    return 3 if error else 0


if __name__ == "__main__":
    sys.exit(main())
