"""What will be done for a job: JobRequest + SiteConfig + the job's GPUs -> Plan. Pure; printable, not run."""

from __future__ import annotations

from .config import SiteConfig, memory_bytes
from .errors import NodeError, RequestError
from .node.control import Limits
from .node.gpus import EXCLUSIVE_PROCESS, Gpu
from .record import record
from .state import Verdict
from .steps import AdmitUser, HoldGpu, MakeDirectories, SetLimits, StartDaemon, StartServer
from .units import MIB, describe_memory, format_memory, format_thread_percentage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .request import JobRequest
    from .steps import Step

# A context costs 514 MiB at 100 % and 145 MiB at 25 % of an H200's threads (O15): so many parts of the whole cost at
# 0 %, and the rest in proportion to the threads. The plugin reckons the same for a step (spank/limits.c).
_CONTEXT_FIXED_PARTS, _CONTEXT_PARTS = 22, 514


@record
class Plan:
    """The steps for one job, in order, and what its tasks are told when they are done."""

    gpus: tuple[Gpu, ...]
    limits: Limits
    context_mib: int
    visible_devices: str
    steps: tuple[Step, ...]

    def verdict(self, pipe_directory: str, log_directory: str) -> Verdict:
        """What the plugin reads in the job's tasks. GPUs stand in the daemon's order, which is PCI order (O19)."""
        settings = [
            ("pipe_directory", pipe_directory),
            ("log_directory", log_directory),
            ("thread_percentage", format_thread_percentage(self.limits.thread_percentage)),
            ("context_mib", str(self.context_mib)),
            ("visible_devices", self.visible_devices),
        ]
        if self.limits.memory_bytes is not None:
            settings.append(("memory_limit", format_memory(self.limits.memory_bytes)))
        if self.limits.client_priority is not None:
            settings.append(("client_priority", str(self.limits.client_priority)))
        settings += [("gpu", f"{gpu.index} {gpu.minor} {gpu.uuid}") for gpu in self.gpus]
        return Verdict("ready", settings=tuple(settings))


def _thread_percentage(request: JobRequest, config: SiteConfig) -> float:
    percent = request.thread_percentage
    if percent is None:
        return config.limits_thread_percentage_default
    low, high = config.limits_thread_percentage_min, config.limits_thread_percentage_max
    if not low <= percent <= high:
        raise RequestError(f"--mps-threads={percent:g}: this site allows {low:g} to {high:g}")
    return percent


def _context_bytes(percent: float, config: SiteConfig) -> int:
    """What a context costs of a client's limit, before the program has allocated anything."""
    parts = _CONTEXT_FIXED_PARTS * 1000 + (_CONTEXT_PARTS - _CONTEXT_FIXED_PARTS) * round(percent * 10)
    return config.limits_memory_context_mib * parts // (_CONTEXT_PARTS * 1000) * MIB


def _memory_limit(request: JobRequest, config: SiteConfig, gpus: tuple[Gpu, ...], percent: float) -> int | None:
    limit = request.memory_limit_bytes
    if limit is None:
        limit = memory_bytes(config.limits_memory_default)
        if limit is None:
            return None
    asked = f"--mps-mem={format_memory(limit)}"
    smallest = min(gpus, key=lambda gpu: gpu.memory_bytes)
    if limit > smallest.memory_bytes:
        raise RequestError(
            f"{asked} is more than {smallest.uuid} has ({describe_memory(smallest.memory_bytes)})",
            hint=f"ask for at most {format_memory(smallest.memory_bytes // MIB * MIB)}, or leave it out for no limit",
        )
    context = _context_bytes(percent, config)
    if limit <= context:
        raise RequestError(
            f"{asked} is less than a CUDA context costs with {percent:g} % of the threads "
            f"(about {describe_memory(context)})",
            hint=f"ask for more than {format_memory(context)}",
        )
    low, high = memory_bytes(config.limits_memory_min), memory_bytes(config.limits_memory_max)
    if low is not None and limit < low:
        raise RequestError(f"{asked}: this site allows {config.limits_memory_min} and more")
    if high is not None and limit > high:
        raise RequestError(f"{asked}: this site allows at most {config.limits_memory_max}")
    return limit


def make_plan(request: JobRequest, config: SiteConfig, gpus: tuple[Gpu, ...]) -> Plan:
    """Decide what the job gets.

    Raises: RequestError when it cannot have what it asks; NodeError when Slurm named one GPU twice.
    """
    if not gpus:
        raise RequestError("this job has no GPU on this node", hint="ask for one, such as --gres=gpu:1")
    gpus = tuple(sorted(gpus, key=lambda gpu: gpu.index))
    uuids = tuple(gpu.uuid for gpu in gpus)
    if len(set(uuids)) < len(uuids):
        raise NodeError(f"Slurm names the same GPU twice: {', '.join(request.gpus)}")
    percent = _thread_percentage(request, config)
    limits = Limits(percent, _memory_limit(request, config, gpus, percent), request.client_priority)
    may_share = config.gpus_sharing == "share"
    mode = EXCLUSIVE_PROCESS if config.gpus_compute_mode == "exclusive_process" and not may_share else None
    return Plan(
        gpus=gpus,
        limits=limits,
        context_mib=config.limits_memory_context_mib,
        visible_devices=config.gpus_client_visible_devices,
        steps=(
            *(HoldGpu(uuid, mode, may_share) for uuid in uuids),
            MakeDirectories(),
            StartDaemon(uuids),
            SetLimits(limits, len(uuids)),
            AdmitUser(request.uid),
            StartServer(request.uid),
        ),
    )
