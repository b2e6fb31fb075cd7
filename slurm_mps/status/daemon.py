"""Asks a job's control daemon for its servers and clients, within a deadline."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic

from ..errors import MpsError
from ..job.verdict import DaemonPlace
from ..job_log.events import SERVER_DIED, SERVER_READY
from ..job_log.read import DaemonLogs, events_of
from ..node.control import ControlDaemon
from ..node.listen import listener
from ..node.processes import ProcessIdentity, age_seconds, identify
from ..units import small_number

#: Sent between questions whose answers may be empty, since the control program puts nothing between them (O7).
_MARK = "get_default_active_thread_percentage"
_PERCENTAGE = re.compile(r"\d{1,3}\.\d+")
_CLIENTS_MAX = 4096
_ANEW_SECONDS, _BLIND_SECONDS = 60.0, 10.0
_LOG_BYTES = 4 * 1024**2
#: The driver brings the GPUs of all servers up one after the other, 0.4 to 0.5 s each (O79), of at most 16.
_START_SECONDS = 10.0
ACTIVE, FAULT, INITIALIZING = "ACTIVE", "FAULT", "INITIALIZING"
#: Our word for a server that ended unasked, so that its daemon lists it no more; the next client gets another (O31).
DIED = "DIED"
#: Our word for a server of a driver that does not report how it is: 535, which has no get_server_status (O83).
RUNNING = "RUNNING"
HEALTHY = (ACTIVE, RUNNING)
_NO_STATUS = 'Unknown command "get_server_status"'


@dataclass(frozen=True)
class Server:
    """An MPS server: its state in the daemon's word, and what percentage of a GPU's threads it gives a client.

    The state is RUNNING where the driver reports none. A server that was there is DIED, without a percentage.
    """

    pid: int
    state: str
    threads: str


@dataclass(frozen=True)
class Client:
    """A client on one GPU, as the control program's ``ps`` lists it; gpu: a UUID, "" for one that is not known here."""

    pid: int
    server: int
    gpu: str
    command: str


@dataclass(frozen=True)
class DaemonAnswer:
    """pid: None when nobody listens. problem: why it did not answer, or not all; empty when it did.

    clients: None when it was not asked for them.
    """

    pid: int | None
    problem: str
    servers: tuple[Server, ...] = ()
    clients: tuple[Client, ...] | None = ()


class Memory:
    """Earlier answers of control daemons, for a caller that looks again and again.

    Each question is some lines in a daemon's log, which has a bound (O49). A daemon is asked anew when NVML lists
    other clients than it did then, when a server had a fault, when the daemon is another process, and from time to
    time.
    """

    def __init__(self) -> None:
        self._answers: dict[str, tuple[float, ProcessIdentity | None, frozenset[int] | None, DaemonAnswer]] = {}

    def recall(self, place: DaemonPlace, clients: frozenset[int] | None) -> DaemonAnswer | None:
        """The earlier answer, if it still holds; `clients` are those that NVML lists on the daemon's GPUs, None if it
        lists none.
        """
        when, process, then, answer = self._answers.get(place.pipe_directory, (0.0, None, None, None))
        if answer is None or answer.problem or process is None or identify(process.pid) != process:
            return None
        if clients != then or any(server.state not in HEALTHY or not identify(server.pid) for server in answer.servers):
            return None
        return answer if monotonic() - when < (_ANEW_SECONDS if clients is not None else _BLIND_SECONDS) else None

    def keep(self, place: DaemonPlace, clients: frozenset[int] | None, answer: DaemonAnswer) -> None:
        process = identify(answer.pid) if answer.pid else None
        self._answers[place.pipe_directory] = (monotonic(), process, clients, answer)


def ask(place: DaemonPlace, program: str, timeout_seconds: float, *, listing: bool = True) -> DaemonAnswer:
    """Ask a control daemon, twice at most, and with `listing` for its clients; each time may take `timeout_seconds`."""
    pid = listener(place.pipe_directory)
    if pid is None:
        return DaemonAnswer(None, "its control daemon is gone")
    daemon = ControlDaemon(program, place.pipe_directory, place.log_directory)
    questions = ["get_server_list", _MARK, "ps"] if listing else ["get_server_list"]
    try:
        pids, listed = parse_clients(daemon.command(questions, timeout_seconds), place.gpus)
    except MpsError as error:
        return DaemonAnswer(pid, f"its control daemon does not answer: {error.message}")
    clients = listed if listing else None
    if not pids:
        return DaemonAnswer(pid, "", _dead_server(place))
    questions = [
        f"{what} {server}" for server in pids for what in ("get_server_status", "get_active_thread_percentage")
    ]
    try:
        answers = daemon.command(questions, timeout_seconds)
    except MpsError:
        if not clients and all(map(_is_young, pids)):
            return DaemonAnswer(pid, "", tuple(Server(server, INITIALIZING, "") for server in pids), clients)
        silent = tuple(Server(server, "", "") for server in pids)
        return DaemonAnswer(
            pid, f"its MPS server did not report its state within {timeout_seconds:g} s", silent, clients
        )
    return DaemonAnswer(pid, "", parse_servers(pids, answers), clients)


def _is_young(server: int) -> bool:
    """Whether a server may still be starting: until it is ACTIVE, get_server_status has no answer (O26)."""
    process = identify(server)
    return process is not None and age_seconds(process) < _START_SECONDS


def _dead_server(place: DaemonPlace) -> tuple[Server, ...]:
    """The server that a daemon without one had last, by its log, where that died; nothing where we cannot tell."""
    try:
        events = events_of(DaemonLogs(place.name, place.log_directory), limit_bytes=_LOG_BYTES)
    except (MpsError, OSError):
        return ()
    last = next((event for event in reversed(events) if event.kind in (SERVER_READY, SERVER_DIED)), None)
    return (Server(last.pid, DIED, ""),) if last and last.kind == SERVER_DIED else ()


def parse_clients(lines: Sequence[str], gpus: Sequence[str]) -> tuple[tuple[int, ...], tuple[Client, ...]]:
    """Read the answers to ``get_server_list`` and ``ps``. Pure."""
    servers: list[int] = []
    clients: list[Client] = []
    marked = False
    for line in lines:
        words = line.split(None, 5)
        pid = small_number(line.strip())
        if not marked and _PERCENTAGE.fullmatch(line.strip()):
            marked = True
        elif not marked and pid is not None:
            servers.append(pid)
        elif marked and len(words) >= 5:
            clients += _client(words, gpus)
    return tuple(servers), tuple(clients[:_CLIENTS_MAX])


def _client(words: Sequence[str], gpus: Sequence[str]) -> list[Client]:
    """A row of ``ps``, whose UUIDs are cut to 22 characters (O32); nothing for another line."""
    pid, server = small_number(words[0]), small_number(words[2])
    if pid is None or server is None:
        return []
    known = [gpu for gpu in gpus if gpu.startswith(words[3])]
    command = words[5].strip() if len(words) > 5 else ""
    return [Client(pid, server, known[0] if len(known) == 1 else "", command)]


def parse_servers(pids: Sequence[int], lines: Sequence[str]) -> tuple[Server, ...]:
    """Read two answers for each server, its state and its percentage; one that went meanwhile has none. Pure."""
    answers = [line.strip() for line in lines]
    states = [RUNNING if line == _NO_STATUS else line for line in answers if line.isupper() or line == _NO_STATUS]
    percentages = [line for line in answers if _PERCENTAGE.fullmatch(line)]
    if len(states) != len(pids) or len(percentages) != len(pids):
        return tuple(Server(pid, "", "") for pid in pids)
    return tuple(Server(*one) for one in zip(pids, states, percentages, strict=True))
