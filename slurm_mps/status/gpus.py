"""Asks NVML for compute modes and the memory of each client, and does not hang where the driver does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from threading import Lock, Thread
from typing import Any


@dataclass(frozen=True)
class GpuState:
    """compute_mode: a key of node.nvml.COMPUTE_MODES. memory_bytes: what each of its MPS clients uses, by pid (O66).

    others: the same of processes with a context that are no clients (O60): MPS servers, and programs without MPS.
    Of a MIG slice there is no mode, but its profile, such as 1g.10gb.
    """

    compute_mode: int | None
    memory_bytes: Mapping[int, int]
    others: Mapping[int, int]
    profile: str = ""


@dataclass(frozen=True)
class NvmlAnswer:
    """By UUID; why it is not all, if it is not; and whether a thread still waits for a driver that hangs."""

    gpus: Mapping[str, GpuState]
    problem: str = ""
    stuck: bool = False


_asking = Lock()  # whoever asks again and again starts no second thread while one hangs


def ask_nvml(uuids: Iterable[str], timeout_seconds: float) -> NvmlAnswer:
    """Ask NVML about these GPUs, and wait for `timeout_seconds` at most."""
    if not _asking.acquire(blocking=False):
        return NvmlAnswer({}, "the NVIDIA driver still does not answer", stuck=True)
    answer: list[NvmlAnswer] = []

    def look() -> None:
        try:
            answer.append(_look(uuids))
        finally:
            _asking.release()

    thread = Thread(target=look, daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    if thread.is_alive():
        return NvmlAnswer({}, f"the NVIDIA driver did not answer within {timeout_seconds:g} s", stuck=True)
    return answer[0] if answer else NvmlAnswer({}, "the NVIDIA driver could not be asked")


def _look(uuids: Iterable[str]) -> NvmlAnswer:
    import pynvml

    found: dict[str, GpuState] = {}
    problem = ""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return NvmlAnswer({}, f"NVML: {error}")
    for uuid in uuids:
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            before = _used(pynvml.nvmlDeviceGetMPSComputeRunningProcesses(handle))
            others = _used(pynvml.nvmlDeviceGetComputeRunningProcesses(handle))
            used = _used(pynvml.nvmlDeviceGetMPSComputeRunningProcesses(handle))
            for pid in before.keys() | used.keys():  # also a client that came or went between the calls
                others.pop(pid, None)
            is_slice = uuid.startswith("MIG-")
            profile = pynvml.nvmlDeviceGetName(handle).rpartition(" MIG ")[2] if is_slice else ""
            mode = None if is_slice else pynvml.nvmlDeviceGetComputeMode(handle)
            found[uuid] = GpuState(mode, used, others, profile)
        except pynvml.NVMLError as error:
            problem = f"{uuid}: NVML: {error}"
    return NvmlAnswer(found, problem)


def _used(rows: Iterable[Any]) -> dict[int, int]:
    return {row.pid: row.usedGpuMemory or 0 for row in rows}
