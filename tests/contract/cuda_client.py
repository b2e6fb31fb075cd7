"""An ordinary CUDA program, through ctypes on libcuda.so.1: a context on every device it sees, and what it has there.

First it prints a line of JSON: its pid, and the devices or the call that failed; in MiB. Then it does what its standard
input says, a line each, and answers each with the CUDA error it got, 0 for none; it leaves when standard input ends:

``allocate MIB``, ``synchronize``; ``work`` synchronizes until that fails, for at most ten seconds, as a rank would;
``fault``, ``trap``, ``spin``: a kernel with an illegal address, one that traps, an endless one, which is announced by a
0 of its own. ONLY the simulated libcuda.so.1 has an entry point for these; for a real card each needs a kernel here.

A number as argument makes that many such programs, forked before any of them touches CUDA.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time

MULTIPROCESSOR_COUNT, COMPUTE_MODE = 16, 20  # CUdevice_attribute
ILLEGAL_ADDRESS, TRAP = 0, 1  # enum sim_fault_kind


class CudaError(Exception):
    """A driver call failed; the text is its name, its number and the number's name."""


def call(name: str, *arguments: object) -> None:
    number = getattr(cuda, name)(*arguments)
    if number:
        text = ctypes.c_char_p()
        cuda.cuGetErrorName(number, ctypes.byref(text))
        raise CudaError(f"{name} {number} {(text.value or b'?').decode()}")


def open_device(ordinal: int) -> dict[str, object]:
    """Make a context on a device, which becomes the current one, and look at it."""
    device, context, sms, mode = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    uuid, name = (ctypes.c_ubyte * 16)(), ctypes.create_string_buffer(96)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    call("cuDeviceGet", ctypes.byref(device), ordinal)
    call("cuDeviceGetUuid_v2", uuid, device)
    call("cuDeviceGetName", name, 96, device)
    call("cuCtxCreate_v2", ctypes.byref(context), 0, device)
    call("cuDeviceGetAttribute", ctypes.byref(sms), MULTIPROCESSOR_COUNT, device)
    call("cuDeviceGetAttribute", ctypes.byref(mode), COMPUTE_MODE, device)
    call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    digits = bytes(uuid).hex()
    return {
        "uuid": "GPU-" + "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])),
        "name": name.value.decode(),
        "sms": sms.value,
        "free": free.value >> 20,
        "total": total.value >> 20,
        "mode": mode.value,
    }


def look() -> dict[str, object]:
    try:
        call("cuInit", 0)
        count = ctypes.c_int()
        call("cuDeviceGetCount", ctypes.byref(count))
        return {"pid": os.getpid(), "devices": [open_device(ordinal) for ordinal in range(count.value)], "failed": ""}
    except CudaError as failed:
        return {"pid": os.getpid(), "devices": [], "failed": str(failed)}


def work() -> int:
    deadline = time.monotonic() + 10
    error = 0
    while not error and time.monotonic() < deadline:
        error = cuda.cuCtxSynchronize()
        time.sleep(0.005)
    return error


def obey(word: str, size_mib: str) -> int:
    if word == "allocate":
        pointer = ctypes.c_void_p()
        return int(cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(int(size_mib) << 20)))
    if word == "synchronize":
        return int(cuda.cuCtxSynchronize())
    if word == "work":
        return work()
    if word == "spin":
        os.write(1, b"0\n")
        return int(cuda.simSpin())
    return int(cuda.simFault({"fault": ILLEGAL_ADDRESS, "trap": TRAP}[word]))


def main() -> None:
    for _ in range(int(sys.argv[1]) - 1):
        if os.fork() == 0:
            break
    report = look()
    os.write(1, f"{json.dumps(report)}\n".encode())  # in one piece: the others write there, too
    for line in sys.stdin:
        word, _, size_mib = line.strip().partition(" ")
        os.write(1, f"{obey(word, size_mib)}\n".encode())
    sys.exit(3 if report["failed"] else 0)


cuda = ctypes.CDLL("libcuda.so.1")

if __name__ == "__main__":
    main()
