"""Count what hooks noted and what the jobs' logs say, once each."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from time import monotonic

from ..errors import NodeError
from ..job.logs import JOINED_DAEMON
from ..job.state import EVENTS, EVENTS_TAKEN, METRICS, NodeState
from ..job_log import events as kinds
from ..job_log.read import CONTROL_LOG, SERVER_LOG, DaemonLogs, events_of, find_logs, read_log
from ..node.wordfile import DamagedFileError
from .totals import LOG_COUNTS, Totals, decode_totals

_EVENTS_LIMIT_BYTES = 2 * 1024**2
_TOTALS_LIMIT_BYTES = 1024**2
_LOCK_SECONDS = 1.0
_SAVE_SECONDS = 1.0
_NAME_LIMIT_BYTES = 200
_NEWEST = 1 << 63
_NOTHING = [0] * len(LOG_COUNTS)
_COUNTED_AS = {
    kinds.FAULT: 0,
    kinds.FULL: 1,
    kinds.REFUSED: 1,
    kinds.SERVER_DIED: 2,
    kinds.SERVER_FAILED: 2,
}


def count(state: NodeState, log_root: str, *, keep: bool) -> Totals:
    """Everything that was counted since the boot, with what is new; without `keep` nothing on disk changes.

    Raises: NodeError; DeadlineError when another counts.
    """
    state.lock_metrics(_LOCK_SECONDS)
    totals, first = _read(state)

    def save() -> None:
        if keep:
            state.root.write(METRICS, totals.encode())

    _count_logs(totals, log_root, state.job_ids(), save, first=first)
    if not keep:
        for name in (EVENTS_TAKEN, EVENTS):
            if state.root.exists(name) and _stamp(state, name) != totals.taken:
                totals.count_events(_text(state, name))
        return totals
    _count_taken(state, totals)
    if state.root.rename(EVENTS, EVENTS_TAKEN):
        _count_taken(state, totals)
    save()
    return totals


def _read(state: NodeState) -> tuple[Totals, bool]:
    try:
        return decode_totals(state.root.read(METRICS, _TOTALS_LIMIT_BYTES)), False
    except (FileNotFoundError, DamagedFileError):
        return Totals(), True  # counters begin anew, which Prometheus expects of them


def _count_taken(state: NodeState, totals: Totals) -> None:
    """Count the events that were set aside, and forget them only when the count is on disk."""
    if not state.root.exists(EVENTS_TAKEN):
        return
    stamp = _stamp(state, EVENTS_TAKEN)
    if stamp != totals.taken:
        totals.count_events(_text(state, EVENTS_TAKEN))
        totals.taken = stamp
        state.root.write(METRICS, totals.encode())
    state.root.unlink(EVENTS_TAKEN)


def _stamp(state: NodeState, name: str) -> str:
    inode, _ = state.root.stamp(name)
    return f"{inode}:{state.root.changed_ns(name)}"


def _text(state: NodeState, name: str) -> str:
    return state.root.read(name, _EVENTS_LIMIT_BYTES).decode("ascii", "replace")


# --------------------------------------------------------------------------------------------------------- the logs


def _count_logs(totals: Totals, root: str, running: Collection[int], save: Callable[[], None], *, first: bool) -> None:
    """Look into the logs that have changed. Those of jobs that were over before the first count are not counted.

    What was counted is saved every second: who is cut off does not begin anew.
    """
    there = _logs_to_count(root)
    saved = monotonic()
    for key in [key for key in totals.logs if key not in there]:
        totals.forget_log(key)
    if first:
        over = {key: logs for key, logs in there.items() if not _is_running(key, logs, root, running)}
        totals.logs |= {key: (_size(logs), _NOTHING) for key, logs in over.items()}
    for key, logs in there.items():
        size = _size(logs)
        before, counted = totals.logs.get(key, ("", _NOTHING))
        if size == before:
            continue
        found = _count_events(logs)
        totals.logs[key] = (size, list(map(max, counted, found)))  # a log that was cut has less
        if monotonic() > saved + _SAVE_SECONDS:
            save()
            saved = monotonic()


def _logs_to_count(root: str) -> dict[str, list[DaemonLogs]]:
    """The logs by job or, where jobs had a daemon in common, by that daemon's name.

    Each of these jobs keeps what there is when it leaves. The daemon's own logs count while they are there, and later
    what the last job kept.
    """
    found: dict[str, list[DaemonLogs]] = {}
    newest: dict[str, int] = {}
    for name in _names(root):
        for one in find_logs(root, name):
            daemon = read_log(one.directory, JOINED_DAEMON, _NAME_LIMIT_BYTES).decode("ascii", "replace")
            if not daemon:
                found.setdefault(name, []).append(one)
            elif (changed := _changed_ns(one, root)) >= newest.get(daemon, 0):
                newest[daemon], found[daemon] = changed, [one]
    return found


def _names(root: str) -> list[str]:
    """Jobs and GPUs that there are logs of."""
    try:
        return [name for name in os.listdir(root) if name.startswith("GPU-") or (name.isdigit() and len(name) <= 10)]
    except OSError:
        return []


def _changed_ns(logs: DaemonLogs, root: str) -> int:
    """When logs of joined jobs were last written to; those of a daemon that runs are the newest."""
    if os.path.dirname(logs.directory) == root:
        return _NEWEST
    try:
        return os.lstat(f"{logs.directory}/{CONTROL_LOG}").st_mtime_ns
    except OSError:
        return 0


def _is_running(key: str, logs: Sequence[DaemonLogs], root: str, running: Collection[int]) -> bool:
    return int(key) in running if key.isdigit() else os.path.dirname(logs[0].directory) == root


def _size(logs: Iterable[DaemonLogs]) -> str:
    sizes = []
    for one in logs:
        for name in (CONTROL_LOG, SERVER_LOG):
            try:
                sizes.append(os.lstat(f"{one.directory}/{name}").st_size)
            except OSError:
                sizes.append(0)
    return f"{sum(sizes)}:{len(sizes)}"


def _count_events(logs: Iterable[DaemonLogs]) -> list[int]:
    found = [0] * len(LOG_COUNTS)
    for one in logs:
        try:
            events = events_of(one)
        except (NodeError, OSError):
            continue
        for event in events:
            if event.kind in _COUNTED_AS:
                found[_COUNTED_AS[event.kind]] += 1
    return found
