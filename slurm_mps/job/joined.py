"""One control daemon for all jobs on a GPU: the first starts it, each job has a link to its socket, the last ends it.

    /run/slurm-mps/daemons/<GPU>/                     root 0755: marks of steps that ended badly (spank/health.c)
      <job that started it>/                          the daemon's pipe directory: root 0700 + its server's user
    /run/slurm-mps/jobs/<job id>/joined-<n>/control   a hard link to its socket: the job's gate to it
    /run/slurm-mps/gpus/<GPU>                         the ledger: who holds it, and what becomes of the daemon

Promises (docs/decisions/0021):
 - Joining and leaving need no answer from the daemon: its ledger, its process and its socket say all.
 - Under the GPU's lock no daemon is waited for. It is started and ended outside of it, by what the ledger says:
   STARTING, OPEN, CLOSING (job/joined_daemon.py).
 - A job's undo ends only what is in the job's own cgroup, and the daemon only when the last has left.
"""

from __future__ import annotations

import os
from time import monotonic

from ..errors import DeadlineError, NodeError, RequestError, raise_all
from ..node import control, processes
from ..node.control import Limits, limit_commands
from ..node.files import read_slurms_own
from ..node.listen import BUSY, listener
from ..node.messages import tell_admin
from ..node.nvml import COMPUTE_MODES
from ..node.wordfile import DamagedFileError, fields, with_fields
from ..record import record, replace
from ..units import MIB, describe_memory
from . import logs
from .actions import LOG_GROWS_TO, claim, refuse_another_way, under_lock, wait_for
from .joined_daemon import close, control_daemon, forget_logs, help_to_close, is_alive, make_logs, put_back
from .ledger import CLOSING, JOINED, JOINED_ALL, OPEN, STARTING, Holder, JoinedDaemon, LedgerEntry, describe_gone
from .state import DAEMONS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..config.settings import SiteConfig
    from ..node.files import Directory
    from ..node.nvml import Gpus
    from .actions import JobOnNode
    from .journal import Journal
    from .state import NodeState

_CLIENTS_SECONDS, _CLIENTS_END_SECONDS = 2.0, 1.0
_SOCKET = "control"
_INCLUDES_MAX = 8
LEAVE_GPUS = "leave_gpus"


def link_name(number: int) -> str:
    """The directory with a job's link, by the job's own count of its GPUs. No script takes it for a daemon's own."""
    return f"joined-{number}"


@record
class JoinGpu:
    """Hold a GPU together with other jobs, and have a link to the daemon that serves them all.

    `way` says whose jobs these are: JOINED, of the same user; JOINED_ALL, of all users, with a server that is root's.
    `limits` are the daemon's own, the most that the site allows; the job's are its clients' variables. `mib` is how
    much of the GPU's memory the job's clients may have together, where that is known, of `mib_in_all`.
    """

    gpu: str
    number: int
    uid: int
    mode: int | None
    limits: Limits
    mib: int
    mib_in_all: int
    way: str = JOINED

    @property
    def server_uid(self) -> int:
        """The user of the daemon's server."""
        return 0 if self.way == JOINED_ALL else self.uid

    def describe(self) -> str:
        mode = "compute mode left alone" if self.mode is None else f"compute mode {COMPUTE_MODES[self.mode]}"
        commands = ", ".join(limit_commands(self.limits, 1))
        whose = "all users" if self.way == JOINED_ALL else f"uid {self.uid}"
        return (
            f"hold {self.gpu} for the job, {mode}, with other jobs of {whose}; link {link_name(self.number)} to "
            f"its control daemon, or start that one and tell it: {commands}, start_server -uid {self.server_uid}"
        )

    def apply(self, job: JobOnNode) -> None:
        """Raises: RequestError where the job cannot be beside the others, or would have to wait for them too long."""
        ours = Holder(job.journal.job_id, self.way, self.uid, self.mib)
        job.journal.claims = True
        while True:
            daemon = under_lock(job, lambda: self._enter(ours, job))
            if daemon.stage == OPEN and self._is_linked(daemon, job):
                return
            if daemon.stage == STARTING and daemon.starter == ours.job_id:
                self._start(daemon, job)
                return
            starts = f"job {daemon.starter} is still starting the control daemon"
            ends = "the control daemon of earlier jobs is still ending"
            wait_for(f"{self.gpu}: {starts if daemon.stage == STARTING else ends}", job)
            help_to_close(self.gpu, daemon, job)

    def _enter(self, ours: Holder, job: JobOnNode) -> JoinedDaemon:
        """Under the lock: become a holder where a daemon is open, or where there is none and this job is to start it.

        Returns: the daemon as the ledger has it now.
        """
        entry = job.state.ledgers.read(self.gpu)
        others = tuple(one for one in entry.holders if one.job_id != ours.job_id)
        self.refuse_beside(others)
        daemon = entry.daemon
        if daemon is None:
            daemon = JoinedDaemon(ours.job_id, STARTING, self.server_uid)
            claim(self.gpu, self.mode, LedgerEntry((*others, ours), entry.mode_found, daemon), job)
            return daemon
        if daemon.stage == OPEN and is_alive(daemon):
            job.state.ledgers.write(self.gpu, replace(entry, holders=(*others, ours)))
            link(self.gpu, daemon, job.journal.directory, self.number, job.state)
            return daemon
        is_holder = daemon.starter in (one.job_id for one in others)
        starts = daemon.stage == STARTING and is_holder and job.state.is_at_work(daemon.starter)
        if daemon.stage != CLOSING and not starts:
            daemon = replace(daemon, stage=CLOSING, closer=ours.job_id)
            job.state.ledgers.write(self.gpu, replace(entry, daemon=daemon))
            tell_admin(f"job {ours.job_id}: {self.gpu}: its control daemon is gone and is started again")
        return daemon

    def refuse_beside(self, others: Sequence[Holder]) -> None:
        """Raises: RequestError where another job that holds the GPU cannot be beside this one, or leaves too little."""
        refuse_another_way(self.gpu, self.way, others)
        for other in others:
            if self.way == JOINED and other.uid != self.uid:
                held = f"{self.gpu} is held by an MPS job of another user"
                raise RequestError(held, hint="this site joins jobs of one user only", reason="held_gpu")
        taken = sum(other.mib for other in others)
        if self.mib and taken + self.mib > self.mib_in_all:
            jobs = ", ".join(str(other.job_id) for other in others if other.uid == self.uid)
            asked, has = describe_memory(self.mib * MIB), describe_memory(self.mib_in_all * MIB)
            raise RequestError(
                f"its processes may take {asked} of {self.gpu} in all, and {f'jobs {jobs}' if jobs else 'other jobs'} "
                f"may take {describe_memory(taken * MIB)} of the {has} that MPS clients have there",
                hint="ask for less with --mps-mem, or for a part of a GPU",
                reason="memory",
            )

    def _is_linked(self, daemon: JoinedDaemon, job: JobOnNode) -> bool:
        """Whether root's daemon of the ledger listens behind the job's link; BUSY is one whose queue is full."""
        pid = daemon.process.pid if daemon.process else None
        return listener(f"{job.journal.directory.path}/{link_name(self.number)}") in (pid, BUSY)

    def _start(self, daemon: JoinedDaemon, job: JobOnNode) -> None:
        """Start the daemon outside the lock, and open it to all holders. Raises: NodeError."""
        running, reader = control_daemon(self.gpu, daemon, job.config), None if self.way == JOINED_ALL else self.uid
        anew = len(job.state.ledgers.read(self.gpu).holders) == 1
        with (
            job.state.daemons().make(self.gpu, 0o755) as place,
            place.make(str(daemon.starter), 0o700) as pipe,
        ):
            pipe.grant_user(reader)
            if not make_logs(self.gpu, reader, job.state, job.config, anew=anew):
                pipe.make("log", 0o755).close()
                running = replace(running, log_directory=f"{running.pipe_directory}/log")
            seconds = job.seconds(job.config.deadlines_daemon_start)
            log_limit_bytes = LOG_GROWS_TO * job.config.logs_max_kib * 1024
            child = running.start((self.gpu,), log_limit_bytes, all_users=self.way == JOINED_ALL)
            (outcome,) = processes.wait_all([child], seconds)
            running.check_start(outcome, seconds, pipe)
        control.set_limits([(running, self.limits, 1)], job.seconds(job.config.deadlines_command))
        process = running.process()
        if process is None:
            raise NodeError(f"{self.gpu}: its control daemon has ended again")
        opened = replace(daemon, stage=OPEN, process=process)
        try:  # while no user can keep it from answering
            asked = running.ask([f"start_server -uid {self.server_uid}"])
            processes.wait_all([asked], job.seconds(job.config.deadlines_command))
        except NodeError as error:
            tell_admin(f"job {job.journal.job_id}: the server is not started ahead of the first client: {error}")
        under_lock(job, lambda: _open(self.gpu, opened, job))
        if not self._is_linked(opened, job):
            raise NodeError(f"{self.gpu}: its control daemon does not listen behind the job's link")


@record
class JoinGpus:
    """Join others on each of the job's GPUs, in the order of the job's own count of them."""

    joins: tuple[JoinGpu, ...]

    def describe(self) -> str:
        return "; ".join(one.describe() for one in self.joins)

    def undo(self) -> LeaveGpus:
        return LeaveGpus(tuple(one.gpu for one in self.joins))

    def apply(self, job: JobOnNode) -> None:
        for one in self.joins:
            one.apply(job)


def _open(gpu: str, daemon: JoinedDaemon, job: JobOnNode) -> JoinedDaemon:
    """Under the lock: open a daemon that runs, and give all holders their links: they may have had one to another."""
    entry = job.state.ledgers.read(gpu)
    if entry.daemon != replace(daemon, stage=STARTING, process=None):
        raise NodeError(f"{gpu}: another job has taken its control daemon over")
    job.state.ledgers.write(gpu, replace(entry, daemon=daemon))
    for holder in entry.holders:
        if holder.job_id == job.journal.job_id:
            _link_all(gpu, daemon, job.journal, job.state)
            continue
        try:
            journal = job.state.look_at_journal(holder.job_id)
            if journal:
                with journal.directory:
                    _link_all(gpu, daemon, journal, job.state)
        except NodeError as error:  # that job's steps say that no daemon answers
            tell_admin(f"job {holder.job_id}: no link to the control daemon that was started again: {error}")
    return daemon


def _link_all(gpu: str, daemon: JoinedDaemon, journal: Journal, state: NodeState) -> None:
    for kind, *words in (line.split(" ") for line in journal.undo):
        gpus = read_leave_gpus(fields(words)).gpus if kind == LEAVE_GPUS else ()
        if gpu in gpus:
            link(gpu, daemon, journal.directory, gpus.index(gpu), state)


def link(gpu: str, daemon: JoinedDaemon, directory: Directory, number: int, state: NodeState) -> None:
    """Put a hard link to the daemon's socket into a job's directory, in place of one that is there."""
    with (
        state.daemons().subdirectory(gpu) as place,
        place.subdirectory(str(daemon.starter)) as pipe,
        directory.make(link_name(number), 0o755) as here,
    ):
        pipe.link_socket(_SOCKET, here)


@record
class LeaveGpus:
    """Leave GPUs' daemons: the links go, the job's clients that are left are ended, the last job ends the daemons.

    They are ended together: one that is stuck delays no other.
    """

    gpus: tuple[str, ...]

    def line(self) -> str:
        return with_fields(LEAVE_GPUS, {"gpus": ",".join(self.gpus)})

    def describe(self) -> str:
        return f"leave {', '.join(self.gpus)}: remove links, end the job's own processes; the last job ends the daemons"

    def all_run(self, job: JobOnNode) -> bool:
        """Whether the job holds its GPUs, and its links lead to the daemons that run."""
        return all(self._runs(number, gpu, job) for number, gpu in enumerate(self.gpus))

    def _runs(self, number: int, gpu: str, job: JobOnNode) -> bool:
        entry = job.state.ledgers.read(gpu)
        daemon = entry.daemon
        if not _holds(gpu, job) or daemon is None or daemon.stage != OPEN or not is_alive(daemon):
            return False
        ours = listener(f"{job.journal.directory.path}/{link_name(number)}")
        return daemon.process is not None and ours in (daemon.process.pid, BUSY)

    def run(self, job: JobOnNode) -> None:
        job_id = job.journal.job_id
        self._remove_links(job)
        # A job that was refused holds none, and has nothing to end.
        if held := [(number, gpu) for number, gpu in enumerate(self.gpus) if _may_hold(gpu, job)]:
            end_clients(job_id, job.journal.uid, job.seconds(_CLIENTS_SECONDS))
            for number, gpu in held:
                logs.keep_part(job_id, gpu, f"gpu-{number}", job.config)
        closing: dict[str, JoinedDaemon] = {}
        problems: list[Exception] = []
        for gpu in self.gpus:
            try:
                if daemon := leave(gpu, (job_id,), job.state, job.gpus, job.config, job.seconds):
                    closing[gpu] = daemon
            except NodeError as error:
                problems.append(error)
        self._remove_links(job)  # until it left, a job that started a dead daemon again may have put them back
        try:
            close(closing, job.state, job.gpus, job.config, job.seconds, job.meanwhile)
        except NodeError as error:
            problems.append(error)
        logs.keep(job_id, job.config, job.state.job_ids())
        raise_all(problems)

    def _remove_links(self, job: JobOnNode) -> None:
        for number in range(len(self.gpus)):
            job.journal.directory.remove_tree(link_name(number))


def _holds(gpu: str, job: JobOnNode) -> bool:
    return any(one.job_id == job.journal.job_id for one in job.state.ledgers.read(gpu).holders)


def _may_hold(gpu: str, job: JobOnNode) -> bool:
    """Whether a job holds a GPU, as far as the ledger can be read; leave() reports one that cannot."""
    try:
        return _holds(gpu, job)
    except NodeError:
        return True


def read_leave_gpus(found: dict[str, str]) -> LeaveGpus:
    """Raises: DamagedFileError when these are not its words."""
    if found.keys() != {"gpus"}:
        raise DamagedFileError(f"the journal has an undo {LEAVE_GPUS} without GPUs")
    return LeaveGpus(tuple(found["gpus"].split(",")))


def end_clients(job_id: int, uid: int, timeout_seconds: float) -> None:
    """End what is left of a job: its user's processes in its cgroup, by the kernel's word, and nobody else's.

    Raises: DeadlineError where the node has so many processes that not all could be looked at.
    """
    found, end = [], monotonic() + timeout_seconds
    for pid in processes.pids():
        if monotonic() > end:
            raise DeadlineError(f"its processes could not be searched for within {timeout_seconds:g} s")
        if processes.job_of(pid) == job_id and processes.uid_of(pid) == uid and (process := processes.identify(pid)):
            found.append(process)
    if not found:
        return
    control.kill_all(found, processes.SIGKILL, _CLIENTS_END_SECONDS)
    names = ", ".join(str(process.pid) for process in found[:4])
    tell_admin(f"job {job_id}: its processes {names} were still there when it had ended, and were killed")


def leave(
    gpu: str,
    jobs: Sequence[int],
    state: NodeState,
    gpus: Gpus,
    config: SiteConfig,
    seconds: Callable[[float], float],
) -> JoinedDaemon | None:
    """Take jobs out of a GPU's ledger, and who has no journal any more; put back the compute mode where that is all.

    Returns: the daemon, where they are to end it: a job that was refused need not, whose neighbours do.
    """
    state.ledgers.lock(seconds(config.deadlines_command))
    try:
        entry = state.ledgers.read(gpu)
        left = tuple(one for one in entry.holders if one.job_id not in jobs)
        daemon = entry.daemon
        abandoned = daemon is not None and (not left or (daemon.stage == STARTING and _is_gone(daemon, left)))
        if daemon is not None and daemon.stage != CLOSING and abandoned:
            daemon = replace(daemon, stage=CLOSING, closer=jobs[0] if jobs else 0)
        entry = replace(entry, holders=left, daemon=daemon)
        state.ledgers.write(gpu, entry if left or daemon else put_back(gpu, entry, gpus))
    finally:
        state.ledgers.unlock()
    if daemon is None and not left:
        forget_logs(gpu, state, config)
    ours = daemon is not None and daemon.stage == CLOSING and (not jobs or daemon.closer in jobs)
    return daemon if ours else None


def _is_gone(daemon: JoinedDaemon, holders: Sequence[Holder]) -> bool:
    return daemon.starter not in (one.job_id for one in holders)


def names(state: NodeState) -> list[str]:
    """The daemons that there are directories of."""
    return state.daemons().names() if state.root.exists(DAEMONS) else []


def what_is_left(entry: LedgerEntry, written: LedgerEntry) -> str:
    """What killed hooks left of a GPU's daemon, by what its ledger says and who of them is there; empty for nothing."""
    daemon = entry.daemon
    if daemon is not None and not entry.holders:
        return f"no job uses the control daemon that job {daemon.starter} started any more"
    if daemon is not None and daemon.stage == STARTING and _is_gone(daemon, entry.holders):
        return f"job {daemon.starter}, which was to start the control daemon, no longer exists"
    return describe_gone(written, entry)


def settle(gpu: str, state: NodeState, gpus: Gpus, config: SiteConfig, seconds: Callable[[float], float]) -> None:
    """Put right what_is_left(). Raises: NodeError."""
    daemon = leave(gpu, (), state, gpus, config, seconds)
    if daemon is not None:
        close({gpu: daemon}, state, gpus, config, seconds)


def unconfined(slurm_conf: str) -> str:
    """Why jobs cannot be joined on this node; empty where Slurm confines them to their GPUs.

    A link to a socket cannot be taken back from who kept a handle on it; without its GPU's device node that is worth
    nothing (O88).
    """
    path = slurm_conf or "/etc/slurm/slurm.conf"
    try:
        slurm, cgroup = _settings(path), _settings(f"{os.path.dirname(path)}/cgroup.conf")
    except OSError as error:
        return f"what confines jobs to their devices cannot be read: {error}"
    if cgroup.get("constraindevices", "").lower() not in ("yes", "true", "up", "1"):
        return f"{os.path.dirname(path)}/cgroup.conf has no ConstrainDevices=yes"
    plugins = slurm.get("taskplugin", "").lower().split(",")
    return "" if "task/cgroup" in plugins or "cgroup" in plugins else f"{path} has no TaskPlugin=task/cgroup"


def _settings(path: str, depth: int = _INCLUDES_MAX) -> dict[str, str]:
    """What a file of Slurm's and those that it includes say: each key, in lower case, with its last value.

    Not slurm.conf.read_conf(): it keeps the place of each line, imports slowly, and works with glob, which root's hooks
    may not. An include that cannot be read, such as one with Slurm's ``%h``, says nothing.
    Raises: OSError when the file itself cannot be read.
    """
    text = read_slurms_own(path).decode("utf-8", "replace")
    found: dict[str, str] = {}
    for line in text.replace("\\\n", " ").splitlines():
        words = line.partition("#")[0].replace("=", " = ").replace('"', " ").split()
        if len(words) > 1 and words[0].lower() == "include" and depth:
            try:
                found |= _settings(os.path.join(os.path.dirname(path), words[1]), depth - 1)
            except OSError:
                continue
        found |= {words[at - 1].lower(): words[at + 1] for at, word in enumerate(words[:-1]) if word == "=" and at}
    return found
