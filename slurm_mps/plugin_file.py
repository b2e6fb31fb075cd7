"""What a plugin file says of itself, read without loading it: the Slurm it was built for, its own version and format.

Slurm refuses a SPANK plugin of another release, and a required one that is refused fails every srun, sbatch and
salloc and drains every node that starts a job. So whoever puts one in place looks first.
"""

from __future__ import annotations

import struct

from .errors import MpsError
from .record import record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from os import PathLike

_SIZE_MAX = 16 * 2**20
_VERSION_MAX = 64
_VERDICT = "slurm_mps_verdict_version"
_DYNAMIC_SYMBOLS, _SYMBOL_SIZE, _LOADED = 11, 24, 1  # SHT_DYNSYM, sizeof(Elf64_Sym), PT_LOAD (elf(5))


@record
class PluginFile:
    """``slurm_release`` such as 22.05.8: of the headers that it was built with. ``version`` is slurm-mps' own.

    ``verdict_version`` is the newest that it reads; a plugin that does not say reads the first.
    """

    slurm_release: str
    version: str
    verdict_version: int

    def loads_in(self, slurm_release: str) -> bool:
        """Whether a Slurm of this release takes it: one of the same year and month does."""
        return self.slurm_release.split(".")[:2] == slurm_release.split(".")[:2]


class _Library:
    """The exported symbols of a 64-bit ELF file. Raises: ValueError, OverflowError, struct.error when it is damaged."""

    def __init__(self, data: bytes) -> None:
        if data[:5] != b"\x7fELF\x02" or data[5:6] not in (b"\x01", b"\x02"):
            raise ValueError("it is no 64-bit ELF file")
        self._data = data
        self._order = "<" if data[5] == 1 else ">"
        self._segments_at, self._sections_at = self._unpack("QQ", 32)
        self._segment_size, self._segment_count, self._section_size, self._section_count = self._unpack("4H", 54)

    def _unpack(self, fields: str, offset: int) -> tuple[int, ...]:
        return struct.unpack_from(self._order + fields, self._data, offset)

    def _section(self, index: int) -> tuple[int, int, int, int]:
        """Type, offset, size and link of a section."""
        start = self._sections_at + index * self._section_size
        (kind,) = self._unpack("I", start + 4)
        return (kind, *self._unpack("QQI", start + 24))  # type: ignore[return-value]

    def _exported(self) -> Iterator[tuple[str, int]]:
        """Name and address of each symbol that the file itself has."""
        for index in range(self._section_count):
            kind, offset, size, link = self._section(index)
            if kind != _DYNAMIC_SYMBOLS:
                continue
            _, names_at, _, _ = self._section(link)
            for start in range(offset, offset + size, _SYMBOL_SIZE):
                name_at, _info, _other, section, address, _size = self._unpack("IBBHQQ", start)
                if section:
                    yield self._text(names_at + name_at), address

    def _place_of(self, symbol: str) -> int:
        """Where in the file a symbol's value begins."""
        address = next((address for name, address in self._exported() if name == symbol), None)
        if address is None:
            raise ValueError(f"it has no {symbol}")
        for index in range(self._segment_count):
            start = self._segments_at + index * self._segment_size
            kind, _flags, offset, loaded_at, _physical, size = self._unpack("IIQQQQ", start)
            if kind == _LOADED and loaded_at <= address < loaded_at + size:
                return offset + address - loaded_at
        raise ValueError(f"its {symbol} has no value")

    def _text(self, place: int) -> str:
        return self._data[place : self._data.index(b"\0", place)].decode("ascii", "replace")

    def text(self, symbol: str) -> str:
        """The value of a char[]."""
        return self._text(self._place_of(symbol))

    def number(self, symbol: str) -> int:
        """The value of an unsigned int."""
        return self._unpack("I", self._place_of(symbol))[0]

    def has(self, symbol: str) -> bool:
        return any(name == symbol for name, _ in self._exported())


def read_plugin(path: str | PathLike[str]) -> PluginFile:
    """Read what a plugin file says of itself; nothing of it is run.

    Raises: MpsError when there is no such file, or it is not slurm-mps' SPANK plugin.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_SIZE_MAX + 1)
    except OSError as error:
        raise MpsError(f"{path}: {error.strerror}") from None
    try:
        library = _Library(data)
        kind = library.text("plugin_type")
        release = library.number("plugin_version")
        version = library.text("slurm_mps_version")
        verdict_version = library.number(_VERDICT) if library.has(_VERDICT) else 1
    except (ValueError, OverflowError, struct.error) as error:
        raise MpsError(f"{path} is not the plugin of slurm-mps: {error}") from None
    if len(data) > _SIZE_MAX or kind != "spank" or not 0 < len(version) <= _VERSION_MAX or not version.isprintable():
        raise MpsError(f"{path} is not the plugin of slurm-mps")
    return PluginFile(f"{release >> 16 & 255}.{release >> 8 & 255:02d}.{release & 255}", version, verdict_version)
