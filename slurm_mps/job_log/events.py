"""Events from the log lines of a control daemon and its servers. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from heapq import merge
from operator import attrgetter

from ..record import record
from .lines import Line

#: Kinds of events.
DAEMON_STARTED, DAEMON_ENDED = "daemon started", "daemon ended"
SERVER_STARTED, SERVER_READY, SERVER_ENDED = "server started", "server ready", "server ended"
SERVER_DIED, SERVER_FORCED, SERVER_FAILED = "server died", "server forced", "server failed"
CONNECTED, CONTEXT, LEFT, TERMINATED = "connected", "context", "left", "terminated"
FAULT, REFUSED, FULL = "fault", "refused", "full"

_FAULT_LINES_SECONDS = 2.0
_PIDS_MAX = 1024
_CLIENTS_MAX = 65536
_CLIENT = re.compile(r"\{PID: (\d{1,9}), Context(?: ID)?: (\d{1,9})\}")
_UUID = re.compile(r"\(uuid ((?:GPU|MIG)-[0-9a-f-]{36})\) is associated")
_NUMBER = re.compile(r"\d{1,9}")
_PINNED = re.compile(r"Device pinned memory limit for device (\d{1,3}) set to 0x([0-9a-f]{1,16}) bytes")
_THREADS = re.compile(r"Active Threads Percentage set to (\d{1,3}\.\d)")


@record
class Event:
    """One thing that happened. pid: of the daemon, server or client that it happened to; 0 where the log does not say.

    server: whose log it is. uid: of the client or server; -1 where the log does not say. gpu: a UUID; device: a GPU by
    the daemon's count, -1 for none. number: an exit status, a CUDA error, how many clients there are room for.
    culprits: the clients that the server names for a fault; pids: all that it took (the culprits among them).
    threads, memory: what a server gives each client: percent, and (device, bytes) where that is limited.
    """

    seconds: float
    kind: str
    pid: int = 0
    server: int = 0
    uid: int = -1
    gpu: str = ""
    device: int = -1
    number: int = 0
    culprits: tuple[int, ...] = ()
    pids: tuple[int, ...] = ()
    threads: str = ""
    memory: tuple[tuple[int, int], ...] = ()
    age_seconds: float = -1.0  #: of a fault: how long its culprit had had its context; -1 where that is not known


_Handlers = tuple[tuple[str, Callable[["_Reader", Line], None]], ...]


class _Client:
    def __init__(self, uid: int = -1) -> None:
        self.uid = uid
        self.active_since = -1.0


class _Fault:
    def __init__(self, line: Line) -> None:
        self.seconds = line.seconds
        self.server = line.pid
        self.culprits: list[int] = []
        self.pids: dict[int, None] = {}  #: in the order of the log
        self.devices: list[int] = []
        self.handled = False
        self.age_seconds = -1.0


class _Reader:
    """Reads one daemon's lines in the order of time; `events` is what has happened so far.

    The job's user can write most lines, and as many as the log holds: what is done for one does not grow with those
    before it.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._clients: dict[int, _Client] = {}
        self._waiting: dict[int, dict[int, str]] = {}  #: by pid, contexts that are not active yet, and their GPUs
        self._without_gpu: dict[tuple[int, int], None] = {}  #: those among them whose GPU is not known
        self._asked: set[int] = set()  #: servers that were asked to end, and did not report that they stay
        self._forced: set[int] = set()  #: servers that were not asked
        self._ready: set[int] = set()
        self._fault: _Fault | None = None
        self._limits: dict[int, tuple[str, list[tuple[int, int]]]] = {}

    def _add(self, line: Line, kind: str, pid: int, **more: object) -> None:
        server = line.pid if line.who == "Server" else 0
        self.events.append(Event(line.seconds, kind, pid, server, **more))  # type: ignore[arg-type]

    def read(self, line: Line) -> None:
        if line.who == "Other":
            return
        for beginning, handle in self._CONTROL if line.who == "Control" else self._SERVER:
            if line.text.startswith(beginning):
                handle(self, line)
                return

    # ------------------------------------------------------------------------------------------- the control daemon

    def _server_started(self, line: Line) -> None:
        numbers = _numbers(line.text)
        if len(numbers) == 2:
            self._add(line, SERVER_STARTED, numbers[0], uid=numbers[1])

    def _server_forced(self, line: Line) -> None:
        server = _first_number(line.text)
        self._forced.add(server)
        self._add(line, SERVER_FORCED, server)

    def _about_server(self, line: Line) -> None:
        """``Server N exited with status S``, ``Server N has 2 active worker threads. Server will not shutdown.``"""
        server = _first_number(line.text)
        if "will not shutdown" in line.text:
            self._asked.discard(server)
        if " exited with status " not in line.text:
            return
        expected = server in self._asked or server in self._forced
        kind = SERVER_ENDED if expected else SERVER_DIED if server in self._ready else SERVER_FAILED
        self._add(line, kind, server, number=_numbers(line.text)[-1])

    def _server_failed(self, line: Line) -> None:
        self._add(line, SERVER_FAILED, line.pid, uid=_first_number(line.text))

    def _new_client(self, line: Line) -> None:
        numbers = _numbers(line.text)
        if len(numbers) >= 2:
            self._client(numbers[0]).uid = numbers[1]

    # -------------------------------------------------------------------------------------------------- the server

    def _client(self, pid: int) -> _Client:
        if pid not in self._clients:
            if len(self._clients) >= _CLIENTS_MAX:
                self._forget(next(iter(self._clients)))
            self._clients[pid] = _Client()
        return self._clients[pid]

    def _forget(self, pid: int) -> _Client:
        for context in self._waiting.pop(pid, {}):
            self._without_gpu.pop((pid, context), None)
        return self._clients.pop(pid, _Client())

    def _of_client(self, line: Line) -> None:
        """Lines that begin with ``Client {PID: ``."""
        found = _CLIENT.search(line.text)
        if not found:
            return
        pid, context = int(found[1]), int(found[2])
        rest = line.text[found.end() :]
        if rest == " connected":
            self._connected(line, pid, context)
        elif rest.startswith(" encountered a fatal GPU error"):
            self._culprit(line, pid)
        elif rest.startswith(" on device ") and rest.endswith(" to be torn down"):
            self._victim(line, pid, _first_number(rest))

    def _connected(self, line: Line, pid: int, context: int) -> None:
        if context == 0:
            uid = self._forget(pid).uid
            self._client(pid).uid = uid
            self._add(line, CONNECTED, pid, uid=uid)
            return
        self._client(pid)
        waiting = self._waiting.setdefault(pid, {})
        if len(waiting) < _PIDS_MAX:
            waiting[context] = ""
            self._without_gpu[pid, context] = None

    def _associated(self, line: Line) -> None:
        """Says no pid: it is the one client's that waits, if one does."""
        found = _UUID.search(line.text)
        if found and len(self._without_gpu) == 1:
            (pid, context), _ = self._without_gpu.popitem()
            self._waiting[pid][context] = found[1]

    def _is_active(self, line: Line) -> None:
        found = _CLIENT.search(line.text)
        if found and line.text.endswith(" is ACTIVE"):
            pid, context = int(found[1]), int(found[2])
            self._client(pid).active_since = line.seconds
            waiting = self._waiting.get(pid, {})
            gpu = waiting.pop(context, "")
            self._without_gpu.pop((pid, context), None)
            if not waiting:
                self._waiting.pop(pid, None)
            self._add(line, CONTEXT, pid, gpu=gpu)

    def _left(self, line: Line) -> None:
        pid = _first_number(line.text)
        self._add(line, LEFT, pid, uid=self._forget(pid).uid)

    def _terminated(self, line: Line) -> None:
        found = _CLIENT.search(line.text)
        if found:
            self._add(line, TERMINATED, int(found[1]))

    def _full(self, line: Line) -> None:
        pid = next(iter(self._waiting)) if len(self._waiting) == 1 else 0
        self._add(line, FULL, pid, number=_first_number(line.text))

    def _not_accepted(self, line: Line) -> None:
        """``Failed to accept new client. Maximum …`` or ``Failed to accept client {PID: …} with status 807``"""
        found = _CLIENT.search(line.text)
        if found:
            self._add(line, REFUSED, int(found[1]), number=_numbers(line.text)[-1])
        elif "Maximum number of clients" in line.text:
            self._full(line)

    def _gives_threads(self, line: Line) -> None:
        found = _THREADS.fullmatch(line.text)
        if found:
            self._limits[line.pid] = (found[1], [])

    def _gives_memory(self, line: Line) -> None:
        found = _PINNED.fullmatch(line.text)
        if found and line.pid in self._limits and len(self._limits[line.pid][1]) < 64:
            self._limits[line.pid][1].append((int(found[1]), int(found[2], 16)))

    def _has_started(self, line: Line) -> None:
        threads, memory = self._limits.pop(line.pid, ("", []))
        self._ready.add(line.pid)
        self._add(line, SERVER_READY, line.pid, threads=threads, memory=tuple(memory))

    # --------------------------------------------------------------------------------------------------- a fault

    def _open_fault(self, line: Line, *, handled: bool) -> _Fault:
        """The fault that a line belongs to: those of one come together."""
        fault = self._fault
        if fault and (
            fault.server != line.pid
            or line.seconds - fault.seconds > _FAULT_LINES_SECONDS
            or (fault.handled and not handled and not fault.pids)
        ):
            self.finish()
            fault = None
        if fault is None:
            fault = self._fault = _Fault(line)
        return fault

    def _culprit(self, line: Line, pid: int) -> None:
        if self._fault and self._fault.pids:
            self.finish()
        fault = self._open_fault(line, handled=False)
        since = self._client(pid).active_since
        if not fault.culprits and since >= 0:
            fault.age_seconds = line.seconds - since
        if len(fault.culprits) < _PIDS_MAX:
            fault.culprits.append(pid)

    def _handles(self, line: Line) -> None:
        if self._fault and self._fault.handled:
            self.finish()
        self._open_fault(line, handled=True).handled = True

    def _victim(self, line: Line, pid: int, device: int) -> None:
        fault = self._open_fault(line, handled=True)
        if pid not in fault.pids and len(fault.pids) < _PIDS_MAX:
            fault.pids[pid] = None
        if device not in fault.devices and len(fault.devices) < 64:
            fault.devices.append(device)

    def finish(self) -> None:
        """The lines of the fault at hand have ended."""
        fault, self._fault = self._fault, None
        if fault is None:
            return
        for device in fault.devices or [-1]:
            self.events.append(
                Event(
                    fault.seconds,
                    FAULT,
                    fault.culprits[0] if fault.culprits else 0,
                    fault.server,
                    device=device,
                    culprits=tuple(fault.culprits),
                    pids=tuple(fault.pids or fault.culprits),
                    age_seconds=fault.age_seconds,
                )
            )

    #: What to do about a line, by how it begins.
    _CONTROL: _Handlers = (
        ("NEW CLIENT ", _new_client),
        ("Starting new server ", _server_started),
        ("NEW SERVER ", lambda self, line: self._ready.add(_first_number(line.text))),
        ("Try shutting down server ", lambda self, line: self._asked.add(_first_number(line.text))),
        ("Force shutting down server ", _server_forced),
        ("Failed to start server ", _server_failed),
        ("Server ", _about_server),
        ("Starting control daemon ", lambda self, line: self._add(line, DAEMON_STARTED, line.pid)),
        (
            "Exit with status ",
            lambda self, line: self._add(line, DAEMON_ENDED, line.pid, number=_first_number(line.text)),
        ),
    )
    _SERVER: _Handlers = (
        ("Client {", _of_client),
        ("Client process ", _left),
        ("Status of client ", _is_active),
        ("Device pinned memory limit ", _gives_memory),
        ("Device ", _associated),
        ("Server is handling a fatal GPU error", _handles),
        ("MPS server requesting client ", _terminated),
        ("Failed to accept ", _not_accepted),
        ("Active Threads Percentage ", _gives_threads),
        ("Server has started", _has_started),
        ("Server has been notified to shutdown", lambda self, line: self._asked.add(line.pid)),
        ("Server was unable to shutdown", lambda self, line: self._asked.discard(line.pid)),
    )


def _numbers(text: str) -> list[int]:
    return [int(number) for number in _NUMBER.findall(text)]


def _first_number(text: str) -> int:
    found = _NUMBER.search(text)
    return int(found[0]) if found else 0


def read_events(control: Iterable[Line], server: Iterable[Line]) -> list[Event]:
    """The events of one control daemon's two logs, in the order of time."""
    reader = _Reader()
    for line in merge(control, server, key=attrgetter("seconds")):
        reader.read(line)
    reader.finish()
    return sorted(reader.events, key=attrgetter("seconds"))
