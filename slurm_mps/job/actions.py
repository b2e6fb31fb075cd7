"""Each kind of action that brings a job's MPS up, beside the undo that takes it back.

An action's undo is written into the journal before the action is applied. An undo finds nothing left to do when it
runs again, and when its action was never applied.
"""

from __future__ import annotations

from time import monotonic, sleep

from ..errors import DeadlineError, NodeError, RequestError, raise_all
from ..node import control, processes
from ..node.control import ControlDaemon, Limits, limit_commands
from ..node.messages import tell_admin
from ..node.nvml import COMPUTE_MODES, EXCLUSIVE_PROCESS
from ..node.processes import describe
from ..node.wordfile import with_fields
from ..record import record, replace
from . import logs
from .joined_daemon import help_to_close, patience, put_back
from .ledger import WHOLE, Holder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from typing import Protocol, TypeVar

    from ..config.settings import SiteConfig
    from ..node.nvml import Gpus
    from .journal import Journal
    from .ledger import JoinedDaemon, LedgerEntry
    from .state import NodeState

    T = TypeVar("T")

    class Undo(Protocol):
        def line(self) -> str: ...
        def describe(self) -> str: ...
        def run(self, job: JobOnNode) -> None: ...

    class Action(Protocol):
        def describe(self) -> str: ...
        def undo(self) -> Undo | None: ...
        def apply(self, job: JobOnNode) -> None: ...


LOG_GROWS_TO = 16  # times what is kept of a log, while the job runs
_LEAVING_SECONDS, _POLL_SECONDS = 0.5, 0.05

#: The pipe directory of the one daemon that serves all of a job's GPUs.
WHOLE_JOB = "pipe"


def gpu_daemon_name(number: int) -> str:
    """The pipe directory of the daemon that serves one GPU, by the job's own count from 0."""
    return f"gpu-{number}"


@record
class JobOnNode:
    """One job on this node, on which actions act.

    Both deadlines are monotonic times in seconds: bring-up ends by the first, and undoing everything by the second.
    `meanwhile` is called while daemons quit, which takes a tenth of a second. `asked`: the epilog's script has sent
    them quit.
    """

    state: NodeState
    journal: Journal
    gpus: Gpus
    config: SiteConfig
    deadline: float
    undo_deadline: float
    meanwhile: Callable[[], None] | None = None
    asked: bool = False

    def seconds(self, wanted: float) -> float:
        """The seconds that one piece of work may take: those it wants, or those left until the deadline.

        Raises: DeadlineError after the deadline.
        """
        left = self.deadline - monotonic()
        if left <= 0:
            raise DeadlineError("out of time (deadlines.prolog and deadlines.epilog of mps.toml)")
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


@record
class HoldGpu:
    """Hold a GPU for the job, in compute mode `mode` (None: the mode is left alone).

    Other MPS jobs may hold it, too, if their `way` is the same and is not WHOLE. The GPU's ledger keeps the compute
    mode that the first holder found; the last holder to leave puts it back. A GPU that becomes exclusive must be free
    of processes: with no holder, an earlier job left them.
    """

    gpu: str
    mode: int | None
    way: str = WHOLE

    def describe(self) -> str:
        mode = "compute mode left alone" if self.mode is None else f"compute mode {COMPUTE_MODES[self.mode]}"
        return f"hold {self.gpu} for the job, {mode}{'' if self.way == WHOLE else ', beside other jobs'}"

    def undo(self) -> ReleaseGpu:
        return ReleaseGpu(self.gpu)

    def apply(self, job: JobOnNode) -> None:
        while daemon := under_lock(job, lambda: self._hold(job)):
            wait_for(f"{self.gpu}: the control daemon of earlier jobs is still ending", job)
            help_to_close(self.gpu, daemon, job)

    def refuse_beside(self, others: Sequence[Holder]) -> None:
        """Raises: RequestError where another job holds the GPU that cannot be beside this one."""
        refuse_another_way(self.gpu, self.way, others)

    def _hold(self, job: JobOnNode) -> JoinedDaemon | None:
        """Under the lock: become a holder. Returns: the daemon that is in the way, though nobody holds it any more."""
        job_id = job.journal.job_id
        job.journal.claims = True
        entry = job.state.ledgers.read(self.gpu)
        others = [one for one in entry.holders if one.job_id != job_id]
        self.refuse_beside(others)
        if entry.daemon is not None:
            return entry.daemon
        claim(self.gpu, self.mode, replace(entry, holders=(*others, Holder(job_id, self.way))), job)
        return None


def refuse_another_way(gpu: str, way: str, others: Sequence[Holder]) -> None:
    """Raises: RequestError where a job holds the GPU in another way, or as a whole."""
    for other in others:
        if other.way != way or way == WHOLE:
            if way == WHOLE:
                why, hint = "and this site shares no GPU between MPS jobs", "ask for a whole GPU (--gres=gpu:1)"
            else:
                why = "which started before this site changed how jobs share a GPU"
                hint = "submit again when that job is over"
            held = f"{gpu} is held by MPS job {other.job_id}, {why}"
            raise RequestError(held, hint=hint, reason="held_gpu")


class _InUseError(NodeError):
    """A GPU that nobody holds has processes, which may be leaving."""

    def __init__(self, gpu: str, pids: Sequence[int]) -> None:
        named = ", ".join(map(describe, pids[:4]))
        held = f"{gpu}: in use by process {named}, though Slurm has just given it to this job"
        super().__init__(held, hint="end every process on that GPU")
        self.gpu, self.pids = gpu, pids

    def judged(self) -> Exception:
        """The error to raise when they stay. A running job may have a part of the GPU and use it without MPS: that is
        no fault of the node.
        """
        from ..slurm.jobs import running_job_of

        jobs = set(map(running_job_of, self.pids))
        if None in jobs:
            return self
        named = ", ".join(sorted(map(str, jobs)))
        held = f"{self.gpu} is in use by job {named}, which runs programs there without MPS"
        return RequestError(held, hint="submit the job again", reason="held_gpu")


def claim(gpu: str, mode: int | None, entry: LedgerEntry, job: JobOnNode) -> None:
    """Under the lock: write down who holds a GPU, with the compute mode to put back, and then set `mode` (None: no).

    Raises: NodeError; also where the job alone holds a GPU that is to be exclusive, and a process is there.
    """
    alone = len(entry.holders) == 1
    if alone and mode == EXCLUSIVE_PROCESS and (there := job.gpus.processes(gpu)):
        raise _InUseError(gpu, there)
    if entry.mode_found is None and mode is not None:
        entry = replace(entry, mode_found=job.gpus.compute_mode(gpu))
    job.state.ledgers.write(gpu, entry)
    if mode is not None and job.gpus.compute_mode(gpu) != mode:
        job.gpus.set_compute_mode(gpu, mode)


def under_lock(job: JobOnNode, work: Callable[[], T]) -> T:
    """Do `work` under the ledgers' lock, and again while processes are leaving a GPU.

    Raises: NodeError, RequestError when they stay.
    """
    end = monotonic() + _LEAVING_SECONDS
    while True:
        job.state.ledgers.lock(job.seconds(job.config.deadlines_command))
        try:
            return work()
        except _InUseError as error:
            in_use = error
        finally:
            job.state.ledgers.unlock()
        if monotonic() > end:
            raise in_use.judged()
        sleep(_POLL_SECONDS)


def wait_for(why: str, job: JobOnNode) -> None:
    """Wait a moment for other jobs. If the job misses a deadline from now on, it is refused for this reason.

    Raises: DeadlineError.
    """
    job.journal.waited = why
    job.seconds(0)
    sleep(_POLL_SECONDS)


@record
class ReleaseGpu:
    """Let go of a GPU; the last to do so puts back the compute mode that the first one found."""

    gpu: str

    @property
    def gpus(self) -> tuple[str]:
        return (self.gpu,)

    def line(self) -> str:
        return with_fields("release_gpu", {"gpu": self.gpu})

    def describe(self) -> str:
        return f"let go of {self.gpu}; the last job to do so puts back the compute mode that the first one found"

    def run(self, job: JobOnNode) -> None:
        job.state.ledgers.lock(job.seconds(job.config.deadlines_command))
        try:
            let_go(self.gpu, (job.journal.job_id,), job.state, job.gpus)
        finally:
            job.state.ledgers.unlock()


def let_go(gpu: str, jobs: Collection[int], state: NodeState, gpus: Gpus) -> None:
    """Take jobs, and holders without a journal, out of a GPU's ledger. The caller has the ledgers' lock."""
    entry = state.ledgers.read(gpu)
    left = tuple(one for one in entry.holders if one.job_id not in jobs)
    if not left and entry.daemon is None:
        entry = put_back(gpu, entry, gpus)
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

    def undo(self) -> RemoveDirectories:
        return RemoveDirectories()

    def apply(self, job: JobOnNode) -> None:
        for name in self.daemons:
            job.journal.directory.make(name, 0o755).close()
        parts = [name for name in self.daemons if name != WHOLE_JOB]
        if not logs.make(job.journal.job_id, job.journal.uid, parts, job.config):
            with job.journal.directory.make("log", 0o755) as here:
                for part in parts:
                    here.make(part, 0o755).close()


@record
class RemoveDirectories:
    """Remove the daemons' pipe directories, and cut their logs to what the site wants kept."""

    def line(self) -> str:
        return "remove_directories"

    def describe(self) -> str:
        return "remove the pipe directories, and cut the logs to what the site keeps"

    def run(self, job: JobOnNode) -> None:
        if not job.journal.directory.exists("log"):
            logs.keep(job.journal.job_id, job.config, job.state.job_ids())
        here = job.journal.directory
        for name in here.names():
            if name in (WHOLE_JOB, "log") or name.startswith("gpu-"):
                here.remove_tree(name)


@record
class StartDaemons:
    """Start the job's control daemons, side by side, each on exactly its GPUs: (its name, their UUIDs)."""

    served: tuple[tuple[str, tuple[str, ...]], ...]

    def describe(self) -> str:
        return "start " + "; ".join(f"control daemon {name} on {', '.join(gpus)}" for name, gpus in self.served)

    def undo(self) -> QuitDaemons:
        return QuitDaemons(tuple(name for name, _ in self.served))

    def apply(self, job: JobOnNode) -> None:
        self._check(self.begin(job), job)

    def begin(self, job: JobOnNode) -> list[processes.Child]:
        """Start all daemons, and do not wait. Raises: NodeError, after ending those that it started."""
        log_limit_bytes = LOG_GROWS_TO * job.config.logs_max_kib * 1024
        children: list[processes.Child] = []
        try:
            for name, gpus in self.served:
                children.append(job.daemon(name).start(gpus, log_limit_bytes))
        except NodeError:
            processes.wait_all(children, 0)
            raise
        return children

    def finish(self, children: Sequence[processes.Child], job: JobOnNode) -> None:
        """Wait for the programs of begin(), which ran before the GPUs were claimed, and check that each daemon runs.

        A daemon that failed is started once more: its GPU may have been in a mode in which no daemon starts.
        Raises: NodeError.
        """
        try:
            self._check(children, job)
        except DeadlineError:
            raise
        except NodeError as error:
            self.undo().run(job)
            self.apply(job)
            tell_admin(f"job {job.journal.job_id}: its control daemon was started twice: {error}")

    def _check(self, children: Sequence[processes.Child], job: JobOnNode) -> None:
        """Wait for the programs of begin(), and check that each daemon runs. Raises: NodeError."""
        seconds = job.seconds(job.config.deadlines_daemon_start)
        outcomes = processes.wait_all(children, seconds)
        problems = []
        for (name, _), outcome in zip(self.served, outcomes, strict=True):
            try:
                with job.journal.directory.subdirectory(name) as pipe:
                    job.daemon(name).check_start(outcome, seconds, pipe)
            except NodeError as error:
                problems.append(error)
        raise_all(problems)


@record
class QuitDaemons:
    """End the control daemons and their servers, proved to be the job's own; one that is stuck delays no other."""

    names: tuple[str, ...]

    def line(self) -> str:
        return with_fields("quit_daemons", {"names": ",".join(self.names)})

    def describe(self) -> str:
        return f"end control daemon {', '.join(self.names)} and its servers: quit, then SIGTERM, then SIGKILL"

    def all_run(self, job: JobOnNode) -> bool:
        """Whether all of the daemons run."""
        return all(job.daemon(name).process() for name in self.names)

    def run(self, job: JobOnNode) -> None:
        daemons = [job.daemon(name) for name in self.names]
        how_long = patience(job.config, job.seconds)
        control.quit_all(daemons, job.journal.uid, how_long, job.meanwhile, asked=job.asked)


@record
class SetLimits:
    """Set what each daemon's clients may have, and read it back; it dies with the daemon."""

    daemons: tuple[JobDaemon, ...]

    def describe(self) -> str:
        return "; ".join(
            f"tell {one.name}, and read back: {', '.join(limit_commands(one.limits, len(one.gpus)))}"
            for one in self.daemons
        )

    def undo(self) -> None:
        return None

    def apply(self, job: JobOnNode) -> None:
        wanted = [(job.daemon(one.name), one.limits, len(one.gpus)) for one in self.daemons]
        control.set_limits(wanted, job.seconds(job.config.deadlines_command))


@record
class AdmitUser:
    """Let the job's user into the job's directory; before that, nobody could disturb the bring-up there.

    Undone by removing the directory.
    """

    uid: int

    def describe(self) -> str:
        return f"let uid {self.uid} into the job's directory"

    def undo(self) -> None:
        return None

    def apply(self, job: JobOnNode) -> None:
        job.journal.directory.grant_user(job.journal.uid)


@record
class StartServers:
    """Have each daemon start its server for the job's user, ahead of the first client; it dies with the daemon.

    It is up 0.15 s and more later, before the job's first CUDA context needs it (O26), and nobody waits for it. A
    daemon that does not do it now does it for the first client; from here on the job's user could be the reason, so
    what the daemons answer says nothing of the node.
    """

    uid: int
    daemons: tuple[str, ...]

    def describe(self) -> str:
        return f"tell {', '.join(self.daemons)}: start_server -uid {self.uid}; not waited for"

    def undo(self) -> None:
        return None

    def apply(self, job: JobOnNode) -> None:
        processes.wait_all(self.begin(job), job.seconds(job.config.deadlines_command))

    def begin(self, job: JobOnNode) -> list[processes.Child]:
        """Start the programs that send the command to the daemons, and return them."""
        children = []
        for name in self.daemons:
            try:
                children.append(job.daemon(name).ask([f"start_server -uid {self.uid}"]))
            except NodeError as error:
                tell_admin(f"job {job.journal.job_id}: the server is not started ahead of the first client: {error}")
        return children
