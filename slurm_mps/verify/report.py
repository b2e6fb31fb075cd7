"""What a rank and a control daemon report, and how a control daemon's answer is read. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from ..units import small_number

#: Ordinals whose memory limit the daemon is asked for; no node has more GPUs.
ORDINALS = 16
QUERY = (
    "device_query --csv",
    "ps",
    "get_default_client_priority",
    *(
        line
        for ordinal in range(ORDINALS)
        # The percentage is asked again and again as a mark between answers, of which some are empty (O4, O7).
        for line in ("get_default_active_thread_percentage", f"get_default_device_pinned_mem_limit {ordinal}")
    ),
)
_PERCENTAGE = re.compile(r"\d{1,3}\.\d+")
_SIZE = re.compile(r"\d{1,12}[MG]")


@dataclass(frozen=True)
class RankReport:
    """What one rank has and was given; "" and 0 where there is nothing. ``visible``: GPU UUIDs, joined by commas.

    threads, memory, priority: the rank's own variables. set_threads, set_memory: what the plugin put there, where the
    user had set nothing. note_lost: what says so was removed. node_fault: why the node runs the job without MPS, on a
    site that allows it. other_job: the job whose pipe directory the rank has instead of its own job's. pid_namespace:
    by its inode. card_multiprocessors: SMs of the whole GPU, from one rank for each GPU. profile: of a MIG slice, such
    as 1g.10gb.
    """

    rank: int
    pid: int
    pid_namespace: int
    pipe_directory: str
    pipe_problem: str = ""
    asked: bool = True
    step_gpus: int = 0
    threads: str = ""
    memory: str = ""
    priority: str = ""
    set_threads: str = ""
    set_memory: str = ""
    note_lost: bool = False
    node_fault: str = ""
    other_job: str = ""
    cpu_numa: str = ""
    ordinal: int = 0
    visible: str = ""
    gpu: str = ""
    profile: str = ""
    gpu_numa: str = ""
    multiprocessors: int = 0
    card_multiprocessors: int = 0
    free_bytes: int = 0
    total_bytes: int = 0
    error: str = ""
    no_driver: bool = False


def parse_report(data: bytes) -> RankReport:
    """Raises: ValueError for what no rank of this version has written."""
    try:
        given = json.loads(data)
    except RecursionError:
        raise ValueError from None
    kinds = {field.name: {"int": int, "str": str, "bool": bool}[str(field.type)] for field in fields(RankReport)}
    if not isinstance(given, dict) or {name: type(value) for name, value in given.items()} != kinds:
        raise ValueError
    return RankReport(**given)


@dataclass(frozen=True)
class DaemonReport:
    """What the control daemon of one pipe directory answered; ``problem``: why it answered nothing.

    clients, namespaces: the server and the pid namespace of each client, by pid. memory: the limit by the client's
    ordinal (O13), as the daemon prints it. priority: ``0`` for normal, ``1`` for low, "" from a driver that does not
    tell.
    """

    problem: str = ""
    clients: Mapping[int, int] = field(default_factory=dict)
    threads: str = ""
    memory: Mapping[int, str] = field(default_factory=dict)
    gpus: tuple[str, ...] = ()
    priority: str = ""
    namespaces: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Evidence:
    """Everything that was reported on one node.

    expected: all ranks that the step has there. daemons: by pipe directory. waited_seconds: how long the ranks had.
    """

    node: str
    expected: tuple[int, ...]
    ranks: Sequence[RankReport]
    daemons: Mapping[str, DaemonReport]
    waited_seconds: float

    def daemon(self, rank: RankReport) -> DaemonReport | None:
        return self.daemons.get(rank.pipe_directory)

    def server(self, rank: RankReport) -> int:
        """The server of a rank, according to the control daemon; 0 for a rank that is no client.

        A rank in a pid namespace of its own may have another pid than the daemon prints. It is known by its namespace,
        where as many clients are in that as ranks.
        """
        daemon = self.daemon(rank)
        if daemon is None:
            return 0
        if daemon.namespaces.get(rank.pid) == rank.pid_namespace:
            return daemon.clients[rank.pid]
        space, directory = rank.pid_namespace, rank.pipe_directory
        inside = {pid: server for pid, server in daemon.clients.items() if daemon.namespaces.get(pid) == space}
        ranks = [one.pid for one in self.ranks if (one.pid_namespace, one.pipe_directory) == (space, directory)]
        unknown = not rank.pipe_problem and len(inside) == len(ranks) and not inside.keys() & set(ranks)
        return min(inside.values(), default=0) if unknown else 0

    def card(self, rank: RankReport) -> int:
        """How many SMs the whole of the rank's GPU has; 0 where that is not known."""
        return max(one.card_multiprocessors for one in self.ranks if one.gpu == rank.gpu)


def parse_daemon_answer(lines: list[str]) -> DaemonReport:
    """Read what the daemon answers to QUERY. Each kind of line is known by its form, since answers may be empty."""
    clients: dict[int, int] = {}
    namespaces: dict[int, int] = {}
    memory: dict[int, str] = {}
    gpus: list[str] = []
    threads, priority, ordinal = "", "", -1
    for line in lines:
        text, words, columns = line.strip(), line.split(), line.split(",")
        if _PERCENTAGE.fullmatch(text):
            threads, ordinal = text, ordinal + 1
        elif _SIZE.fullmatch(text):
            memory[ordinal] = text
        elif text in ("0", "1"):
            priority = text
        elif len(columns) > 3 and columns[2].startswith(("GPU-", "MIG-")):
            gpus.append(columns[2])
        elif len(words) > 4 and words[0].isdecimal() and words[2].isdecimal():
            clients[int(words[0])] = int(words[2])
            namespaces[int(words[0])] = small_number(words[4], 10) or 0
    return DaemonReport("", clients, threads, memory, tuple(gpus), priority, namespaces)
