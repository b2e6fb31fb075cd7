"""What a rank and its node really have: asked of the driver, the control daemons, sysfs and the environment.

Every wait has a deadline. The driver is asked in a thread, since a call into a driver that hangs never returns.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic

from ..errors import MpsError
from ..job.verdict import JOBS
from ..node.control import DAEMON_PROGRAM, ControlDaemon
from ..node.cuda import Cuda, CudaError
from ..node.processes import run
from ..node.reading import read_text
from ..slurm.hostlist import expand_numbers, join_numbers
from . import card
from .meeting import Meeting, find_meeting, open_meeting
from .report import QUERY, DaemonReport, Evidence, RankReport, parse_daemon_answer
from .step import Step

DEFAULT_PIPE_DIRECTORY = "/tmp/nvidia-mps"  # noqa: S108 (the driver's own, for a process without the variable)
_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
_NODES = "/sys/devices/system/node"
_SET_BY_PLUGIN = "CUDA_MPS_SET_BY_SLURM"
#: What only a task of a job with MPS has. SLURM_SPANK_MPS is in tasks of sbatch's and salloc's jobs alone.
_MARKS = ("SLURM_SPANK_MPS", _SET_BY_PLUGIN, "SLURM_MPS_NODE_FAULT")


# ------------------------------------------------------------------------------------------------- the whole report


def report_node(step: Step, environment: Mapping[str, str], timeout_seconds: float) -> Evidence:
    """The part of a node's first rank: report, collect the other ranks' reports, and ask the control daemons.

    The daemons are asked while the other ranks are still there, since a daemon lists no others.
    Raises: MeetingError.
    """
    deadline = monotonic() + timeout_seconds
    with open_meeting(step) as meeting:
        ranks = [look(step, meeting, environment, timeout_seconds)]
        ranks += meeting.collect(step.node_ranks[1:], deadline)
        directories = {rank.pipe_directory for rank in ranks if not rank.pipe_problem}
        daemons = ask_daemons(sorted(directories), environment, timeout_seconds / 3)
    return Evidence(step.node, step.node_ranks, ranks, daemons, timeout_seconds)


def report_rank(step: Step, environment: Mapping[str, str], timeout_seconds: float) -> None:
    """The part of every other rank: report, and stay a client until the first rank has asked the control daemons.

    Raises: MeetingError.
    """
    meeting = find_meeting(step, monotonic() + timeout_seconds)
    meeting.put(look(step, meeting, environment, timeout_seconds))
    meeting.wait(monotonic() + 2 * timeout_seconds)


def look(step: Step, meeting: Meeting, environment: Mapping[str, str], timeout_seconds: float) -> RankReport:
    """Make a context on this rank's GPU, which stays, and report what this process has.

    The first rank that comes with a GPU finds out how large the whole of it is: a bound rank sees no other.
    Raises: MeetingError.
    """
    directory = environment.get("CUDA_MPS_PIPE_DIRECTORY", "")
    owner = owner_of(directory)

    def given(name: str) -> str:
        return environment.get(name, "")

    by_plugin = dict(word.partition("=")[::2] for word in given(_SET_BY_PLUGIN).split())
    report = RankReport(
        rank=step.rank,
        pid=os.getpid(),
        pid_namespace=os.stat("/proc/self/ns/pid").st_ino,
        pipe_directory=directory or DEFAULT_PIPE_DIRECTORY,
        pipe_problem=pipe_problem(directory),
        asked=asked_for_mps(step, environment),
        step_gpus=step_gpus(environment),
        threads=given("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"),
        memory=given("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"),
        priority=given("CUDA_MPS_CLIENT_PRIORITY"),
        set_threads=by_plugin.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", ""),
        set_memory=by_plugin.get("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT", ""),
        note_lost=owner in step.job_ids and "CUDA_MPS_PIPE_DIRECTORY" not in by_plugin,
        node_fault=given("SLURM_MPS_NODE_FAULT"),
        other_job="" if owner in step.job_ids else owner,
        cpu_numa=cpu_numa(os.sched_getaffinity(0), _NODES),
    )
    answer: SimpleQueue[RankReport] = SimpleQueue()
    libraries = given("LD_LIBRARY_PATH")
    Thread(target=lambda: answer.put(_use_gpu(report, step.local_id, libraries)), daemon=True).start()
    try:
        report = answer.get(timeout=(seconds := timeout_seconds * 0.6))  # in time for a report that says so
    except Empty:
        return replace(report, error=f"the CUDA driver did not answer within {seconds:g} s")
    if report.gpu and meeting.claim(report.gpu):
        size = _ask_card(report.gpu, meeting.path, libraries, timeout_seconds / 3)
        report = replace(report, card_multiprocessors=size)
    return report


# ------------------------------------------------------------------------------------------------------ the driver


def _use_gpu(report: RankReport, local_id: int, libraries: str) -> RankReport:
    """Add the device that a task takes which counts its node's GPUs: its local id, modulo their number."""
    try:
        cuda = Cuda(libraries)
        count = cuda.device_count()
        ordinal = local_id % count
        visible = ",".join(cuda.uuid(number) for number in range(count))
        numa = gpu_numa(cuda.pci_address(ordinal))
        report = replace(report, ordinal=ordinal, visible=visible, gpu=cuda.uuid(ordinal), gpu_numa=numa)
        report = replace(report, profile=cuda.profile(ordinal))
        device = cuda.open_device(ordinal)
    except OSError as error:
        return replace(report, error=str(error), no_driver=True)
    except CudaError as error:
        return replace(report, error=str(error))
    free, total = device.free_bytes, device.total_bytes
    return replace(report, multiprocessors=device.multiprocessors, free_bytes=free, total_bytes=total)


def _ask_card(gpu: str, empty_directory: str, libraries: str, timeout_seconds: float) -> int:
    """How many SMs a whole GPU has; 0 when that cannot be found out.

    Asks a short process that is no MPS client, since its pipe directory has no control daemon (O21).
    """
    clean = {"PATH": _PATH, "CUDA_MPS_PIPE_DIRECTORY": empty_directory, "CUDA_VISIBLE_DEVICES": gpu}
    try:
        outcome = run([sys.executable, "-I", "-S", card.__file__, libraries], clean, timeout_seconds)
    except MpsError:
        return 0
    return int(outcome.output) if outcome.status == 0 and outcome.output.isdecimal() else 0


# ----------------------------------------------------------------------------------------------- the control daemon


def pipe_problem(directory: str) -> str:
    """Why no control daemon can be reached there; empty when its socket is there, whoever listens."""
    try:
        os.stat(f"{directory or DEFAULT_PIPE_DIRECTORY}/control")
        return ""
    except PermissionError:
        reason = "may not be entered"
    except OSError:
        reason = "has no control daemon" if os.path.isdir(directory) else "does not exist"
    return f"CUDA_MPS_PIPE_DIRECTORY={directory} {reason}" if directory else "CUDA_MPS_PIPE_DIRECTORY is not set"


def owner_of(directory: str) -> str:
    """The id of the job whose pipe directory this is; empty for any other directory."""
    place = directory.removeprefix(f"{JOBS}/")
    return place.partition("/")[0] if place != directory else ""


def asked_for_mps(step: Step, environment: Mapping[str, str]) -> bool:
    """Whether anything shows that the job asked for MPS: the task's environment, or the job's state on this node."""
    own = owner_of(environment.get("CUDA_MPS_PIPE_DIRECTORY", "")) in step.job_ids
    return (
        own
        or any(name in environment for name in _MARKS)
        or any(os.path.isdir(f"{JOBS}/{job}") for job in step.job_ids)
    )


def ask_daemons(
    directories: Collection[str], environment: Mapping[str, str], timeout_seconds: float
) -> dict[str, DaemonReport]:
    """Ask the control daemons of these pipe directories, all at the same time."""
    from concurrent.futures import ThreadPoolExecutor

    if not directories:
        return {}
    with ThreadPoolExecutor(len(directories)) as pool:
        answers = pool.map(lambda directory: _ask_daemon(directory, environment, timeout_seconds), directories)
        return dict(zip(directories, answers, strict=True))


def _ask_daemon(directory: str, environment: Mapping[str, str], timeout_seconds: float) -> DaemonReport:
    """Ask a control daemon for its clients, GPUs and limits, in one go: it talks to one at a time (O40)."""
    from shutil import which

    program = which(DAEMON_PROGRAM, path=environment.get("PATH", _PATH))
    if not program:
        return DaemonReport(f"{DAEMON_PROGRAM} is not in PATH")
    try:
        daemon = ControlDaemon(program, directory, environment.get("CUDA_MPS_LOG_DIRECTORY", directory))
        return parse_daemon_answer(daemon.command(QUERY, timeout_seconds))
    except MpsError as error:
        return DaemonReport(str(error))


# ---------------------------------------------------------------------------------------------------- the machine


def step_gpus(environment: Mapping[str, str]) -> int:
    """How many GPUs the step has on this node, as Slurm tells this task; 0 when it does not.

    The lists of a bound task name its own only.
    """
    count = environment.get("SLURM_GPUS_ON_NODE", "")
    if count.isascii() and count.isdecimal():
        return int(count[:4])
    listed = environment.get("SLURM_STEP_GPUS") or environment.get("SLURM_JOB_GPUS", "")
    return len([name for name in listed.split(",") if name])


def cpu_numa(cpus: set[int], nodes_directory: str) -> str:
    """The NUMA nodes of a CPU mask, such as ``0-1``; empty where the machine does not tell."""
    found = []
    try:
        for name in os.listdir(nodes_directory):
            number = name.removeprefix("node")
            if number.isdecimal() and cpus & set(expand_numbers(read_text(f"{nodes_directory}/{name}/cpulist"))):
                found.append(int(number))
    except (OSError, ValueError):
        return ""
    return join_numbers(found)


def gpu_numa(pci_address: str) -> str:
    """The NUMA node of a GPU; empty where the machine has one only (-1) or does not tell."""
    try:
        number = read_text(f"/sys/bus/pci/devices/{pci_address}/numa_node").strip()
    except OSError:
        return ""
    return number if number.isdecimal() else ""
