"""A rank that keeps a GPU busy and counts: kernels of a chosen size, launched one after another through ctypes.

``load.py RANKS MEETING SECONDS PHASE...``: RANKS programs meet in the directory MEETING, then do every PHASE together
for SECONDS, all within the same window. A phase is ``flood:BLOCKS:ITERATIONS:BATCH`` (launches, two batches ahead of
the GPU) or ``pace:BLOCKS:ITERATIONS:PAUSE_MS`` (one at a time, each timed from launch to end, with a pause after it).
Prints one line of JSON: what the rank has of the GPU, and of each phase the kernels that ended within the window and,
for `pace`, the latencies in microseconds.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from pathlib import Path

from tests.hardware.meeting import meet

THREADS = 256
_SMS = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT

#: Multiply-adds, each of which waits for the one before; the result is kept, so that none can be left out.
PTX = b"""
.version 6.0
.target sm_70
.address_size 64
.visible .entry burn(.param .u32 iterations, .param .u64 result) {
    .reg .f32 %x;
    .reg .u32 %left;
    .reg .u64 %address;
    .reg .pred %more, %never;
    ld.param.u32 %left, [iterations];
    ld.param.u64 %address, [result];
    cvta.to.global.u64 %address, %address;
    mov.f32 %x, 0f3F000000;
AGAIN:
    fma.rn.f32 %x, %x, 0f3F7FBE77, 0f3A83126F;
    sub.u32 %left, %left, 1;
    setp.ne.u32 %more, %left, 0;
    @%more bra AGAIN;
    setp.eq.f32 %never, %x, 0fBF800000;
    @%never st.global.f32 [%address], %x;
    ret;
}
"""

cuda = ctypes.CDLL("libcuda.so.1")


def call(name: str, *arguments: object) -> None:
    """Raises: RuntimeError with the driver's name of what went wrong."""
    number = getattr(cuda, name)(*arguments)
    if number:
        text = ctypes.c_char_p()
        cuda.cuGetErrorName(number, ctypes.byref(text))
        raise RuntimeError(f"{name}: {(text.value or b'?').decode()} ({number})")


class Gpu:
    """A context on the first device, and the kernel."""

    def __init__(self) -> None:
        device, context, sms = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_int()
        call("cuInit", 0)
        call("cuDeviceGet", ctypes.byref(device), 0)
        call("cuCtxCreate_v2", ctypes.byref(context), 0, device)
        call("cuDeviceGetAttribute", ctypes.byref(sms), _SMS, device)
        self.sms = sms.value
        module, self._kernel, word = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_uint64()
        call("cuModuleLoadData", ctypes.byref(module), PTX)
        call("cuModuleGetFunction", ctypes.byref(self._kernel), module, b"burn")
        call("cuMemAlloc_v2", ctypes.byref(word), ctypes.c_size_t(4096))
        self._word = word
        self._launch = cuda.cuLaunchKernel
        self._launch.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3]

    def wait(self) -> None:
        call("cuCtxSynchronize")

    def prepare(self, iterations: int) -> ctypes.Array[ctypes.c_void_p]:
        """The arguments of a launch; `_held` keeps alive what they point to."""
        self._held = ctypes.c_uint(iterations)
        values = (self._held, self._word)
        return (ctypes.c_void_p * 2)(*(ctypes.cast(ctypes.byref(value), ctypes.c_void_p) for value in values))

    def make_event(self) -> ctypes.c_void_p:
        event = ctypes.c_void_p()
        call("cuEventCreate", ctypes.byref(event), 0)
        return event

    def launch_batch(
        self, batch: int, blocks: int, arguments: ctypes.Array[ctypes.c_void_p], event: ctypes.c_void_p
    ) -> None:
        for _ in range(batch):
            self.launch(blocks, arguments)
        call("cuEventRecord", event, None)

    def await_event(self, event: ctypes.c_void_p) -> None:
        call("cuEventSynchronize", event)

    def launch(self, blocks: int, arguments: ctypes.Array[ctypes.c_void_p]) -> None:
        number = self._launch(self._kernel, blocks, 1, 1, THREADS, 1, 1, 0, None, arguments, None)
        if number:
            raise RuntimeError(f"cuLaunchKernel: {number}")


def flood(gpu: Gpu, blocks: int, iterations: int, batch: int, opens: float, seconds: float) -> dict[str, object]:
    """Launch without a pause; the batches that end within the window count.

    A batch is of the same size for all ranks and modes: who launches less at a time gets less of a GPU that is shared
    by turns.
    """
    arguments = gpu.prepare(iterations)
    events = [gpu.make_event(), gpu.make_event()]
    for event in events:
        gpu.launch_batch(batch, blocks, arguments, event)
    kernels, turn = 0, 0
    while True:
        gpu.await_event(events[turn])
        now = time.time()
        if now >= opens + seconds:
            break
        gpu.launch_batch(batch, blocks, arguments, events[turn])
        turn = 1 - turn
        if now >= opens:
            kernels += batch
    gpu.wait()
    return {"kernels": kernels}


def pace(gpu: Gpu, blocks: int, iterations: int, pause_ms: int, opens: float, seconds: float) -> dict[str, object]:
    """One launch at a time, each timed."""
    arguments = gpu.prepare(iterations)
    latencies = []
    while (now := time.time()) < opens + seconds:
        began = time.perf_counter()
        gpu.launch(blocks, arguments)
        gpu.wait()
        took = time.perf_counter() - began
        if now >= opens:
            latencies.append(round(took * 1e6, 1))
        time.sleep(pause_ms / 1000)
    return {"kernels": len(latencies), "latencies_us": latencies}


def main() -> int:
    ranks, place, seconds = int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    report: dict[str, object] = {"rank": int(os.environ.get("SLURM_PROCID", "0"))}
    try:
        gpu = Gpu()
        phases: list[dict[str, object]] = []
        report |= {"sms": gpu.sms, "phases": phases}
        for number, phase in enumerate(sys.argv[4:]):
            kind, *size = phase.split(":")
            blocks, iterations, last = map(int, size)
            gpu.launch(blocks, gpu.prepare(iterations))  # the first launch loads the module
            gpu.wait()
            opens = meet(place / str(number), ranks)
            run = {"flood": flood, "pace": pace}[kind]
            phases.append({"phase": phase, **run(gpu, blocks, iterations, last, opens, seconds)})
    except (RuntimeError, OSError) as error:
        report["error"] = str(error)
    print(json.dumps(report), flush=True)
    return 1 if "error" in report else 0


if __name__ == "__main__":
    sys.exit(main())
