"""How the ranks of a step reach rank 0 without MPI: each has one connection to it, and lines of JSON go over that.

All ranks on one node: a socket in Linux's abstract namespace, where the kernel tells the other side's uid. Several
nodes: TCP. Rank 0 takes the first free one of a few ports that follow from the step's name, and the others try them at
each address that rank 0 may have: its name, the address that Slurm gives for the node the step was launched from,
and the loopback for its neighbours. No variable of a step tells more, and asking slurmctld would load it.

Trust: over TCP a report is taken from whoever knows the step's name and what is in a task's environment, which is no
secret. Somebody on the cluster's network who tries can therefore make ``verify`` print a wrong report; more than that
they cannot do: one report a rank, the first one counts, sizes are bounded, nothing but JSON of known form is read, and
what is printed is made printable. Every wait has a deadline.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import zlib
from time import monotonic, sleep

from ..record import record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Protocol

    from .report import Message
    from .step import Step

    class Link(Protocol):
        """What rank 0 and the others need of one another. Deadlines count as ``time.monotonic()`` does.

        through: ``slurm`` or ``mpi``.
        """

        through: str

        def gather(self, mine: Message, deadline: float) -> dict[int, Message]:
            """Bring a message of each rank to rank 0; those that came in time. Nothing on other ranks.

            Who has missed one is not waited for again.
            """

        def broadcast(self, message: Message, deadline: float) -> Message:
            """Bring rank 0's message to all. Raises: LinkError on a rank that it does not reach in time."""

        def close(self) -> None: ...


LINE_MAX = 262144
ROUNDS = 2  # messages that a rank has to say
PLACES = 8
FIRST_PORT, PORTS = 20000, 12000  # below the ports that Linux gives to programs that do not care (32768)
_CONNECT_SECONDS = 0.5
_PAUSE_SECONDS = 0.02
_NAME_SECONDS = 0.5
_SEND_SECONDS = 2.0
_STRANGERS = 64


class LinkError(Exception):
    """Rank 0 was not reached, or no longer answers."""


@record
class Meeting:
    """Where the ranks of one step meet, and how they know one another; the same on all of them."""

    names: tuple[str, ...]
    ports: tuple[int, ...]
    watchword: str


def meeting(step: Step, environment: Mapping[str, str], uid: int) -> Meeting:
    shared = ("SLURM_STEP_LAUNCHER_PORT", "SLURM_SRUN_COMM_PORT", "SLURM_WORKING_CLUSTER")
    watchword = " ".join((step.name, str(uid), *(environment.get(name, "") for name in shared)))
    names = tuple(f"\0slurm-mps-verify/{step.name}/{uid}/{number}" for number in range(PLACES))
    ports = tuple(FIRST_PORT + zlib.crc32(f"{number} {watchword}".encode()) % PORTS for number in range(PLACES))
    return Meeting(names, ports, watchword)


def open_link(step: Step, environment: Mapping[str, str], deadline: float) -> Link:
    """Rank 0 listens and returns at once; the others return when they have reached it.

    Raises: LinkError when that is not before the deadline.
    """
    place = meeting(step, environment, os.getuid())
    local = len(step.hosts) == 1
    if step.rank == 0:
        return RootLink(step.size, place, _listen(place, local, step.size) if step.size > 1 else None)
    return RankLink(step.rank, place, _Way(step, place, local), deadline)


def _listen(place: Meeting, local: bool, size: int) -> socket.socket:
    family = socket.AF_UNIX if local else socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    addresses = place.names if local else tuple(("", port) for port in place.ports)
    for address in addresses:
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            if not local:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(size + _STRANGERS)
            return listener
        except OSError:
            listener.close()
    raise LinkError("rank 0 finds no free port to listen on")


def _is_ours(connection: socket.socket) -> bool:
    """Whether the other side is a process of this user; over TCP nobody knows."""
    if connection.family != socket.AF_UNIX:
        return True
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1]) == os.getuid()


def _encode(message: Message) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def _decode(line: bytes) -> Message:
    """Raises: LinkError when the line is no JSON object."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise LinkError("what came is no message of a rank")
    return message


class _Peer:
    """One connection, read line by line."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.rank = -1
        self._buffer = b""

    def receive(self) -> list[bytes]:
        """The whole lines that a ready connection has brought.

        Raises: LinkError when it was closed, or brings more without a line end than any message has.
        """
        try:
            chunk = self.connection.recv(65536)
        except OSError:
            chunk = b""
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        if not chunk or len(self._buffer) > LINE_MAX:
            raise LinkError("the connection was closed")
        return lines

    def send(self, message: Message) -> None:
        self.connection.settimeout(_SEND_SECONDS)
        try:
            self.connection.sendall(_encode(message))
        except OSError:
            raise LinkError("the connection was closed") from None


class RootLink:
    """Rank 0's side."""

    through = "slurm"

    def __init__(self, size: int, place: Meeting, listener: socket.socket | None) -> None:
        self._size = size
        self._place = place
        self._listener = listener
        self._peers: dict[int, _Peer] = {}  # by descriptor
        self._admitted: set[int] = set()
        self._awaited = set(range(1, size))
        self._inbox: dict[int, list[Message]] = {}
        self._poll = select.poll()
        if listener:
            self._poll.register(listener, select.POLLIN)

    def gather(self, mine: Message, deadline: float) -> dict[int, Message]:
        while not self._complete() and monotonic() < deadline:
            for fd, _ in self._poll.poll(max(0, int((deadline - monotonic()) * 1000) + 1)):
                if self._listener and fd == self._listener.fileno():
                    self._accept(self._listener)
                elif fd in self._peers:
                    self._hear(self._peers[fd])
        found = {rank: box.pop(0) for rank, box in self._inbox.items() if box}
        self._awaited &= found.keys()
        return {0: mine, **found}

    def _complete(self) -> bool:
        """Whether every rank that is waited for has said its word, or has come and gone without one."""
        there = {peer.rank for peer in self._peers.values()}
        waiting = (rank for rank in self._awaited if not self._inbox.get(rank))
        return all(rank in self._admitted and rank not in there for rank in waiting)

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        strangers = sum(peer.rank < 0 for peer in self._peers.values())
        if strangers > self._size + _STRANGERS or not _is_ours(connection):
            connection.close()
            return
        self._peers[connection.fileno()] = _Peer(connection)
        self._poll.register(connection, select.POLLIN)

    def _hear(self, peer: _Peer) -> None:
        try:
            for line in peer.receive():
                if peer.rank < 0:
                    self._admit(peer, _decode(line))
                elif len(self._inbox.setdefault(peer.rank, [])) < ROUNDS:
                    self._inbox[peer.rank].append(_decode(line))
        except LinkError:
            self._drop(peer)

    def _admit(self, peer: _Peer, hello: Message) -> None:
        """Raises: LinkError when it does not know the step, or says to be a rank that has come before."""
        rank = hello.get("rank")
        known = type(rank) is int and 0 < rank < self._size and rank not in self._admitted
        if not known or hello.get("step") != self._place.watchword:
            raise LinkError("not a rank of this step")
        peer.rank = int(str(rank))
        self._admitted.add(peer.rank)
        peer.send({"step": self._place.watchword, "to": rank})

    def _drop(self, peer: _Peer) -> None:
        fd = peer.connection.fileno()
        self._poll.unregister(fd)
        del self._peers[fd]
        peer.connection.close()

    def broadcast(self, message: Message, deadline: float) -> Message:
        for peer in [peer for peer in self._peers.values() if peer.rank > 0 and monotonic() < deadline]:
            try:
                peer.send(message)
            except LinkError:
                self._drop(peer)
        return message

    def close(self) -> None:
        for peer in list(self._peers.values()):
            self._drop(peer)
        if self._listener:
            self._listener.close()


class RankLink:
    """The side of all other ranks."""

    through = "slurm"

    def __init__(self, rank: int, place: Meeting, way: _Way, deadline: float) -> None:
        self._rank = rank
        self._place = place
        while True:
            for connection in way.connections():
                self._peer = _Peer(connection)
                self._unread: list[bytes] = []
                if self._greet(deadline):
                    return
                connection.close()
            if monotonic() > deadline:
                raise LinkError(f"rank 0 could not be reached at {way}")
            sleep(_PAUSE_SECONDS)

    def _greet(self, deadline: float) -> bool:
        """Say who we are and see that it is rank 0 of this step who answers."""
        try:
            self._peer.send({"rank": self._rank, "step": self._place.watchword})
            return self._receive(deadline) == {"step": self._place.watchword, "to": self._rank}
        except LinkError:
            return False

    def _receive(self, deadline: float) -> Message:
        poll = select.poll()
        poll.register(self._peer.connection, select.POLLIN)
        while not self._unread:
            if monotonic() >= deadline:
                raise LinkError("rank 0 does not answer")
            if poll.poll(max(0, int((deadline - monotonic()) * 1000) + 1)):
                self._unread += self._peer.receive()
        return _decode(self._unread.pop(0))

    def gather(self, mine: Message, deadline: float) -> dict[int, Message]:
        del deadline
        self._peer.send(mine)
        return {}

    def broadcast(self, message: Message, deadline: float) -> Message:
        del message
        return self._receive(deadline)

    def close(self) -> None:
        self._peer.connection.close()


class _Way:
    """Every address at which rank 0 may listen, the likely ones first. Names are resolved while others are tried."""

    def __init__(self, step: Step, place: Meeting, local: bool) -> None:
        self._names = place.names if local else ()
        self._ports = place.ports
        neighbour = ["127.0.0.1"] if step.node_id == 0 else []
        self._hosts = neighbour if neighbour or local else list(step.launch_addresses)
        if not local and not neighbour:
            self._resolve(step.hosts[0])

    def __str__(self) -> str:
        return ", ".join(self._hosts) or "the place where this node's ranks meet"

    def _resolve(self, name: str) -> None:
        """Put the addresses of the name in front; a resolver that hangs does not hang us."""
        import _thread

        done = _thread.allocate_lock()
        done.acquire()

        def resolve() -> None:
            try:
                found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
                known = [str(address[0]) for *_, address in found]
                self._hosts = list(dict.fromkeys(known + self._hosts))
            except OSError:
                pass
            finally:
                done.release()

        _thread.start_new_thread(resolve, ())
        done.acquire(timeout=_NAME_SECONDS)

    def connections(self) -> Iterator[socket.socket]:
        """Each connection that comes about, to whomever."""
        for name in self._names:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.settimeout(_CONNECT_SECONDS)
                connection.connect(name)
            except OSError:
                connection.close()
                continue
            if _is_ours(connection):
                yield connection
            else:
                connection.close()
        for port in self._ports if self._hosts else ():
            for host in list(self._hosts):
                try:
                    yield socket.create_connection((host, port), timeout=_CONNECT_SECONDS)
                except OSError:
                    continue
