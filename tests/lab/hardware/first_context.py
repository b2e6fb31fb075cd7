"""A rank that makes its first CUDA context, and prints when it began, when cuInit was done and when the context was
there, in seconds since the epoch."""

from __future__ import annotations

import time

BEGAN = time.time()

import ctypes  # noqa: E402 - the clock comes first
import json  # noqa: E402
import os  # noqa: E402


def main() -> None:
    cuda = ctypes.CDLL("libcuda.so.1")
    device, context = ctypes.c_int(), ctypes.c_void_p()
    errors = [cuda.cuInit(0)]
    initialised = time.time()
    errors += [cuda.cuDeviceGet(ctypes.byref(device), 0), cuda.cuCtxCreate_v2(ctypes.byref(context), 0, device)]
    there = time.time()
    errors.append(cuda.cuCtxSynchronize())
    said = {"began": BEGAN, "initialised": initialised, "context": there, "errors": errors}
    print(json.dumps({"gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), **said}))


main()
