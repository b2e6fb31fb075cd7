"""What ranks tell rank 0, and how it is read again: only objects of exactly these fields and types. Pure.

Text comes from a process that may be anybody's (see ``link``): it is bounded here and made printable where it is shown.
"""

from __future__ import annotations

import re

from ..record import record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Message = dict[str, Any]

TEXT_MAX = 4096
#: Ordinals whose memory limit the daemon is asked for; more GPUs than that no node has.
ORDINALS = 16
QUERY = (
    "device_query --csv",
    "ps",
    *(
        line
        for ordinal in range(ORDINALS)
        # The percentage is asked again and again as a mark between answers, of which some are empty (O4, O7).
        for line in ("get_default_active_thread_percentage", f"get_default_device_pinned_mem_limit {ordinal}")
    ),
)
_PERCENTAGE = re.compile(r"\d{1,3}\.\d+")
_SIZE = re.compile(r"\d{1,12}[MG]")


@record
class Report:
    """What one rank has and was given; "" and 0 where there is nothing. ``visible`` are GPU UUIDs, with commas.

    node_fault: why its node runs the job without MPS, where the site wants it so. set_threads, set_memory: what the
    plugin put into threads and memory, where that was no wish of the user's. other_job: whose daemon it was told.
    """

    rank: int
    host: str
    pid: int
    error: str
    no_driver: bool
    pipe_directory: str
    pipe_problem: str
    asked: bool
    step_gpus: int
    threads: str
    memory: str
    job_threads: str
    job_memory: str
    ordinal: int
    visible: str
    gpu: str
    multiprocessors: int
    free_bytes: int
    total_bytes: int
    cpu_numa: str
    gpu_numa: str
    node_fault: str = ""
    set_threads: str = ""
    set_memory: str = ""
    other_job: str = ""


@record
class DaemonAnswer:
    """What the control daemon of one pipe directory said; ``problem`` when it said nothing.

    clients: the server of each client's pid. memory: limit by the client's ordinal (O13), as the daemon prints it.
    """

    problem: str
    clients: dict[int, int]
    threads: str
    memory: dict[int, str]
    gpus: tuple[str, ...]


@record
class Card:
    """How many SMs a whole GPU has, asked by a process that is no MPS client; 0 when that failed."""

    gpu: str
    multiprocessors: int


def to_message(report: Report) -> Message:
    return dict(vars(report))


def from_message(message: object) -> Report:
    """Read a rank's report.

    Raises: ValueError when it has other fields, other types, longer texts or negative numbers.
    """
    fields = Report.__annotations__
    if not isinstance(message, dict) or message.keys() != fields.keys():
        raise ValueError("not the fields of a report")
    for name, kind in fields.items():
        value = message[name]
        if type(value).__name__ != kind or (kind == "str" and len(value) > TEXT_MAX) or (kind == "int" and value < 0):
            raise ValueError(f"{name} is no {kind} that a report may have")
    return Report(**message)


def parse_daemon_answer(lines: list[str]) -> DaemonAnswer:
    """Read what the daemon answers to QUERY. The kinds of line are told apart by their form: answers may be empty."""
    clients: dict[int, int] = {}
    memory: dict[int, str] = {}
    gpus: list[str] = []
    threads, ordinal = "", -1
    for line in lines:
        text, words, columns = line.strip(), line.split(), line.split(",")
        if _PERCENTAGE.fullmatch(text):
            threads, ordinal = text, ordinal + 1
        elif _SIZE.fullmatch(text):
            memory[ordinal] = text
        elif len(columns) > 3 and columns[2].startswith("GPU-"):
            gpus.append(columns[2])
        elif len(words) > 4 and words[0].isdecimal() and words[2].isdecimal():
            clients[int(words[0])] = int(words[2])
    return DaemonAnswer("", clients, threads, memory, tuple(gpus))


def daemon_message(answer: DaemonAnswer) -> Message:
    """As JSON keeps it, whose keys are texts."""
    return {**vars(answer), "clients": list(answer.clients.items()), "memory": list(answer.memory.items())}


def daemon_from_message(message: Message) -> DaemonAnswer:
    """Raises: ValueError, TypeError or KeyError when it is none."""
    return DaemonAnswer(
        str(message["problem"])[:TEXT_MAX],
        {int(pid): int(server) for pid, server in message["clients"]},
        str(message["threads"])[:TEXT_MAX],
        {int(ordinal): str(size)[:TEXT_MAX] for ordinal, size in message["memory"]},
        tuple(str(gpu)[:TEXT_MAX] for gpu in message["gpus"]),
    )
