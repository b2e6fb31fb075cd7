"""Checks of the GPUs: gres.conf, the driver, the control program, compute modes, who is on them."""

from __future__ import annotations

import glob
import os
import re
import stat
from typing import TYPE_CHECKING

from ...config.settings import CONFIG_PATH
from ...errors import MpsError
from ...job.plan import refusal_of_default
from ...job.reconcile import BUSY, KEPT
from ...job.state import NodeState
from ...job.told import read_verdict
from ...job.verdict import JOBS
from ...node.control import search
from ...node.listen import listener
from ...node.nvml import COMPUTE_MODES, EXCLUSIVE_PROCESS
from ...node.paths import others_can_write
from ...node.processes import describe, name_of, parent_of, pids, uid_of
from ...node.reading import small_number
from ...slurm.host import NotKnownError, count_gpus
from ...slurm.hostlist import expand_hosts
from ...status.node import READY
from ...units import printable
from ..facts import NoAnswerError
from ..finding import COMPUTE, GPU_NODE, check, fine, problem, warning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...job.journal import Journal
    from ...slurm.conf import ConfLine
    from ..facts import Facts
    from ..finding import Finding
    from ..gpus import GpuFacts

_NEEDED = (
    "start_server",
    "set_default_active_thread_percentage",
    "get_default_active_thread_percentage",
    "set_default_device_pinned_mem_limit",
    "get_default_device_pinned_mem_limit",
    "set_default_client_priority",
)
_FINDS_NVIDIA = ("nvml", "nvidia")  # the latter from Slurm 24.05 on
_MEMORY_LIMITS_CUDA = (11, 5)
_MANY_CLIENTS_CUDA = (13, 1)
_VOLTA = (7, 0)
_PROCESSES_BRANCH = 510
_STATIC_PARTITIONS, _PROTOCOL_3 = "sm_partition", "protocol"
_DAEMON, _SERVER = "nvidia-cuda-mps-control", "nvidia-cuda-mps-server"
_COMM_MAX = 15
_NO_GPU = 'srun --gres=gpu:1 finds no such node ("Requested node configuration is not available").'
_ANCESTORS_MAX = 64
_SEARCH_SECONDS = 5.0


# ------------------------------------------------------------------------------------------------------ gres.conf


def _gres_lines(facts: Facts) -> list[tuple[ConfLine, dict[str, str]]]:
    """The lines of gres.conf that are this node's."""
    found = []
    for line in facts.other_conf("gres.conf").lines:
        pairs = line.pairs()
        try:
            names = expand_hosts(pairs["nodename"]) if "nodename" in pairs else [facts.node_name]
        except ValueError:
            names = []
        if facts.node_name in names:
            found.append((line, pairs))
    return found


def _autodetect(facts: Facts) -> str:
    """How this node's GPUs are found; off where it is not said."""
    return next(
        (pairs["autodetect"].lower() for _, pairs in reversed(_gres_lines(facts)) if "autodetect" in pairs), "off"
    )


def _gpu_files(facts: Facts) -> list[tuple[ConfLine, str]]:
    """The device files of this node's GPUs, in the order in which Slurm counts them."""
    found = []
    for line, pairs in _gres_lines(facts):
        if pairs.get("name", "").lower() == "gpu" and "file" in pairs:
            try:
                found += [(line, path) for path in expand_hosts(pairs["file"])]
            except ValueError:
                found.append((line, pairs["file"]))
    return found


@check(
    "gres-types",
    "Slurm hands out GPUs",
    why="Without gres/gpu no job has a GPU of its own, and a prolog does not learn which.",
)
def gres_types(facts: Facts) -> Iterator[Finding]:
    if "gpu" not in facts.words("GresTypes"):
        has = facts.value("GresTypes") or "nothing"
        yield problem(f"GresTypes has {has}, and not gpu", f"{facts.where('GresTypes')}: GresTypes=gpu")


@check(
    "gres-mps",
    "Slurm's own gres/mps is not in use",
    why="It is another way of sharing GPUs among jobs, with a control daemon of its own on the same GPUs.",
)
def gres_mps(facts: Facts) -> Iterator[Finding]:
    if "mps" in facts.words("GresTypes"):
        yield problem(f"{facts.where('GresTypes')}: GresTypes has mps", "GresTypes=gpu")
    try:
        lines = facts.other_conf("gres.conf").lines
    except NotKnownError:
        return
    for line in lines:
        if line.pairs().get("name", "").lower() == "mps":
            yield problem(f"{line.place}: {line.text}", "take the line out")


@check(
    "gres-conf",
    "gres.conf names this node's GPUs by their device files, or finds them with NVML",
    why="From them Slurm has the indices that it gives the prolog, and the devices that a task may open.",
    where=GPU_NODE,
)
def gres_conf(facts: Facts) -> Iterator[Finding]:
    path = f"{facts.conf_directory}/gres.conf"
    line = f"{path}: NodeName={facts.node_name} Name=gpu File=/dev/nvidia[0-{max(0, facts.gpus_in_slurm - 1)}]"
    if not os.path.exists(path):
        yield problem(f"{path}: no such file", line)
        return
    if _autodetect(facts) in _FINDS_NVIDIA:
        return
    gpus = [(at, pairs) for at, pairs in _gres_lines(facts) if pairs.get("name", "").lower() == "gpu"]
    if not gpus:
        yield problem(f"{path} has no GPU of node {facts.node_name}", line)
    for at, pairs in gpus:
        if "file" not in pairs:
            yield problem(f"{at.place}: no File=", line)


@check(
    "gres-autodetect",
    "Slurm can find GPUs as gres.conf wants",
    why="slurmd does not find the GPUs, and does not start or offers none.",
    where=GPU_NODE,
)
def gres_autodetect(facts: Facts) -> Iterator[Finding]:
    kind = _autodetect(facts)
    where = f"{facts.conf_directory}/gres.conf has AutoDetect={kind}"
    places = facts.plugin_directories
    if kind in _FINDS_NVIDIA:
        if places and not any(os.path.exists(f"{directory}/gpu_{kind}.so") for directory in places):
            yield problem(
                f"{where}, and there is no gpu_{kind}.so in {places[0]}",
                "AutoDetect=off, with File= lines; or a Slurm that was built with it",
            )
    elif kind != "off":
        yield problem(f"{where}, which finds no NVIDIA GPU", "AutoDetect=nvml, or off with File= lines")


@check(
    "gres-files",
    "the device files that gres.conf names are there",
    why="slurmd does not start, or offers fewer GPUs.",
    where=GPU_NODE,
)
def gres_files(facts: Facts) -> Iterator[Finding]:
    for line, path in _gpu_files(facts):
        try:
            is_device = stat.S_ISCHR(os.stat(path).st_mode)
        except OSError as error:
            yield problem(f"{line.place}: {path}: {error.strerror}", "nvidia-smi makes them; or mend the line")
            continue
        if not is_device:
            yield problem(f"{line.place}: {path} is no device", "mend the line")


def _driver_gpus(facts: Facts) -> tuple[GpuFacts, ...]:
    """Raises: NotKnownError; that the driver does not answer is another finding."""
    try:
        return facts.driver.gpus
    except MpsError:
        raise NotKnownError("the NVIDIA driver does not answer") from None


@check(
    "gres-order",
    "Slurm counts the GPUs as the driver does",
    why="The prolog takes Slurm's index for NVML's: in another order it starts MPS on another job's GPU.",
    where=GPU_NODE,
)
def gres_order(facts: Facts) -> Iterator[Finding]:
    gpus = _driver_gpus(facts)
    if _autodetect(facts) in _FINDS_NVIDIA:
        return
    for index, (line, path) in enumerate(_gpu_files(facts)):
        digits = re.search(r"(\d+)$", path)
        if not digits or index >= len(gpus) or gpus[index].minor is None:
            continue
        if gpus[index].minor != int(digits[1]):
            right = f"/dev/nvidia{gpus[index].minor}"
            yield problem(
                f"{line.place}: Slurm's GPU {index} is {path}, the driver's is {right} ({gpus[index].uuid})",
                "list the files in the order of nvidia-smi -L, with their minor numbers",
            )


@check(
    "gres-uuid",
    "a UUID in gres.conf is that of its device file",
    why="After a card was changed Slurm hands out one GPU by its file and another by its UUID.",
    where=GPU_NODE,
)
def gres_uuid(facts: Facts) -> Iterator[Finding]:
    by_file = {f"/dev/nvidia{gpu.minor}": gpu.uuid for gpu in _driver_gpus(facts)}
    for line, pairs in _gres_lines(facts):
        given, path = pairs.get("uniqueid", ""), pairs.get("file", "")
        if given.startswith("GPU-") and path in by_file and by_file[path] != given:
            yield problem(f"{line.place}: {path} is {by_file[path]}, not {given}", f"UniqueId={by_file[path]}")


@check(
    "gpu-count",
    "slurm.conf gives this node the GPUs that it has",
    why="Slurm hands out GPUs that are not there, or leaves some idle.",
    where=COMPUTE,
)
def gpu_count(facts: Facts) -> Iterator[Finding]:
    given, node = facts.gpus_in_slurm, facts.node_name
    if not given:
        devices = glob.glob("/dev/nvidia[0-9]*")
        if devices:
            what = f"slurm.conf gives node {node} no GPU, and it has {', '.join(sorted(devices))}"
            yield warning(what, f"slurm.conf: NodeName={node} ... Gres=gpu:{len(devices)}", _NO_GPU)
        elif "gpu" in facts.words("GresTypes") and not any(
            count_gpus(pairs.get("gres", "")) for _, pairs in facts.conf.records("NodeName")
        ):
            what = "slurm.conf has GresTypes=gpu, and gives no node a GPU"
            yield warning(what, "slurm.conf: NodeName=... Gres=gpu:N, on the line of each node with GPUs", _NO_GPU)
        return
    have = len(_driver_gpus(facts))
    if given > have:
        yield problem(f"slurm.conf: Gres=gpu:{given} for node {node}, which has {have}", f"Gres=gpu:{have}")
    elif given < have:
        yield warning(f"slurm.conf: Gres=gpu:{given} for node {node}, which has {have}", f"Gres=gpu:{have}")


# ---------------------------------------------------------------------------------------- driver, control program


@check(
    "driver",
    "the NVIDIA driver answers",
    why="Every job that asks for MPS here meets a fault of the node.",
    where=GPU_NODE,
)
def driver(facts: Facts) -> Iterator[Finding]:
    try:
        found = facts.driver
    except NoAnswerError as error:
        yield problem(f"{error}: it may hang", "nvidia-smi; dmesg | grep -i nvrm")
        return
    except MpsError as error:
        yield problem(f"NVML: {error}", "nvidia-smi; dmesg | grep -i nvrm")
        return
    clients = 60 if found.cuda >= _MANY_CLIENTS_CUDA else 48
    yield fine(f"driver {found.version}, CUDA {found.cuda[0]}.{found.cuda[1]}: {clients} clients of a server on a GPU")


@check(
    "driver-version",
    "driver and GPUs can do what slurm-mps offers",
    why="Limits that a driver does not know cannot be given, and a job that asks for one fails.",
    where=GPU_NODE,
)
def driver_version(facts: Facts) -> Iterator[Finding]:
    gpus = _driver_gpus(facts)
    found = facts.driver
    cuda = f"{found.cuda[0]}.{found.cuda[1]}"
    if found.cuda < _MEMORY_LIMITS_CUDA:
        yield problem(
            f"driver {found.version} speaks CUDA {cuda}, which has no --mps-mem", "a driver of CUDA 11.5 or newer"
        )
    if 0 < found.branch < _PROCESSES_BRANCH:
        yield warning(f"driver {found.version} does not tell who is on a GPU", f"driver r{_PROCESSES_BRANCH} or newer")
    old = [gpu for gpu in gpus if gpu.compute_capability and gpu.compute_capability < _VOLTA]
    if old:
        named = f"GPU {', '.join(str(gpu.index) for gpu in old)} ({old[0].name})"
        yield warning(f"{named}: older than Volta, which has 16 clients and no limits", "other GPUs for MPS")


@check(
    "control-program",
    "control program and server program are there, and root's",
    why="No control daemon starts, or no server for its first client; root runs them.",
    where=GPU_NODE,
)
def control_program(facts: Facts) -> Iterator[Finding]:
    path = facts.site.paths_control_program
    server = f"{os.path.dirname(path)}/{_SERVER}"
    for program in (path, server) if os.path.exists(path) else (path,):
        if not os.path.exists(program):
            yield problem(
                f"{program}: no such file", "install the driver's compute utilities, or set paths.control_program"
            )
        elif not os.stat(program).st_mode & stat.S_IXUSR:
            yield problem(f"{program} is not executable", f"chmod 755 {program}")
        elif others_can_write(program):
            yield problem(
                f"{others_can_write(program)} can be written by others than root", "chown root: and chmod go-w it"
            )


@check(
    "control-commands",
    "the control program knows the commands that slurm-mps sends",
    why="It answers what it does not know with exit 0; the limit is then read back, missed, and the job fails.",
    where=GPU_NODE,
)
def control_commands(facts: Facts) -> Iterator[Finding]:
    if not os.access(facts.site.paths_control_program, os.X_OK):
        raise NotKnownError(f"{facts.site.paths_control_program} cannot be run")
    try:
        usage = facts.control_help
    except NotKnownError:
        raise
    except MpsError as error:
        yield problem(str(error), f"{facts.site.paths_control_program} -h")
        return
    unknown = [command for command in _NEEDED if command not in usage]
    if unknown:
        yield problem(
            f"{facts.site.paths_control_program} does not know {', '.join(unknown)}", "a driver of CUDA 11.5 or newer"
        )
        return
    more = [name for name, word in (("static partitions", _STATIC_PARTITIONS), ("v3", _PROTOCOL_3)) if word in usage]
    yield fine(f"limits and priority{''.join(f', {name}' for name in more)}")


@check(
    "memory-default",
    "a job that gives no memory limit can have the site's",
    why="Each job with --mps that does not give --mps-mem itself is refused, for a limit that it never asked for.",
    where=GPU_NODE,
)
def memory_default(facts: Facts) -> Iterator[Finding]:
    fix = f"{CONFIG_PATH}: another limits.memory.default, or none"
    said = refusal_of_default(facts.site)
    if not said:
        sizes = {gpu.memory_bytes: gpu for gpu in _driver_gpus(facts) if gpu.memory_bytes}
        if sizes:
            smallest = sizes[min(sizes)]
            said = refusal_of_default(facts.site, smallest.uuid, smallest.memory_bytes)
    if said:
        yield problem(said, fix)


# ------------------------------------------------------------------------------------------------------ the GPUs


@check(
    "gpu-answers",
    "every GPU answers",
    why="A GPU that fell off the bus fails each job that it is given to.",
    where=GPU_NODE,
)
def gpu_answers(facts: Facts) -> Iterator[Finding]:
    for gpu in _driver_gpus(facts):
        if gpu.error:
            yield problem(f"GPU {gpu.index}: NVML: {gpu.error}", "dmesg | grep -i xid; take the node out of service")


@check(
    "persistence-mode",
    "the driver stays loaded when nobody uses a GPU",
    why="Each job's control daemon and server wait until the driver has set the GPU up again, seconds each time.",
    where=GPU_NODE,
)
def persistence_mode(facts: Facts) -> Iterator[Finding]:
    off = [str(gpu.index) for gpu in _driver_gpus(facts) if gpu.persistence is False]
    if off:
        yield warning(f"persistence mode is off on GPU {', '.join(off)}", "systemctl enable --now nvidia-persistenced")


@check(
    "mig",
    "no GPU is in MIG mode",
    why="slurm-mps serves whole GPUs: a job that asks for MPS on a part of one is refused.",
    where=GPU_NODE,
)
def mig(facts: Facts) -> Iterator[Finding]:
    on = [str(gpu.index) for gpu in _driver_gpus(facts) if gpu.mig]
    if on:
        yield warning(f"GPU {', '.join(on)}: MIG mode is on", "keep MPS jobs off this node, or nvidia-smi -mig 0")


@check(
    "compute-mode",
    "every GPU that no MPS job holds is in a mode that programs can use",
    why="PROHIBITED lets nobody in; EXCLUSIVE_PROCESS, left behind, makes the second program on the GPU fail.",
    where=GPU_NODE,
)
def compute_mode(facts: Facts) -> Iterator[Finding]:
    odd = [gpu for gpu in _driver_gpus(facts) if gpu.compute_mode]
    held = _held(facts) if odd else set()
    for gpu in odd:
        name = COMPUTE_MODES.get(gpu.compute_mode or 0, str(gpu.compute_mode))
        fix = f"nvidia-smi -i {gpu.index} -c 0"
        if gpu.compute_mode != EXCLUSIVE_PROCESS:
            yield problem(f"GPU {gpu.index} ({gpu.uuid}) is {name}", fix)
        elif held is None:
            raise NotKnownError(
                f"GPU {gpu.index} is {name}, and only root sees whether a job holds it", needs_root=True
            )
        elif gpu.uuid not in held:
            yield warning(f"GPU {gpu.index} ({gpu.uuid}) is {name}, and no MPS job holds it", fix)


def _held(facts: Facts) -> set[str] | None:
    """The GPUs that MPS jobs hold; None for those who may not know."""
    if not facts.is_root:
        return None
    try:
        state = NodeState(make=False)
        return {gpu for gpu in state.ledgers.names() if state.ledgers.read(gpu).holders}
    except (FileNotFoundError, MpsError):
        return set()


@check(
    "foreign-processes",
    "nobody is on a GPU but Slurm's jobs",
    why="Who came past Slurm, or was left by a job, keeps the next MPS job's server from its GPU, and the node drains.",
    where=GPU_NODE,
)
def foreign_processes(facts: Facts) -> Iterator[Finding]:
    for gpu in _driver_gpus(facts):
        foreign = [pid for pid in gpu.processes if not _is_slurms(pid)]
        if foreign:
            foreign = _but_servers(facts, foreign)
        if foreign:
            named = ", ".join(map(describe, foreign[:4]))
            yield warning(f"GPU {gpu.index} ({gpu.uuid}): process {named} is of no job", f"end it: kill {foreign[0]}")


def _is_slurms(pid: int) -> bool:
    """Whether a process, or one that it comes from, is root's slurmstepd or control daemon.

    Daemons that are no job's are another finding.
    """
    for _ in range(_ANCESTORS_MAX):
        parent = parent_of(pid)
        if parent is None:
            return True  # gone meanwhile
        if uid_of(pid) == 0 and name_of(pid) in ("slurmstepd", _DAEMON[:_COMM_MAX]):
            return True
        pid = parent
        if pid <= 1:
            return False
    return False


def _but_servers(facts: Facts, foreign: list[int]) -> list[int]:
    """Those that are no job's MPS server: one that hangs may be left when its control daemon is gone.

    A server's environment is its user's to write: it is taken for the server of a job of that user's alone.
    """
    if not facts.is_root:
        if any(_runs(pid, _SERVER) for pid in foreign):
            raise NotKnownError("only root sees whose MPS servers are on the GPUs", needs_root=True)
        return foreign
    try:
        state = NodeState(make=False)
    except (FileNotFoundError, MpsError):
        return foreign
    servers = set()
    for one in search(JOBS, _SEARCH_SECONDS):
        job_id = small_number(one.pipe_directory.removeprefix(f"{JOBS}/").partition("/")[0])
        journal = _journal(state, job_id) if job_id is not None else None
        if journal and one.uid in (0, journal.uid):
            servers.add(one.process.pid)
    return [pid for pid in foreign if pid not in servers]


def _journal(state: NodeState, job_id: int) -> Journal | None:
    """What is kept of a job, where it can be read: damage is another finding."""
    try:
        return state.look_at_journal(job_id)
    except MpsError:
        return None


@check(
    "job-daemon",
    "every job with MPS has its control daemon",
    why="Its MPS server goes with it, and programs that had one get CUDA error 806; those that the job starts from now "
    "on end at once, with a message.",
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
                f"end the job: scancel {job_id}; slurm-mps logs {job_id} may say what became of it",
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
    """Whether the job is over, which is another finding."""
    try:
        found = facts.stale
    except MpsError:
        return False
    return any(one.thing == f"job {job_id}" and one.outcome not in (BUSY, KEPT) for one in found)


@check(
    "other-daemon",
    "no control daemon runs but those of jobs",
    why="A program whose CUDA_MPS_PIPE_DIRECTORY is not set joins whoever's daemon is in /tmp/nvidia-mps; and a daemon "
    "for all GPUs is in the way of each job's own.",
    where=COMPUTE,
)
def other_daemon(facts: Facts) -> Iterator[Finding]:
    if not facts.is_root:
        if any(_runs(pid, _DAEMON) for pid in pids()):
            raise NotKnownError("only root sees whose control daemons these are", needs_root=True)
        return
    for one in search("", _SEARCH_SECONDS):
        if one.program == _DAEMON and not one.pipe_directory.startswith(f"{JOBS}/"):
            where = printable(one.pipe_directory or "/tmp/nvidia-mps", 80)  # noqa: S108 - the driver's own default
            pid = one.process.pid
            yield warning(f"control daemon {describe(pid)} in {where} is of no job", f"end it: kill {pid}")


def _runs(pid: int, program: str) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
            return os.path.basename(file.read(4096).partition("\0")[0]) == program
    except OSError:
        return False
