"""MPS on this node: every job that the caller may see, its control daemons, servers, clients and GPUs.

Root sees all jobs, a user their own. Facts come from root's files, the control daemons, NVML and the kernel; a
client's environment (its rank, a lower limit of its own) is written by its user, and is for display only.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from shutil import which

from ..config.settings import DEFAULTS, STATE_DIRECTORY
from ..errors import MpsError, NodeError
from ..job.journal import Journal
from ..job.state import NodeState
from ..job.verdict import JOBS, DaemonPlace, Verdict
from ..job.verdict_file import read_verdict
from ..node import processes
from ..node.control import DAEMON_PROGRAM
from ..node.nvml import COMPUTE_MODES, EXCLUSIVE_PROCESS
from ..node.reading import environments_of
from ..slurm import jobs as slurm
from ..units import describe_memory, format_thread_percentage, printable, small_number
from ..verify.judge import percentage, variable_limit
from .daemon import DIED, FAULT, Client, DaemonAnswer, Memory, Server, ask
from .gpus import GpuState, NvmlAnswer, ask_nvml

Environments = Mapping[int, Mapping[str, str]]

#: How a job stands on this node.
BEGINNING, READY, REFUSED, WITHOUT, ENDING, UNKNOWN = "beginning", "ready", "refused", "without", "ending", "unknown"
TIMEOUT_SECONDS = 2.0
BATCH = "batch"


@dataclass(frozen=True)
class ProgramView:
    """A program on one GPU, as reports have it. step, rank: of its task, None where it does not say.

    pid_inside: what its container calls it, None without a pid namespace of its own. memory_bytes: what it uses, None
    where NVML does not say.
    """

    pid: int
    pid_inside: int | None
    uid: int | None
    step: str | None
    rank: int | None
    command: str
    memory_bytes: int | None


@dataclass(frozen=True)
class ClientView(ProgramView):
    """A client. thread_percentage: of the GPU's threads. limit_bytes: None for no limit."""

    server: int
    thread_percentage: float | None
    limit_bytes: int | None


@dataclass(frozen=True)
class GpuView:
    """A GPU of a job: the mode it is in, the one that was found (None: it was not changed, or only root may know).

    without_mps: the job's programs that have a context on it and are no clients. profile: of a MIG slice, such as
    1g.10gb.
    """

    uuid: str
    mode: int | None
    mode_found: int | None
    clients: tuple[ClientView, ...]
    without_mps: tuple[ProgramView, ...]
    profile: str = ""


@dataclass(frozen=True)
class DaemonView:
    """A control daemon of a job; pid: None when it is gone, 0 when it is not known."""

    place: DaemonPlace
    pid: int | None
    problem: str
    servers: tuple[Server, ...]
    gpus: tuple[GpuView, ...]


@dataclass(frozen=True)
class JobView:
    """A job on this node, and how it stands; `message` says why, where it has no MPS."""

    job_id: int
    uid: int
    state: str
    message: str
    threads: str
    auto: tuple[str, ...]
    daemons: tuple[DaemonView, ...]


@dataclass(frozen=True)
class NodeView:
    """All that was seen; each of `problems` is a sentence, which begins with the job's number if it is about a
    job.
    """

    jobs: tuple[JobView, ...]
    problems: tuple[str, ...]
    of_all: bool  #: whether jobs of all users were looked for
    stuck: bool  #: whether a thread of this process waits for a driver that hangs


@dataclass(frozen=True)
class _Job:
    """What the files say of a job."""

    job_id: int
    uid: int
    state: str
    verdict: Verdict | None
    program: str
    modes_found: Mapping[str, int]
    shares: bool = False  #: a GPU of it with another job, as far as is known


def look(
    job_ids: Sequence[int] = (),
    timeout_seconds: float = TIMEOUT_SECONDS,
    *,
    memory: Memory | None = None,
    sparing: bool = False,
) -> NodeView | None:
    """Look at this node, at these jobs alone if any are given. None where slurm-mps was not used since the boot.

    memory: of whoever looks again and again. sparing: clients by NVML's word alone where it tells all of them, without
    what their daemons and their environments say of them.
    """
    if not os.path.isdir(STATE_DIRECTORY):
        return None
    problems: list[str] = []
    root = os.geteuid() == 0
    jobs = _roots_jobs(job_ids, problems) if root else _own_jobs(job_ids, problems)
    seen = {job.job_id for job in jobs}
    whose = "" if root else ", or it is not yours"
    problems += [f"job {job}: nothing of it is on this node{whose}" for job in job_ids if job not in seen]
    gpus = _ask_gpus(jobs, timeout_seconds)
    problems += [gpus.problem] if gpus.problem else []
    answers = _ask_daemons(jobs, gpus.gpus, timeout_seconds, memory or Memory(), sparing=sparing)
    clients = {client.pid for answer in answers.values() for client in answer.clients or ()}
    clients.update(pid for state in gpus.gpus.values() for pid in (*state.memory_bytes, *state.others))
    environments = {} if sparing else environments_of(clients)
    views = tuple(_view(job, answers, gpus.gpus, environments) for job in jobs)
    for view in views:
        problems += [f"job {view.job_id}: {words}" for words in _problems(view)]
    return NodeView(views, tuple(problems), root, gpus.stuck)


# ------------------------------------------------------------------------------------------------------ which jobs


def own_job_ids() -> list[int]:
    """Jobs that may be ours: those with a step here, and those of SLURM_JOB_ID in our processes' environments."""
    found = slurm.jobs_with_steps()
    own = os.geteuid()
    for pid in processes.pids():
        if processes.uid_of(pid) == own:
            job = small_number(processes.environment_of(pid).get("SLURM_JOB_ID", ""))
            if job is not None:
                found.add(job)
    return sorted(found)


def _own_jobs(job_ids: Sequence[int], problems: list[str]) -> list[_Job]:
    program = which(DAEMON_PROGRAM) or DEFAULTS.paths_control_program
    found = []
    for job_id in dict.fromkeys(job_ids or own_job_ids()):
        verdict = _read_verdict(job_id, problems)
        if verdict or os.access(f"{JOBS}/{job_id}", os.R_OK):
            state = verdict.status if verdict else UNKNOWN
            found.append(_Job(job_id, os.geteuid(), state, verdict, program, {}))
    return found


def _read_verdict(job_id: int, problems: list[str]) -> Verdict | None:
    try:
        return read_verdict(job_id)
    except NodeError as error:
        problems.append(f"job {job_id}: {error}")
        return None


def _roots_jobs(job_ids: Sequence[int], problems: list[str]) -> list[_Job]:
    try:
        state = NodeState(make=False)
    except (NodeError, FileNotFoundError) as error:
        problems.append(str(error))
        return []
    there = state.job_ids()
    found = []
    for job_id in dict.fromkeys(job_ids or there):
        if job_id not in there:
            continue
        try:
            journal = state.look_at_journal(job_id)
            if journal:
                found.append(_roots_job(state, journal, problems))
        except MpsError as error:
            problems.append(f"job {job_id}: {error}")
    return found


def _roots_job(state: NodeState, journal: Journal, problems: list[str]) -> _Job:
    job_id = journal.job_id
    verdict = _read_verdict(job_id, problems)
    config = journal.read_config() or DEFAULTS
    stage = verdict.status if verdict else BEGINNING
    if verdict and verdict.status == READY and not journal.ready:
        stage = ENDING
    if journal.boot_id != state.boot_id:
        problems.append(f"job {job_id}: it is of an earlier boot; slurm-mps reconcile takes it down")
        stage, verdict = ENDING, None
    modes, shares = {}, False
    for uuid in {gpu for place in (verdict.daemons if verdict else ()) for gpu in place.gpus}:
        entry = state.ledgers.read(uuid)
        shares |= len(entry.holders) > 1
        if entry.mode_found is not None and any(one.job_id == job_id for one in entry.holders):
            modes[uuid] = entry.mode_found
    return _Job(job_id, journal.uid, stage, verdict, config.paths_control_program, modes, shares)


# -------------------------------------------------------------------------------------------------- who is asked what


def _places(jobs: Iterable[_Job]) -> list[tuple[_Job, DaemonPlace]]:
    return [(job, place) for job in jobs if job.verdict for place in job.verdict.daemons]


def _ask_daemons(
    jobs: Iterable[_Job], gpus: Mapping[str, GpuState], timeout_seconds: float, memory: Memory, *, sparing: bool
) -> dict[str, DaemonAnswer]:
    """All at once: one that is stuck keeps nobody else waiting."""
    answers: dict[str, DaemonAnswer] = {}

    def ask_one(one: tuple[_Job, DaemonPlace]) -> None:
        job, place = one
        there = _nvmls_clients(place, gpus)
        answer = memory.recall(place, there)
        if answer is None:
            listing = not sparing or there is None or job.shares
            answer = ask(place, job.program, timeout_seconds, listing=listing)
            memory.keep(place, there, answer)
        answers[place.pipe_directory] = answer

    places = _places(jobs)
    with ThreadPoolExecutor(max(1, len(places))) as pool:
        list(pool.map(ask_one, places))
    return answers


def _nvmls_clients(place: DaemonPlace, gpus: Mapping[str, GpuState]) -> frozenset[int] | None:
    """The clients on a daemon's GPUs, by NVML; None where it does not tell of each GPU."""
    if not all(uuid in gpus for uuid in place.gpus):
        return None
    return frozenset(pid for uuid in place.gpus for pid in gpus[uuid].memory_bytes)


def _ask_gpus(jobs: Iterable[_Job], timeout_seconds: float) -> NvmlAnswer:
    uuids = dict.fromkeys(gpu for _, place in _places(jobs) for gpu in place.gpus)
    return ask_nvml(uuids, timeout_seconds) if uuids else NvmlAnswer({})


# ---------------------------------------------------------------------------------------------------- put together


def _view(
    job: _Job, answers: Mapping[str, DaemonAnswer], gpus: Mapping[str, GpuState], environments: Environments
) -> JobView:
    verdict = job.verdict
    daemons = [
        _daemon_view(job, verdict, place, answers, gpus, environments)
        for place in (verdict.daemons if verdict else ())
        if verdict
    ]
    return JobView(
        job_id=job.job_id,
        uid=job.uid,
        state=job.state,
        message=verdict.message if verdict else "",
        threads=format_thread_percentage(verdict.thread_percentage) if verdict and verdict.daemons else "",
        auto=verdict.auto if verdict else (),
        daemons=tuple(daemons),
    )


def _daemon_view(
    job: _Job,
    verdict: Verdict,
    place: DaemonPlace,
    answers: Mapping[str, DaemonAnswer],
    gpus: Mapping[str, GpuState],
    environments: Environments,
) -> DaemonView:
    answer = answers[place.pipe_directory]
    threads = {server.pid: server.threads for server in answer.servers}
    given = format_thread_percentage(verdict.thread_percentage)
    views = []
    for uuid in place.gpus:
        state = gpus.get(uuid)
        listed = answer.clients
        if listed is None:
            server = answer.servers[0].pid if answer.servers else 0
            listed = tuple(Client(pid, server, uuid, "") for pid in (state.memory_bytes if state else ()))
        clients = [
            _client_view(client, uuid, place, threads.get(client.server) or given, state, environments)
            for client in listed
            if client.gpu == uuid and (not place.joined_directory or _job_of(client.pid, environments) == job.job_id)
        ]
        mode = state.compute_mode if state else None
        in_order = tuple(sorted(clients, key=lambda client: client.pid))
        outside = {**state.others, **_unlisted(state.memory_bytes, answers)} if state else {}
        without = tuple(
            _program_view(pid, processes.program_name(pid), used, environments)
            for pid, used in sorted(outside.items())
            if _is_of(job, pid, environments)
        )
        views.append(GpuView(uuid, mode, job.modes_found.get(uuid), in_order, without, state.profile if state else ""))
    return DaemonView(place, answer.pid, answer.problem, answer.servers, tuple(views))


def _job_of(pid: int, environments: Environments) -> int | None:
    """The job of a client of several jobs' server. Where a container hides its cgroup, the client's own word counts."""
    return processes.job_of(pid) or small_number(environments.get(pid, {}).get("SLURM_JOB_ID", ""))


def _client_view(
    client: Client,
    uuid: str,
    place: DaemonPlace,
    threads: str,
    state: GpuState | None,
    environments: Environments,
) -> ClientView:
    environment = environments.get(client.pid, {})
    own_threads = environment.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "")
    limits = [place.memory_bytes]
    try:
        visible = _visible(environment.get("CUDA_VISIBLE_DEVICES", ""), place.gpus)
        ordinal = visible.index(uuid) if uuid in visible else -1
        own_memory = environment.get("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT", "")
        limits.append(variable_limit(own_memory, visible, ordinal, uuid))
    except ValueError:
        limits = []  # a value that the driver cannot use lifts every limit (O12)
    used = state.memory_bytes.get(client.pid) if state else None
    return ClientView(
        **vars(_program_view(client.pid, client.command, used, environments)),
        server=client.server,
        thread_percentage=min(filter(None, map(percentage, (threads, own_threads))), default=None),
        limit_bytes=min((limit for limit in limits if limit is not None), default=None),
    )


def _program_view(pid: int, command: str, used: int | None, environments: Environments) -> ProgramView:
    """A program with a context on a GPU, and nothing of MPS."""
    environment = environments.get(pid, {})
    step = small_number(environment.get("SLURM_STEP_ID", ""))
    rank = small_number(environment.get("SLURM_PROCID", ""))
    return ProgramView(
        pid=pid,
        pid_inside=processes.pid_inside(pid),
        uid=processes.uid_of(pid),
        step=str(step) if step is not None else BATCH if "SLURM_JOB_ID" in environment else None,
        rank=rank if step is not None else None,
        command=printable(os.path.basename(command), 60),
        memory_bytes=used,
    )


def _unlisted(clients: Mapping[int, int], answers: Mapping[str, DaemonAnswer]) -> dict[int, int]:
    """Clients of a daemon that is none of ours, as one that an image starts; none where a daemon was not asked."""
    listed: set[int] = set()
    for answer in answers.values():
        if answer.clients is None or answer.problem:
            return {}
        listed.update(client.pid for client in answer.clients)
    return {pid: used for pid, used in clients.items() if pid not in listed and processes.identify(pid)}


def _is_of(job: _Job, pid: int, environments: Environments) -> bool:
    """Whether a process on a GPU of the job is a program of it; where neither cgroup nor environment tell, by its user.

    MPS servers are none: they run as the job's user, and with PrologFlags=RunInJob in the job's cgroup.
    """
    name = processes.program_of(pid) if os.geteuid() == 0 else processes.name_of(pid)
    if name.startswith("nvidia-cuda-mps"):
        return False
    job_id = _job_of(pid, environments)
    return processes.uid_of(pid) == job.uid if job_id is None else job_id == job.job_id


def _visible(text: str, gpus: Sequence[str]) -> list[str]:
    """A client's devices: what its CUDA_VISIBLE_DEVICES names, or all of the daemon's."""
    names = [name for name in text.split(",") if name]
    if not names:
        return list(gpus)
    ordinals = [small_number(name) for name in names]
    return [
        gpus[ordinal] if ordinal is not None and ordinal < len(gpus) else name
        for name, ordinal in zip(names, ordinals, strict=True)
    ]


# --------------------------------------------------------------------------------------------------- what is wrong


def _problems(job: JobView) -> list[str]:
    found = []
    for daemon in job.daemons:
        where = f" ({daemon.place.name})" if daemon.place.name else ""
        if daemon.problem:
            found.append(f"{daemon.problem}{where}")
        found += [_in_fault(server, daemon) for server in daemon.servers if server.state == FAULT]
        if job.state == READY:
            found += [f"{words}{where}" for words in _without_server(job, daemon)]
        for gpu in daemon.gpus:
            if gpu.mode_found is not None and gpu.mode not in (None, EXCLUSIVE_PROCESS):
                found.append(
                    f"{gpu.uuid} is {COMPUTE_MODES.get(gpu.mode or 0)}, though the job holds it EXCLUSIVE_PROCESS"
                )
            found += _outside(gpu)
            lifted = [client.pid for client in gpu.clients if daemon.place.memory_bytes and client.limit_bytes is None]
            if lifted:
                limit = describe_memory(daemon.place.memory_bytes or 0)
                found.append(
                    f"process {', '.join(map(str, lifted[:8]))} may take more than {limit} of {gpu.uuid}: the driver "
                    "cannot use its CUDA_MPS_PINNED_DEVICE_MEM_LIMIT, and then applies no limit"
                )
    return found


def _outside(gpu: GpuView) -> list[str]:
    if not gpu.without_mps:
        return []
    names = [
        f"{one.pid} ({one.pid_inside} in its container)" if one.pid_inside else f"{one.pid}"
        for one in gpu.without_mps[:8]
    ]
    which = f"process {names[0]} runs" if len(gpu.without_mps) == 1 else f"processes {', '.join(names)} run"
    return [f"{which} on {gpu.uuid} without the job's control daemon and its limits"]


def _without_server(job: JobView, daemon: DaemonView) -> list[str]:
    """The prolog starts a server, which stays; a daemon that has none lost it, and tells nobody."""
    after = "the next program gets a new one"
    dead = next((server.pid for server in daemon.servers if server.state == DIED), None)
    if dead is not None:
        lost = "its clients lost what they had on the GPU (CUDA error 806)"
        return [f"MPS server {dead} died: {lost}, {after}; slurm-mps logs {job.job_id} tells more"]
    if daemon.pid and not daemon.problem and not daemon.servers:
        return [f"its control daemon {daemon.pid} has no MPS server; {after}"]
    return []


def _in_fault(server: Server, daemon: DaemonView) -> str:
    """The daemon does not say which GPU it is, so all clients may be among those that were hit."""
    there = sorted({client.pid for gpu in daemon.gpus for client in gpu.clients})
    which = f" ({'process' if len(there) == 1 else 'of processes'} {', '.join(map(str, there[:8]))})" if there else ""
    return f"MPS server {server.pid} has a GPU fault and takes no programs until all that it hit have ended{which}"
