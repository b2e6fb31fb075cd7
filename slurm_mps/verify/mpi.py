"""How the ranks of a step that was started with an MPI reach rank 0: through mpi4py."""

from __future__ import annotations

from time import monotonic, sleep

from .link import LinkError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from .report import Message
    from .step import Step

_STARTED_BY_MPI = ("PMI_RANK", "PMI_FD", "PMIX_RANK", "PMIX_NAMESPACE")
_TAG = 17
_PAUSE_SECONDS = 0.002


def open_mpi_link(step: Step, environment: Mapping[str, str]) -> MpiLink | None:
    """The step's own MPI; None without one: not started by one, no mpi4py, or one that sees another number of ranks."""
    if not any(name in environment for name in _STARTED_BY_MPI):
        return None
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        return None
    return MpiLink(MPI.COMM_WORLD, MPI.ANY_SOURCE) if MPI.COMM_WORLD.size == step.size else None


class MpiLink:
    """Messages one by one rather than collectives, whose waits have no deadline and name nobody."""

    through = "mpi"

    def __init__(self, world: Any, any_source: int) -> None:
        self._world = world
        self._any_source = any_source
        self._sent: list[Any] = []
        self._inbox: dict[int, list[Message]] = {}
        self._awaited = set(range(1, world.size))

    def gather(self, mine: Message, deadline: float) -> dict[int, Message]:
        if self._world.rank:
            self._sent.append(self._world.isend(mine, 0, _TAG))
            return {}
        while not all(self._inbox.get(rank) for rank in self._awaited) and monotonic() < deadline:
            if self._world.iprobe(self._any_source, _TAG):
                self._receive()
            else:
                sleep(_PAUSE_SECONDS)
        found = {rank: box.pop(0) for rank, box in self._inbox.items() if box}
        self._awaited &= found.keys()
        return {0: mine, **found}

    def _receive(self) -> None:
        from mpi4py import MPI

        status = MPI.Status()
        message = self._world.recv(source=self._any_source, tag=_TAG, status=status)
        self._inbox.setdefault(status.Get_source(), []).append(message)

    def broadcast(self, message: Message, deadline: float) -> Message:
        if self._world.rank == 0:
            self._sent += [self._world.isend(message, rank, _TAG) for rank in range(1, self._world.size)]
            return message
        while not self._world.iprobe(0, _TAG):
            if monotonic() > deadline:
                raise LinkError("rank 0 does not answer")
            sleep(_PAUSE_SECONDS)
        answer: Message = self._world.recv(source=0, tag=_TAG)
        return answer

    def close(self) -> None:
        """MPI's own end waits for all ranks; where some never came it is cut short."""
        if len(self._awaited) < self._world.size - 1:
            self._world.Abort(1)
