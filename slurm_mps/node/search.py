"""Looks through /proc for control daemons and servers."""

from __future__ import annotations

import os

from .processes import environment_of, identify, pids, program_of, uid_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./")
_UUID_MAX = 96


class _Nodes:
    """Which processes see the /run that we see; another container, or another node of a test, has one of its own.

    A mount namespace is known by its name, which asks no file system. That of a process of root's may be another one
    with the same /run, as a unit of systemd's has; what a user mounted is not looked at.
    """

    def __init__(self) -> None:
        self._ours = {_mounts("self"): True}

    def see(self, pid: int, uid: int) -> bool:
        mounts = _mounts(str(pid))
        if mounts not in self._ours and uid == 0:
            self._ours[mounts] = _same_run(pid)
        return self._ours.get(mounts, False)


def _mounts(pid: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return ""


def _same_run(pid: int) -> bool:
    try:
        theirs, ours = os.stat(f"/proc/{pid}/root/run"), os.stat("/run")
    except OSError:
        return False
    return (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)


def search_lines(directory: str, program_names: tuple[str, ...]) -> Iterator[str]:
    """A line for each process that runs one of these programs, with a pipe directory that is this or lies below it.

    ``pid start_ticks uid program pipe_directory gpus`` (GPU UUIDs with commas, or ``-``; only of root's processes). A
    server's environment is its user's to write: what is given back is made of plain characters, and proves no more than
    that a process looks like this. Reading it may take for ever (processes.in_child).
    """
    nodes = _Nodes()
    named = [(pid, program_of(pid)) for pid in pids()]
    found = [(pid, name, uid_of(pid)) for pid, name in named if name in program_names]
    for pid, name, uid in sorted(found, key=lambda one: one[2] or 0):  # root's first: they tell which node is ours
        process = identify(pid)
        if process is None or uid is None or not nodes.see(pid, uid):
            continue
        environment = environment_of(pid)
        pipe = environment.get("CUDA_MPS_PIPE_DIRECTORY", "")
        if not (f"{pipe}/".startswith(f"{directory}/") and _PLAIN.issuperset(pipe)) or identify(pid) != process:
            continue
        gpus = environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if uid == 0 else []
        uuids = [gpu for gpu in gpus if gpu.startswith("GPU-") and len(gpu) < _UUID_MAX and _PLAIN.issuperset(gpu)]
        yield f"{pid} {process.start_ticks} {uid} {name} {pipe} {','.join(uuids) or '-'}\n"
