"""Each kind of step that brings a job's MPS up, beside the undo that takes it down again.

A step looks (what will undo me?), its undo is written into the journal, then it applies. An undo finds nothing left
to do when it runs again, and when its step never came to apply.
"""

from __future__ import annotations

from time import monotonic

from .errors import DeadlineError, NodeError, RequestError
from .node import logs
from .node.control import ControlDaemon, Limits, Patience
from .node.messages import tell_admin
from .record import record, replace
from .wordfile import DamagedFileError, fields, with_fields

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from .config import SiteConfig
    from .node.gpus import Gpus
    from .state import Journal, NodeState

    class Undo(Protocol):
        def line(self) -> str: ...
        def undo(self, site: JobSite) -> None: ...

    class Step(Protocol):
        def look(self) -> Undo | None: ...
        def apply(self, site: JobSite) -> None: ...


@record
class JobSite:
    """What a step acts on: one job's place on this node.

    Both deadlines are monotonic times in seconds: what is brought up must be so by the first, so that there is time to
    undo it all by the second.
    """

    state: NodeState
    journal: Journal
    gpus: Gpus
    config: SiteConfig
    deadline: float
    undo_deadline: float

    def seconds(self, wanted: float) -> float:
        """How long one thing may take: what it wants, but no longer than is left of the whole.

        Raises: DeadlineError when nothing is left.
        """
        left = self.deadline - monotonic()
        if left <= 0:
            raise DeadlineError("out of time")
        return min(wanted, left)

    @property
    def daemon(self) -> ControlDaemon:
        here = self.journal.directory
        kept_here = here.exists("log")
        log_directory = f"{here.path}/log" if kept_here else f"{self.config.paths_logs}/{self.journal.job_id}"
        return ControlDaemon(self.config.paths_control_program, f"{here.path}/pipe", log_directory)


@record
class HoldGpu:
    """Hold a GPU for the job, in compute mode `mode` (None: the mode is left alone).

    The first holder's find is kept in the GPU's ledger; the last holder to leave puts it back.
    """

    gpu: str
    mode: int | None
    may_share: bool

    def look(self) -> ReleaseGpu:
        return ReleaseGpu(self.gpu)

    def apply(self, site: JobSite) -> None:
        site.state.lock_ledgers(site.seconds(site.config.deadlines_command))
        try:
            self._hold(site)
        finally:
            site.state.unlock_ledgers()

    def _hold(self, site: JobSite) -> None:
        job_id = site.journal.job_id
        entry = site.state.read_ledger(self.gpu)
        others = [job for job in entry.holders if job != job_id]
        if others and not self.may_share:
            raise RequestError(
                f"{self.gpu} is held by MPS job {others[0]}", hint="this site does not share a GPU between MPS jobs"
            )
        found = entry.mode_found
        if found is None and self.mode is not None:
            found = site.gpus.compute_mode(self.gpu)
        site.state.write_ledger(self.gpu, replace(entry, holders=(*others, job_id), mode_found=found))
        if self.mode is not None and site.gpus.compute_mode(self.gpu) != self.mode:
            site.gpus.set_compute_mode(self.gpu, self.mode)


@record
class ReleaseGpu:
    """Let go of a GPU; the last to do so puts back the compute mode that the first one found."""

    gpu: str

    def line(self) -> str:
        return with_fields("release_gpu", {"gpu": self.gpu})

    def undo(self, site: JobSite) -> None:
        site.state.lock_ledgers(site.seconds(site.config.deadlines_command))
        try:
            entry = site.state.read_ledger(self.gpu)
            left = tuple(job for job in entry.holders if job != site.journal.job_id)
            if not left and entry.mode_found is not None:
                if site.gpus.compute_mode(self.gpu) != entry.mode_found:
                    site.gpus.set_compute_mode(self.gpu, entry.mode_found)
                entry = replace(entry, mode_found=None)
            site.state.write_ledger(self.gpu, replace(entry, holders=left))
        finally:
            site.state.unlock_ledgers()


@record
class MakeDirectories:
    """Give the control daemon its pipe directory, to which the job's directory is the gate (O24), and a log directory.

    The logs grow with every connection, and any process of the job's user may connect: they lie where the site keeps
    logs and not beside the state, which every job of the node needs room for. Only where that cannot be they lie here.
    """

    def look(self) -> RemoveDirectories:
        return RemoveDirectories()

    def apply(self, site: JobSite) -> None:
        site.journal.directory.make("pipe", 0o755).close()
        if not logs.make(site.journal.job_id, site.journal.uid, site.config):
            site.journal.directory.make("log", 0o755).close()


@record
class RemoveDirectories:
    """Remove the daemon's pipe directory, and cut its logs to what the site wants kept."""

    def line(self) -> str:
        return "remove_directories"

    def undo(self, site: JobSite) -> None:
        if not site.journal.directory.exists("log"):
            logs.keep(site.journal.job_id, site.config, site.state.job_ids())
        for name in ("pipe", "log"):
            site.journal.directory.remove_tree(name)


@record
class StartDaemon:
    """Start the job's control daemon on exactly the job's GPUs."""

    gpus: tuple[str, ...]

    def look(self) -> QuitDaemon:
        return QuitDaemon()

    def apply(self, site: JobSite) -> None:
        site.daemon.start(self.gpus, site.seconds(site.config.deadlines_daemon_start))
        with site.journal.directory.subdirectory("pipe") as pipe:
            site.daemon.protect(pipe)
            if site.daemon.process(pipe) is None:
                raise NodeError(f"{site.daemon.program} -d said yes, but no control daemon runs")


@record
class QuitDaemon:
    """End the control daemon and its servers, proved to be the job's own."""

    def line(self) -> str:
        return "quit_daemon"

    def undo(self, site: JobSite) -> None:
        wanted = site.config.deadlines_quit + 2 * site.config.deadlines_signal
        share = site.seconds(wanted) / wanted
        patience = Patience(
            force_after_seconds=2,
            quit_seconds=share * site.config.deadlines_quit,
            signal_seconds=share * site.config.deadlines_signal,
        )
        try:
            pipe = site.journal.directory.subdirectory("pipe")
        except FileNotFoundError:  # an earlier try removed it; what it could not end may be there still
            site.daemon.quit(None, site.journal.uid, patience)
            return
        with pipe:
            site.daemon.quit(pipe, site.journal.uid, patience)


@record
class SetLimits:
    """Set what each client may have, and read it back; it dies with the daemon."""

    limits: Limits
    device_count: int

    def look(self) -> None:
        return None

    def apply(self, site: JobSite) -> None:
        site.daemon.set_limits(self.limits, self.device_count, site.seconds(site.config.deadlines_command))


@record
class AdmitUser:
    """Let the job's user into its directory; until now nobody could disturb what was done there.

    Undone by removing the directory.
    """

    uid: int

    def look(self) -> None:
        return None

    def apply(self, site: JobSite) -> None:
        site.journal.admit_user()


@record
class StartServer:
    """Have the server started for the job's user, ahead of the first client; it dies with the daemon.

    Not waited for: it is up before the job's first CUDA context needs it (O26). A daemon that does not do it now does
    it for the first client; from here on the job's user could be the reason, so it is no fault of the node.
    """

    uid: int

    def look(self) -> None:
        return None

    def apply(self, site: JobSite) -> None:
        try:
            site.daemon.start_server(self.uid, site.seconds(site.config.deadlines_command))
        except NodeError as error:
            tell_admin(f"job {site.journal.job_id}: the server is not started ahead of the first client: {error}")


def read_undo(line: str) -> Undo:
    """Read an undo back from its journal line.

    Raises: DamagedFileError when it is none.
    """
    kind, *words = line.split(" ")
    if kind == "release_gpu":
        return ReleaseGpu(**fields(words))
    if kind == "remove_directories" and not words:
        return RemoveDirectories()
    if kind == "quit_daemon" and not words:
        return QuitDaemon()
    raise DamagedFileError(f"the journal has an unknown undo {kind[:40]!r}")
