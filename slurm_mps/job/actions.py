"""Each kind of step that brings a job's MPS up, beside the undo that takes it down again.

A step looks (what will undo me?), its undo is written into the journal, then it applies. An undo finds nothing left
to do when it runs again, and when its step never came to apply.
"""

from __future__ import annotations

import _thread
from time import monotonic, sleep

from ..errors import DeadlineError, MpsError, NodeError, RequestError
from ..node.control import ControlDaemon, Limits, Patience, limit_commands
from ..node.messages import tell_admin
from ..node.nvml import COMPUTE_MODES, EXCLUSIVE_PROCESS
from ..node.processes import describe
from ..node.wordfile import DamagedFileError, fields, with_fields
from ..record import record, replace
from . import logs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from typing import Protocol, TypeVar

    from ..config.settings import SiteConfig
    from ..node.nvml import Gpus
    from .journal import Journal
    from .state import NodeState

    T = TypeVar("T")

    class Undo(Protocol):
        def line(self) -> str: ...
        def describe(self) -> str: ...
        def undo(self, site: JobOnNode) -> None: ...

    class Step(Protocol):
        def describe(self) -> str: ...
        def look(self) -> Undo | None: ...
        def apply(self, site: JobOnNode) -> None: ...


_LOG_GROWS_TO = 16  # times what is kept of a log, while the job runs
_LEAVING_SECONDS, _LEAVING_POLL_SECONDS = 0.5, 0.05

#: The pipe directory of the one daemon that serves all of a job's GPUs.
WHOLE_JOB = "pipe"


def gpu_daemon_name(number: int) -> str:
    """The pipe directory of the daemon that serves one GPU, by the job's own count from 0."""
    return f"gpu-{number}"


@record
class JobOnNode:
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

    def daemon(self, name: str) -> ControlDaemon:
        """One of the job's control daemons, by the name of its pipe directory."""
        here = self.journal.directory
        kept_here = here.exists("log")
        log_directory = f"{here.path}/log" if kept_here else f"{self.config.paths_logs}/{self.journal.job_id}"
        if name != WHOLE_JOB:
            log_directory += f"/{name}"
        return ControlDaemon(self.config.paths_control_program, f"{here.path}/{name}", log_directory)


@record
class JobDaemon:
    """One of a job's control daemons: its pipe directory's name, the UUIDs of its GPUs, what its clients may have."""

    name: str
    gpus: tuple[str, ...]
    limits: Limits


def _in_thread(act: Callable[[T], None], thing: T) -> _thread.LockType | None:
    """Do something in a thread. Returns: a lock that is free when it is done; None where there is no thread for it."""
    done = _thread.allocate_lock()
    done.acquire()

    def run() -> None:
        act(thing)
        done.release()

    try:
        _thread.start_new_thread(run, ())
    except RuntimeError:
        return None
    return done


def side_by_side(act: Callable[[T], None], things: Sequence[T]) -> None:
    """Do the same to several things at once and wait for all of it; whatever waits in it has its own deadline.

    Raises: what went wrong; of several failures, one NodeError that tells them all.
    """
    errors: list[Exception] = []

    def attempt(thing: T) -> None:
        try:
            act(thing)
        except Exception as error:  # raised again below, in the thread that waits
            errors.append(error)

    here = [things[0]]
    ends = []
    for thing in things[1:]:
        end = _in_thread(attempt, thing)
        if end is None:  # no thread to be had: one after the other, then
            here.append(thing)
        else:
            ends.append(end)
    for thing in here:
        attempt(thing)
    for end in ends:
        end.acquire()
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise NodeError("; ".join(str(error) if isinstance(error, MpsError) else repr(error) for error in errors))


@record
class ReadLedgers:
    """See that what is kept of the GPUs can be read, before anything is changed that could not be undone without it."""

    gpus: tuple[str, ...]

    def describe(self) -> str:
        return f"see that what is kept of {', '.join(self.gpus)} can be read"

    def look(self) -> None:
        return None

    def apply(self, site: JobOnNode) -> None:
        for gpu in self.gpus:
            site.state.ledgers.read(gpu)


@record
class HoldGpu:
    """Hold a GPU for the job, in compute mode `mode` (None: the mode is left alone).

    The first holder's find is kept in the GPU's ledger; the last holder to leave puts it back. A GPU that is to be
    exclusive must be free of processes: what is there although nobody holds it was left behind.
    """

    gpu: str
    mode: int | None
    may_share: bool

    def describe(self) -> str:
        mode = "compute mode left alone" if self.mode is None else f"compute mode {COMPUTE_MODES[self.mode]}"
        return f"hold {self.gpu} for the job, {mode}{', with other jobs' if self.may_share else ''}"

    def look(self) -> ReleaseGpu:
        return ReleaseGpu(self.gpu)

    def apply(self, site: JobOnNode) -> None:
        site.state.ledgers.lock(site.seconds(site.config.deadlines_command))
        try:
            self._hold(site)
        finally:
            site.state.ledgers.unlock()

    def refuse_beside(self, others: Sequence[int]) -> None:
        """Raises: RequestError where other jobs hold the GPU and the site does not share one."""
        if others and not self.may_share:
            raise RequestError(
                f"{self.gpu} is held by MPS job {others[0]}",
                hint="this site does not share a GPU between MPS jobs",
                reason="shared_gpu",
            )

    def _hold(self, site: JobOnNode) -> None:
        job_id = site.journal.job_id
        entry = site.state.ledgers.read(self.gpu)
        others = [job for job in entry.holders if job != job_id]
        self.refuse_beside(others)
        if not others and self.mode == EXCLUSIVE_PROCESS:
            self._see_it_free(site)
        found = entry.mode_found
        if found is None and self.mode is not None:
            found = site.gpus.compute_mode(self.gpu)
        site.state.ledgers.write(self.gpu, replace(entry, holders=(*others, job_id), mode_found=found))
        if self.mode is not None and site.gpus.compute_mode(self.gpu) != self.mode:
            site.gpus.set_compute_mode(self.gpu, self.mode)

    def _see_it_free(self, site: JobOnNode) -> None:
        end = monotonic() + _LEAVING_SECONDS
        while there := site.gpus.processes(self.gpu):
            if monotonic() > end:
                raise NodeError(
                    f"{self.gpu}: in use by process {', '.join(map(describe, there[:4]))}, though Slurm has just given "
                    "it to this job",
                    hint="end what was left there",
                )
            sleep(_LEAVING_POLL_SECONDS)


@record
class ReleaseGpu:
    """Let go of a GPU; the last to do so puts back the compute mode that the first one found."""

    gpu: str

    def line(self) -> str:
        return with_fields("release_gpu", {"gpu": self.gpu})

    def describe(self) -> str:
        return f"let go of {self.gpu}; the last job to do so puts back the compute mode that the first one found"

    def undo(self, site: JobOnNode) -> None:
        site.state.ledgers.lock(site.seconds(site.config.deadlines_command))
        try:
            let_go(self.gpu, (site.journal.job_id,), site.state, site.gpus)
        finally:
            site.state.ledgers.unlock()


def let_go(gpu: str, jobs: Collection[int], state: NodeState, gpus: Gpus) -> None:
    """Take jobs, and whoever has no journal any more, out of a GPU's ledger, whose lock the caller has."""
    entry = state.ledgers.read(gpu)
    left = tuple(job for job in entry.holders if job not in jobs)
    if not left and entry.mode_found is not None:
        if gpus.compute_mode(gpu) != entry.mode_found:
            gpus.set_compute_mode(gpu, entry.mode_found)
        entry = replace(entry, mode_found=None)
    state.ledgers.write(gpu, replace(entry, holders=left))


@record
class MakeDirectories:
    """Give each control daemon its pipe directory, to which the job's directory is the gate (O24), and a log directory.

    The logs grow with every connection, and any process of the job's user may connect: they lie where the site keeps
    logs and not beside the state, which every job of the node needs room for. Only where that cannot be they lie here.
    """

    daemons: tuple[str, ...]

    def describe(self) -> str:
        return f"make the pipe directory {', '.join(self.daemons)} in the job's directory, and the log directory"

    def look(self) -> RemoveDirectories:
        return RemoveDirectories()

    def apply(self, site: JobOnNode) -> None:
        for name in self.daemons:
            site.journal.directory.make(name, 0o755).close()
        parts = [name for name in self.daemons if name != WHOLE_JOB]
        if not logs.make(site.journal.job_id, site.journal.uid, parts, site.config):
            with site.journal.directory.make("log", 0o755) as here:
                for part in parts:
                    here.make(part, 0o755).close()


@record
class RemoveDirectories:
    """Remove the daemons' pipe directories, and cut their logs to what the site wants kept."""

    def line(self) -> str:
        return "remove_directories"

    def describe(self) -> str:
        return "remove the pipe directories, and cut the logs to what the site keeps"

    def undo(self, site: JobOnNode) -> None:
        if not site.journal.directory.exists("log"):
            logs.keep(site.journal.job_id, site.config, site.state.job_ids())
        here = site.journal.directory
        for name in here.names():
            if name in (WHOLE_JOB, "log") or name.startswith("gpu-"):
                here.remove_tree(name)


@record
class StartDaemons:
    """Start the job's control daemons, side by side, each on exactly its GPUs: (its name, their UUIDs)."""

    served: tuple[tuple[str, tuple[str, ...]], ...]

    def describe(self) -> str:
        return "start " + "; ".join(f"control daemon {name} on {', '.join(gpus)}" for name, gpus in self.served)

    def look(self) -> QuitDaemons:
        return QuitDaemons(tuple(name for name, _ in self.served))

    def apply(self, site: JobOnNode) -> None:
        side_by_side(lambda one: self._start(*one, site), self.served)

    def _start(self, name: str, gpus: tuple[str, ...], site: JobOnNode) -> None:
        daemon = site.daemon(name)
        log_limit_bytes = _LOG_GROWS_TO * site.config.logs_max_kib * 1024
        daemon.start(gpus, site.seconds(site.config.deadlines_daemon_start), log_limit_bytes)
        with site.journal.directory.subdirectory(name) as pipe:
            daemon.protect(pipe)
            if daemon.process(pipe) is None:
                raise NodeError(f"{daemon.program} -d said yes, but no control daemon runs")


@record
class QuitDaemons:
    """End the control daemons and their servers, proved to be the job's own; one that is stuck delays no other."""

    names: tuple[str, ...]

    def line(self) -> str:
        return with_fields("quit_daemons", {"names": ",".join(self.names)})

    def describe(self) -> str:
        return f"end control daemon {', '.join(self.names)} and its servers: quit, then SIGTERM, then SIGKILL"

    def stand(self, site: JobOnNode) -> bool:
        """Whether all of them run."""
        return all(self._stands(name, site) for name in self.names)

    def _stands(self, name: str, site: JobOnNode) -> bool:
        try:
            with site.journal.directory.subdirectory(name) as pipe:
                return site.daemon(name).process(pipe) is not None
        except FileNotFoundError:
            return False

    def undo(self, site: JobOnNode) -> None:
        side_by_side(lambda name: self._quit(name, site), self.names)

    def _quit(self, name: str, site: JobOnNode) -> None:
        wanted = site.config.deadlines_quit + 2 * site.config.deadlines_signal
        share = site.seconds(wanted) / wanted
        patience = Patience(
            force_after_seconds=2,
            quit_seconds=share * site.config.deadlines_quit,
            signal_seconds=share * site.config.deadlines_signal,
        )
        try:
            pipe = site.journal.directory.subdirectory(name)
        except FileNotFoundError:  # an earlier try removed it; what it could not end may be there still
            site.daemon(name).quit(None, site.journal.uid, patience)
            return
        with pipe:
            site.daemon(name).quit(pipe, site.journal.uid, patience)


@record
class SetLimits:
    """Set what each daemon's clients may have, and read it back; it dies with the daemon."""

    daemons: tuple[JobDaemon, ...]

    def describe(self) -> str:
        return "; ".join(
            f"tell {one.name}, and read back: {', '.join(limit_commands(one.limits, len(one.gpus)))}"
            for one in self.daemons
        )

    def look(self) -> None:
        return None

    def apply(self, site: JobOnNode) -> None:
        side_by_side(lambda daemon: self._set(daemon, site), self.daemons)

    def _set(self, one: JobDaemon, site: JobOnNode) -> None:
        site.daemon(one.name).set_limits(one.limits, len(one.gpus), site.seconds(site.config.deadlines_command))


@record
class AdmitUser:
    """Let the job's user into its directory; until now nobody could disturb what was done there.

    Undone by removing the directory.
    """

    uid: int

    def describe(self) -> str:
        return f"let uid {self.uid} into the job's directory"

    def look(self) -> None:
        return None

    def apply(self, site: JobOnNode) -> None:
        site.journal.admit_user()


@record
class StartServers:
    """Have each daemon start its server for the job's user, ahead of the first client; it dies with the daemon.

    Not waited for: it is up before the job's first CUDA context needs it (O26). A daemon that does not do it now does
    it for the first client; from here on the job's user could be the reason, so it is no fault of the node.
    """

    uid: int
    daemons: tuple[str, ...]

    def describe(self) -> str:
        return f"tell {', '.join(self.daemons)}: start_server -uid {self.uid}; not waited for"

    def look(self) -> None:
        return None

    def apply(self, site: JobOnNode) -> None:
        side_by_side(lambda name: self._start(name, site), self.daemons)

    def _start(self, name: str, site: JobOnNode) -> None:
        try:
            site.daemon(name).start_server(self.uid, site.seconds(site.config.deadlines_command))
        except NodeError as error:
            tell_admin(f"job {site.journal.job_id}: the server is not started ahead of the first client: {error}")


def read_undo(line: str) -> Undo:
    """Read an undo back from its journal line.

    Raises: DamagedFileError when it is none.
    """
    kind, *words = line.split(" ")
    if kind == "release_gpu" and (found := fields(words)).keys() == {"gpu"}:
        return ReleaseGpu(found["gpu"])
    if kind == "remove_directories" and not words:
        return RemoveDirectories()
    if kind == "quit_daemons" and (found := fields(words)).keys() == {"names"}:
        return QuitDaemons(tuple(found["names"].split(",")))
    raise DamagedFileError(f"the journal has an unknown undo {kind[:40]!r}")
