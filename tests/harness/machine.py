"""A throw-away machine: namespaces with a PID 1, users, devices and a file system of their own.

Root on any Linux host can make one in about a tenth of a second. Promises:

- Nothing on the host changes. The root file system inside is an overlay with its upper layer in memory, so
  even ``make install`` inside leaves the host as it was; only paths named in `binds` are shared, and are
  writable.
- All of it is gone with the ``Machine``, even when the test process dies of SIGKILL (see
  :mod:`tests.harness.inside`).
- Every wait is bounded, and an environment inside is built from nothing: no SLURM_*, SPANK_*, PMI* or CUDA_*
  of the caller's gets in.

The simulated files of `overlays` are copied when the machine starts; a library rebuilt later is not seen.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self
from uuid import uuid4

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

USERS: Mapping[str, int] = {"alice": 20001, "bob": 20002, "carol": 20003}
SERVICE_USERS: Mapping[str, int] = {"slurm": 64030, "munge": 64031}
GPU_DEVICES = 16
HOSTNAME = "mpstest"
ADDRESS = "10.213.0.1"
"""The machine's address: on `lo` of its own network namespace, so it is nobody else's."""
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CGROUP_CONTROLLERS = ("devices", "freezer")
UNIFIED = "unified"

NODE_PRIVATE = ("/run", "/tmp", "/var/log", "/dev/shm")
NODE_SHARED = ("/run/munge", "/var/log/slurm", "/var/log/munge")

# A cgroup that slurmd is to manage must have no process from outside of its PID namespace: nsenter's child joins it, by
# the descriptor that was opened outside, for who is within a cgroup namespace cannot bring anybody into it. slurmd from
# 24.11 on manages its own cgroup, in which nobody else can be.
_OPEN_CGROUP = 'mkdir -p "$0" && exec 9>"$0/cgroup.procs" && exec "$@"'
_JOIN_CGROUP = 'echo 0 >&9 && exec 9>&- && exec /usr/bin/nsenter -t 1 -C -- "$@"'
_INSIDE = Path(__file__).with_name("inside.py")
_PYTHON = "/usr/bin/python3"
_START_TIMEOUT_SECONDS = 20.0
_STOP_TIMEOUT_SECONDS = 15.0
_TERM_GRACE_SECONDS = 1.0
_FORK_TIMEOUT_SECONDS = 2.0


@dataclass(frozen=True)
class Result:
    """How a command inside ended; a negative return code is the signal that ended it."""

    returncode: int
    stdout: str
    stderr: str

    def check(self) -> Result:
        """Return itself when the command succeeded; raise with all it printed when not."""
        if self.returncode != 0:
            raise AssertionError(f"exit {self.returncode}\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}")
        return self


@dataclass(frozen=True)
class Process:
    """A process of the machine, by its pid inside; `starttime` is in clock ticks since boot."""

    pid: int
    ppid: int
    uid: int
    comm: str
    cmdline: tuple[str, ...]
    starttime: int


@dataclass(frozen=True)
class NodeSpace:
    """One node's mount namespace: NODE_PRIVATE is its own, everything else is the machine's."""

    name: str
    host_pid: int
    pid: int
    """Of the process inside that holds it: ``nsenter -t PID -m`` enters the node from within the machine."""


class Throwaway:
    """What a with statement begins, and closes at its end; also where it fails to begin."""

    def begin(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        try:
            self.begin()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Machine(Throwaway):
    """A throw-away machine; use it as a context manager.

    overlays: directory inside -> directories whose files lie over it, the first named on top.
    binds: path on the host -> path inside; shared, not copied.
    root: the directory whose file system it has instead of the host's.
    shown: paths of the host that are there at the same places, read-only, also where the machine or a node has a
    directory of its own.
    gpus: how many /dev/nvidiaN there are; opening one gives ENXIO, or EPERM where a device cgroup denies it. None for
    the host's own.
    """

    def __init__(
        self,
        *,
        overlays: Mapping[str, Sequence[str | Path]] | None = None,
        binds: Mapping[str | Path, str] | None = None,
        root: str | Path | None = None,
        shown: Sequence[str | Path] = (),
        gpus: int | None = GPU_DEVICES,
    ) -> None:
        self._overlays = {place: [str(Path(one).resolve()) for one in many] for place, many in (overlays or {}).items()}
        self._binds = {str(Path(source).resolve()): target for source, target in (binds or {}).items()}
        self._root = str(Path(root).resolve()) if root else "/"
        self._shown = [str(Path(one).resolve()) for one in (*shown, _INSIDE.parent)]
        self._gpus = gpus
        self._keeper: subprocess.Popen[str] | None = None
        self._pid = 0
        self._children: list[subprocess.Popen[bytes]] = []
        self._nodes: dict[str, NodeSpace] = {}
        self._unified_cgroup = ""
        self.cgroups: tuple[str, ...] = ()
        """The cgroup v1 controllers that the machine has, or UNIFIED for v2; empty where the host has none."""

    # --------------------------------------------------------------------------------------------------- life

    def begin(self) -> None:
        """Make the machine; on return its PID 1 runs and all is mounted."""
        if os.geteuid() != 0:
            raise PermissionError("a throw-away machine needs root (mount, pid and network namespaces)")
        keeper = subprocess.Popen(
            [_PYTHON, "-I", "-S", str(_INSIDE), "keeper"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={"PATH": PATH, "HARNESS_SPEC": json.dumps(self._spec())},
            start_new_session=True,
        )
        self._keeper = keeper
        line = _read_line(keeper.stdout, _START_TIMEOUT_SECONDS)
        if not line:
            keeper.kill()
            raise RuntimeError(f"the throw-away machine did not start:\n{keeper.communicate()[1]}")
        report = json.loads(line)
        self._pid = report["pid"]
        self.cgroups = tuple(report["cgroups"])
        self._unified_cgroup = report["unified"]

    @property
    def running(self) -> bool:
        return self._pid != 0

    def close(self) -> None:
        """End everything inside and wait until it is gone; harmless when called again."""
        keeper, self._keeper, self._pid = self._keeper, None, 0
        if keeper is None:
            return
        for child in self._children:  # an nsenter that stopped itself with its program reaps nothing, and PID 1 waits
            child.send_signal(signal.SIGCONT)
        assert keeper.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            keeper.stdin.close()
        try:
            keeper.wait(_STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            keeper.kill()  # PID 1 dies with its keeper, and all the rest with PID 1
            keeper.wait()
        for stream in (keeper.stdout, keeper.stderr):
            if stream is not None:
                stream.close()
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_TERM_GRACE_SECONDS)
            for pipe in (child.stdin, child.stdout, child.stderr):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
        self._children.clear()
        self._nodes.clear()

    def _spec(self) -> dict[str, Any]:
        """What the keeper needs to know, as JSON carries it."""
        accounts = {**SERVICE_USERS, **USERS}
        return {
            "hostname": HOSTNAME,
            "address": ADDRESS,
            "gpus": self._gpus,
            "users": dict(USERS),
            "root": self._root,
            "shown": self._shown,
            "overlays": self._overlays,
            "binds": self._binds,
            "cgroup_controllers": list(CGROUP_CONTROLLERS),
            "etc_lines": {
                "passwd": [f"{name}:x:{uid}:{uid}::{_home(name)}:/bin/bash" for name, uid in accounts.items()],
                "shadow": [f"{name}:*:20000::::::" for name in accounts],
                "group": [f"{name}:x:{uid}:" for name, uid in accounts.items()],
            },
            "etc_files": {
                "hostname": f"{HOSTNAME}\n",
                "hosts": f"127.0.0.1 localhost\n{ADDRESS} {HOSTNAME}\n",
                "resolv.conf": "",
            },
        }

    @property
    def pid(self) -> int:
        """The host's pid of PID 1."""
        if not self._pid:
            raise RuntimeError("the throw-away machine is not running")
        return self._pid

    # -------------------------------------------------------------------------------------------------- nodes

    def add_node(self, name: str) -> NodeSpace:
        """Make a mount namespace for node `name`, with tmpfs of its own on NODE_PRIVATE.

        NODE_SHARED are directories below those that stay the machine's (munge's socket, Slurm's logs). Mounts
        made in the machine afterwards are not seen by the node.
        """
        for path in NODE_SHARED:
            self.path(path).mkdir(parents=True, exist_ok=True)
        shown = [path for path in self._shown if path.startswith(tuple(f"{place}/" for place in NODE_PRIVATE))]
        spec = json.dumps({"private": NODE_PRIVATE, "shared": [*NODE_SHARED, *shown]})
        holder = self.popen(
            [_PYTHON, "-I", "-S", str(_INSIDE), "node"], env={"HARNESS_SPEC": spec}, stdout=subprocess.PIPE
        )
        if _read_line(holder.stdout, _START_TIMEOUT_SECONDS) != "ready":
            raise RuntimeError(f"node {name}: its namespace did not come up")
        self._nodes[name] = NodeSpace(name, self.host_pid(holder), self.pid_inside(holder))
        return self._nodes[name]

    @property
    def nodes(self) -> Mapping[str, NodeSpace]:
        """The nodes, by name."""
        return self._nodes

    # ----------------------------------------------------------------------------------------------- commands

    def command(
        self, argv: Sequence[str | Path], *, user: str | None = None, cwd: str = "/", node: str | None = None
    ) -> list[str]:
        """The host's command line that runs `argv` inside; for callers that want their own terminal on it."""
        target = self._nodes[node].host_pid if node else self.pid
        enter = ["/usr/bin/nsenter", "-t", str(target), f"--wdns={cwd}"]
        if self._unified_cgroup:
            slurmd = f".slurmd-{uuid4().hex}" if Path(argv[0]).name == "slurmd" else ""
            opened = ["/bin/sh", "-c", _OPEN_CGROUP, self._unified_cgroup + slurmd]
            joined = ["-m", "-u", "-i", "-n", "-p", "--", "/bin/sh", "-c", _JOIN_CGROUP, "sh"]
            line = [*opened, *enter, *joined]
        else:
            line = [*enter, "-a", "--"]
        if user is not None and user != "root":
            uid = self._uid(user)
            line += ["/usr/bin/setpriv", f"--reuid={uid}", f"--regid={uid}", "--init-groups", "--"]
        return line + [str(word) for word in argv]

    def environment(self, user: str | None = None, env: Mapping[str, str] | None = None) -> dict[str, str]:
        """An environment built from nothing, as a fresh login of `user` would have, with `env` added."""
        name = user or "root"
        return {
            "PATH": PATH,
            "HOME": _home(name),
            "USER": name,
            "LOGNAME": name,
            "SHELL": "/bin/bash",
            "LANG": "C.UTF-8",
            **(env or {}),
        }

    def popen(
        self,
        argv: Sequence[str | Path],
        *,
        user: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
        node: str | None = None,
        stdin: int | IO[Any] | None = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = subprocess.DEVNULL,
        stderr: int | IO[Any] | None = subprocess.DEVNULL,
    ) -> subprocess.Popen[bytes]:
        """Start a long-lived program inside.

        The ``Popen`` is nsenter's, which waits for the program and ends as it ends: send signals with
        :meth:`signal`, or the program lives on when nsenter has died.
        """
        child = subprocess.Popen(
            self.command(argv, user=user, cwd=cwd, node=node),
            env=self.environment(user, env),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        self._children.append(child)
        return child

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        user: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
        timeout: float = 30,
        input: str | None = None,  # noqa: A002 - as subprocess.run calls it
        node: str | None = None,
    ) -> Result:
        """Run a program inside to its end.

        Its output goes through files, so a daemon that it leaves behind with the same standard output does
        not hold the caller. Raises: TimeoutError, with what was printed so far, after killing the process
        group.
        """
        with (
            tempfile.TemporaryFile() as out,
            tempfile.TemporaryFile() as err,
            tempfile.TemporaryFile() as fed,
        ):
            fed.write((input or "").encode())
            fed.seek(0)
            child = self.popen(argv, user=user, env=env, cwd=cwd, node=node, stdin=fed, stdout=out, stderr=err)
            try:
                code = child.wait() if _ends_within(child.pid, timeout) else None
            finally:
                self._end(child)
            stdout, stderr = (_text(stream) for stream in (out, err))
        if code is None:
            line = shlex.join(str(word) for word in argv)
            raise TimeoutError(f"{line}: no end after {timeout} s\n--- stdout\n{stdout}\n--- stderr\n{stderr}")
        return Result(code, stdout, stderr)

    def signal(self, child: subprocess.Popen[bytes], number: int) -> None:
        """Send a signal to the program that :meth:`popen` started (not to nsenter in front of it).

        When its program stops, nsenter stops itself, and then misses the program's end: it is continued.
        """
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.host_pid(child), number)
        if number != signal.SIGSTOP:
            child.send_signal(signal.SIGCONT)

    def host_pid(self, child: subprocess.Popen[bytes]) -> int:
        """The host's pid of the program that :meth:`popen` started: nsenter's only child, very soon."""
        deadline = time.monotonic() + _FORK_TIMEOUT_SECONDS
        while child.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
                if children:
                    return int(children[0])
            time.sleep(0.002)
        raise ProcessLookupError(f"the program behind pid {child.pid} has ended")

    def pid_inside(self, child: subprocess.Popen[bytes]) -> int:
        """The pid, as seen inside, of the program that :meth:`popen` started."""
        status = Path(f"/proc/{self.host_pid(child)}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1])

    def _end(self, child: subprocess.Popen[bytes]) -> None:
        """End a command of :meth:`run` that is not over: SIGTERM (srun cancels its step), soon SIGKILL."""
        if child.poll() is None:
            self._signal_quietly(child)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_TERM_GRACE_SECONDS)
            _kill_group(child.pid)
            child.wait()
        self._children.remove(child)

    def _signal_quietly(self, child: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.signal(child, signal.SIGTERM)

    # -------------------------------------------------------------------------------------------------- files

    def path(self, inside: str | Path, *, node: str | None = None) -> Path:
        """Where the host reaches the file `inside`: read and write it directly, without a command.

        An absolute symbolic link on the way would lead to the host's file; Slurm's and the project's paths
        have none (/var/run does).
        """
        target = self._nodes[node].host_pid if node else self.pid
        return Path(f"/proc/{target}/root", str(inside).lstrip("/"))

    def write(
        self,
        inside: str | Path,
        text: str,
        *,
        mode: int = 0o644,
        user: str | None = None,
        node: str | None = None,
    ) -> None:
        """Write a file inside, making its directories; replaced at once, never seen half-written."""
        place = self.path(inside, node=node)
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(f".{place.name}.partial")
        partial.write_text(text)
        partial.chmod(mode)
        if user is not None:
            os.chown(partial, self._uid(user), self._gid(user))
        partial.replace(place)

    def read(self, inside: str | Path, *, node: str | None = None) -> str:
        """The text of a file inside."""
        return self.path(inside, node=node).read_text(errors="replace")

    def make_directory(self, inside: str | Path, *, user: str = "root", mode: int = 0o755) -> None:
        """Make a directory inside, owned by `user`."""
        place = self.path(inside)
        place.mkdir(parents=True, exist_ok=True)
        place.chmod(mode)
        os.chown(place, self._uid(user), self._gid(user))

    def _account(self, user: str) -> list[str]:
        for line in self.read("/etc/passwd").splitlines():
            if line.split(":")[0] == user:
                return line.split(":")
        raise KeyError(f"no user {user} in the machine")

    def _uid(self, user: str) -> int:
        return USERS[user] if user in USERS else int(self._account(user)[2])

    def _gid(self, user: str) -> int:
        return USERS[user] if user in USERS else int(self._account(user)[3])

    # ---------------------------------------------------------------------------------------------- processes

    def processes(self) -> list[Process]:
        """Every process of the machine but PID 1, the node holders and what has ended, read from its own /proc."""
        found = []
        for directory in self.path("/proc").iterdir():
            if directory.name.isdigit() and directory.name != "1":
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    found.append(_read_process(directory))
        running = (one for one in found if one and str(_INSIDE) not in one.cmdline)
        return sorted(running, key=lambda one: one.pid)


def _ends_within(pid: int, timeout_seconds: float) -> bool:
    """Wait for a child to end; unlike ``Popen.wait(timeout)`` without polling, which adds up over thousands of runs."""
    pidfd = os.pidfd_open(pid)
    try:
        return bool(select.select([pidfd], [], [], timeout_seconds)[0])
    finally:
        os.close(pidfd)


def _kill_group(group: int) -> None:
    """Kill a process group and wait, bounded, until no process is left in it."""
    deadline = time.monotonic() + _TERM_GRACE_SECONDS
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, signal.SIGKILL)
            time.sleep(0.005)


def _home(user: str) -> str:
    """The home directory of an account in the machine."""
    return "/root" if user == "root" else f"/home/{user}" if user in USERS else "/nonexistent"


def _read_process(directory: Path) -> Process | None:
    """Read one /proc/PID; the name in `stat` may itself hold blanks and parentheses (proc(5)). None for a zombie."""
    before, _, after = (directory / "stat").read_text().rpartition(")")
    fields = after.split()
    if fields[0] in "ZX":
        return None
    return Process(
        pid=int(directory.name),
        ppid=int(fields[1]),
        uid=directory.stat().st_uid,
        comm=before.partition("(")[2],
        cmdline=tuple((directory / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]),
        starttime=int(fields[19]),
    )


def _text(stream: IO[bytes]) -> str:
    """All that was written to a temporary file."""
    stream.seek(0)
    return stream.read().decode(errors="replace")


def _read_line(stream: IO[Any] | None, timeout_seconds: float) -> str:
    """The first line of a new program's output; empty when it ended or said nothing in time."""
    assert stream is not None
    ready, _, _ = select.select([stream], [], [], timeout_seconds)
    line = stream.readline() if ready else ""
    return (line.decode() if isinstance(line, bytes) else str(line)).strip()
