"""Why tasks of a step ended badly, as far as MPS explains it: one sentence for each cause. Pure."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence

from ..record import record
from ..slurm.hostlist import join_numbers
from ..units import MIB, describe_memory
from .events import (
    CONNECTED,
    CONTEXT,
    DAEMON_ENDED,
    DAEMON_STARTED,
    FAULT,
    FULL,
    LEFT,
    REFUSED,
    SERVER_DIED,
    SERVER_FAILED,
    SERVER_READY,
    TERMINATED,
    Event,
)

AUTO = "auto"
#: A fault that comes so soon after its client's context may be what a killed predecessor left (O67: after 0.16 s).
_SOON_SECONDS = 0.5
_SAME_MOMENT_SECONDS = 0.0015  # the logs count milliseconds
#: The log may say as late after the fault that a killed client has left (O100).
_LEAVES_WITHIN_SECONDS = 2.0
_NAMED_PIDS = 8
_NOT_READY = 807
#: What no log says: of a daemon that SIGKILL ended none has a line (O65).
VANISHED = (
    "the MPS control daemon on this node is gone, and its server with it (CUDA error 806); its log does not say why"
)
_ENDED_BY_SOMEBODY = (1, 2, 9, 15)  # SIGHUP, SIGINT, SIGKILL, SIGTERM; the signal module is slow to import


@record
class Task:
    """A task of the step on this node: its rank, its pid, and how it ended as wait(2) says it; None: it runs."""

    rank: int
    pid: int
    status: int | None

    @property
    def failed(self) -> bool:
        """Whether it ended badly, and of itself."""
        if not self.status:
            return False
        return not (os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) in _ENDED_BY_SOMEBODY)


@record
class Seen:
    """What one control daemon's logs say since the step began; `gpus` are its own, in its order."""

    gpus: tuple[str, ...]
    events: Sequence[Event]
    gone: bool  #: nobody listens any more
    ended: Event | None  #: the daemon's end, by its own word
    joined: bool = False  #: jobs are joined on it: other jobs' programs are its clients, too


def seen_since(
    since_seconds: float,
    gpus: tuple[str, ...],
    *,
    gone: bool,
    events: Sequence[Event],
    explained: bool = False,
    joined: bool = False,
) -> Seen:
    """What a daemon's logs say since then to the tasks of a step; `events` are all that the logs have.

    Earlier events explain later ones: which server was ready, that the daemon ended. With `explained` the tasks are a
    script, one of whose steps explained a failure then: a daemon that is gone was gone before, unless its logs go on.
    """
    lives = [event for event in events if event.kind in (DAEMON_STARTED, DAEMON_ENDED)]
    ended = lives[-1] if lives and lives[-1].kind == DAEMON_ENDED else None
    news = [event for event in events if event.seconds >= since_seconds]
    return Seen(gpus, news, gone and bool(news or not explained), ended, joined)


@record
class FailedStep:
    """A step whose tasks ended badly on this node, or with `is_job_script` the job's script.

    memory: MiB of a client on a GPU, ``auto``, or ``-``.
    """

    tasks: tuple[Task, ...]
    is_job_script: bool
    memory: str


class _Names:
    """What the step's processes are called, and those of other jobs: `jobs` has the job of a pid, where it is known."""

    def __init__(self, step: FailedStep, seen: Sequence[Seen], jobs: Mapping[int, int]) -> None:
        self._jobs = jobs
        self._joined = any(one.joined for one in seen)
        self._ranks = {task.pid: task.rank for task in step.tasks}
        self._is_job_script = step.is_job_script
        clients = {event.pid for one in seen for event in one.events if event.kind in (CONNECTED, CONTEXT)}
        #: Programs that a wrapper or mpirun started are not known by their pids; then all clients may be the step's.
        self.any_may_be_ours = not clients & self._ranks.keys()

    def ours(self, pids: Collection[int]) -> bool:
        return self.any_may_be_ours or bool(self._ranks.keys() & set(pids))

    def who(self, pids: Collection[int]) -> str:
        if self._is_job_script and len(pids) == 1 and self._ranks.keys() & set(pids):
            return "the script"
        ranks = sorted(self._ranks[pid] for pid in pids if pid in self._ranks and not self._is_job_script)
        others = [pid for pid in pids if pid not in self._ranks or self._is_job_script]
        words = [f"{'rank' if len(ranks) == 1 else 'ranks'} {join_numbers(ranks)}"] if ranks else []
        anothers = sorted({self._jobs[pid] for pid in others if pid in self._jobs})
        if anothers:
            others = [pid for pid in others if pid not in self._jobs]
            jobs = f"job{'' if len(anothers) == 1 else 's'} {', '.join(map(str, anothers))}"
            words.append(f"programs of another job of yours ({jobs})")
        if others:
            more = f" and {len(others) - _NAMED_PIDS} more" if len(others) > _NAMED_PIDS else ""
            listed = ", ".join(map(str, others[:_NAMED_PIDS]))
            whose = ", perhaps another job's of yours," if self._joined and not self._is_job_script else ""
            words.append(f"{'process' if len(others) == 1 else 'processes'} {listed}{more}{whose}")
        return " and ".join(words)


def explain(step: FailedStep, seen: Sequence[Seen], jobs: Mapping[int, int] | None = None) -> list[str]:
    """A sentence for each thing that MPS did to the step, the causes first; none where nothing explains it.

    All but VANISHED are from the logs.
    """
    names = _Names(step, seen, jobs or {})
    found: list[str] = []
    for one in seen:
        found += _faults(one, names)
        found += _servers(one, names)
        found += _refusals(one, names)
    return list(dict.fromkeys(found))


def _faults(seen: Seen, names: _Names) -> list[str]:
    faults = [event for event in seen.events if event.kind == FAULT and names.ours(event.pids)]
    return [_fault(event, seen, names) for event in faults]


def _fault(event: Event, seen: Seen, names: _Names) -> str:
    gpu = seen.gpus[event.device] if 0 <= event.device < len(seen.gpus) else ""
    others = [pid for pid in event.pids if pid not in event.culprits]
    if not event.culprits:
        return (
            f"a GPU fault on {gpu or 'its GPU'} ended {names.who(event.pids)}; the MPS server does not say whose it "
            "was (a program that is killed inside a kernel causes one, too)"
        )
    hit = f"{names.who(event.culprits)} hit a GPU fault on {gpu or 'its GPU'}"
    paid = _may_have_paid(event, gpu, seen.events)
    if paid:
        hit += ", or paid for a program that was killed inside a kernel there"
    if others:
        return f"{hit}{',' if paid else ''} and took {names.who(others)} along: a fault ends every program on its GPU"
    return hit if paid else f"{hit}; no other program was on that GPU"


def _may_have_paid(fault: Event, gpu: str, events: Sequence[Event]) -> bool:
    """Whether the server may blame this client for what one left that was killed inside a kernel.

    That one left before the client came (O46, O67), or beside it: then it leaves while the fault is handled, and is
    not among those that the fault ended (O47, O100).
    """
    came = fault.seconds - fault.age_seconds - _SAME_MOMENT_SECONDS
    just_came = 0 <= fault.age_seconds < _SOON_SECONDS
    was_there = {event.pid for event in events if event.kind == CONTEXT and event.gpu in ("", gpu)}
    return any(
        (just_came and event.seconds < came)
        or (
            event.pid in was_there
            and event.pid not in fault.pids
            and abs(event.seconds - fault.seconds) < _LEAVES_WITHIN_SECONDS
        )
        for event in events
        if event.kind == LEFT
    )


def _servers(seen: Seen, names: _Names) -> list[str]:
    def of(kind: str) -> list[Event]:
        return [event for event in seen.events if event.kind == kind]

    words = []
    clients = {event.pid for event in seen.events if event.kind in (CONNECTED, CONTEXT)}
    if seen.gone and seen.ended:
        words.append(
            f"the MPS control daemon on this node ended (status {seen.ended.number}), and its server with it "
            "(CUDA error 806)"
        )
    elif seen.gone:
        words.append(VANISHED)
    elif of(SERVER_DIED) and names.ours(clients):
        words.append("the MPS server died, and its clients lost what they had on the GPU (CUDA error 806)")
    elif of(SERVER_FAILED):
        words.append("the MPS server could not be started (CUDA error 805)")
    return words


def _refusals(seen: Seen, names: _Names) -> list[str]:
    words = []
    full = [event for event in seen.events if event.kind == FULL and (not event.pid or names.ours([event.pid]))]
    if full:
        one = "1 program" if len(full) == 1 else f"{len(full)} programs"
        words.append(
            f"the MPS server takes {full[0].number} programs on a GPU and refused {one} more (CUDA error 808): "
            "start fewer for each GPU"
        )
    refused = [event for event in seen.events if event.kind == REFUSED and names.ours([event.pid])]
    not_ready = [event.pid for event in refused if event.number == _NOT_READY]
    if not_ready:
        words.append(
            f"the MPS server refused {names.who(not_ready)} (CUDA error {_NOT_READY}): "
            "programs that a GPU fault hit had not ended yet"
        )
    words += [
        f"the MPS server refused {names.who([event.pid])} (CUDA error {event.number})"
        for event in refused
        if event.number != _NOT_READY
    ]
    ended = [event.pid for event in seen.events if event.kind == TERMINATED and names.ours([event.pid])]
    if ended:
        words.append(f"{names.who(ended)} was ended through the control daemon, by terminate_client (CUDA error 810)")
    return words


def suspect_limit(step: FailedStep, seen: Sequence[Seen]) -> str:
    """What to say where explain() found nothing: that there is a memory limit, if there is one.

    The server does not say who hits it (O64), so nobody is to be sent to its logs.
    """
    names = _Names(step, seen, {})
    clients = {event.pid for one in seen for event in one.events if event.kind == CONTEXT}
    failed = [task.pid for task in step.tasks if task.failed and (task.pid in clients or names.any_may_be_ours)]
    if step.memory == "-" or not failed or not clients:
        return ""
    limit = "--mps-mem=auto" if step.memory == AUTO else f"{describe_memory(int(step.memory) * MIB)} on each GPU"
    return f"{names.who(failed)} failed under a memory limit ({limit}); if it ran out of memory, that limit is why"


def free_since(events: Sequence[Event], since_seconds: float) -> float | None:
    """Since when a daemon's server has been ready and without a client, at the earliest since then.

    None where a client was there, and where the logs do not go back to the server's start.
    """
    ready, there = 0.0, set()
    for event in events:
        if event.kind == SERVER_READY:
            ready = event.seconds
        elif event.kind in (CONNECTED, CONTEXT):
            there.add(event.pid)
        elif event.kind == LEFT and event.seconds < since_seconds:
            there.discard(event.pid)
    return max(ready, since_seconds) if ready and not there else None
