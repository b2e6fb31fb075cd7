"""The undos of a journal, read back."""

from __future__ import annotations

from ..node.wordfile import DamagedFileError, fields
from .actions import QuitDaemons, ReleaseGpu, RemoveDirectories
from .joined import LEAVE_GPUS, read_leave_gpus

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .actions import Undo


def read_undo(line: str) -> Undo:
    """Read an undo back from its journal line.

    Raises: DamagedFileError when the line is no undo.
    """
    kind, *words = line.split(" ")
    if kind == "release_gpu" and (found := fields(words)).keys() == {"gpu"}:
        return ReleaseGpu(found["gpu"])
    if kind == "remove_directories" and not words:
        return RemoveDirectories()
    if kind == "quit_daemons" and (found := fields(words)).keys() == {"names"}:
        return QuitDaemons(tuple(found["names"].split(",")))
    if kind == LEAVE_GPUS:
        return read_leave_gpus(fields(words))
    raise DamagedFileError(f"the journal has an unknown undo {kind[:40]!r}")
