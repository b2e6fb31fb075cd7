"""A rank that keeps a GPU busy and counts: kernels of a chosen size, launched one after another through ctypes.

``load.py RANKS MEETING SECONDS PHASE...``: RANKS programs meet in the directory MEETING, then do every PHASE together
for SECONDS, all within the same window. A phase is ``flood:BLOCKS:ITERATIONS:BATCH`` (launches, two batches ahead of
the GPU), ``stream:BLOCKS:ITERATIONS:BATCH`` (the same, of a kernel that reads memory instead of computing: 16 bytes a
thread and iteration) or ``pace:BLOCKS:ITERATIONS:PAUSE_MS`` (one at a time, each timed from launch to end, with a pause
after it).
Prints one line of JSON: when the rank had its context, what it has of the GPU, and of each phase the kernels that ended
within the window and, for `pace`, the latencies in microseconds.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from pathlib import Path

from tests.lab.hardware.meeting import meet

THREADS = 256
_LOAD_BYTES = 16
_SMS = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT

#: `burn`: multiply-adds, each of which waits for the one before. `stream`: sums of what lies in memory, each thread's
#: share a whole grid apart. Results are kept, so that nothing can be left out.
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
.visible .entry stream(.param .u32 iterations, .param .u64 source) {
    .reg .u32 %left, %thread, %block, %threads, %blocks;
    .reg .u64 %address, %at, %step;
    .reg .f32 %x, %a, %b, %c, %d;
    .reg .pred %more, %never;
    ld.param.u32 %left, [iterations];
    ld.param.u64 %address, [source];
    cvta.to.global.u64 %address, %address;
    mov.u32 %thread, %tid.x;
    mov.u32 %block, %ctaid.x;
    mov.u32 %threads, %ntid.x;
    mov.u32 %blocks, %nctaid.x;
    mad.lo.u32 %thread, %block, %threads, %thread;
    mul.lo.u32 %blocks, %blocks, %threads;
    mul.wide.u32 %at, %thread, 16;
    add.u64 %address, %address, %at;
    mul.wide.u32 %step, %blocks, 16;
    mov.f32 %x, 0f00000000;
AGAIN:
    ld.global.v4.f32 {%a, %b, %c, %d}, [%address];
    add.f32 %a, %a, %b;
    add.f32 %c, %c, %d;
    add.f32 %a, %a, %c;
    add.f32 %x, %x, %a;
    add.u64 %address, %address, %step;
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
    """A context on the first device, and the kernels."""

    def __init__(self) -> None:
        device, context, sms = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_int()
        call("cuInit", 0)
        call("cuDeviceGet", ctypes.byref(device), 0)
        call("cuCtxCreate_v2", ctypes.byref(context), 0, device)
        call("cuDeviceGetAttribute", ctypes.byref(sms), _SMS, device)
        self.sms = sms.value
        self._module = ctypes.c_void_p()
        call("cuModuleLoadData", ctypes.byref(self._module), PTX)
        self._launch = cuda.cuLaunchKernel
        self._launch.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3]

    def wait(self) -> None:
        call("cuCtxSynchronize")

    def prepare(self, name: bytes, iterations: int, memory_bytes: int = 4096) -> ctypes.Array[ctypes.c_void_p]:
        """Make a kernel the one that is launched, with zeroed memory of its own.

        Returns: the arguments of a launch; `_held` keeps alive what they point to.
        """
        kernel, memory, size = ctypes.c_void_p(), ctypes.c_uint64(), ctypes.c_size_t(memory_bytes)
        call("cuModuleGetFunction", ctypes.byref(kernel), self._module, name)
        call("cuMemAlloc_v2", ctypes.byref(memory), size)
        call("cuMemsetD8_v2", memory, 0, size)
        self._kernel = kernel
        self._held = (ctypes.c_uint(iterations), memory)
        return (ctypes.c_void_p * 2)(*(ctypes.cast(ctypes.byref(value), ctypes.c_void_p) for value in self._held))

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


def flood(
    gpu: Gpu, blocks: int, batch: int, arguments: ctypes.Array[ctypes.c_void_p], opens: float, seconds: float
) -> dict[str, object]:
    """Launch without a pause; the batches that end within the window count.

    A batch is of the same size for all ranks and modes: who launches less at a time gets less of a GPU that is shared
    by turns.
    """
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


def pace(
    gpu: Gpu, blocks: int, pause_ms: int, arguments: ctypes.Array[ctypes.c_void_p], opens: float, seconds: float
) -> dict[str, object]:
    """One launch at a time, each timed."""
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
        report |= {"context": time.time(), "sms": gpu.sms, "phases": phases}
        for number, phase in enumerate(sys.argv[4:]):
            kind, *size = phase.split(":")
            blocks, iterations, last = map(int, size)
            if kind == "stream":
                arguments = gpu.prepare(b"stream", iterations, blocks * THREADS * iterations * _LOAD_BYTES)
            else:
                arguments = gpu.prepare(b"burn", iterations)
            gpu.launch(blocks, arguments)  # the first launch loads the module
            gpu.wait()
            opens = meet(place / str(number), ranks)
            run = pace if kind == "pace" else flood
            phases.append({"phase": phase, **run(gpu, blocks, last, arguments, opens, seconds)})
    except (RuntimeError, OSError) as error:
        report["error"] = str(error)
    print(json.dumps(report), flush=True)
    return 1 if "error" in report else 0


if __name__ == "__main__":
    sys.exit(main())
