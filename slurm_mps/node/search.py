"""Looks through /proc for control daemons and servers."""

from __future__ import annotations

import os

from . import processes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./")
_UUID_MAX = 96


class _Nodes:
    """Tells which processes see our /run. Those of another container, or of another node of a test, see another.

    A mount namespace is known by its name, which asks no file system. That of a process of root's may be another one
    with the same /run, as a unit of systemd's has; what a user mounted is not looked at.
    """

    def __init__(self) -> None:
        self._ours = {processes.mount_namespace("self"): True}

    def see(self, pid: int, uid: int) -> bool:
        mounts = processes.mount_namespace(pid)
        if mounts not in self._ours and uid == 0:
            self._ours[mounts] = _same_run(pid)
        return self._ours.get(mounts, False)


def _same_run(pid: int) -> bool:
    try:
        theirs, ours = os.stat(f"/proc/{pid}/root/run"), os.stat("/run")
    except OSError:
        return False
    return (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)


def search_lines(directory: str, program_names: tuple[str, ...]) -> Iterator[str]:
    """A line for each process that runs one of these programs, with a pipe directory that is this or lies below it.

    ``pid start_ticks uid program pipe_directory gpus`` (GPU UUIDs with commas, or ``-``). Reading a process may take
    for ever (processes.in_child).

    Only processes that root made are read: their user or their group is root, as is the group of a server that root's
    control daemon starts (O51). A user can start a server too, but not with that group, and a user's process can make
    a reader of its environment wait. An empty directory means all processes, users' own as well; their environments
    are for display only.
    """
    nodes = _Nodes()
    named = [pid for pid in processes.pids() if processes.program_name(pid) in program_names]
    ours = [pid for pid in named if not directory or processes.is_of_roots_making(pid)]
    found = [(pid, name, processes.uid_of(pid)) for pid in ours if (name := processes.program_of(pid))]
    for pid, name, uid in sorted(found, key=lambda one: one[2] or 0):  # root's first: they tell which node is ours
        process = processes.identify(pid)
        if process is None or uid is None or not nodes.see(pid, uid):
            continue
        environment = processes.environment_of(pid)
        pipe = environment.get("CUDA_MPS_PIPE_DIRECTORY", "")
        is_below = f"{pipe}/".startswith(f"{directory}/") and _PLAIN.issuperset(pipe)
        if not is_below or processes.identify(pid) != process:
            continue
        gpus = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
        uuids = [
            gpu for gpu in gpus if gpu.startswith(("GPU-", "MIG-")) and len(gpu) < _UUID_MAX and _PLAIN.issuperset(gpu)
        ]
        yield f"{pid} {process.start_ticks} {uid} {name} {pipe} {','.join(uuids) or '-'}\n"
