"""Put one question to NVML twice, through slurm_mps's own binding and through the maintained pynvml.

Arguments: ``ask GPU FIELD`` with a field of ``slurm_mps.node.nvml.Gpu``, ``ours`` the same of our binding alone, ``mode
UUID``, ``busy UUID SECONDS`` (whether anything ran since then), ``processes UUID``, ``clients UUID`` (each MPS client's
pid and MiB), ``expected INDEX`` (the UUID, ours from the kernel's list), ``set-mode UUID MODE``, or ``set-ours UUID
MODE``, where ours sets the mode and pynvml only reads what it is now.
Prints a line of JSON, [ours, pynvml's]; each is {"value": …} or {"number": …, "words": …} of an NVML error, ours with
the "function" that it names. With MINORS_FROM=N in the environment the first GPU's minor number reads N, and so on: on
many nodes, the simulated ones among them, it is the index, and nobody would see one taken for the other.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
from typing import TYPE_CHECKING, Any

import pynvml

from slurm_mps.errors import NodeError
from slurm_mps.node.nvml import Gpus, expected_uuids
from slurm_mps.status.gpus import ask_nvml

if TYPE_CHECKING:
    from collections.abc import Callable

Answer = dict[str, Any]
LOAD_LIBRARY = ctypes.CDLL

FIELDS: dict[str, Callable[[Any], Any]] = {
    "uuid": pynvml.nvmlDeviceGetUUID,
    "index": pynvml.nvmlDeviceGetIndex,
    "minor": pynvml.nvmlDeviceGetMinorNumber,
    "memory_bytes": lambda handle: pynvml.nvmlDeviceGetMemoryInfo(handle).total,
    "name": pynvml.nvmlDeviceGetName,
    "free_bytes": lambda handle: pynvml.nvmlDeviceGetMemoryInfo(handle).free,
    "compute_capability": pynvml.nvmlDeviceGetCudaComputeCapability,
    "cuda_version": lambda _: divmod(pynvml.nvmlSystemGetCudaDriverVersion_v2() // 10, 100),
}


class Shifted:
    """libnvidia-ml.so.1 with higher minor numbers."""

    def __init__(self, library: str) -> None:
        self._library = LOAD_LIBRARY(library)

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)
        if name != "nvmlDeviceGetMinorNumber":
            return function

        def read_shifted(handle: Any, reference: Any) -> int:
            status: int = function(handle, reference)
            reference._obj.value += int(os.environ["MINORS_FROM"])  # noqa: SLF001 - byref() has no other name for it
            return status

        return read_shifted


def ours(question: str, name: str, detail: str) -> Answer:
    gpus = Gpus()
    try:
        if question in ("ask", "ours"):
            return {"value": getattr(gpus.resolve(name), detail)}
        if question == "processes":
            return {"value": sorted(gpus.processes(name))}
        if question == "busy":
            return {"value": gpus.was_busy(name, float(detail))}
        if question == "clients":
            used = ask_nvml([name], 10).gpus[name].memory_bytes
            return {"value": sorted([pid, size >> 20] for pid, size in used.items())}
        if question == "expected":
            return {"value": list(expected_uuids([name]))}
        if question in ("set-mode", "set-ours"):
            gpus.set_compute_mode(name, int(detail))
        return {"value": gpus.compute_mode(name)}
    except NodeError as error:
        said = re.search(r"(\w+): ([^:]*) \(NVML error (\d+)\)$", str(error))
        if said is None:
            return {"words": str(error)}
        return {"function": said[1], "words": said[2], "number": int(said[3])}


def pynvmls(question: str, name: str, detail: str) -> Answer:
    try:
        pynvml.nvmlInit()
        if name.isdigit():
            handle = pynvml.nvmlDeviceGetHandleByIndex(int(name))
        else:
            handle = pynvml.nvmlDeviceGetHandleByUUID(name)
        if question == "ask":
            return {"value": FIELDS[detail](handle)}
        if question == "expected":
            return {"value": [pynvml.nvmlDeviceGetUUID(handle)]}
        if question == "processes":
            return {"value": sorted(one.pid for one in pynvml.nvmlDeviceGetComputeRunningProcesses(handle))}
        if question == "busy":
            _, samples = pynvml.nvmlDeviceGetSamples(handle, pynvml.NVML_GPU_UTILIZATION_SAMPLES, 0)
            return {"value": any(s.sampleValue.uiVal and s.timeStamp > float(detail) * 1e6 for s in samples)}
        if question == "clients":
            clients = pynvml.nvmlDeviceGetMPSComputeRunningProcesses(handle)
            return {"value": sorted([one.pid, one.usedGpuMemory >> 20] for one in clients)}
        if question == "set-mode":
            pynvml.nvmlDeviceSetComputeMode(handle, int(detail))
        return {"value": pynvml.nvmlDeviceGetComputeMode(handle)}
    except pynvml.NVMLError as error:
        return {"number": error.value, "words": words_for(error)}


def words_for(error: Any) -> str:
    """The library's own; pynvml has others for some errors, and these alone where there is no library."""
    try:
        return str(pynvml.nvmlErrorString(error.value))
    except pynvml.NVMLError:
        return str(error)


if "MINORS_FROM" in os.environ:
    ctypes.CDLL = pynvml.CDLL = Shifted  # type: ignore[assignment, misc]
question, name, detail = (*sys.argv[1:], "")[:3]
print(json.dumps([ours(question, name, detail), pynvmls(question, name, detail)]))
