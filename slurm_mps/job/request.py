"""The job's request: the prolog's environment -> JobRequest. Pure; opens nothing, runs nothing.

Every ``SPANK_*`` value is a user's text: any user can send any of them with any bytes, past the plugin and its checks
(S4), so each is read here by a grammar and never reaches a shell, a path or a control command as it came.
``SLURM_*`` values are slurmd's own; one that makes no sense is a fault of the node, not of the user.
"""

from __future__ import annotations

from binascii import crc32

from ..errors import NodeError, RequestError
from ..record import record
from ..units import AUTO, parse_client_priority, parse_memory, parse_memory_by_gpu, parse_thread_percentage, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import TypeVar

    T = TypeVar("T")

_PREFIX = "SPANK_MPS"
_OFF = "SPANK_NO_MPS"  # --mps=off, as the plugin carries it
#: Slurm's own word for how much of a GPU a job of gres/mps has, in percent. Nobody but Slurm can set it for a prolog.
SHARE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
_RUN = frozenset(("SLURM_JOB_UID", "SLURM_JOB_RESTART_COUNT", "SLURM_JOB_START_TIME", "SLURM_JOB_GPUS"))
#: The variable in which slurmd hands over each option's value (spank/submit.c carries it).
VARIABLES = {
    "--mps": "SPANK_MPS",
    "--mps-threads": "SPANK_MPS_THREADS",
    "--mps-mem": "SPANK_MPS_MEM",
    "--mps-priority": "SPANK_MPS_PRIORITY",
}
ID_MAX = 2**32 - 1
PER_NODE, PER_GPU = "per-node", "per-gpu"
_DAEMONS = {"1": "", PER_NODE: PER_NODE, PER_GPU: PER_GPU}  # "1": --mps without a value


@record
class JobRequest:
    """One job's wish on this node.

    ``gpus`` are the job's GPUs here as Slurm names them: indices, or UUIDs (Slurm 25.11 and later, S17); with UUIDs
    ``slurm_indices`` may have Slurm's index of each, in the same order, which is what a task's variables count by.
    ``thread_percentage`` is in percent, ``memory_limit_bytes`` per client process and GPU, ``client_priority`` 0 for
    normal and 1 for low. None: not asked for. ``daemons`` says how many control daemons: PER_NODE, PER_GPU, or "" for
    what suits the GPUs; with PER_GPU ``memory_by_gpu`` may have a limit for each GPU, by the job's own count from 0.
    ``auto_threads`` and ``auto_memory``: each step divides by the ranks that share a GPU. ``share_percentage``: how
    much of a GPU Slurm gave the job (gres/mps); None: whole GPUs, or shards, of which Slurm tells the prolog nothing.
    ``tasks``: how many the job has on this node, 0 where that is not known.
    """

    job_id: int
    uid: int
    gpus: tuple[str, ...]
    thread_percentage: float | None = None
    memory_limit_bytes: int | None = None
    client_priority: int | None = None
    daemons: str = ""
    memory_by_gpu: tuple[tuple[int, int], ...] = ()
    auto_threads: bool = False
    auto_memory: bool = False
    slurm_indices: tuple[int, ...] = ()
    share_percentage: float | None = None
    tasks: int = 0


def slurm_number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Read a number that slurmd put into the environment.

    Raises: NodeError when it is absent without a default, or no number from 0 to 2^32-1.
    """
    text = environment.get(name, "")
    if not text and default is not None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= ID_MAX):
        raise NodeError(f"slurmd gave the prolog no usable {name}: {printable(text)!r}")
    return int(text)


def _option(environment: Mapping[str, str], option: str, parse: Callable[[str], T]) -> T | None:
    text = environment.get(VARIABLES[option])
    if text is None:
        return None
    try:
        return parse(text)
    except ValueError as error:
        raise RequestError(f"{option}={printable(text)}: {error}") from None


def _daemons(text: str) -> str:
    if text not in _DAEMONS:
        raise ValueError(f"expected {PER_NODE}, {PER_GPU} or off")  # off, the plugin passes on as _OFF
    return _DAEMONS[text]


def _unless_auto(text: str, parse: Callable[[str], T]) -> T | None:
    return None if text == AUTO else parse(text)


def _memory(text: str) -> int | tuple[tuple[int, int], ...] | None:
    return parse_memory_by_gpu(text) if ":" in text else _unless_auto(text, parse_memory)


def _gpus(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Slurm's own names of the job's GPUs on this node; UUIDs are preferred, they need no counting."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    names = visible if "-" in visible else environment.get("SLURM_JOB_GPUS", "") or visible
    gpus = tuple(name for name in names.split(",") if name)
    for name in gpus:
        if not (name.isascii() and (name.startswith(("GPU-", "MIG-")) or (name.isdigit() and len(name) <= 4))):
            raise NodeError(f"slurmd gave the prolog a GPU it cannot name: {printable(name)!r}")
    return gpus


def _slurm_indices(environment: Mapping[str, str], gpus: tuple[str, ...]) -> tuple[int, ...]:
    """Slurm's indices of GPUs that are named by UUID; empty where SLURM_JOB_GPUS does not list each."""
    indices = [name for name in environment.get("SLURM_JOB_GPUS", "").split(",") if name]
    numbers = all(name.isascii() and name.isdigit() and len(name) <= 4 for name in indices)
    by_uuid = any(not name.isdigit() for name in gpus)
    return tuple(map(int, indices)) if by_uuid and numbers and len(indices) == len(gpus) else ()


def asks_for_mps(environment: Mapping[str, str]) -> bool:
    """Whether the plugin passed on a request, or Slurm gave the job a part of a GPU with gres/mps."""
    return SHARE in environment or any(name.startswith(_PREFIX) for name in environment)


def may_have_mps_unasked(environment: Mapping[str, str]) -> bool:
    """Whether the site may give MPS to a job that asks for nothing: it has whole GPUs, and did not say --mps=off."""
    devices = environment.get("CUDA_VISIBLE_DEVICES", "")
    return bool(environment.get("SLURM_JOB_GPUS")) and "MIG-" not in devices and _OFF not in environment


def _share(environment: Mapping[str, str]) -> float | None:
    text = environment.get(SHARE)
    try:
        return None if text is None else parse_thread_percentage(text)
    except ValueError:
        if text and text.isdecimal() and int(text) > 100:  # of the first GPU's count, for parts of several
            what = f"--gres=mps gives it {printable(text)} % of a GPU"
            raise RequestError(what, hint="ask for whole GPUs with --gres=gpu", reason="threads") from None
        raise NodeError(f"slurmd gave the prolog no usable {SHARE}: {printable(text or '')!r}") from None


def run_of_job(environment: Mapping[str, str]) -> str:
    """A name for this run of the job, which differs from that of a requeued run, and of another job with the same id.
    Slurm gives the time of the start from 23.02 on.
    """
    given = [name for name in environment if name.startswith(_PREFIX)]
    given_text = "\0".join(f"{name}={environment[name]}" for name in sorted([*given, *(_RUN & environment.keys())]))
    return f"{crc32(given_text.encode('utf-8', 'surrogateescape')):08x}"


def read_request(environment: Mapping[str, str]) -> JobRequest:
    """Read a job's request from the environment that slurmd gives the prolog.

    Raises: RequestError for a wrong value of the user's, NodeError for one of slurmd's.
    """
    unknown = sorted(n for n in environment if n.startswith(_PREFIX + "_") and n not in VARIABLES.values())
    if unknown:
        raise RequestError(
            f"the request has {printable(unknown[0])}, which slurm-mps on this node does not know",
            hint="tell your admin: the submit host may have a newer slurm-mps than this node",
        )
    if _OFF in environment and SHARE in environment:
        raise RequestError(
            "--mps=off: only MPS limits a job to the part of a GPU that --gres=mps gives it",
            hint="leave it out, or ask for a whole GPU (--gres=gpu:1)",
        )
    daemons = _option(environment, "--mps", _daemons) or ""
    memory = _option(environment, "--mps-mem", _memory)
    by_gpu = memory if isinstance(memory, tuple) else ()
    if by_gpu and daemons != PER_GPU:
        raise RequestError(
            f"--mps-mem={printable(environment['SPANK_MPS_MEM'])}: one control daemon cannot tell its GPUs apart",
            hint="ask for --mps=per-gpu, or for one size",
        )
    gpus = _gpus(environment)
    return JobRequest(
        job_id=slurm_number(environment, "SLURM_JOB_ID"),
        uid=slurm_number(environment, "SLURM_JOB_UID"),
        gpus=gpus,
        thread_percentage=_option(
            environment, "--mps-threads", lambda text: _unless_auto(text, parse_thread_percentage)
        ),
        memory_limit_bytes=memory if isinstance(memory, int) else None,
        client_priority=_option(environment, "--mps-priority", parse_client_priority),
        daemons=daemons,
        memory_by_gpu=by_gpu,
        auto_threads=environment.get("SPANK_MPS_THREADS") == AUTO,
        auto_memory=environment.get("SPANK_MPS_MEM") == AUTO,
        slurm_indices=_slurm_indices(environment, gpus),
        share_percentage=_share(environment),
        tasks=slurm_number(environment, "SLURM_JOB_NTASKS", 0) if environment.get("SLURM_JOB_NUM_NODES") == "1" else 0,
    )
