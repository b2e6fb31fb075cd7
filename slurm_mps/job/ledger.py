"""A ledger for each GPU: which jobs hold it and how, and the compute mode that was found before slurm-mps changed it.

slurm-mps ledger 1
boot <boot id>
mode_found 0
daemon starter=4711 stage=open uid=20001 closer=0 pid=812 start=90210        where jobs are joined (job/joined.py)
holder 4711 way=joined uid=20001 mib=35654
"""

from __future__ import annotations

from ..node.files import whole_name
from ..node.processes import ProcessIdentity
from ..node.wordfile import DamagedFileError, decode, encode, fields, with_fields
from ..record import record, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from ..node.files import Directory, LockFile

_VERSION = 1
_LOCK = 0  # of all ledgers
#: How a job holds a GPU: no other MPS job beside it, others that each have a daemon of their own, or one daemon for
#: jobs of one user, or for jobs of all users.
WHOLE, SEPARATE, JOINED, JOINED_ALL = "whole", "separate", "joined", "joined-all"
STARTING, OPEN, CLOSING = "starting", "open", "closing"


@record
class Holder:
    """A job that holds a GPU, and how. A joined one has its user, and the MiB for its clients (0: not known)."""

    job_id: int
    way: str = WHOLE
    uid: int = 0
    mib: int = 0


@record
class JoinedDaemon:
    """The control daemon of joined jobs: the job that started it, its stage, and its process.

    `uid` is the user of its server: root for jobs of all users. `closer` is the job whose undo ends it.
    """

    starter: int
    stage: str
    uid: int = 0
    closer: int = 0
    process: ProcessIdentity | None = None


@record
class LedgerEntry:
    """A GPU's holders, the compute mode before slurm-mps changed it (None: it did not), and the daemon of joined
    jobs.
    """

    holders: tuple[Holder, ...] = ()
    mode_found: int | None = None
    daemon: JoinedDaemon | None = None


class Ledgers:
    """The ledgers of this node's GPUs, in a directory that only root can enter.

    `job_ids` gives the jobs that have a directory: any other holder has ended.
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
        """Lock the ledgers. Raises: DeadlineError."""
        self._locks.acquire(_LOCK, timeout_seconds)

    def unlock(self) -> None:
        self._locks.release(_LOCK)

    def names(self) -> list[str]:
        """The GPUs with a ledger, or with a ledger whose write was cut short."""
        return sorted({whole_name(name) for name in self._directory.names()})

    def read(self, uuid: str) -> LedgerEntry:
        """A GPU's ledger, without the holders that have ended and without those of another boot."""
        entry, boot_id = self.read_as_written(uuid)
        if boot_id != self._boot_id:
            return LedgerEntry()
        jobs = set(self._job_ids())
        return replace(entry, holders=tuple(one for one in entry.holders if one.job_id in jobs))

    def read_as_written(self, uuid: str) -> tuple[LedgerEntry, str]:
        """A GPU's ledger as it is on disk, and its boot id; an empty one and "" where there is none.

        Raises: DamagedFileError, NewerFileError.
        """
        try:
            lines = decode(self._directory.read(uuid), "ledger", _VERSION)
        except FileNotFoundError:
            return LedgerEntry(), ""
        known = dict(line.partition(" ")[::2] for line in lines if not line.startswith("holder "))
        mode = known.get("mode_found")
        try:
            holders = tuple(_holder(line) for line in lines if line.startswith("holder "))
            daemon = _daemon(known["daemon"]) if "daemon" in known else None
            return LedgerEntry(holders, None if mode is None else int(mode), daemon), known.get("boot", "")
        except (KeyError, ValueError):
            raise DamagedFileError(f"the ledger of {uuid} does not name its holders") from None

    def write(self, uuid: str, entry: LedgerEntry) -> None:
        """Put a GPU's ledger on disk. An empty ledger's file is removed."""
        if entry == LedgerEntry():
            self._directory.unlink(uuid)
            return
        mode = [] if entry.mode_found is None else [f"mode_found {entry.mode_found}"]
        daemon = [] if entry.daemon is None else [_daemon_line(entry.daemon)]
        lines = [f"boot {self._boot_id}", *mode, *daemon, *map(_holder_line, entry.holders)]
        self._directory.write(uuid, encode("ledger", _VERSION, lines))


def describe_gone(written: LedgerEntry, entry: LedgerEntry) -> str:
    """The holders that a ledger names (`written`) and that have ended (they are not in `entry`), in words; "" for
    none.
    """
    gone = [str(one.job_id) for one in written.holders if one not in entry.holders]
    if len(gone) > 1:
        return f"held by jobs {', '.join(gone)}, which no longer exist"
    return f"held by job {gone[0]}, which no longer exists" if gone else ""


def _holder(line: str) -> Holder:
    """Raises: KeyError, ValueError."""
    _, job_id, *words = line.split(" ")
    found = fields(words)
    return Holder(int(job_id), found["way"], int(found.get("uid", "0")), int(found.get("mib", "0")))


def _holder_line(holder: Holder) -> str:
    joined = {"uid": str(holder.uid), "mib": str(holder.mib)} if holder.way in (JOINED, JOINED_ALL) else {}
    return with_fields(f"holder {holder.job_id}", {"way": holder.way, **joined})


def _daemon(words: str) -> JoinedDaemon:
    """Raises: KeyError, ValueError."""
    found = fields(words.split(" "))
    process = ProcessIdentity(int(found["pid"]), int(found["start"])) if "pid" in found else None
    if found["stage"] not in (STARTING, OPEN, CLOSING):
        raise ValueError(found["stage"])
    return JoinedDaemon(int(found["starter"]), found["stage"], int(found["uid"]), int(found["closer"]), process)


def _daemon_line(daemon: JoinedDaemon) -> str:
    numbers = {"uid": daemon.uid, "closer": daemon.closer}
    if daemon.process:
        numbers |= {"pid": daemon.process.pid, "start": daemon.process.start_ticks}
    words = {
        "starter": str(daemon.starter),
        "stage": daemon.stage,
        **{key: str(value) for key, value in numbers.items()},
    }
    return with_fields("daemon", words)
