"""The driver and its GPUs as NVML has them, through the maintained binding (docs/decisions/0003)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import NodeError

T = TypeVar("T")


@dataclass(frozen=True)
class GpuFacts:
    """One GPU. None, or 0 bytes: the driver does not tell. ``error``: NVML's word where it does not answer at all.

    ``slices``: UUID and bytes of each of its MIG slices.
    """

    index: int
    uuid: str = ""
    minor: int | None = None
    name: str = ""
    compute_mode: int | None = None
    persistence: bool | None = None
    mig: bool | None = None
    mig_pending: bool | None = None
    compute_capability: tuple[int, int] | None = None
    processes: tuple[int, ...] = ()
    memory_bytes: int = 0
    slices: tuple[tuple[str, int], ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Driver:
    """The driver's version, such as 580.159.04, the newest CUDA it speaks, such as (13, 0), and its GPUs."""

    version: str
    cuda: tuple[int, int]
    gpus: tuple[GpuFacts, ...]

    @property
    def branch(self) -> int:
        """580 of 580.159.04."""
        head = self.version.partition(".")[0]
        return int(head) if head.isdigit() else 0


def look_at_gpus() -> Driver:
    """Raises: NodeError in NVML's words."""
    import pynvml

    try:
        pynvml.nvmlInit()
        cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        version = pynvml.nvmlSystemGetDriverVersion()
        gpus = tuple(_look(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError as error:
        raise NodeError(str(error)) from None
    return Driver(version, (cuda // 1000, cuda % 1000 // 10), gpus)


def _look(nvml: Any, index: int) -> GpuFacts:
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        uuid = nvml.nvmlDeviceGetUUID(handle)
    except nvml.NVMLError as error:
        return GpuFacts(index, error=str(error))

    def ask(one: Callable[[], T]) -> T | None:
        try:
            return one()
        except nvml.NVMLError:
            return None

    persistence = ask(lambda: nvml.nvmlDeviceGetPersistenceMode(handle))
    mig, pending = ask(lambda: nvml.nvmlDeviceGetMigMode(handle)) or (None, None)
    mode = None if mig else ask(lambda: nvml.nvmlDeviceGetComputeMode(handle))  # slices have modes then
    capability = ask(lambda: nvml.nvmlDeviceGetCudaComputeCapability(handle))
    rows = ask(lambda: nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle))
    return GpuFacts(
        index,
        uuid,
        ask(lambda: int(nvml.nvmlDeviceGetMinorNumber(handle))),
        str(ask(lambda: nvml.nvmlDeviceGetName(handle)) or ""),
        mode,
        None if persistence is None else bool(persistence),
        None if mig is None else bool(mig),
        None if pending is None else bool(pending),
        None if capability is None else (int(capability[0]), int(capability[1])),
        tuple(row.pid for row in rows or ()),
        int(ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total) or 0),
        tuple(_slices(nvml, handle)) if mig else (),
    )


def _slices(nvml: Any, gpu: Any) -> Iterator[tuple[str, int]]:
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(gpu)):
        try:
            handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, number)
            yield nvml.nvmlDeviceGetUUID(handle), int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
        except nvml.NVMLError:
            continue
