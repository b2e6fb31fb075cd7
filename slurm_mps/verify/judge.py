"""What is wrong, in plain words, from what the ranks and the control daemons of one node reported. Pure.

Facts go before intentions: a rank is a client if the control daemon lists it, and is limited if the driver says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from ..slurm.hostlist import join_numbers
from ..units import GIB, MIB, describe_memory, parse_memory, parse_thread_percentage, printable, printed_memory
from .report import DaemonReport, Evidence, RankReport

#: The smallest part of an H200 that a percentage comes down to: 1 % and 3 % are 8 SMs (O10).
SMALLEST_PART = 8
#: What the control program says where nobody listens (O7); the driver then goes on without MPS (O21).
_GONE = "Cannot find MPS control daemon"
_UNKNOWN = "? "
_DRIVER_SIZE = re.compile(r"(\d{1,9})([MG])(i?B)?", re.IGNORECASE)
_PRIORITIES = {"0": "normal", "1": "low"}


def problems(found: Evidence) -> list[str]:
    """Everything that is not as it should be, the causes first; empty when all is well."""
    return [
        *_missing(found),
        *_silent_daemons(found),
        *_errors(found),
        *_without_mps(found),
        *_of_another_job(found),
        *_apart(found),
        *_piled_up(found),
        *_unknown_limits(found),
        *_over_threads(found),
        *_over_memory(found),
        *_over_priority(found),
    ]


# ---------------------------------------------------------------------------------------------------- who is there


def _missing(found: Evidence) -> list[str]:
    missing = sorted(set(found.expected) - {rank.rank for rank in found.ranks})
    return [f"{_ranks(missing)} did not report within {found.waited_seconds:g} s"] if missing else []


def _silent_daemons(found: Evidence) -> list[str]:
    return [
        f"the control daemon of {printable(directory, 120)} does not answer: {printable(answer.problem, 200)}"
        for directory, answer in sorted(found.daemons.items())
        if answer.problem
    ]


def _errors(found: Evidence) -> list[str]:
    return _grouped(
        found.ranks,
        lambda rank: rank.error and f"cannot use {rank.gpu or 'a GPU'}: {printable(rank.error, 200)}",
        lambda ranks, words: f"{_ranks(ranks)} {words}",
    )


def _without_mps(found: Evidence) -> list[str]:
    """Ranks that no daemon lists; a rank that failed only where the reason is clear."""

    def words(rank: RankReport) -> str:
        daemon = found.daemon(rank)
        known_why = rank.pipe_problem or (daemon and daemon.problem)
        return "" if found.server(rank) or (rank.error and not known_why) else _why_without(rank, daemon)

    def sentence(ranks: list[int], why: str) -> str:
        if why.startswith(_UNKNOWN):
            return f"cannot tell whether {_ranks(ranks)} {_have(ranks)} MPS: {why.removeprefix(_UNKNOWN)}"
        return f"{_ranks(ranks)} {'runs' if len(ranks) == 1 else 'run'} without MPS: {why}"

    return _grouped(found.ranks, words, sentence)


def _of_another_job(found: Evidence) -> list[str]:
    return _grouped(
        found.ranks,
        lambda rank: rank.other_job and f"the pipe directory of job {printable(rank.other_job)}",
        lambda ranks, words: f"{_ranks(ranks)} {_have(ranks)} {words}: the environment was inherited from that job",
    )


def _why_without(rank: RankReport, daemon: DaemonReport | None) -> str:
    directory = printable(rank.pipe_directory, 120)
    if rank.node_fault and rank.pipe_problem:
        return f"{printable(rank.node_fault, 300)}; this site lets jobs run without MPS on a faulty node"
    if rank.pipe_problem:
        asked = "" if rank.asked else "; this job did not ask for MPS (--mps)"
        return f"{printable(rank.pipe_problem, 200)}{asked}"
    if daemon and _GONE in daemon.problem:
        return f"the control daemon of {directory} is gone"
    if daemon is None or daemon.problem:
        return f"{_UNKNOWN}the control daemon of {directory} does not answer"
    return f"the control daemon of {directory} lists no such client"


# ------------------------------------------------------------------------------------------------------ who shares


def _by_gpu(found: Evidence) -> dict[str, list[RankReport]]:
    groups: dict[str, list[RankReport]] = {}
    for rank in found.ranks:
        if rank.gpu:
            groups.setdefault(rank.gpu, []).append(rank)
    return dict(sorted(groups.items()))


def _apart(found: Evidence) -> list[str]:
    """GPUs whose ranks have different servers, or where only some ranks have one."""
    words = []
    for gpu, ranks in _by_gpu(found).items():
        servers: dict[int, list[int]] = {}
        for rank in ranks:
            servers.setdefault(found.server(rank), []).append(rank.rank)
        clients = [numbers for server, numbers in servers.items() if server]
        if len(servers) < 2 or not clients:
            continue
        together = max(clients, key=len)
        rest = [rank.rank for rank in ranks if rank.rank not in together]
        share = "share one server" if len(together) > 1 else "has a server"
        others = f"{_ranks(rest)} {'do' if len(rest) > 1 else 'does'} not"
        words.append(f"{_ranks(together)} on {gpu} {share}, {others}")
    return words


def _piled_up(found: Evidence) -> list[str]:
    """Whether all ranks are on one GPU while the step has more of them here."""
    ranks = [rank for rank in found.ranks if rank.gpu]
    used = {rank.gpu for rank in ranks}
    count = max((rank.step_gpus for rank in ranks), default=0)
    if len(ranks) < 2 or len(used) > 1 or count < 2:
        return []
    unused = sorted({gpu for daemon in found.daemons.values() for gpu in daemon.gpus} - used)
    hint = f": no rank uses {', '.join(unused)}" if unused else ""
    return [f"all {len(ranks)} ranks are on {used.pop()}, although the step has {count} GPUs on this node{hint}"]


# --------------------------------------------------------------------------------------------------------- limits


def thread_limit(rank: RankReport, daemon: DaemonReport | None) -> float | None:
    """The lowest percentage that the rank's environment, the plugin or the control daemon sets; None for no limit."""
    texts = (rank.threads, rank.set_threads, daemon.threads if daemon else "")
    return min(filter(None, map(percentage, texts)), default=None)


def percentage(text: str) -> float | None:
    """None for what the driver ignores, which is no limit (O11)."""
    try:
        return parse_thread_percentage(text)
    except ValueError:
        return None


def _unknown_limits(found: Evidence) -> list[str]:
    """Clients without the plugin's note, of whose step a limit may be lower than the job's."""
    return _grouped(
        found.ranks,
        lambda rank: "CUDA_MPS_SET_BY_SLURM was removed" if rank.note_lost and found.server(rank) else "",
        lambda ranks, why: f"cannot tell which limits the step set for {_ranks(ranks)}: {why}; let all CUDA_* in",
    )


def _over_threads(found: Evidence) -> list[str]:
    def words(rank: RankReport) -> str:
        limit, total = thread_limit(rank, found.daemon(rank)), found.card(rank)
        if limit is None or not total or rank.multiprocessors <= max(SMALLEST_PART, total * limit / 100):
            return ""
        variable = _lost("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", rank.threads, rank.set_threads)
        why = _why_over(found, rank, variable)
        return f"{rank.multiprocessors} of {total} SMs although limited to {limit:g} %: {why}"

    return _grouped(found.ranks, words, lambda ranks, text: f"{_ranks(ranks)} {_have(ranks)} {text}")


def _lost(name: str, value: str, was_set: str) -> str:
    """A variable that was removed or changed after the plugin had set it; empty for none."""
    return f"{name}={printable(was_set, 60)}" if was_set and value != was_set else ""


def _why_over(found: Evidence, rank: RankReport, lost: str) -> str:
    if found.server(rank) and lost:
        return f"the step's {lost} was changed or removed before the program started"
    if found.server(rank):
        return "the server does not apply the limit; it may have started before the limit was set"
    return "without MPS no limit holds"


def own_memory_limit(rank: RankReport) -> int | None:
    """What the rank's own variable sets for its device, in bytes; None when it does not name it, or is empty.

    Raises: ValueError for a value that the driver cannot use, whereupon it drops every limit (O12).
    """
    return variable_limit(rank.memory, rank.visible.split(","), rank.ordinal, rank.gpu)


def variable_limit(text: str, visible: Sequence[str], ordinal: int, gpu: str) -> int | None:
    """What CUDA_MPS_PINNED_DEVICE_MEM_LIMIT sets for one of a client's visible devices (UUIDs, in its order).

    Returns: bytes; None when it does not name the device, or is empty.
    Raises: ValueError for a value that the driver cannot use, whereupon it drops every limit (O12).
    """
    limit = None
    for entry in filter(None, text.split(",")):
        device, _, size = entry.partition("=")
        places = [str(number) for number in range(len(visible))]
        matched = _DRIVER_SIZE.fullmatch(size)
        if device not in (*places, *visible) or not matched or not int(matched[1]):
            raise ValueError(entry)
        if device in (str(ordinal), gpu):
            limit = int(matched[1]) * (GIB if matched[2] in "Gg" else MIB)
    return limit


def _set_memory_limit(rank: RankReport) -> int | None:
    """What the plugin set for the rank's device, in bytes; None where it set nothing."""
    sizes = dict(entry.partition("=")[::2] for entry in rank.set_memory.split(","))
    return _memory(sizes.get(str(rank.ordinal), ""))


def _memory(text: str) -> int | None:
    """None for what is no limit."""
    try:
        return parse_memory(text)
    except ValueError:
        return None


def memory_limit(rank: RankReport, daemon: DaemonReport | None) -> int | None:
    """The lowest memory limit of environment, plugin and control daemon, in bytes; None for no limit.

    The daemon's word is rounded down (O95): a limit of the rank's own that rounds to it is as low.
    """
    try:
        own = own_memory_limit(rank)
    except ValueError:
        own = None
    lowest = min(filter(None, (own, _set_memory_limit(rank))), default=None)
    default = _memory(daemon.memory.get(rank.ordinal, "")) if daemon else None
    if lowest and default == printed_memory(lowest):
        return lowest
    return min(filter(None, (lowest, default)), default=None)


def _over_memory(found: Evidence) -> list[str]:
    free = {rank.rank: rank.free_bytes for rank in found.ranks}

    def sentence(ranks: list[int], words: str) -> str:
        most = describe_memory(max(free[rank] for rank in ranks))
        return f"{_ranks(ranks)} {_have(ranks)} {words}; {most} are free"

    return _grouped(
        [rank for rank in found.ranks if rank.multiprocessors], lambda rank: _memory_words(found, rank), sentence
    )


def _memory_words(found: Evidence, rank: RankReport) -> str:
    limit, own = memory_limit(rank, found.daemon(rank)), memory_limit(rank, None)
    rounded_bytes = GIB if limit and limit >= GIB and limit != own else 0  # the daemon's word alone (O95)
    asked = f" although limited to {describe_memory(limit)}" if limit else ""
    try:
        own_memory_limit(rank)
    except ValueError:
        shown = printable(rank.memory, 60)
        return f"no memory limit{asked}: the driver cannot use CUDA_MPS_PINNED_DEVICE_MEM_LIMIT={shown}"
    if limit is None or rank.free_bytes <= limit + rounded_bytes:
        return ""
    variable = _lost("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT", rank.memory, rank.set_memory)
    return f"too much memory{asked}: {_why_over(found, rank, variable)}"


# -------------------------------------------------------------------------------------------------------- priority


def priority(rank: RankReport, daemon: DaemonReport | None) -> str | None:
    """``normal`` or ``low``; None where that is not known.

    A client's own variable goes before the daemon's default. Source: CUDA_MPS_CLIENT_PRIORITY in NVIDIA's MPS
    documentation; not seen on hardware.
    """
    default = daemon.priority if daemon else ""
    return _PRIORITIES.get(rank.priority) or _PRIORITIES.get(default)


def _over_priority(found: Evidence) -> list[str]:
    """Clients that raised the priority of a job that asked for low; the daemon's default is low then."""

    def words(rank: RankReport) -> str:
        daemon = found.daemon(rank)
        low = daemon is not None and _PRIORITIES.get(daemon.priority) == "low"
        raised = low and found.server(rank) and priority(rank, daemon) != "low"
        return "normal priority although the job asked for low: CUDA_MPS_CLIENT_PRIORITY=0 was set" if raised else ""

    return _grouped(found.ranks, words, lambda ranks, text: f"{_ranks(ranks)} {_have(ranks)} {text}")


# ---------------------------------------------------------------------------------------------------------- words


def _ranks(numbers: list[int]) -> str:
    return f"{'rank' if len(numbers) == 1 else 'ranks'} {join_numbers(numbers)}"


def _have(numbers: list[int]) -> str:
    return "has" if len(numbers) == 1 else "have"


def _grouped(
    ranks: Iterable[RankReport], words: Callable[[RankReport], str], sentence: Callable[[list[int], str], str]
) -> list[str]:
    """One sentence for all ranks with the same words; none for ranks without words."""
    groups: dict[str, list[int]] = {}
    for rank in ranks:
        groups.setdefault(words(rank), []).append(rank.rank)
    groups.pop("", None)
    return [sentence(numbers, text) for text, numbers in groups.items()]
