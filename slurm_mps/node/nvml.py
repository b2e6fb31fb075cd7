"""The node's GPUs through NVML: their UUIDs, memory, compute modes and processes.

A binding of the functions that prolog and epilog need. Everything off the job's path uses the maintained
``pynvml`` (nvidia-ml-py), and a contract test holds this binding to it; here it would cost the prolog more than all
its other work, and would have root run third-party code for every job (docs/decisions/0003).

Errors: every failing NVML call is a NodeError that names the function, the GPU and NVML's own words.
Source: NVIDIA's NVML API reference; function names and numbers as in nvml.h.
"""

from __future__ import annotations

import ctypes

from ..errors import NodeError, RequestError
from ..record import record
from .files import open_trusted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

_LIBRARY = "libnvidia-ml.so.1"
_UUID_BYTES = 96
_NAME_BYTES = 96
_PROCESSES_MAX = 256
_NOT_SUPPORTED = 3
_GPU_UTILIZATION, _SAMPLES_MAX = 1, 256

#: nvmlComputeMode_t
COMPUTE_MODES = {0: "DEFAULT", 1: "EXCLUSIVE_THREAD", 2: "PROHIBITED", 3: "EXCLUSIVE_PROCESS"}
DEFAULT, EXCLUSIVE_PROCESS = 0, 3

#: The first CUDA whose control daemon limits memory, and the driver that has it (NVIDIA's documentation).
CUDA_NEEDED = (11, 5)
NEEDED = "CUDA 11.5 (driver 495) or newer"
_VERSION_BYTES = 80
#: The kernel's own list of GPUs: a directory each, named by PCI address, with a file of ``Name: value`` lines (O69).
_KERNEL_LIST = "/proc/driver/nvidia/gpus"
_CAPABILITIES = "/proc/driver/nvidia/capabilities"
_HEXADECIMAL = frozenset("0123456789abcdef-")


class _Process(ctypes.Structure):  # nvmlProcessInfo_t, of NVML's third form (O60)
    _fields_ = (
        ("pid", ctypes.c_uint),
        ("memory", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class _Attributes(ctypes.Structure):  # nvmlDeviceAttributes_t, of a MIG device alone
    _fields_ = (
        ("multiprocessors", ctypes.c_uint),
        ("shared_engines", ctypes.c_uint * 5),
        ("gpu_parts", ctypes.c_uint),
        ("compute_parts", ctypes.c_uint),
        ("memory_mib", ctypes.c_ulonglong),
    )


class _Sample(ctypes.Structure):  # nvmlSample_t, whose value is a union
    _fields_ = (("microseconds", ctypes.c_ulonglong), ("percent", ctypes.c_uint), ("_rest", ctypes.c_uint))


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


@record
class Gpu:
    """A GPU of this node, or a MIG slice of one. ``index`` counts GPUs in PCI order as NVML does.

    Its device node is ``/dev/nvidia<minor>``, a slice's own ``/dev/nvidia-caps/nvidia-cap<minor>``. ``free_bytes`` is
    what nobody used when it was asked; ``compute_capability`` such as (9, 0); ``cuda_version`` the newest CUDA that the
    driver speaks, such as (13, 0). ``profile`` is NVIDIA's name of a slice's size, such as 1g.10gb, and "" for a GPU;
    ``slice_index`` counts the slices of a GPU; ``parts``: how many of how many parts of the GPU compute for it.
    """

    uuid: str
    index: int
    minor: int
    memory_bytes: int
    name: str
    free_bytes: int
    compute_capability: tuple[int, int]
    cuda_version: tuple[int, int]
    profile: str = ""
    slice_index: int = 0
    parts: tuple[int, int] = (1, 1)

    @property
    def called(self) -> str:
        """Its name in messages."""
        return f"{self.uuid} ({self.profile})" if self.profile else self.uuid


def expected_uuids(names: Sequence[str]) -> tuple[str, ...]:
    """The UUIDs of GPUs that Slurm names by index or UUID, in PCI order, as the kernel lists them: at once, where NVML
    takes 17 ms to open.

    This is an expectation: NVML may leave out a GPU that the kernel lists. Empty where the kernel does not list all
    of these GPUs, as in some containers.
    """
    listed = _listed_by_kernel()
    wanted = {listed[int(name)] if name.isdigit() and int(name) < len(listed) else name for name in names}
    found = tuple(uuid for uuid in listed if uuid in wanted)
    return found if len(found) == len(names) else ()


def _listed_by_kernel() -> list[str]:
    """The UUIDs of this node's GPUs but those that the admin excluded; none if one of them has none yet.

    Before a GPU's first use its UUID is question marks.
    """
    found = []
    try:
        with open_trusted(_KERNEL_LIST) as here:
            for address in here.names():
                with here.subdirectory(address) as gpu:
                    lines = gpu.read("information").decode("ascii", "replace").splitlines()
                known = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
                if known.get("GPU Excluded") != "Yes":
                    found.append(known.get("GPU UUID", ""))
    except (OSError, NodeError):
        return []
    whole = all(uuid.startswith("GPU-") and _HEXADECIMAL.issuperset(uuid[4:]) for uuid in found)
    return found if whole else []


def _has_slices() -> bool:
    """Whether a GPU of this node is cut into MIG slices, as the kernel lists them."""
    cards = (card for card in _listed(_CAPABILITIES) if card.startswith("gpu"))
    return any(name.startswith("gi") for card in cards for name in _listed(f"{_CAPABILITIES}/{card}/mig"))


def _listed(directory: str) -> list[str]:
    try:
        with open_trusted(directory) as here:
            return here.names()
    except (OSError, NodeError):  # a driver or a GPU that knows no MIG
        return []


def _capability_minor(minor: int, gpu_instance: int, compute_instance: int) -> int:
    """The minor number of the device that the kernel asks whoever uses a MIG slice for."""
    place = f"{_CAPABILITIES}/gpu{minor}/mig/gi{gpu_instance}/ci{compute_instance}"
    try:
        with open_trusted(place) as here:
            words = here.read("access").split()
        return int(words[words.index(b"DeviceFileMinor:") + 1])
    except (OSError, ValueError, IndexError) as error:
        raise NodeError(f"{place}/access does not name the device of a MIG slice: {error}") from None


def _describe(library: ctypes.CDLL, status: int) -> str:
    library.nvmlErrorString.restype = ctypes.c_char_p
    words: bytes | None = library.nvmlErrorString(status)
    return f"{(words or b'unknown error').decode('ascii', 'replace')} (NVML error {status})"


class Gpus:
    """NVML, opened at its first use."""

    def __init__(self) -> None:
        self._nvml: ctypes.CDLL | None = None
        self._handles: dict[str, ctypes.c_void_p] = {}
        self._has_slices: bool | None = None

    def open(self) -> None:
        """Open NVML now, which takes 17 ms with the first handle (O29): while something else has to be waited for.

        An error is ignored here: it comes again in the call that needs NVML, and is reported there.
        """
        try:
            self._library().nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(ctypes.c_void_p()))
        except NodeError:
            pass

    def close(self) -> None:
        """Close NVML, which would take as long when the process ends. Not before all is done that may be undone."""
        if self._nvml is not None:
            self._nvml.nvmlShutdown()
            self._nvml = None
            self._handles.clear()

    def _library(self) -> ctypes.CDLL:
        if self._nvml is None:
            try:
                library = ctypes.CDLL(_LIBRARY)
            except OSError as error:
                raise NodeError(f"NVML cannot be loaded: {error}", hint="is the NVIDIA driver installed?") from None
            status = library.nvmlInit_v2()
            if status:
                raise NodeError(f"this node's NVIDIA driver: nvmlInit_v2: {_describe(library, status)}")
            self._nvml = library
        return self._nvml

    def _call(self, function: str, subject: str, *arguments: Any) -> None:
        library = self._library()
        status = getattr(library, function)(*arguments)
        if status:
            raise NodeError(f"{subject}: {function}: {_describe(library, status)}")

    def _handle(self, uuid: str) -> ctypes.c_void_p:
        if uuid not in self._handles:
            handle = ctypes.c_void_p()
            try:
                self._call("nvmlDeviceGetHandleByUUID", uuid, uuid.encode("ascii"), ctypes.byref(handle))
            except NodeError as error:
                cut = "was the GPU cut anew? restart slurmd, which keeps the slices that it found"
                raise NodeError(error.message, hint=cut if uuid.startswith("MIG-") else "") from None
            self._handles[uuid] = handle
        return self._handles[uuid]

    def _text(self, function: str, subject: str, handle: ctypes.c_void_p, size: int) -> str:
        buffer = ctypes.create_string_buffer(size)
        self._call(function, subject, handle, buffer, size)
        return buffer.value.decode("ascii", "replace")

    def _number(self, function: str, subject: str, handle: ctypes.c_void_p) -> int:
        number = ctypes.c_uint()
        self._call(function, subject, handle, ctypes.byref(number))
        return number.value

    def resolve(self, name: str) -> Gpu:
        """Find a GPU by what Slurm calls it: an index, which counts as NVML does, or a UUID, also of a MIG slice.

        Raises: NodeError when the node has no such GPU, its driver is older than CUDA_NEEDED, or NVML fails;
        RequestError for an index on a node with MIG slices.
        """
        subject = f"GPU {name}"
        handle = self._by_index(name) if name.isdigit() else self._handle(name)
        part = self._slice(subject, handle) if name.startswith("MIG-") else {}
        card = part.pop("card", handle)
        uuid = self._text("nvmlDeviceGetUUID", subject, handle, _UUID_BYTES)
        self._handles[uuid] = handle
        memory = _Memory()
        self._call("nvmlDeviceGetMemoryInfo", subject, handle, ctypes.byref(memory))
        return Gpu(
            uuid=uuid,
            index=self._number("nvmlDeviceGetIndex", subject, card),
            memory_bytes=memory.total,
            name=self._text("nvmlDeviceGetName", subject, handle, _NAME_BYTES),
            free_bytes=memory.free,
            compute_capability=self._compute_capability(subject, card),
            cuda_version=self._cuda_version(),
            **(part or {"minor": self._number("nvmlDeviceGetMinorNumber", subject, card)}),
        )

    def _by_index(self, name: str) -> ctypes.c_void_p:
        if self._has_slices is None:
            self._has_slices = _has_slices()
        if self._has_slices:
            raise RequestError(
                f"Slurm gives it GPU {name} by number, and a number is ambiguous on a node with MIG slices",
                hint="tell your admin: AutoDetect=nvml gives UUIDs of slices, and from Slurm 25.11 on of GPUs",
                reason="mig",
            )
        handle = ctypes.c_void_p()
        self._call("nvmlDeviceGetHandleByIndex_v2", f"GPU {name}", int(name), ctypes.byref(handle))
        return handle

    def _slice(self, subject: str, handle: ctypes.c_void_p) -> dict[str, Any]:
        """The fields that only a MIG slice has, and its card's handle. From documentation, not seen on hardware."""
        card, attributes = ctypes.c_void_p(), _Attributes()
        self._call("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", subject, handle, ctypes.byref(card))
        self._call("nvmlDeviceGetAttributes_v2", subject, handle, ctypes.byref(attributes))
        minor = self._number("nvmlDeviceGetMinorNumber", subject, card)
        gpu_instance = self._number("nvmlDeviceGetGpuInstanceId", subject, handle)
        compute_instance = self._number("nvmlDeviceGetComputeInstanceId", subject, handle)
        return {
            "card": card,
            "minor": _capability_minor(minor, gpu_instance, compute_instance),
            "profile": self._text("nvmlDeviceGetName", subject, handle, _NAME_BYTES).rpartition(" MIG ")[2],
            "slice_index": self._number("nvmlDeviceGetIndex", subject, handle),
            "parts": (attributes.compute_parts, self._number("nvmlDeviceGetMaxMigDeviceCount", subject, card)),
        }

    def _compute_capability(self, subject: str, handle: ctypes.c_void_p) -> tuple[int, int]:
        major, minor = ctypes.c_int(), ctypes.c_int()
        numbers = ctypes.byref(major), ctypes.byref(minor)
        self._call("nvmlDeviceGetCudaComputeCapability", subject, handle, *numbers)
        return major.value, minor.value

    def _cuda_version(self) -> tuple[int, int]:
        version = ctypes.c_int()
        self._call("nvmlSystemGetCudaDriverVersion_v2", "this node's NVIDIA driver", ctypes.byref(version))
        found = version.value // 1000, version.value % 1000 // 10
        if found < CUDA_NEEDED:
            driver = ctypes.create_string_buffer(_VERSION_BYTES)
            self._call("nvmlSystemGetDriverVersion", "this node's NVIDIA driver", driver, _VERSION_BYTES)
            named = f"{driver.value.decode('ascii', 'replace')} (CUDA {found[0]}.{found[1]})"
            raise NodeError(f"this node's NVIDIA driver {named} is too old: slurm-mps needs {NEEDED}")
        return found

    def compute_mode(self, uuid: str) -> int:
        """The compute mode a GPU is in, a key of COMPUTE_MODES."""
        return self._number("nvmlDeviceGetComputeMode", uuid, self._handle(uuid))

    def processes(self, uuid: str) -> tuple[int, ...]:
        """The processes that have a context on a GPU; empty where the driver does not list them."""
        library, handle = self._library(), self._handle(uuid)
        function = "nvmlDeviceGetComputeRunningProcesses_v3"
        if not hasattr(library, function):  # a driver older than r510
            return ()
        count, rows = ctypes.c_uint(_PROCESSES_MAX), (_Process * _PROCESSES_MAX)()
        status = getattr(library, function)(handle, ctypes.byref(count), rows)
        if status == _NOT_SUPPORTED:
            return ()
        if status:
            raise NodeError(f"{uuid}: {function}: {_describe(library, status)}")
        return tuple(row.pid for row in rows[: count.value])

    def was_busy(self, uuid: str, since_seconds: float) -> bool:
        """Whether anything ran on a GPU since then, by samples of its last 14 s (O98); no where the driver has none."""
        kind, count, rows = ctypes.c_uint(), ctypes.c_uint(_SAMPLES_MAX), (_Sample * _SAMPLES_MAX)()
        asked = _GPU_UTILIZATION, ctypes.c_ulonglong(), ctypes.byref(kind), ctypes.byref(count), rows
        if self._library().nvmlDeviceGetSamples(self._handle(uuid), *asked):
            return False
        return any(row.percent and row.microseconds > since_seconds * 1e6 for row in rows[: count.value])

    def set_compute_mode(self, uuid: str, mode: int) -> None:
        """Put a GPU into a compute mode and read it back.

        Raises: NodeError when NVML refuses, or reads back another mode.
        """
        self._call("nvmlDeviceSetComputeMode", uuid, self._handle(uuid), mode)
        now = self.compute_mode(uuid)
        if now != mode:
            raise NodeError(
                f"{uuid}: compute mode {COMPUTE_MODES.get(mode, mode)} was set, but NVML reads back "
                f"{COMPUTE_MODES.get(now, now)}"
            )
