"""The plan of a job: JobRequest + SiteConfig + the job's GPUs -> Plan. Pure; a plan can be printed instead of run."""

from __future__ import annotations

import os
import sys

from ..config.settings import SiteConfig, joins_all, memory_bytes
from ..errors import NodeError, RequestError
from ..node.control import ControlDaemon, Limits
from ..node.nvml import DEFAULT, EXCLUSIVE_PROCESS, Gpu
from ..record import record, replace
from ..units import GPUS_MAX, MIB, describe_memory, format_memory
from .actions import (
    WHOLE_JOB,
    AdmitUser,
    HoldGpu,
    JobDaemon,
    MakeDirectories,
    SetLimits,
    StartDaemons,
    StartServers,
    gpu_daemon_name,
)
from .joined import JoinGpu, JoinGpus, link_name
from .joined_daemon import daemon_path, log_path
from .ledger import JOINED, JOINED_ALL, SEPARATE, WHOLE
from .request import PER_GPU, PER_NODE
from .verdict import READY, DaemonPlace, Verdict, VerdictGpu

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeVar

    from .actions import Action, JobOnNode
    from .request import JobRequest

    T = TypeVar("T")

# A context costs 514 MiB at 100 % and 145 MiB at 25 % of an H200's threads (O15): so many parts of the whole cost at
# 0 %, and the rest in proportion to the threads. The plugin reckons the same for a step (spank/limits.c).
_CONTEXT_FIXED_PARTS, _CONTEXT_PARTS = 22, 514
#: What the plugin runs: to see whether a server takes clients, and to say why tasks ended badly.
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PROBE = (sys.executable, f"{_PACKAGE}/task/probe.py")
_EXPLAIN = f"{_PACKAGE}/task/explain.py"
_DRIVER_MIB = 640  # what the driver keeps of a GPU that NVML calls free: 616 on an H200
CUDA_OF_ALL_USERS = (13, 0)  #: of driver 580, whose control daemon has a server for all users (O74, O96)
_SERVER_MIB = 128  # 73 MiB for an idle server on an H200 (O44), and some for what it needs as it goes


@record
class Plan:
    """The actions for one job, in order, and the verdict for its tasks when they are done.

    ``slurm_indices`` are Slurm's numbers of the ``gpus``, in the same order.
    """

    gpus: tuple[Gpu, ...]
    slurm_indices: tuple[int, ...]
    daemons: tuple[JobDaemon, ...]
    clients_per_gpu: int
    request: JobRequest
    config: SiteConfig
    actions: tuple[Action, ...]

    def running(self, job: JobOnNode) -> list[ControlDaemon]:
        """The plan's daemons, as the job's tasks reach them."""
        if self.config.gpus_sharing != JOINED:
            return [job.daemon(one.name) for one in self.daemons]
        here, config = job.journal.directory.path, job.config
        return [
            ControlDaemon(config.paths_control_program, f"{here}/{one.name}", log_path(one.gpus[0], config))
            for one in self.daemons
        ]

    def verdict(self, running: Sequence[ControlDaemon]) -> Verdict:
        """The verdict for the job's tasks; `running` are the plan's daemons.

        GPUs stand in the daemon's order, which is PCI order (O19). One daemon serves all of them, or each its own in
        the same order.
        """
        auto = (("threads", self.request.auto_threads), ("memory", self.request.auto_memory))
        limits, joins = self.daemons[0].limits, self.config.gpus_sharing == JOINED
        return Verdict(
            READY,
            daemons=tuple(_place(*one, joins) for one in zip(running, self.daemons, strict=True)),
            gpus=tuple(
                VerdictGpu(index, gpu.minor, gpu.uuid, _for_clients(gpu, self.config), gpu.memory_bytes // MIB)
                for index, gpu in zip(self.slurm_indices, self.gpus, strict=True)
            ),
            per_gpu=self.request.daemons == PER_GPU or joins,
            thread_percentage=limits.thread_percentage,
            thread_percentage_min=self.config.limits_thread_percentage_min,
            memory_min=self.config.limits_memory_min,
            context_mib=self.config.limits_memory_context_mib,
            clients_per_gpu=self.clients_per_gpu,
            client_priority=limits.client_priority,
            auto=tuple(what for what, is_asked in auto if is_asked),
            share_percentage=self.request.share_percentage,
            shards_per_gpu=self.config.gpus_shards_per_gpu,
            share_memory=_divides_share(self.request, self.config),
            visible_devices=self.config.gpus_client_visible_devices,
            probe=_PROBE,
            explain=_EXPLAIN,
            unguarded=self.config.gpus_compute_mode == "unchanged",
        )


def _place(daemon: ControlDaemon, planned: JobDaemon, joins: bool) -> DaemonPlace:
    name = "" if planned.name == WHOLE_JOB else planned.name.replace("joined-", "gpu-")
    directories = daemon.pipe_directory, daemon.log_directory
    joined_directory = daemon_path(planned.gpus[0]) if joins else ""
    return DaemonPlace(name, *directories, planned.limits.memory_bytes, planned.gpus, joined_directory)


def _for_clients(gpu: Gpu, config: SiteConfig) -> int:
    """How many MiB of a GPU its clients can share out; what their contexts cost counts against their limits (O15).

    Where other jobs may be on the GPU it is a part of the whole, whatever they use at the moment.
    """
    is_alone = config.gpus_sharing == "refuse"
    mib = gpu.free_bytes // MIB if is_alone else gpu.memory_bytes // MIB - _DRIVER_MIB
    return max(0, mib - max(_SERVER_MIB, config.limits_memory_context_mib))


def _clients_per_gpu(gpus: tuple[Gpu, ...], config: SiteConfig) -> int:
    """How many client contexts a server takes on a GPU (O42, M5), and on a MIG slice in proportion to its part."""
    if gpus[0].profile:
        return min(max(1, (config.gpus_clients_max or 48) * part // of) for part, of in (gpu.parts for gpu in gpus))
    if config.gpus_clients_max:
        return config.gpus_clients_max
    if min(gpu.compute_capability for gpu in gpus) < (7, 0):
        return 16
    return 60 if gpus[0].cuda_version >= (13, 1) else 48


def _thread_percentage(request: JobRequest, config: SiteConfig) -> float:
    percent, share = request.thread_percentage, request.share_percentage
    low, high = config.limits_thread_percentage_min, config.limits_thread_percentage_max
    if share is not None and share < low:
        raise RequestError(
            f"--gres=mps gives it {share:g} % of a GPU: this site allows {low:g} and more", reason="threads"
        )
    if request.auto_threads:
        return high if share is None else min(high, share)
    if percent is None:
        return config.limits_thread_percentage_default if share is None else min(high, share)
    if share is not None and percent > share:
        raise RequestError(
            f"--mps-threads={percent:g} is more than --gres=mps gives the job of a GPU ({share:g} %)",
            hint=f"ask for --mps-threads={share:g} or less, or for a larger part",
            reason="threads",
        )
    if not low <= percent <= high:
        raise RequestError(f"--mps-threads={percent:g}: this site allows {low:g} to {high:g}", reason="threads")
    return percent


def _context_bytes(percent: float, config: SiteConfig) -> int:
    """What a context costs of a client's limit, before the program has allocated anything."""
    parts = _CONTEXT_FIXED_PARTS * 1000 + (_CONTEXT_PARTS - _CONTEXT_FIXED_PARTS) * round(percent * 10)
    return config.limits_memory_context_mib * parts // (_CONTEXT_PARTS * 1000) * MIB


def refusal_of_default(config: SiteConfig, gpu: str = "", gpu_bytes: int | None = None) -> str:
    """Why a job that gives no limit of its own is refused for the site's; "" if it is not.

    `gpu` is the UUID of the GPU of so many bytes; without, what the configuration alone tells.
    """
    limit = memory_bytes(config.limits_memory_default)
    if limit is None:
        return ""
    asked, percent = _default_word(limit), config.limits_thread_percentage_default
    refused = _too_much(asked, limit, gpu, gpu_bytes) if gpu_bytes is not None else ""
    return refused or _too_little(asked, limit, percent, config)


def _default_word(limit: int) -> str:
    return f"the site's default limit (limits.memory.default in mps.toml), {format_memory(limit)},"


def _too_much(asked: str, limit: int, gpu: str, gpu_bytes: int) -> str:
    return f"{asked} is more than {gpu} has ({describe_memory(gpu_bytes)})" if limit > gpu_bytes else ""


def _too_little(asked: str, limit: int, percent: float, config: SiteConfig) -> str:
    context = _context_bytes(percent, config)
    if limit > context:
        return ""
    return (
        f"{asked} is less than a CUDA context costs with {percent:g} % of the threads "
        f"(about {describe_memory(context)})"
    )


def _checked_limit(
    limit: int, smallest: Gpu, percent: float, config: SiteConfig, gpu_word: str, *, by_default: bool = False
) -> int:
    """A memory limit in bytes that a client of this GPU can have; `by_default` when the job did not ask for it."""
    asked = _default_word(limit) if by_default else f"--mps-mem={gpu_word}{format_memory(limit)}"
    refused = _too_much(asked, limit, smallest.called, smallest.memory_bytes)
    if refused:
        most = format_memory(smallest.memory_bytes // MIB * MIB)
        hint = f"ask for at most {most}"
        hint += ", or leave it out for no limit" if config.limits_memory_default == "none" else ""
        raise RequestError(refused, hint=f"give --mps-mem={most} or less" if by_default else hint, reason="memory")
    refused = _too_little(asked, limit, percent, config)
    if refused:
        least = format_memory(_context_bytes(percent, config))
        hint = f"give --mps-mem with more than {least}" if by_default else f"ask for more than {least}"
        raise RequestError(refused, hint=hint, reason="memory")
    low, high = memory_bytes(config.limits_memory_min), memory_bytes(config.limits_memory_max)
    if low is not None and limit < low:
        raise RequestError(f"{asked}: this site allows {config.limits_memory_min} and more", reason="memory")
    if high is not None and limit > high:
        raise RequestError(f"{asked}: this site allows at most {config.limits_memory_max}", reason="memory")
    return limit


def _divides_share(request: JobRequest, config: SiteConfig) -> bool:
    """Whether a part of a GPU means the same part of its memory, for all processes of the job together."""
    says = request.memory_limit_bytes is not None or request.memory_by_gpu or request.auto_memory
    may_have_part = request.share_percentage is not None or config.gpus_shards_per_gpu > 0
    return config.limits_memory_of_share == "even" and may_have_part and not says


def _most_memory(gpu: Gpu, config: SiteConfig) -> int | None:
    """What the site lets a client have of a GPU at most; None for all of it."""
    high = memory_bytes(config.limits_memory_max)
    return None if high is None else min(high, gpu.memory_bytes // MIB * MIB)


def _memory_limit(
    request: JobRequest, config: SiteConfig, gpus: tuple[Gpu, ...], percent: float, number: int
) -> int | None:
    """The limit of the daemon that serves these GPUs, the first of which is the job's `number`-th."""
    smallest = min(gpus, key=lambda gpu: gpu.memory_bytes)
    own = dict(request.memory_by_gpu).get(number)
    if own is not None:
        return _checked_limit(own, smallest, percent, config, f"{number}:")
    if request.auto_memory:
        return _most_memory(smallest, config)
    if request.memory_limit_bytes is not None:
        return _checked_limit(request.memory_limit_bytes, smallest, percent, config, "")
    if request.share_percentage is not None and _divides_share(request, config):
        return _memory_of_share(request.share_percentage, smallest, percent, config)
    limit = memory_bytes(config.limits_memory_default)
    if limit is None:
        return _most_memory(smallest, config) if joins_all(config) else None
    return _checked_limit(limit, smallest, percent, config, "", by_default=True)


def _memory_of_share(share: float, gpu: Gpu, percent: float, config: SiteConfig) -> int | None:
    """What one client may have of a GPU of which its job has a part: all of that part. None for a whole GPU."""
    if share >= 100:
        return None
    limit = int(_for_clients(gpu, config) * share / 100) * MIB
    refused = _too_little(
        f"--gres=mps gives it {share:g} % of the memory, {format_memory(limit)}, which", limit, percent, config
    )
    if refused:
        raise RequestError(refused, hint="ask for a larger part", reason="memory")
    high = memory_bytes(config.limits_memory_max)
    return limit if high is None else min(high, limit)


def _check_gpu_numbers(request: JobRequest, count: int) -> None:
    beyond = [number for number, _ in request.memory_by_gpu if number >= count]
    if beyond:
        has = "one GPU on this node, which is 0" if count == 1 else f"{count} GPUs on this node, 0 to {count - 1}"
        raise RequestError(f"--mps-mem has a limit for GPU {beyond[0]}, but this job has {has}", reason="memory")


def _served(request: JobRequest, config: SiteConfig, gpus: tuple[T, ...]) -> tuple[tuple[str, tuple[T, ...]], ...]:
    """The job's control daemons by name, and which of its GPUs each serves."""
    if config.gpus_sharing == JOINED:
        return tuple((link_name(number), (gpu,)) for number, gpu in enumerate(gpus))
    if request.daemons == PER_GPU:
        return tuple((gpu_daemon_name(number), (gpu,)) for number, gpu in enumerate(gpus))
    return ((WHOLE_JOB, gpus),)


def _daemons(request: JobRequest, config: SiteConfig, gpus: tuple[Gpu, ...]) -> tuple[JobDaemon, ...]:
    percent = _thread_percentage(request, config)
    return tuple(
        JobDaemon(
            name=name,
            gpus=tuple(gpu.uuid for gpu in its),
            limits=Limits(percent, _memory_limit(request, config, its, percent, number), request.client_priority),
        )
        for number, (name, its) in enumerate(_served(request, config, gpus))
    )


def _compute_mode(way: str, config: SiteConfig) -> int | None:
    """The compute mode that a job's GPUs need: one server to a GPU, or several."""
    if config.gpus_compute_mode == "unchanged":
        return None
    return DEFAULT if way == SEPARATE else EXCLUSIVE_PROCESS


def first_actions(request: JobRequest, config: SiteConfig, uuids: tuple[str, ...]) -> tuple[Action, ...]:
    """The actions that need to know no more than which GPUs the job has (in PCI order): make_plan()'s begin with them.

    Empty where the GPUs are not known, or where make_plan() would refuse them.
    """
    if not 0 < len(uuids) <= GPUS_MAX or config.gpus_sharing == JOINED or _has_refused_part(request, config):
        return ()
    served = _served(request, config, uuids)
    way = SEPARATE if config.gpus_sharing == "separate" else WHOLE
    return (
        *(HoldGpu(uuid, _compute_mode(way, config), way) for uuid in uuids),
        MakeDirectories(tuple(name for name, _ in served)),
        StartDaemons(served),
    )


def _has_refused_part(request: JobRequest, config: SiteConfig) -> bool:
    """Whether Slurm gave the job a part of a GPU where the site gives MPS jobs whole ones."""
    return request.share_percentage is not None and config.gpus_sharing == "refuse"


def _on_slices(request: JobRequest, config: SiteConfig, gpus: tuple[Gpu, ...]) -> tuple[JobRequest, SiteConfig]:
    """What holds where the job's GPUs are MIG slices (docs/decisions/0025): a daemon and one job for each, by UUID.

    There is no compute mode to set. Raises: RequestError.
    """
    if not all(gpu.profile for gpu in gpus):
        raise RequestError(
            "it has a whole GPU and a MIG slice on this node, and a program can use one kind",
            hint="ask for one kind",
            reason="mig",
        )
    if request.share_percentage is not None:
        raise RequestError("--gres=mps gives it a part of a MIG slice, which has one job at a time", reason="mig")
    if len(gpus) > 1 and request.daemons == PER_NODE:
        raise RequestError(
            f"--mps=per-node: its {len(gpus)} MIG slices on this node need a control daemon each",
            hint="leave it out, or ask for --mps=per-gpu",
            reason="per_node",
        )
    several = PER_GPU if len(gpus) > 1 else request.daemons
    alone = {"gpus_sharing": "refuse", "gpus_compute_mode": "unchanged", "gpus_client_visible_devices": "uuid"}
    return replace(request, daemons=several), replace(config, **alone)


def make_plan(request: JobRequest, config: SiteConfig, gpus: tuple[Gpu, ...]) -> Plan:
    """Decide what the job gets.

    Raises: RequestError when it cannot have what it asks; NodeError when Slurm named one GPU twice.
    """
    if not gpus:
        raise RequestError(
            "this job has no GPU on this node", hint="ask for one, such as --gres=gpu:1", reason="no_gpu"
        )
    if len(gpus) > GPUS_MAX:
        raise NodeError(f"Slurm gave the job {len(gpus)} GPUs on this node; slurm-mps serves {GPUS_MAX}")
    numbered = zip(gpus, request.slurm_indices or tuple(gpu.index for gpu in gpus), strict=True)
    gpus, slurm_indices = zip(*sorted(numbered, key=lambda one: (one[0].index, one[0].slice_index)), strict=True)
    if any(gpu.profile for gpu in gpus):
        request, config = _on_slices(request, config, gpus)
    if _has_refused_part(request, config):
        raise RequestError(
            f"--gres=mps gives it {request.share_percentage:g} % of a GPU, and this site gives MPS jobs whole ones",
            hint=f"ask for --gres=gpu:1 --mps-threads={request.share_percentage:g}, or your admin about gpus.sharing",
            reason="site",
        )
    uuids = tuple(gpu.uuid for gpu in gpus)
    if len(set(uuids)) < len(uuids):
        raise NodeError(f"Slurm names the same GPU twice: {', '.join(request.gpus)}")
    _check_gpu_numbers(request, len(gpus))
    if config.gpus_sharing == JOINED and len(gpus) > 1 and request.daemons != PER_GPU:
        raise RequestError(
            f"each of its {len(gpus)} GPUs on this node has a control daemon of its own, which other jobs use, too",
            hint="ask for --mps=per-gpu, and bind each task to one GPU (--gpus-per-task=1)",
            reason="per_node",
        )
    if joins_all(config) and gpus[0].cuda_version < CUDA_OF_ALL_USERS:
        raise RequestError(
            'this site joins jobs of all users (gpus.joined_users = "all"), for which this node has too old a driver',
            hint="tell your admin: it needs driver 580",
            reason="site",
        )
    daemons = _daemons(request, config, gpus)
    return Plan(
        gpus=gpus,
        slurm_indices=slurm_indices,
        daemons=daemons,
        clients_per_gpu=_clients_per_gpu(gpus, config),
        request=request,
        config=config,
        actions=_joining(request, config, gpus, daemons)
        if config.gpus_sharing == JOINED
        else (
            *first_actions(request, config, uuids),
            SetLimits(daemons),
            AdmitUser(request.uid),
            StartServers(request.uid, tuple(daemon.name for daemon in daemons)),
        ),
    )


def _joining(
    request: JobRequest, config: SiteConfig, gpus: tuple[Gpu, ...], daemons: tuple[JobDaemon, ...]
) -> tuple[Action, ...]:
    """The actions of a job that joins others. The daemon has the site's limits; the job's are its clients' own."""
    mode = _compute_mode(JOINED, config)
    way = JOINED_ALL if joins_all(config) else JOINED
    joins = []
    for number, (gpu, daemon) in enumerate(zip(gpus, daemons, strict=True)):
        limits = Limits(config.limits_thread_percentage_max, _most_memory(gpu, config))
        mib = _promised_mib(request, config, gpu, daemon, -(-request.tasks // len(gpus)))
        joins.append(JoinGpu(gpu.uuid, number, request.uid, mode, limits, mib, _for_clients(gpu, config), way))
    return (JoinGpus(tuple(joins)), AdmitUser(request.uid))


def _promised_mib(request: JobRequest, config: SiteConfig, gpu: Gpu, daemon: JobDaemon, tasks: int) -> int:
    """How much of a GPU's memory the job's processes there may have together; 0 where that is not known."""
    share = request.share_percentage
    if share is not None and (request.auto_memory or _divides_share(request, config)):
        return int(_for_clients(gpu, config) * share / 100)
    if config.limits_memory_default == "none" and _divides_share(request, config):
        return 0  # its shards' part, which Slurm counts and the plugin sets
    limit = daemon.limits.memory_bytes
    return 0 if limit is None or request.auto_memory else limit // MIB * max(1, tasks)
