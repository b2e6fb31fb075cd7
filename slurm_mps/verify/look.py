"""What one rank finds out: its GPU from the driver, its clients from the control daemon, NUMA nodes from sysfs.

Every wait has a deadline. The driver is asked in a thread, since a call into a driver that hangs never returns.
"""

from __future__ import annotations

import _thread
import os
import sys

from ..errors import MpsError
from ..node.control import DAEMON_PROGRAM, ControlDaemon
from ..node.cuda import Cuda, CudaError
from ..node.processes import run
from ..record import record, replace
from ..slurm.hostlist import expand_numbers, join_numbers
from .report import QUERY, TEXT_MAX, Card, DaemonAnswer, Report, parse_daemon_answer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from .step import Step

DEFAULT_PIPE_DIRECTORY = "/tmp/nvidia-mps"  # noqa: S108 (the driver's own, for a process without the variable)
_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
_NODES = "/sys/devices/system/node"
_JOBS = "/run/slurm-mps/jobs"


@record
class _Gpu:
    """What the driver says to this process."""

    ordinal: int = 0
    visible: str = ""
    gpu: str = ""
    multiprocessors: int = 0
    free_bytes: int = 0
    total_bytes: int = 0
    gpu_numa: str = ""
    error: str = ""
    no_driver: bool = False


def look(step: Step, environment: Mapping[str, str], timeout_seconds: float) -> Report:
    """Make a context on this rank's GPU, which stays, and report what this process has."""
    gpu = _ask_driver(step.local_id, timeout_seconds)
    directory = environment.get("CUDA_MPS_PIPE_DIRECTORY", "")

    def given(name: str) -> str:
        return environment.get(name, "")[:TEXT_MAX]

    return Report(
        rank=step.rank,
        host=step.host,
        pid=os.getpid(),
        pipe_directory=(directory or DEFAULT_PIPE_DIRECTORY)[:TEXT_MAX],
        pipe_problem=pipe_problem(directory),
        asked="SLURM_SPANK_MPS" in environment,
        step_gpus=step_gpus(environment),
        threads=given("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"),
        memory=given("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"),
        set_threads=given("SLURM_MPS_ACTIVE_THREAD_PERCENTAGE"),
        set_memory=given("SLURM_MPS_PINNED_DEVICE_MEM_LIMIT"),
        other_job=other_job(directory, environment.get("SLURM_JOB_ID", "")),
        job_threads=given("SLURM_SPANK_MPS_THREADS"),
        job_memory=given("SLURM_SPANK_MPS_MEM"),
        node_fault=given("SLURM_MPS_NODE_FAULT"),
        cpu_numa=cpu_numa(os.sched_getaffinity(0), _NODES),
        **vars(gpu),
    )


# ------------------------------------------------------------------------------------------------------ the driver


def _ask_driver(local_id: int, timeout_seconds: float) -> _Gpu:
    answer: list[_Gpu] = []
    done = _thread.allocate_lock()
    done.acquire()

    def ask() -> None:
        try:
            answer.append(_use_gpu(local_id))
        finally:
            done.release()

    _thread.start_new_thread(ask, ())
    if not done.acquire(timeout=timeout_seconds):
        return _Gpu(error=f"the CUDA driver did not answer within {timeout_seconds:g} s")
    return answer[0] if answer else _Gpu(error="the CUDA driver could not be asked")


def _use_gpu(local_id: int) -> _Gpu:
    """The device that a task takes which counts its node's GPUs: its local id, modulo their number."""
    found = _Gpu()
    try:
        cuda = Cuda()
        count = cuda.device_count()
        ordinal = local_id % count
        visible = ",".join(cuda.uuid(number) for number in range(count))
        found = _Gpu(ordinal=ordinal, visible=visible, gpu=cuda.uuid(ordinal))
        found = replace(found, gpu_numa=gpu_numa(cuda.pci_address(ordinal)))
        device = cuda.open_device(ordinal)
    except OSError as error:
        return _Gpu(error=str(error)[:TEXT_MAX], no_driver=True)
    except CudaError as error:
        return replace(found, error=str(error))
    return replace(
        found,
        multiprocessors=device.multiprocessors,
        free_bytes=device.free_bytes,
        total_bytes=device.total_bytes,
    )


def ask_card(gpu: str, environment: Mapping[str, str], timeout_seconds: float) -> Card:
    """Ask a short process that is no MPS client how many SMs the whole GPU has: its pipe directory is empty (O21)."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="slurm-mps-verify-") as empty:
        kept = {name: environment[name] for name in ("LD_LIBRARY_PATH", "PYTHONPATH") if name in environment}
        clean = {"PATH": _PATH, **kept, "CUDA_MPS_PIPE_DIRECTORY": empty, "CUDA_VISIBLE_DEVICES": gpu}
        try:
            outcome = run([sys.executable, "-P", "-m", "slurm_mps.verify.card"], clean, timeout_seconds)
        except MpsError:
            return Card(gpu, 0)
    words = outcome.output.split()
    known = outcome.status == 0 and words[:1] == [gpu] and words[1].isdecimal()
    return Card(gpu, int(words[1]) if known else 0)


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


def other_job(directory: str, job_id: str) -> str:
    """The job whose pipe directory this is, if it is not this one's; empty for any other directory."""
    place = directory.removeprefix(f"{_JOBS}/")
    owner = place.partition("/")[0]
    return owner[:TEXT_MAX] if place != directory and job_id and owner != job_id else ""


def ask_daemon(directory: str, environment: Mapping[str, str], timeout_seconds: float) -> DaemonAnswer:
    """Ask a control daemon for its clients, GPUs and limits, in one go: it talks to one at a time (O40)."""
    path = environment.get("PATH", _PATH).split(":")
    programs = [f"{place}/{DAEMON_PROGRAM}" for place in path if os.access(f"{place}/{DAEMON_PROGRAM}", os.X_OK)]
    if not programs:
        return DaemonAnswer(f"{DAEMON_PROGRAM} is not in PATH", {}, "", {}, ())
    try:
        lines = ControlDaemon(programs[0], directory, environment.get("CUDA_MPS_LOG_DIRECTORY", directory)).command(
            QUERY, timeout_seconds
        )
    except MpsError as error:
        return DaemonAnswer(str(error)[:TEXT_MAX], {}, "", {}, ())
    return parse_daemon_answer(lines)


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
            if number.isdecimal() and cpus & set(expand_numbers(_read(f"{nodes_directory}/{name}/cpulist"))):
                found.append(int(number))
    except (OSError, ValueError):
        return ""
    return join_numbers(found)


def gpu_numa(pci_address: str) -> str:
    """The NUMA node of a GPU; empty where the machine has one only (-1) or does not tell."""
    try:
        number = _read(f"/sys/bus/pci/devices/{pci_address}/numa_node").strip()
    except OSError:
        return ""
    return number if number.isdecimal() else ""


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read(65536)
