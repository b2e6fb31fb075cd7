"""The verdict is the prolog's decision about a job on this node: the file that the plugin reads in every step.

    slurm-mps verdict 1
    uid 20001                                              the job's user
    status ready                                           or refused, or without, and then only a message
    daemon <pipe directory> <log directory> <limit or ->   one for all GPUs, or with `daemons per-gpu` one for each
    daemons per-gpu
    thread_percentage 25                                   what each client may use of a GPU's threads
    thread_percentage_min 0.1                              the least that the site allows a step
    memory_min 1M                                          the same for memory
    context_mib 514                                        what a context costs at 100 % of the threads
    probe <python> <script>                                finds out whether a server takes clients (task/probe.py)
    explain <script>                                       says why tasks ended badly (task/explain.py)
    clients_per_gpu 48
    compute_mode unchanged                                 where nothing keeps a program from running without MPS
    visible_devices uuid                                   or ordinal
    client_priority 1                                      where the job asked for one
    auto threads                                           what each step divides: threads, memory
    share 25                                               how much of a GPU Slurm gave the job (gres/mps)
    shards_per_gpu 4                                       for jobs of gres/shard: SLURM_SHARDS_ON_NODE has a task's
    share_memory even                                      a part of a GPU is the same part of its memory
    joined <directory>                                     for each daemon that serves other jobs, too: it lies there
    gpu <Slurm's index> <minor> <uuid> <MiB for clients> <MiB in all>
    exit 81                                                with `refused`: the exit status of the job's tasks
    end <checksum>

It lies in /run/slurm-mps/jobs/<job id>/verdict or, where nothing of the job can be kept there, in
/var/log/slurm-mps/<job id>/verdict (job/logs.py). Only root can write either. spank/verdict.c reads it, and
job/verdict_file.py for commands.
"""

from __future__ import annotations

import os

from ..config.settings import STATE_DIRECTORY
from ..node.wordfile import DamagedFileError, decode, encode
from ..record import record
from ..units import format_memory, format_thread_percentage, parse_memory, parse_thread_percentage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

VERDICT_VERSION = 1  # spank/verdict.h reads the same, and doctor compares
READY, REFUSED, WITHOUT = "ready", "refused", "without"
JOBS = f"{STATE_DIRECTORY}/jobs"
PER_GPU = "per-gpu"
#: Why a job was refused, as the exit status of its tasks: Slurm itself takes it to its database (docs/decisions/0023).
_EXIT_REFUSED, NO_GPU = 80, 81  # spank/verdict.h has both, and 88 for a step that meets no server
_EXIT_STATUSES = {
    "no_gpu": NO_GPU,
    "threads": 82,
    "memory": 83,
    "held_gpu": 84,
    "busy_gpu": 85,
    "mig": 86,
    "node_fault": 87,
}


@record
class VerdictGpu:
    """A GPU of the job: Slurm's index of it, its device node ``/dev/nvidia<minor>``, what its clients can share out."""

    slurm_index: int
    minor: int
    uuid: str
    mib_for_clients: int
    mib: int


@record
class DaemonPlace:
    """Where a control daemon is, which GPUs (UUIDs, in its own order) it serves, and what it gives each client.

    ``name`` is that of its pipe directory where each GPU has a daemon, and empty for the only one.
    ``joined_directory``: of a daemon that serves other jobs, too (job/joined.py); its limits are its clients' own.
    """

    name: str
    pipe_directory: str
    log_directory: str
    memory_bytes: int | None
    gpus: tuple[str, ...]
    joined_directory: str = ""


@record
class Verdict:
    """``ready``: the job has MPS. ``refused``: its tasks fail with the message. ``without``: they run without MPS.

    ``auto`` names what each step divides by the ranks that share a GPU: ``threads``, ``memory``. ``unguarded``: its
    programs can run without MPS. ``exit_status``: of a refused job's tasks, 0 for others. With NO_GPU a component of a
    heterogeneous job, which only the plugin knows for one, runs all the same.
    """

    status: str
    message: str = ""
    uid: int | None = None
    daemons: tuple[DaemonPlace, ...] = ()
    gpus: tuple[VerdictGpu, ...] = ()
    per_gpu: bool = False
    thread_percentage: float = 100.0
    thread_percentage_min: float = 0.1
    memory_min: str = "1M"
    context_mib: int = 0
    clients_per_gpu: int = 0
    client_priority: int | None = None
    auto: tuple[str, ...] = ()
    share_percentage: float | None = None
    shards_per_gpu: int = 0
    share_memory: bool = False
    visible_devices: str = "uuid"
    probe: tuple[str, str] = ("", "")
    explain: str = ""
    unguarded: bool = False
    exit_status: int = 0

    def encode(self) -> bytes:
        """The file that the plugin reads."""
        lines = (f"{key} {_one_line(value)}" for key, value in self.settings())
        return encode("verdict", VERDICT_VERSION, lines)

    def settings(self) -> Iterable[tuple[str, str]]:
        """Its lines, as key and value."""
        if self.uid is not None:
            yield "uid", str(self.uid)
        yield "status", self.status
        if self.status != READY:
            yield "message", self.message
            if self.exit_status:
                yield "exit", str(self.exit_status)
            return
        for daemon in self.daemons:
            limit = "-" if daemon.memory_bytes is None else format_memory(daemon.memory_bytes)
            yield "daemon", f"{daemon.pipe_directory} {daemon.log_directory} {limit}"
        yield "thread_percentage", format_thread_percentage(self.thread_percentage)
        yield "thread_percentage_min", format_thread_percentage(self.thread_percentage_min)
        yield "memory_min", self.memory_min
        yield "context_mib", str(self.context_mib)
        yield "probe", " ".join(self.probe)
        yield "explain", self.explain
        yield "clients_per_gpu", str(self.clients_per_gpu)
        yield "visible_devices", self.visible_devices
        yield from ((key, value) for key, value in self._optional() if value)
        for gpu in self.gpus:
            yield "gpu", f"{gpu.slurm_index} {gpu.minor} {gpu.uuid} {gpu.mib_for_clients} {gpu.mib}"

    def _optional(self) -> Iterable[tuple[str, str]]:
        """The lines of a ready job that are left out where their value is empty."""
        yield "daemons", PER_GPU if self.per_gpu else ""
        yield "compute_mode", "unchanged" if self.unguarded else ""
        yield "client_priority", "" if self.client_priority is None else str(self.client_priority)
        yield "share", "" if self.share_percentage is None else format_thread_percentage(self.share_percentage)
        yield "shards_per_gpu", str(self.shards_per_gpu or "")
        yield "share_memory", "even" if self.share_memory else ""
        yield from (("auto", what) for what in self.auto)
        yield from (("joined", daemon.joined_directory) for daemon in self.daemons)


def refused(message: str, reason: str = "") -> Verdict:
    """`reason`: RequestError's, or ``node_fault``."""
    return Verdict(REFUSED, message, exit_status=_EXIT_STATUSES.get(reason, _EXIT_REFUSED))


def without(message: str) -> Verdict:
    return Verdict(WITHOUT, message)


def _one_line(text: str) -> str:
    """A verdict's values are read to the end of the line; no message may start a line of its own."""
    return "".join(c if " " <= c <= "~" else "?" for c in text)[:480]


def parse_verdict(data: bytes) -> Verdict:
    """Read a verdict's file, whole, as the plugin does.

    Raises: DamagedFileError; NewerFileError.
    """
    lines = [line.partition(" ")[::2] for line in decode(data, "verdict", VERDICT_VERSION)]
    try:
        verdict = _parse(dict(lines), lines)
    except (KeyError, ValueError):
        raise DamagedFileError("the verdict is damaged") from None
    return verdict


def _parse(known: dict[str, str], lines: list[tuple[str, str]]) -> Verdict:
    """Raises: KeyError, ValueError for anything that the prolog cannot have written."""
    status = known["status"]
    uid = int(known["uid"]) if "uid" in known else None
    if status in (REFUSED, WITHOUT) and known["message"]:
        return Verdict(status, known["message"], uid, exit_status=int(known.get("exit", "0")))
    if status != READY:
        raise ValueError(status)
    gpus = tuple(_gpu(value) for key, value in lines if key == "gpu")
    daemons = [value for key, value in lines if key == "daemon"]
    joined = [value for key, value in lines if key == "joined"] or [""] * len(daemons)
    per_gpu = known.get("daemons") == PER_GPU
    uuids = tuple(gpu.uuid for gpu in gpus)
    served = tuple((uuid,) for uuid in uuids) if per_gpu else (uuids,)
    python, script = known["probe"].split(" ")
    priority = known.get("client_priority")
    if not gpus:
        raise ValueError("no GPU")
    return Verdict(
        status,
        uid=uid,
        daemons=tuple(_daemon(*words) for words in zip(daemons, served, joined, strict=True)),
        gpus=gpus,
        per_gpu=per_gpu,
        thread_percentage=parse_thread_percentage(known["thread_percentage"]),
        thread_percentage_min=parse_thread_percentage(known["thread_percentage_min"]),
        memory_min=known["memory_min"],
        context_mib=int(known["context_mib"]),
        clients_per_gpu=int(known["clients_per_gpu"]),
        client_priority=None if priority is None else int(priority),
        auto=tuple(value for key, value in lines if key == "auto"),
        share_percentage=parse_thread_percentage(known["share"]) if "share" in known else None,
        shards_per_gpu=int(known.get("shards_per_gpu", "0")),
        share_memory="share_memory" in known,
        visible_devices=known["visible_devices"],
        probe=(python, script),
        explain=known["explain"],
        unguarded="compute_mode" in known,
    )


def _gpu(words: str) -> VerdictGpu:
    index, minor, uuid, for_clients, mib = words.split(" ")
    return VerdictGpu(int(index), int(minor), uuid, int(for_clients), int(mib))


def _daemon(words: str, gpus: tuple[str, ...], joined_directory: str) -> DaemonPlace:
    pipe, log, limit = words.split(" ")
    name = os.path.basename(pipe).replace("joined-", "gpu-")
    memory = None if limit == "-" else parse_memory(limit)
    return DaemonPlace(name if name.startswith("gpu-") else "", pipe, log, memory, gpus, joined_directory)
