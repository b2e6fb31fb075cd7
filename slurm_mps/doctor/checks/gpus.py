"""Checks of the driver, the control program, and the GPUs: their modes, and which processes are on them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from operator import itemgetter
from shutil import which

from ...config.settings import CONFIG_PATH, joins_all
from ...errors import MpsError, NodeError
from ...job.journal import Journal
from ...job.plan import CUDA_OF_ALL_USERS, refusal_of_default
from ...job.reconcile import BUSY, KEPT
from ...job.state import NodeState
from ...job.verdict import JOBS
from ...job.verdict_file import read_verdict
from ...node.control import DAEMON_PROGRAM, SERVER_PROGRAM, search, server_path, why_not_run
from ...node.listen import listener
from ...node.nvml import COMPUTE_MODES, CUDA_NEEDED, EXCLUSIVE_PROCESS, NEEDED
from ...node.processes import describe, name_of, parent_of, uid_of
from ...slurm.host import NotKnownError
from ...status.node import READY
from ...units import printable, small_number
from ..facts import CONTROL_EXTRAS, Facts
from ..finding import COMPUTE, GPU_NODE, Finding, check, fine, problem, warning

_MANY_CLIENTS_CUDA = (13, 1)
_VOLTA = (7, 0)
_PROCESSES_BRANCH = 510
_COMM_MAX = 15
_ANCESTORS_MAX = 64
_SEARCH_SECONDS = 5.0


# ---------------------------------------------------------------------------------------- driver, control program


@check(
    "driver",
    "the NVIDIA driver and every GPU answer",
    why="Each job with --mps on this node, or on that GPU, will fail. With policy.node_fault = drain the node drains.",
    where=GPU_NODE,
)
def driver(facts: Facts) -> Iterator[Finding]:
    try:
        found = facts.driver
    except NodeError as error:
        is_missing = not os.path.exists("/proc/driver/nvidia/version") and "Shared Library" in str(error)
        fix = "install the NVIDIA driver" if is_missing else "nvidia-smi; dmesg | grep -i nvrm"
        yield problem(f"NVML: {error}", fix)
        return
    for gpu in found.gpus:
        if gpu.error:
            fix = "dmesg | grep -i xid; take the node out of service"
            yield problem(f"GPU {gpu.index}: NVML: {gpu.error}", fix)
    clients = 60 if found.cuda >= _MANY_CLIENTS_CUDA else 48
    yield fine(f"driver {found.version}, CUDA {found.cuda[0]}.{found.cuda[1]}: {clients} clients of a server on a GPU")


@check(
    "driver-version",
    "driver and GPUs can do what slurm-mps offers",
    why="A job that asks for a limit which the driver does not know fails.",
    where=GPU_NODE,
)
def driver_version(facts: Facts) -> Iterator[Finding]:
    gpus, found = facts.gpus, facts.driver
    if found.cuda < CUDA_NEEDED:
        what = f"driver {found.version} (CUDA {found.cuda[0]}.{found.cuda[1]}) is too old for any MPS job"
        yield problem(what, f"a driver of {NEEDED}")
    if found.cuda < CUDA_OF_ALL_USERS and any(map(joins_all, facts.sites.values())):
        what = f'driver {found.version} has no server for all users, which gpus.joined_users = "all" needs'
        yield problem(what, 'driver 580, or gpus.joined_users = "same"')
    if 0 < found.branch < _PROCESSES_BRANCH:
        what = f"driver {found.version} does not say which processes are on a GPU"
        yield warning(what, f"driver r{_PROCESSES_BRANCH} or newer")
    old = [gpu for gpu in gpus if gpu.compute_capability and gpu.compute_capability < _VOLTA]
    if old:
        named = f"GPU {', '.join(str(gpu.index) for gpu in old)} ({old[0].name})"
        yield warning(f"{named}: older than Volta, which has 16 clients and no limits", "other GPUs for MPS")


@check(
    "control-program",
    "control program and server program are there, and know what slurm-mps asks of them",
    why="The prolog cannot start a control daemon or set its limits, or the daemon no server for its first client.",
    where=GPU_NODE,
)
def control_program(facts: Facts) -> Iterator[Finding]:
    path = facts.site.paths_control_program
    wrong = why_not_run(path)
    if wrong:
        yield problem(wrong.message, wrong.hint)
        return
    if not os.access(path, os.X_OK):
        yield problem(f"{path} is not executable", f"chmod 755 {path}")
        return
    if not which(SERVER_PROGRAM, path=server_path(path)):
        fix = "install the driver's compute utilities"
        yield problem(f"{SERVER_PROGRAM} is neither beside {path} nor in {server_path('')[1:]}", fix)
    try:
        unknown = facts.control_unknown
    except NodeError as error:
        yield problem(str(error), f"a driver of {NEEDED}")
        return
    known = [CONTROL_EXTRAS[extra] for extra in CONTROL_EXTRAS if extra not in unknown]
    yield fine(f"a daemon sets and reads back limits and priority{', and has ' if known else ''}{', '.join(known)}")


@check(
    "memory-default",
    "a job that gives no memory limit can have the site's",
    why="A job with --mps and without --mps-mem is refused, for a limit that its user did not ask for.",
    where=GPU_NODE,
)
def memory_default(facts: Facts) -> Iterator[Finding]:
    devices = [one for gpu in facts.gpus for one in (gpu.slices if gpu.mig else [(gpu.uuid, gpu.memory_bytes)])]
    uuid, size = min((one for one in devices if one[1]), key=itemgetter(1), default=("", None))
    for name, site in facts.sites.items():
        refusal = refusal_of_default(site, uuid, size)
        if refusal:
            where = f"partition.{name}." if name else ""
            yield problem(refusal, f"{CONFIG_PATH}: another {where}limits.memory.default, or none")
            return


# ------------------------------------------------------------------------------------------------------ the GPUs


@check(
    "persistence-mode",
    "the driver stays loaded when no process uses a GPU",
    why="Each job's control daemon and server wait until the driver has set the GPU up again, which takes seconds.",
    where=GPU_NODE,
)
def persistence_mode(facts: Facts) -> Iterator[Finding]:
    off = [str(gpu.index) for gpu in facts.gpus if gpu.persistence is False]
    if off:
        yield warning(f"persistence mode is off on GPU {', '.join(off)}", "systemctl enable --now nvidia-persistenced")


@check(
    "compute-mode",
    "every GPU that no MPS job holds is in a mode that programs can use",
    why="PROHIBITED lets no program in. EXCLUSIVE_PROCESS, left behind, makes the second program on the GPU fail.",
    where=GPU_NODE,
)
def compute_mode(facts: Facts) -> Iterator[Finding]:
    odd = [gpu for gpu in facts.gpus if gpu.compute_mode]
    held = _held() if odd and facts.is_root else set()
    for gpu in odd:
        what = f"GPU {gpu.index} ({gpu.uuid}) is {COMPUTE_MODES.get(gpu.compute_mode or 0, str(gpu.compute_mode))}"
        fix = f"nvidia-smi -i {gpu.index} -c 0"
        if gpu.compute_mode != EXCLUSIVE_PROCESS:
            yield problem(what, fix)
        elif not facts.is_root:
            raise NotKnownError(f"{what}, and only root sees whether a job holds it", needs_root=True)
        elif gpu.uuid not in held:
            yield warning(f"{what}, and no MPS job holds it", fix)


def _held() -> set[str]:
    """The GPUs that MPS jobs hold."""
    try:
        state = NodeState(make=False)
        return {gpu for gpu in state.ledgers.names() if state.ledgers.read(gpu).holders}
    except (FileNotFoundError, MpsError):
        return set()


@check(
    "foreign-processes",
    "only Slurm's jobs have processes on a GPU",
    why="Such a process came past Slurm, or a job left it. The next MPS job's server cannot have the GPU, and the node "
    "drains.",
    where=GPU_NODE,
)
def foreign_processes(facts: Facts) -> Iterator[Finding]:
    foreign = {gpu: [pid for pid in gpu.processes if not _is_slurms(pid)] for gpu in facts.gpus}
    if any(foreign.values()) and not facts.is_root:
        raise NotKnownError("only root sees whose processes are on the GPUs", needs_root=True)
    servers = _servers_of_jobs() if any(foreign.values()) else set()
    for gpu, found in foreign.items():
        pids = [pid for pid in found if pid not in servers]
        if pids:
            named = ", ".join(map(describe, pids[:4]))
            yield warning(f"GPU {gpu.index} ({gpu.uuid}): process {named} is of no job", f"end it: kill {pids[0]}")


def _is_slurms(pid: int) -> bool:
    """Whether a process, or one that it comes from, is root's slurmstepd or control daemon.

    A daemon that is no job's is the check other-daemon.
    """
    for _ in range(_ANCESTORS_MAX):
        parent = parent_of(pid)
        if parent is None:
            return True  # gone meanwhile
        if uid_of(pid) == 0 and name_of(pid) in ("slurmstepd", DAEMON_PROGRAM[:_COMM_MAX]):
            return True
        pid = parent
        if pid <= 1:
            return False
    return False


def _servers_of_jobs() -> set[int]:
    """The MPS servers of jobs here: one that hangs may be left when its control daemon is gone.

    A server's environment is its user's to write: it is taken for the server of a job of that user's alone.
    """
    try:
        state = NodeState(make=False)
    except (FileNotFoundError, MpsError):
        return set()
    servers = set()
    for one in search(JOBS, _SEARCH_SECONDS):
        job_id = small_number(one.pipe_directory.removeprefix(f"{JOBS}/").partition("/")[0])
        journal = _journal(state, job_id) if job_id is not None else None
        if journal and one.uid in (0, journal.uid):
            servers.add(one.process.pid)
    return servers


def _journal(state: NodeState, job_id: int) -> Journal | None:
    """The journal of a job, where it can be read: damage is the check stale-state."""
    try:
        return state.look_at_journal(job_id)
    except MpsError:
        return None


@check(
    "job-daemon",
    "every job with MPS has its control daemon",
    why="The MPS server ends with its control daemon, and its programs get CUDA error 806. Programs that the job "
    "starts from now on end at once, with a message.",
    where=COMPUTE,
)
def job_daemon(facts: Facts) -> Iterator[Finding]:
    if not facts.is_root:
        raise NotKnownError("only root can read the state", needs_root=True)
    try:
        state = NodeState(make=False)
    except FileNotFoundError:
        return
    for job_id in state.job_ids():
        gone = _without_daemon(state, job_id)
        if gone and not _is_left_over(facts, job_id):
            yield problem(
                f"job {job_id}: the control daemon in {gone} is gone",
                f"end the job: scancel {job_id}; slurm-mps logs {job_id} may say why the daemon ended",
            )


def _without_daemon(state: NodeState, job_id: int) -> str:
    """The pipe directory of a job that is up, in which no daemon listens; "" for none."""
    journal = _journal(state, job_id)
    try:
        verdict = read_verdict(job_id)
    except MpsError:
        return ""
    if not (journal and journal.ready and journal.boot_id == state.boot_id and verdict and verdict.status == READY):
        return ""
    gone = next((one.pipe_directory for one in verdict.daemons if listener(one.pipe_directory) is None), "")
    still = _journal(state, job_id) if gone else None  # its end may have come between
    return gone if still and still.ready else ""


def _is_left_over(facts: Facts, job_id: int) -> bool:
    """Whether the job is over, which is the check stale-state."""
    try:
        return any(one.thing == f"job {job_id}" and one.outcome not in (BUSY, KEPT) for one in facts.stale)
    except MpsError:
        return False


@check(
    "other-daemon",
    "only jobs have control daemons",
    why="A program whose CUDA_MPS_PIPE_DIRECTORY is not set joins the daemon in /tmp/nvidia-mps, whoever runs it. A "
    "daemon for all GPUs keeps the GPUs from each job's own daemon.",
    where=COMPUTE,
)
def other_daemon(facts: Facts) -> Iterator[Finding]:
    if not facts.is_root:
        raise NotKnownError("only root sees whose control daemons run", needs_root=True)
    for one in search("", _SEARCH_SECONDS):
        ours = (f"{JOBS}/", f"{facts.trial_directory}/")
        if one.program == DAEMON_PROGRAM and not one.pipe_directory.startswith(ours):
            where = printable(one.pipe_directory or "/tmp/nvidia-mps", 80)  # noqa: S108 - the driver's own default
            pid = one.process.pid
            yield warning(f"control daemon {describe(pid)} in {where} is of no job", f"end it: kill {pid}")
