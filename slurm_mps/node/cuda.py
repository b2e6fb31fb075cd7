"""The devices, SMs and memory that a CUDA program has, from the driver, as any program asks it.

For ranks and tests, off the job's path. Loading it makes the process a CUDA program: with MPS set up, a client.
Source: CUDA driver API; attribute and error numbers as in cuda.h.
"""

from __future__ import annotations

import ctypes

from ..record import record

_LIBRARY = "libcuda.so.1"
_MULTIPROCESSOR_COUNT = 16


class CudaError(Exception):
    """A driver call failed; ``number`` is its CUresult."""

    def __init__(self, function: str, number: int, name: str) -> None:
        super().__init__(f"{function}: {name} ({number})")
        self.number = number


@record
class Device:
    """One visible device after a context was made on it. ``free_bytes`` is what an MPS memory limit leaves (O16)."""

    ordinal: int
    uuid: str
    multiprocessors: int
    free_bytes: int
    total_bytes: int


def _load(search_path: str) -> ctypes.CDLL:
    """Raises: OSError when there is no driver."""
    for directory in filter(None, search_path.replace(";", ":").split(":")):
        try:
            return ctypes.CDLL(f"{directory}/{_LIBRARY}")
        except OSError:  # not there, or for another kind of machine; the loader goes on as well
            continue
    return ctypes.CDLL(_LIBRARY)


class Cuda:
    """The CUDA driver of this process.

    `search_path` is the LD_LIBRARY_PATH of the programs that are meant, where this process was started without: a site
    may have a driver there that is newer than the system's (CUDA's forward compatibility package).
    """

    def __init__(self, search_path: str = "") -> None:
        self._library = _load(search_path)
        self._call("cuInit", 0)

    def _call(self, function: str, *arguments: object) -> None:
        number = getattr(self._library, function)(*arguments)
        if number:
            name = ctypes.c_char_p()
            self._library.cuGetErrorName(number, ctypes.byref(name))
            raise CudaError(function, number, (name.value or b"unknown").decode("ascii", "replace"))

    def device_count(self) -> int:
        count = ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        return count.value

    def _device(self, ordinal: int) -> ctypes.c_int:
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        return device

    def uuid(self, ordinal: int) -> str:
        """A visible device's UUID, without a context; of a MIG slice, the slice's."""
        uuid = (ctypes.c_ubyte * 16)()
        self._call("cuDeviceGetUuid_v2", uuid, self._device(ordinal))
        return _uuid_text(bytes(uuid), "MIG" if self.profile(ordinal) else "GPU")

    def profile(self, ordinal: int) -> str:
        """The size of a MIG slice, such as 1g.10gb, which its name ends with; "" for a whole GPU. Without a context."""
        name = ctypes.create_string_buffer(128)
        self._call("cuDeviceGetName", name, len(name), self._device(ordinal))
        return name.value.decode("ascii", "replace").partition(" MIG ")[2]

    def multiprocessors(self, ordinal: int) -> int:
        """How many SMs this process may use of a device: all of them unless it is an MPS client. Without a context."""
        count = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(count), _MULTIPROCESSOR_COUNT, self._device(ordinal))
        return count.value

    def pci_address(self, ordinal: int) -> str:
        """A device's place as sysfs writes it: ``0000:06:00.0``. Without a context."""
        text = ctypes.create_string_buffer(32)
        self._call("cuDeviceGetPCIBusId", text, len(text), self._device(ordinal))
        return text.value.decode("ascii", "replace").lower()

    def open_device(self, ordinal: int) -> Device:
        """Make a context on a device and look at it; the context stays, so that the process stays a client.

        Raises: CudaError, such as 2 (out of memory: the limit is below what a context costs), 46 (device unavailable:
        another process has it exclusively) or 808 (the server has no room for another client).
        """
        context = ctypes.c_void_p()
        self._call("cuCtxCreate_v2", ctypes.byref(context), 0, self._device(ordinal))
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return Device(ordinal, self.uuid(ordinal), self.multiprocessors(ordinal), free.value, total.value)


def _uuid_text(data: bytes, kind: str) -> str:
    text = data.hex()
    return f"{kind}-{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
