"""An ordinary CUDA program, through ctypes on libcuda.so.1: a context on every device it sees, and what it has there.

First it prints a line of JSON: its pid, and the devices or the call that failed; in MiB. Then it does what its standard
input says, a line each, and answers each with the CUDA error it got, 0 for none; it leaves when standard input ends:

``allocate MIB``, ``synchronize``; ``work`` synchronizes until that fails, for at most ten seconds, as a rank would;
``fault``, ``trap``, ``spin``: a kernel with an illegal address, one that traps, an endless one, which is announced by a
0 of its own, on the last device. The simulated libcuda.so.1 has entry points for these, a real one runs KERNELS.

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
IS_SIMULATED = "simSpin"

#: What the driver compiles for the card at hand; `spin` reads a word that nobody ever writes.
KERNELS = b"""
.version 6.0
.target sm_50
.address_size 64
.visible .entry fault() {
    .reg .u64 %address;
    mov.u64 %address, 64;
    st.global.u32 [%address], 1;
    ret;
}
.visible .entry trap() {
    trap;
    ret;
}
.visible .entry spin(.param .u64 word) {
    .reg .u64 %address;
    .reg .u32 %value;
    .reg .pred %again;
    ld.param.u64 %address, [word];
    cvta.to.global.u64 %address, %address;
AGAIN:
    ld.volatile.global.u32 %value, [%address];
    setp.eq.u32 %again, %value, 0;
    @%again bra AGAIN;
    ret;
}
"""


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
    kind = "MIG-" if b" MIG " in name.value else "GPU-"
    return {
        "uuid": kind + "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])),
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


def launch(name: str) -> None:
    """Start a kernel of KERNELS on the current device."""
    module, kernel, word = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_uint64()
    call("cuModuleLoadData", ctypes.byref(module), KERNELS)
    call("cuModuleGetFunction", ctypes.byref(kernel), module, name.encode())
    call("cuMemAlloc_v2", ctypes.byref(word), ctypes.c_size_t(4096))
    call("cuMemsetD32_v2", word, 0, ctypes.c_size_t(1024))
    arguments = (ctypes.c_void_p * 1)(ctypes.cast(ctypes.byref(word), ctypes.c_void_p))
    call("cuLaunchKernel", kernel, 1, 1, 1, 1, 1, 1, 0, None, arguments if name == "spin" else None, None)


def misbehave(how: str, spins: str = "0") -> int:
    simulated = hasattr(cuda, IS_SIMULATED)
    if not simulated:
        launch(how)
    if how == "spin":
        os.write(1, f"{spins}\n".encode())
    if not simulated:
        return int(cuda.cuCtxSynchronize())
    return int(cuda.simSpin() if how == "spin" else cuda.simFault({"fault": ILLEGAL_ADDRESS, "trap": TRAP}[how]))


def obey(word: str, size_mib: str) -> int:
    if word == "allocate":
        pointer = ctypes.c_void_p()
        return int(cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(int(size_mib) << 20)))
    if word == "synchronize":
        return int(cuda.cuCtxSynchronize())
    if word == "work":
        return work()
    return misbehave(word)


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
