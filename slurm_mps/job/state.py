"""The state of slurm-mps on a node: a journal per job, a ledger per GPU, a verdict for the job's tasks.

    /run/slurm-mps/          root 0711
      lock                   node/files.py    locks by number: a job's id, 0 for the ledgers, others beyond
      config                 config/          the compiled site configuration (settings.py: the form; load.py: when)
      last-fault             job/hook.py      the message of the last prolog or epilog that failed
      last-fault-reported    etc/health-check.sh, when it gave that message to slurmctld
      events, events-taken   metrics/         the outcomes that hooks noted, and those that are being counted
      metrics                metrics/         the counters since the boot
      jobs/<job id>/         root 0700 + ACL user:<uid>:r-x
        journal              job/journal.py   0600, the undos of the job, the last one first
        config               job/journal.py   0600, the configuration of the job's bring-up
        verdict              job/verdict.py   0644, for the job's tasks (without this directory: logs.leave_verdict)
        suspect-<n>          spank/health.c   0600, a task of the job's n-th GPU ended badly; its server is to be tested
        explained            spank/explain.c  0600, when the plugin last explained why a step ended badly
        pipe/                the control daemon's; gpu-0/, gpu-1/, ... where each GPU has its own
        joined-0/, ...       job/joined.py    a link to the daemon of joined jobs
      gpus/<uuid>            job/ledger.py    0600, the GPU's holders, and its compute mode before them
      daemons/<uuid>/        job/joined_daemon.py  0755, the control daemon of joined jobs

Promises (docs/decisions/0010):
 - Every file is whole or absent, and carries its format version and the boot it describes.
 - Each undo is on disk before its action changes anything.
 - Only root can read or write anything but the verdict.
 - A job that started under an older slurm-mps ends under this one. The state of a newer one stays as it is.
"""

from __future__ import annotations

from binascii import crc32

from ..config.settings import CONFIG_VERSION, STATE_DIRECTORY, SiteConfig, from_lines
from ..errors import DeadlineError, NodeError
from ..node import processes
from ..node.files import LockFile, make_trusted, open_trusted, whole_name
from ..node.wordfile import DamagedFileError, decode, encode
from .journal import Journal, read_journal
from .ledger import Ledgers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..node.files import Directory

_SKELETON = ("jobs", "gpus", "lock")
#: The same for systemd, which makes it at boot (tmpfiles.d): engines bind it into containers before the first job.
MADE_AT_BOOT = f"""d {STATE_DIRECTORY} 0711 root root
d {STATE_DIRECTORY}/jobs 0711 root root
d {STATE_DIRECTORY}/gpus 0700 root root
f {STATE_DIRECTORY}/lock 0600 root root
"""
DAEMONS = "daemons"
_LAST_FAULT = ("last-fault", "last-fault-reported")
EVENTS, EVENTS_TAKEN, METRICS = "events", "events-taken", "metrics"
_EVENTS_LIMIT_BYTES = 1024**2
_METRICS_LOCK, _CONFIG_LOCK = 1 << 40, (1 << 40) + 1  # beyond all job ids
_GPU_LOGS_LOCKS = 1 << 41  # and one for each GPU


class NodeState:
    """The state directory, open; made when it is not there yet, as on the first job after a boot.

    With `make` false nothing is made. Raises: FileNotFoundError then.
    """

    def __init__(self, path: str = STATE_DIRECTORY, *, make: bool = True) -> None:
        self.root = make_trusted(path, 0o711) if make else open_trusted(path)
        if not make and not all(map(self.root.exists, _SKELETON)):
            raise NodeError(f"{path} is not whole; the next job, or reconcile, makes what is missing")
        self._jobs = self.root.make("jobs", 0o711) if make else self.root.subdirectory("jobs")
        gpus = self.root.make("gpus", 0o700) if make else self.root.subdirectory("gpus")
        self._daemons: Directory | None = None
        self._locks = LockFile(self.root)
        self.boot_id = processes.boot_id()
        self.ledgers = Ledgers(gpus, self._locks, self.boot_id, self.job_ids)

    def close(self) -> None:
        for thing in (self._locks, self.ledgers, self._jobs, self.root):
            thing.close()

    def lock_job(self, job_id: int, timeout_seconds: float) -> None:
        """Keep every other prolog and epilog of this job out until this process ends."""
        self._locks.acquire(job_id, timeout_seconds)

    def unlock_job(self, job_id: int) -> None:
        self._locks.release(job_id)

    def is_at_work(self, job_id: int) -> bool:
        """Whether a prolog or epilog of another job runs, or a reconcile that works on that job."""
        try:
            self._locks.acquire(job_id, 0)
        except DeadlineError:
            return True
        self._locks.release(job_id)
        return False

    def daemons(self) -> Directory:
        """The directory of joined jobs' control daemons, made when it is not there yet."""
        if self._daemons is None:
            self._daemons = self.root.make(DAEMONS, 0o711)
        return self._daemons

    def job_ids(self) -> list[int]:
        """The jobs that have a directory."""
        return sorted(int(name) for name in self._jobs.names() if name.isdigit())

    def strangers(self) -> list[str]:
        """The paths of files that this version of slurm-mps does not put there."""
        ours = (*_SKELETON, DAEMONS, "config", *_LAST_FAULT, EVENTS, EVENTS_TAKEN, METRICS)
        root = [name for name in self.root.names() if whole_name(name) not in ours]
        jobs = [name for name in self._jobs.names() if not name.isdigit()]
        return [f"{place.path}/{name}" for place, names in ((self.root, root), (self._jobs, jobs)) for name in names]

    def open_journal(self, job_id: int) -> Journal | None:
        """A job's journal; None when there is none. A directory that a crash left without a journal is removed.

        Raises: DamagedFileError, NewerFileError (the state stays as it is), NodeError.
        """
        journal = self.look_at_journal(job_id)
        if journal is None:
            self._jobs.remove_tree(str(job_id))
        return journal

    def stamp(self, job_id: int) -> tuple[int, int]:
        """A stamp that differs for every later version of a job's journal; (0, 0) where there is none."""
        try:
            with self._jobs.subdirectory(str(job_id)) as directory:
                return directory.stamp("journal")
        except FileNotFoundError:
            return (0, 0)

    def look_at_journal(self, job_id: int) -> Journal | None:
        """open_journal(), and nothing is removed."""
        try:
            directory = self._jobs.subdirectory(str(job_id))
        except FileNotFoundError:
            return None
        try:
            journal = read_journal(directory)
            if journal.job_id != job_id:
                raise DamagedFileError(f"{directory.path}/journal is of job {journal.job_id}")
            return journal
        except FileNotFoundError:
            directory.close()
            return None
        except NodeError:
            directory.close()
            raise

    def begin_journal(self, job_id: int, uid: int, run: str, node: str = "") -> Journal:
        """Make a job's directory, which only root can enter for now, and write its journal."""
        directory = self._jobs.make(str(job_id), 0o700)
        journal = Journal(directory, job_id, uid, run, self.boot_id, node)
        try:
            journal.write()
        except NodeError:
            directory.close()
            self._jobs.remove_tree(str(job_id))
            raise
        return journal

    def remove_journal(self, journal: Journal) -> None:
        """Remove the state of a job with nothing left to undo. The journal goes last, so that a crash here can be
        repaired.

        Raises: NodeError when something is in the directory that slurm-mps did not put there.
        """
        for name in ("verdict", "config", "explained"):
            journal.directory.unlink(name)
        for name in journal.directory.names():
            if name.startswith("suspect"):
                journal.directory.unlink(name)
        journal.directory.unlink("journal", temporary_only=True)
        strangers = [name for name in journal.directory.names() if name != "journal"]
        if strangers:
            raise NodeError(f"{journal.directory.path} holds {strangers[0]!r}, which slurm-mps did not put there")
        journal.directory.unlink("journal")  # whole until it is gone: remove_tree() empties files first
        self._jobs.remove_tree(str(journal.job_id))
        journal.directory.close()

    def read_compiled_config(self, stamp: str = "", partition: str = "") -> SiteConfig | None:
        """The compiled site configuration for jobs in a partition, if it is that of the file with this `stamp`;
        without `stamp`, the last one.
        """
        try:
            first, *lines = decode(self.root.read("config"), "config", CONFIG_VERSION)
            return from_lines(lines, partition) if stamp in ("", first) else None
        except (FileNotFoundError, NodeError, ValueError):
            return None  # made anew from the file, which is what counts

    def lock_config(self, timeout_seconds: float) -> bool:
        """Keep others from compiling the site configuration. Returns: whether the lock could be had in time."""
        try:
            self._locks.acquire(_CONFIG_LOCK, timeout_seconds)
        except DeadlineError:
            return False
        return True

    def unlock_config(self) -> None:
        self._locks.release(_CONFIG_LOCK)

    def lock_gpu_logs(self, gpu: str, timeout_seconds: float) -> None:
        """Keep others from making or removing the log directory of a GPU. Raises: DeadlineError."""
        self._locks.acquire(_GPU_LOGS_LOCKS + crc32(gpu.encode()), timeout_seconds)

    def unlock_gpu_logs(self, gpu: str) -> None:
        self._locks.release(_GPU_LOGS_LOCKS + crc32(gpu.encode()))

    def keep_compiled_config(self, stamp: str, lines: list[str]) -> None:
        """Keep the compiled form for the jobs to come. Failing to is no fault: it is compiled again."""
        try:
            self.root.write("config", encode("config", CONFIG_VERSION, [stamp, *lines]))
        except NodeError:
            pass

    def note_event(self, words: str) -> None:
        """Note a hook's outcome, for metrics to count. A full file loses it.

        Raises: NodeError.
        """
        self.root.append(EVENTS, f"{words}\n".encode("ascii", "replace"), _EVENTS_LIMIT_BYTES)

    def lock_metrics(self, timeout_seconds: float) -> None:
        """Lock the metrics until this process ends. No hook waits for this lock."""
        self._locks.acquire(_METRICS_LOCK, timeout_seconds)

    def write_last_fault(self, text: str) -> None:
        self.root.write(_LAST_FAULT[0], text.encode("utf-8", "replace"))
