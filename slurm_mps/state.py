"""What slurm-mps keeps on a node: a journal per job, a ledger per GPU, a verdict for the job's tasks.

    /run/slurm-mps/          root 0711
      lock                   locks by number: a job's id, 0 for what all share: ledgers, config
      config                 the compiled site configuration
      last-fault             what the last prolog or epilog that failed had to say
      events, events-taken   where metrics are on: what hooks did, a line each, and what of it is being counted
      metrics                what was counted since the boot
      jobs/<job id>/         root 0700 + ACL user:<uid>:r-x
        journal              0600  what is to be undone, from the last line to the first
        config               0600  the configuration the job was brought up with
        verdict              0644  what the job's tasks read (of a job without this directory: logs.leave_verdict)
        suspect-<n>          0600  a task with the job's n-th GPU ended badly since its server was seen well (plugin's)
        told                 0600  the job's user has been told why a step ended badly, at that time (plugin's)
        pipe/                the control daemon's; gpu-0/, gpu-1/, ... where each GPU has its own
      gpus/<uuid>            0600  ledger: who holds the GPU, which compute mode the first of them found

Promises: every file is whole or absent and carries its format version and the boot it describes; what is to be put
back is on disk before it is changed; only root can read or write anything but the verdict. A job that began under an
older slurm-mps ends under this one; what a newer one wrote is left as it is (docs/decisions/0010).
"""

from __future__ import annotations

from .config import SiteConfig, from_lines, to_lines
from .errors import NodeError
from .node import processes
from .node.files import Directory, LockFile, make_trusted, open_trusted, whole_name
from .record import record
from .wordfile import DamagedFileError, decode, encode, fields, with_fields

STATE_DIRECTORY = "/run/slurm-mps"
VERSION = 1  # of all files but journals and verdicts
JOURNAL_VERSION = 1
VERDICT_VERSION = 1  # spank/verdict.h reads the same, and doctor compares
_LEDGER_LOCK = 0
_SKELETON = ("jobs", "gpus", "lock")
EVENTS, EVENTS_TAKEN, METRICS = "events", "events-taken", "metrics"
_EVENTS_LIMIT_BYTES = 1024**2
_METRICS_LOCK = 1 << 40  # beyond all job ids


@record
class Verdict:
    """What the prolog decided, for the plugin in the job's tasks.

    ``ready`` with ``settings``; ``refused``: they fail with the message; ``without``: they run without MPS and say so.
    """

    status: str
    message: str = ""
    settings: tuple[tuple[str, str], ...] = ()

    def lines(self) -> list[str]:
        message = (("message", self.message),) if self.message else ()
        return [f"{key} {_one_line(value)}" for key, value in (("status", self.status), *message, *self.settings)]

    def encode(self) -> bytes:
        """The file that the plugin reads."""
        return encode("verdict", VERDICT_VERSION, self.lines())


def _one_line(text: str) -> str:
    """A verdict's values are read to the end of the line; no message may start a line of its own."""
    return "".join(c if " " <= c <= "~" else "?" for c in text)[:480]


def refused(message: str) -> Verdict:
    return Verdict("refused", message)


def without(message: str) -> Verdict:
    return Verdict("without", message)


@record
class LedgerEntry:
    """Who holds a GPU, and the compute mode that was found when slurm-mps changed it (None: it did not)."""

    holders: tuple[int, ...] = ()
    mode_found: int | None = None


class Journal:
    """One job's way on this node: who it is, and the lines that undo what was done for it."""

    def __init__(
        self, directory: Directory, job_id: int, uid: int, restart_count: int, boot_id: str, node: str = ""
    ) -> None:
        self.directory = directory
        self.job_id = job_id
        self.uid = uid
        self.restart_count = restart_count
        self.boot_id = boot_id
        self.node = node  #: what Slurm calls this node
        self.undo: list[str] = []
        self.ready = False

    def write(self) -> None:
        """Put the journal on disk as it stands."""
        who = {
            "id": str(self.job_id),
            "uid": str(self.uid),
            "restart": str(self.restart_count),
            "boot": self.boot_id,
            "node": self.node,
            "ready": "yes" if self.ready else "no",
        }
        lines = [with_fields("job", who), *(f"undo {line}" for line in self.undo)]
        self.directory.write("journal", encode("journal", JOURNAL_VERSION, lines))

    def note(self, undo: str, after: int = 0) -> None:
        """Put on disk how the effect that comes next is undone: before all others, or `after` so many of them."""
        self.undo.insert(len(self.undo) - after, undo)
        self.write()

    def admit_user(self) -> None:
        """Let the job's user enter and read the job's directory."""
        self.directory.grant_user(self.uid)

    def write_verdict(self, verdict: Verdict) -> None:
        self.directory.write("verdict", verdict.encode(), mode=0o644)

    def tell_tasks(self, verdict: Verdict) -> None:
        """Leave the verdict of a job without MPS; with no daemon here, all may enter where the file system has no ACLs.

        Raises: NodeError; then there is no verdict at all.
        """
        try:
            try:
                self.admit_user()
            except NodeError:
                self.directory.open_to_all()
            self.write_verdict(verdict)
        except NodeError:
            self.directory.unlink("verdict")
            raise

    def write_config(self, config: SiteConfig) -> None:
        self.directory.write("config", encode("config", VERSION, to_lines(config)))

    def read_config(self) -> SiteConfig | None:
        """The configuration the job was brought up with; None when it did not come that far."""
        try:
            return from_lines(decode(self.directory.read("config"), "config", VERSION))
        except FileNotFoundError:
            return None


def _read_journal(directory: Directory) -> Journal:
    lines = decode(directory.read("journal"), "journal", JOURNAL_VERSION)
    try:
        name, *words = lines[0].split(" ")
        who = fields(words)
        job_id, uid, restart_count = (int(who[key]) for key in ("id", "uid", "restart"))
        journal = Journal(directory, job_id, uid, restart_count, who["boot"], who["node"])
        journal.ready = who["ready"] == "yes"
    except (IndexError, KeyError, ValueError):
        raise DamagedFileError(f"{directory.path}/journal does not name its job") from None
    undo = [line.partition(" ")[::2] for line in lines[1:]]
    if name != "job" or any(key != "undo" for key, _ in undo):
        raise DamagedFileError(f"{directory.path}/journal has lines of another kind")
    journal.undo = [line for _, line in undo]
    return journal


class NodeState:
    """The state directory, open; made when it is not there yet, as on the first job after a boot.

    With `make` false nothing is made. Raises: FileNotFoundError then.
    """

    def __init__(self, path: str = STATE_DIRECTORY, *, make: bool = True) -> None:
        self.root = make_trusted(path, 0o711) if make else open_trusted(path)
        if not make and not all(map(self.root.exists, _SKELETON)):
            raise NodeError(f"{path} is not whole; the next job, or reconcile, makes what is missing")
        self._jobs = self.root.make("jobs", 0o711) if make else self.root.subdirectory("jobs")
        self._gpus = self.root.make("gpus", 0o700) if make else self.root.subdirectory("gpus")
        self._locks = LockFile(self.root)
        self.boot_id = processes.boot_id()

    def close(self) -> None:
        for thing in (self._locks, self._gpus, self._jobs, self.root):
            thing.close()

    def lock_job(self, job_id: int, timeout_seconds: float) -> None:
        """Keep every other prolog and epilog of this job out until this process ends."""
        self._locks.acquire(job_id, timeout_seconds)

    def unlock_job(self, job_id: int) -> None:
        self._locks.release(job_id)

    def lock_ledgers(self, timeout_seconds: float) -> None:
        self._locks.acquire(_LEDGER_LOCK, timeout_seconds)

    def unlock_ledgers(self) -> None:
        self._locks.release(_LEDGER_LOCK)

    def job_ids(self) -> list[int]:
        """Jobs that something is kept of."""
        return sorted(int(name) for name in self._jobs.names() if name.isdigit())

    def strangers(self) -> list[str]:
        """The paths of what no slurm-mps of this version puts where they are."""
        ours = (*_SKELETON, "config", "last-fault", EVENTS, EVENTS_TAKEN, METRICS)
        root = [name for name in self.root.names() if whole_name(name) not in ours]
        jobs = [name for name in self._jobs.names() if not name.isdigit()]
        return [f"{place.path}/{name}" for place, names in ((self.root, root), (self._jobs, jobs)) for name in names]

    def open_journal(self, job_id: int) -> Journal | None:
        """A job's journal; None when nothing was begun for it (what a crash left before the first note is removed).

        Raises: DamagedFileError, NewerFileError (the state is kept as it is), NodeError.
        """
        journal = self.look_at_journal(job_id)
        if journal is None:
            self._jobs.remove_tree(str(job_id))
        return journal

    def stamp(self, job_id: int) -> tuple[int, int]:
        """Tells a job's journal as it is now from every later one; (0, 0) where there is none."""
        try:
            with self._jobs.subdirectory(str(job_id)) as directory:
                return directory.stamp("journal")
        except FileNotFoundError:
            return (0, 0)

    def look_at_journal(self, job_id: int) -> Journal | None:
        """The same, and nothing is removed."""
        try:
            directory = self._jobs.subdirectory(str(job_id))
        except FileNotFoundError:
            return None
        try:
            journal = _read_journal(directory)
            if journal.job_id != job_id:
                raise DamagedFileError(f"{directory.path}/journal is of job {journal.job_id}")
            return journal
        except FileNotFoundError:
            directory.close()
            return None
        except NodeError:
            directory.close()
            raise

    def begin_journal(self, job_id: int, uid: int, restart_count: int, node: str = "") -> Journal:
        """Make a job's directory, root's alone for now, and note it."""
        directory = self._jobs.make(str(job_id), 0o700)
        journal = Journal(directory, job_id, uid, restart_count, self.boot_id, node)
        try:
            journal.write()
        except NodeError:
            directory.close()
            self._jobs.remove_tree(str(job_id))
            raise
        return journal

    def remove_journal(self, journal: Journal) -> None:
        """The last act: nothing is left to undo. The journal goes last, so that a crash here can be gone on with.

        Raises: NodeError when something is in the directory that slurm-mps did not put there.
        """
        for name in ("verdict", "config", "told"):
            journal.directory.unlink(name)
        for name in journal.directory.names():
            if name.startswith("suspect"):
                journal.directory.unlink(name)
        journal.directory.unlink("journal", temporary_only=True)
        strangers = [name for name in journal.directory.names() if name != "journal"]
        if strangers:
            raise NodeError(f"{journal.directory.path} holds {strangers[0]!r}, which slurm-mps did not put there")
        self._jobs.remove_tree(str(journal.job_id))
        journal.directory.close()

    def read_ledger(self, uuid: str) -> LedgerEntry:
        """Who holds a GPU. Holders that are no jobs of this boot any more do not count."""
        entry, boot_id = self.read_ledger_as_written(uuid)
        if boot_id != self.boot_id:
            return LedgerEntry()
        jobs = set(self.job_ids())
        return LedgerEntry(tuple(job for job in entry.holders if job in jobs), entry.mode_found)

    def read_ledger_as_written(self, uuid: str) -> tuple[LedgerEntry, str]:
        """What a GPU's ledger says, and the boot it says it of; nothing of no boot where there is none."""
        try:
            lines = decode(self._gpus.read(uuid), "ledger", VERSION)
        except FileNotFoundError:
            return LedgerEntry(), ""
        known = dict(line.partition(" ")[::2] for line in lines if not line.startswith("holder "))
        mode = known.get("mode_found")
        try:
            holders = tuple(int(line.removeprefix("holder ")) for line in lines if line.startswith("holder "))
            return LedgerEntry(holders, None if mode is None else int(mode)), known.get("boot", "")
        except ValueError:
            raise DamagedFileError(f"the ledger of {uuid} does not name its holders") from None

    def ledgers(self) -> list[str]:
        """The GPUs that a ledger is kept of, or that a write of one was begun for."""
        return sorted({whole_name(name) for name in self._gpus.names()})

    def write_ledger(self, uuid: str, entry: LedgerEntry) -> None:
        """Put a GPU's ledger on disk; without holders and nothing to put back there is none."""
        if not entry.holders and entry.mode_found is None:
            self._gpus.unlink(uuid)
            return
        mode = [] if entry.mode_found is None else [f"mode_found {entry.mode_found}"]
        lines = [f"boot {self.boot_id}", *mode, *(f"holder {job}" for job in entry.holders)]
        self._gpus.write(uuid, encode("ledger", VERSION, lines))

    def read_compiled_config(self, stamp: str = "") -> SiteConfig | None:
        """The compiled site configuration, if it was made of the file that `stamp` describes; without one, the last."""
        try:
            first, *lines = decode(self.root.read("config"), "config", VERSION)
            return from_lines(lines) if stamp in ("", first) else None
        except (FileNotFoundError, NodeError, ValueError):
            return None  # made anew from the file, which is what counts

    def write_compiled_config(self, stamp: str, config: SiteConfig) -> None:
        self.root.write("config", encode("config", VERSION, [stamp, *to_lines(config)]))

    def note_event(self, words: str) -> None:
        """Note what a hook did, for who counts it; lost where nobody has counted for long.

        Raises: NodeError.
        """
        self.root.append(EVENTS, f"{words}\n".encode("ascii", "replace"), _EVENTS_LIMIT_BYTES)

    def lock_metrics(self, timeout_seconds: float) -> None:
        """Keep others who count out until this process ends; no hook waits for it."""
        self._locks.acquire(_METRICS_LOCK, timeout_seconds)

    def write_last_fault(self, text: str) -> None:
        self.root.write("last-fault", text.encode("utf-8", "replace"))
