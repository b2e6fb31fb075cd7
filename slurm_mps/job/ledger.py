"""A ledger for each GPU: which jobs hold it, and the compute mode that was found before slurm-mps changed it.

slurm-mps ledger 1
boot <boot id>
mode_found 0
holder 4711
"""

from __future__ import annotations

from ..node.files import whole_name
from ..node.wordfile import DamagedFileError, decode, encode
from ..record import record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from ..node.files import Directory, LockFile

_VERSION = 1
_LOCK = 0  # of all ledgers, and of the compiled configuration


@record
class LedgerEntry:
    """Who holds a GPU, and the compute mode that was found when slurm-mps changed it (None: it did not)."""

    holders: tuple[int, ...] = ()
    mode_found: int | None = None


class Ledgers:
    """The ledgers of this node's GPUs, in a directory that only root can enter.

    `job_ids` says of which jobs something is kept: who is none of them holds nothing any more.
    """

    def __init__(
        self, directory: Directory, locks: LockFile, boot_id: str, job_ids: Callable[[], Collection[int]]
    ) -> None:
        self._directory = directory
        self._locks = locks
        self._boot_id = boot_id
        self._job_ids = job_ids

    def close(self) -> None:
        self._directory.close()

    def lock(self, timeout_seconds: float) -> None:
        """Keep everybody else out of the ledgers. Raises: DeadlineError."""
        self._locks.acquire(_LOCK, timeout_seconds)

    def unlock(self) -> None:
        self._locks.release(_LOCK)

    def names(self) -> list[str]:
        """The GPUs that a ledger is kept of, or that a write of one was begun for."""
        return sorted({whole_name(name) for name in self._directory.names()})

    def read(self, uuid: str) -> LedgerEntry:
        """Who holds a GPU. Holders that are no jobs of this boot any more do not count."""
        entry, boot_id = self.read_as_written(uuid)
        if boot_id != self._boot_id:
            return LedgerEntry()
        jobs = set(self._job_ids())
        return LedgerEntry(tuple(job for job in entry.holders if job in jobs), entry.mode_found)

    def read_as_written(self, uuid: str) -> tuple[LedgerEntry, str]:
        """What a GPU's ledger says, and the boot it says it of; nothing of no boot where there is none.

        Raises: DamagedFileError, NewerFileError.
        """
        try:
            lines = decode(self._directory.read(uuid), "ledger", _VERSION)
        except FileNotFoundError:
            return LedgerEntry(), ""
        known = dict(line.partition(" ")[::2] for line in lines if not line.startswith("holder "))
        mode = known.get("mode_found")
        try:
            holders = tuple(int(line.removeprefix("holder ")) for line in lines if line.startswith("holder "))
            return LedgerEntry(holders, None if mode is None else int(mode)), known.get("boot", "")
        except ValueError:
            raise DamagedFileError(f"the ledger of {uuid} does not name its holders") from None

    def write(self, uuid: str, entry: LedgerEntry) -> None:
        """Put a GPU's ledger on disk; without holders and nothing to put back there is none."""
        if not entry.holders and entry.mode_found is None:
            self._directory.unlink(uuid)
            return
        mode = [] if entry.mode_found is None else [f"mode_found {entry.mode_found}"]
        lines = [f"boot {self._boot_id}", *mode, *(f"holder {job}" for job in entry.holders)]
        self._directory.write(uuid, encode("ledger", _VERSION, lines))
