"""A program that looks through /proc for control daemons and servers. Run as root, by who can abandon it.

Reading another's process can take for ever, beyond SIGKILL, where that process waits in a file system that does not
answer. So epilog and reconcile do not search by themselves: they run this, and go on without it when it is late.

Its argument is a directory; it prints a line for each process whose pipe directory is that or lies below it:
``pid start_ticks uid program pipe_directory gpus`` (GPU UUIDs with commas, or ``-``; only of root's processes). A
server's environment is its user's to write: what is printed is made of plain characters, and proves no more than that
a process looks like this.
"""

from __future__ import annotations

import os
import sys

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


def lines(directory: str) -> Iterator[str]:
    """What main() prints."""
    from slurm_mps.node.control import DAEMON_PROGRAM, SERVER_PROGRAM
    from slurm_mps.node.processes import environment_of, identify, pids, program_of, uid_of

    nodes = _Nodes()
    named = [(pid, program_of(pid)) for pid in pids()]
    found = [(pid, name, uid_of(pid)) for pid, name in named if name in (DAEMON_PROGRAM, SERVER_PROGRAM)]
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


def main() -> int:
    sys.path.append(os.path.abspath(f"{__file__}/../../.."))  # last: it may not hide a module
    sys.stdout.writelines(lines(sys.argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
