"""Events in plain words. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..units import describe_memory
from . import events as kinds
from .events import Event

#: Kinds of events that are failures.
TROUBLE = frozenset(
    [
        *(kinds.FAULT, kinds.REFUSED, kinds.FULL, kinds.TERMINATED),
        *(kinds.SERVER_DIED, kinds.SERVER_FAILED, kinds.SERVER_FORCED),
    ]
)
_NAMED = 16
_REASONS = {
    807: "programs that a GPU fault hit had not ended yet",
    808: "it has as many programs as it takes",
}


def describe(event: Event, gpus: Sequence[str], name: Callable[[int], str]) -> str:
    """One event as a sentence; `gpus`: the daemon's in its order, or none; `name` says what a client is called."""
    return _SENTENCES[event.kind](event, gpus, name)


def _names(pids: Sequence[int], name: Callable[[int], str]) -> str:
    more = f" and {len(pids) - _NAMED} more" if len(pids) > _NAMED else ""
    return ", ".join(name(pid) for pid in pids[:_NAMED]) + more


def _device(event: Event, gpus: Sequence[str]) -> str:
    if 0 <= event.device < len(gpus):
        return gpus[event.device]
    return f"GPU {event.device} of this daemon" if event.device >= 0 else "a GPU"


def _ready(event: Event, gpus: Sequence[str], _name: Callable[[int], str]) -> str:
    limits = [f"{event.threads} % of the threads"] if event.threads else []
    for device, size in event.memory:
        gpu = gpus[device] if device < len(gpus) else f"GPU {device}"
        limits.append(f"{describe_memory(size)} of {gpu}")
    gives = f"; each client gets at most {', '.join(limits)}" if limits else ""
    return f"server {event.pid} is up{gives}"


def _connected(event: Event, _gpus: Sequence[str], name: Callable[[int], str]) -> str:
    uid = f" of uid {event.uid}" if event.uid >= 0 else ""
    return f"{name(event.pid)}{uid} connected"


def _context(event: Event, _gpus: Sequence[str], name: Callable[[int], str]) -> str:
    return f"{name(event.pid)} has a context on {event.gpu or 'a GPU'}"


def _fault(event: Event, gpus: Sequence[str], name: Callable[[int], str]) -> str:
    where = f"GPU FAULT on {_device(event, gpus)}"
    if not event.culprits:
        return f"{where}, the server does not say whose: it ended {_names(event.pids, name)}"
    others = [pid for pid in event.pids if pid not in event.culprits]
    along = f" and took {_names(others, name)} along" if others else ""
    soon = (
        f"; {event.age_seconds:.3f} s after its context was made: one killed inside a kernel before it leaves this, too"
    )
    return f"{where} by {_names(event.culprits, name)}{along}{soon if 0 <= event.age_seconds < 0.5 else ''}"


def _refused(event: Event, _gpus: Sequence[str], name: Callable[[int], str]) -> str:
    reason = f": {_REASONS[event.number]}" if event.number in _REASONS else ""
    return f"the server REFUSED {name(event.pid)} (CUDA error {event.number}){reason}"


def _full(event: Event, _gpus: Sequence[str], name: Callable[[int], str]) -> str:
    who = name(event.pid) if event.pid else "a program"
    return f"the server REFUSED {who} (CUDA error 808): it has {event.number} on that GPU and takes no more"


_SENTENCES: dict[str, Callable[[Event, Sequence[str], Callable[[int], str]], str]] = {
    kinds.DAEMON_STARTED: lambda event, _g, _n: f"control daemon {event.pid} started",
    kinds.DAEMON_ENDED: lambda event, _g, _n: f"control daemon {event.pid} ended (status {event.number})",
    kinds.SERVER_STARTED: lambda event, _g, _n: f"server {event.pid} is started for uid {event.uid}",
    kinds.SERVER_READY: _ready,
    kinds.SERVER_ENDED: lambda event, _g, _n: f"server {event.pid} ended, as requested",
    kinds.SERVER_DIED: lambda event, _g, _n: (
        f"server {event.pid} DIED, and its clients lost what they had on the GPU (CUDA error 806)"
    ),
    kinds.SERVER_FORCED: lambda event, _g, _n: f"server {event.pid} was ended although it had clients",
    kinds.SERVER_FAILED: lambda event, _g, _n: f"server {event.pid} could NOT BE STARTED (CUDA error 805)",
    kinds.CONNECTED: _connected,
    kinds.CONTEXT: _context,
    kinds.LEFT: lambda event, _g, name: f"{name(event.pid)} left",
    kinds.TERMINATED: lambda event, _g, name: (
        f"{name(event.pid)} was ENDED through the control daemon, by terminate_client (CUDA error 810)"
    ),
    kinds.FAULT: _fault,
    kinds.REFUSED: _refused,
    kinds.FULL: _full,
}
