"""CUDA MPS as programs meet it: daemons through the control program's standard input, clients through libcuda.so.1.

The tests here are written against this and nothing below it, so that they run on the simulated driver, in a throw-away
machine, and on the real one of this host. Promises: each daemon has a pipe and a log directory of its own in a scratch
directory; every daemon and client of a test ends with it. Sizes are in MiB.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import select
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.harness.machine import USERS, Machine, Process, Result

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

CONTROL = "nvidia-cuda-mps-control"
SERVER = "nvidia-cuda-mps-server"
RECORDED_SMS = 132
"""Of the cards in the record: where a card has as many, its numbers must come out exactly, elsewhere roughly."""
PID_FILE = "nvidia-cuda-mps-control.pid"
FILES_OF_A_DAEMON = ["control", "control_lock", "control_privileged", "log", PID_FILE]
"""What is in the pipe directory while a daemon runs (O25)."""

NVML_MEMORY = """
import sys, pynvml
pynvml.nvmlInit()
memory = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(sys.argv[1]))
print(memory.total >> 20, memory.free >> 20)
"""

_HERE = Path(__file__).parent
_TIMEOUT_SECONDS = 30.0
_LONGEST_WAIT_SECONDS = 10.0


class ThisHost(Machine):
    """No machine at all: the same calls on this host, for its real driver."""

    def begin(self) -> None:
        pass

    def command(
        self, argv: Sequence[str | Path], *, user: str | None = None, cwd: str = "/", node: str | None = None
    ) -> list[str]:
        assert node is None
        line = ["/usr/bin/env", f"--chdir={cwd}"]
        if user is not None and user != "root":
            group = pwd.getpwnam(user).pw_gid
            line += ["setpriv", f"--reuid={user}", f"--regid={group}", "--init-groups", "--"]
        return line + [str(word) for word in argv]

    def environment(self, user: str | None = None, env: Mapping[str, str] | None = None) -> dict[str, str]:
        where = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        return {**super().environment(user), **where, **(env or {})}

    def path(self, inside: str | Path, *, node: str | None = None) -> Path:
        assert node is None
        return Path(inside)


@dataclass(frozen=True)
class Place:
    """Where the tests run: `users` are two ordinary ones, `python` has pynvml and slurm_mps, `plain_python` neither.

    `branch` is the driver's, such as 580. `nvidias`: its control program is NVIDIA's own, and there is no GPU.
    """

    machine: Machine
    users: tuple[str, str]
    scratch: str
    plain_python: str
    python: tuple[str, ...]
    branch: int
    real: bool = False
    nvidias: bool = False

    def prepare(self) -> None:
        self.machine.make_directory(self.scratch)
        for script in ("cuda_client.py", "nvml_both.py"):
            self.machine.write(f"{self.scratch}/{script}", (_HERE / script).read_text())

    @cached_property
    def gpus(self) -> tuple[list[str], list[str], list[str]]:
        """UUIDs, names and PCI addresses of all GPUs, in their order."""
        listed = self.machine.run(["nvidia-smi", "--query-gpu=uuid,name,pci.bus_id", "--format=csv,noheader"])
        rows = [row.split(", ") for row in listed.check().stdout.splitlines()]
        return [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]

    def mps_processes(self, below: str = "") -> list[Process]:
        """The daemons and servers of these tests: those whose pipe directory lies below the scratch one, or another."""
        mark = f"CUDA_MPS_PIPE_DIRECTORY={below or self.scratch}/"
        return [
            process
            for process in self.machine.processes()
            if process.comm.startswith("nvidia-cuda-mps") and mark in self._environment_of(process.pid)
        ]

    def _environment_of(self, pid: int) -> str:
        try:
            return self.machine.read(f"/proc/{pid}/environ")
        except (FileNotFoundError, ProcessLookupError):
            return ""

    def uid(self, user: str) -> int:
        return 0 if user == "root" else USERS[user] if user in USERS else pwd.getpwnam(user).pw_uid

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        """Send a signal; a process that has ended meanwhile needs none."""
        done = self.machine.run(["kill", f"-{int(number)}", str(pid)])
        assert done.returncode == 0 or "No such process" in done.stderr, done

    def ask_nvml(
        self, *question: str, user: str | None = None, env: Mapping[str, str] | None = None
    ) -> list[dict[str, Any]]:
        """What our binding and pynvml say: see nvml_both.py."""
        script = f"{self.scratch}/nvml_both.py"
        answers: list[dict[str, Any]] = json.loads(
            self.machine.run([*self.python, script, *question], user=user, env=env).check().stdout
        )
        return answers

    def ask_ours(self, gpu: str, field: str) -> Any:
        """What our binding says of a GPU that pynvml has no word for."""
        return self.ask_nvml("ours", gpu, field)[0]["value"]


@dataclass(frozen=True)
class Device:
    """What a client has on one device; `free` and `total` in MiB."""

    uuid: str
    name: str
    sms: int
    free: int
    total: int
    mode: int

    @property
    def has_no_limit(self) -> bool:
        """All the card's memory is free but for what contexts take, some 590 MiB here."""
        return self.total - self.free < 1024


@dataclass(frozen=True)
class Report:
    """What a client said of itself; `failed` is "cuInit 100 CUDA_ERROR_NO_DEVICE", or empty."""

    pid: int
    devices: tuple[Device, ...]
    failed: str

    @property
    def uuids(self) -> list[str]:
        return [device.uuid for device in self.devices]

    @property
    def only(self) -> Device:
        """Its device, when it has one and no trouble."""
        assert not self.failed
        (device,) = self.devices
        return device


class Client:
    """A running CUDA program (cuda_client.py), after it has looked at its devices."""

    def __init__(self, place: Place, child: subprocess.Popen[bytes], copies: int) -> None:
        self._place = place
        self._child = child
        self._unread = b""
        self.reports = [self._read_report() for _ in range(copies)]

    @property
    def report(self) -> Report:
        return self.reports[0]

    @property
    def pid(self) -> int:
        return self.report.pid

    def _read_line(self) -> str:
        assert self._child.stdout is not None
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._child.stdout], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(self._child.stdout.fileno(), 65536) if ready else b""
            if not piece:
                raise AssertionError(f"the client said nothing more{' in time' if not ready else ''}: {self._unread!r}")
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    def _read_report(self) -> Report:
        line = self._read_line()
        try:
            said = json.loads(line)
        except json.JSONDecodeError:
            raise AssertionError(f"the client broke: {line} {self._child.communicate()[0].decode()}") from None
        return Report(said["pid"], tuple(Device(**device) for device in said["devices"]), said["failed"])

    def tell(self, what: str) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(f"{what}\n".encode())
        self._child.stdin.flush()

    def answer(self) -> int:
        """The CUDA error that the thing last told ended with."""
        return int(self._read_line())

    def ask(self, what: str) -> int:
        self.tell(what)
        return self.answer()

    def misbehave(self, how: str) -> None:
        """Run a bad kernel: "fault", "trap" or "spin", which runs once this returns."""
        self.tell(how)
        if how == "spin":
            assert self.answer() == 0
        if how == "spin" and not self._place.real:
            wait_until(self._sleeps)  # in simSpin, until the server says something

    def _sleeps(self) -> bool:
        status = self._place.machine.read(f"/proc/{self.pid}/stat")
        return status.rpartition(")")[2].split()[0] == "S"

    def _wait(self, timeout: float) -> None:
        """Wait for its end, which closes its output; Popen.wait would poll.

        Raises: TimeoutError.
        """
        assert self._child.stdout is not None
        deadline = time.monotonic() + timeout
        while select.select([self._child.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            if not os.read(self._child.stdout.fileno(), 65536):
                self._child.wait()
                return
        raise TimeoutError(f"client {self.pid} is still there")

    def leave(self, timeout: float = _TIMEOUT_SECONDS) -> Report:
        """End it as a program ends, and wait for that."""
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        self._wait(timeout)
        return self.report

    def kill(self, number: int = signal.SIGKILL) -> None:
        """End it with a signal, and wait for that."""
        self._place.kill(self.pid, number)
        self._wait(_TIMEOUT_SECONDS)

    def end(self) -> None:
        """Have it gone, whatever it is doing."""
        with contextlib.suppress(TimeoutError):
            self.leave(timeout=1)
        if self._child.returncode is None:
            self.kill()


class Daemon:
    """A control daemon's directories, and the daemon in them if it was started."""

    def __init__(self, place: Place, directory: str, user: str, gpus: Sequence[str] = ()) -> None:
        self._place = place
        self._gpus = gpus
        self._machine = place.machine
        self.directory = directory
        self.user = user
        self.pipe = f"{directory}/pipe"
        self.log = f"{directory}/log"
        self.environment = {"CUDA_MPS_PIPE_DIRECTORY": self.pipe, "CUDA_MPS_LOG_DIRECTORY": self.log}
        self.clients: list[Client] = []

    def make_directories(self, mode: int = 0o700) -> None:
        """Make the directory with `mode`, and pipe and log in it, all of them the user's."""
        for path, its_mode in ((self.directory, mode), (self.pipe, 0o755), (self.log, 0o755)):
            self._machine.make_directory(path, user=self.user, mode=its_mode)

    def start(self, *options: str, env: Mapping[str, str] | None = None, timeout: float = _TIMEOUT_SECONDS) -> Result:
        return self._machine.run(
            [CONTROL, *(options or ("-d",))],
            user=self.user,
            env={**self.environment, **sees(*self._gpus), **(env or {})},
            timeout=timeout,
        )

    def control(self, *lines: str, user: str | None = None, timeout: float = _TIMEOUT_SECONDS) -> Result:
        """Give the control program these lines on its standard input."""
        said = "".join(f"{line}\n" for line in lines)
        return self._machine.run([CONTROL], user=user or self.user, env=self.environment, input=said, timeout=timeout)

    def ask(self, *lines: str, user: str | None = None) -> str:
        """What the control program prints, which must succeed and be silent on standard error."""
        result = self.control(*lines, user=user)
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout.removesuffix("\n")

    def start_control(self, line: str) -> subprocess.Popen[bytes]:
        """The same, without waiting for its end."""
        child = self.popen(CONTROL, stdin=subprocess.PIPE)
        assert child.stdin is not None
        child.stdin.write(f"{line}\n".encode())
        child.stdin.close()
        return child

    def popen(
        self, *argv: str, stdin: int = subprocess.DEVNULL, stdout: int = subprocess.DEVNULL
    ) -> subprocess.Popen[bytes]:
        return self._machine.popen(
            argv, user=self.user, env=self.environment, stdin=stdin, stdout=stdout, stderr=subprocess.STDOUT
        )

    def client(self, env: Mapping[str, str] | None = None, *, user: str | None = None, copies: int = 1) -> Client:
        """Start a CUDA program that looks for this daemon."""
        script = f"{self._place.scratch}/cuda_client.py"
        child = self._machine.popen(
            [self._place.plain_python, "-I", "-S", script, str(copies)],
            user=user or self.user,
            env={**self.environment, **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        client = Client(self._place, child, copies)
        self.clients.append(client)
        return client

    def look(self, env: Mapping[str, str] | None = None, *, user: str | None = None) -> Report:
        """Run such a program to its end."""
        return self.client(env, user=user).leave()

    @property
    def is_there(self) -> bool:
        result = self.control("get_server_list", user="root")
        return (result.returncode, result.stderr) != (1, "Cannot find MPS control daemon process\n")

    @property
    def pid(self) -> int:
        """Of the daemon, also of one that has died; of driver 535's, which writes no pid file, as long as it runs."""
        if self._machine.path(f"{self.pipe}/{PID_FILE}").exists():
            return int(self._machine.read(f"{self.pipe}/{PID_FILE}"))
        found = self._place.mps_processes(self.directory)
        pids = [one.pid for one in found]
        (daemon,) = (one.pid for one in found if one.ppid not in pids)
        return daemon

    @property
    def server(self) -> int:
        """The pid of its server, 0 when it has none."""
        return int(self.ask("get_server_list") or 0)

    def start_server(self, user: str | None = None) -> int:
        """Start a server for a user, wait until it is ACTIVE, and return its pid."""
        assert self.ask(f"start_server -uid {self._place.uid(user or self.user)}") == ""
        server = self.server
        assert self.ask(f"get_server_status {server}") == "ACTIVE"
        return server

    def listed_files(self) -> list[str]:
        return sorted(os.listdir(self._machine.path(self.pipe)))

    def read_log(self, name: str) -> str:
        return self._machine.read(f"{self.log}/{name}")

    def log_lines(self, name: str) -> list[str]:
        """A log's lines without time, program and pid."""
        return [line.partition("] ")[2] for line in self.read_log(name).splitlines()]

    def end(self) -> None:
        for client in self.clients:
            client.end()
        if self._machine.path(f"{self.pipe}/control").exists():
            self.control("quit -t 1", user="root")


class Driver:
    """The driver of the place, for one test."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.machine = place.machine
        self.user, self.other_user = place.users
        self.branch = place.branch
        self.uuids, self.names, self.bus_ids = place.gpus
        #: How many GPUs a daemon gets that is not told which: each costs a real one a third of a second (O79).
        self.gpus_needed = 1
        self._daemons: list[Daemon] = []

    @property
    def files_of_a_daemon(self) -> list[str]:
        """What is in the pipe directory while a daemon runs (O25, O83)."""
        return [name for name in FILES_OF_A_DAEMON if name != PID_FILE or self.branch >= 550]

    def directories(self, *, user: str | None = None, mode: int = 0o700, name: str = "") -> Daemon:
        """Fresh directories without a daemon."""
        directory = f"{self.place.scratch}/{len(self._daemons)}{name}"
        daemon = Daemon(self.place, directory, user or self.user, self.uuids[: self.gpus_needed])
        daemon.make_directories(mode)
        self._daemons.append(daemon)
        return daemon

    def daemon(self, env: Mapping[str, str] | None = None, *, user: str | None = None, mode: int = 0o700) -> Daemon:
        """A control daemon in the background, `env` being added to its environment."""
        daemon = self.directories(user=user, mode=mode)
        assert daemon.start(env=env) == Result(0, "", "")
        return daemon

    def nvml_memory(self, gpu: int) -> tuple[int, int]:
        """A GPU's memory in total and what is free of it, as NVML has them in its first form."""
        said = self.machine.run([*self.place.python, "-c", NVML_MEMORY, self.uuids[gpu]]).check().stdout.split()
        return int(said[0]), int(said[1])

    def server_uids(self) -> list[int]:
        return [process.uid for process in self.place.mps_processes() if process.cmdline[0].endswith(SERVER)]

    def left_over(self) -> list[int]:
        """The pids of all daemons and servers, of which a test leaves none."""
        return [process.pid for process in self.place.mps_processes()]

    def close(self) -> None:
        """End all daemons and clients. Raises: AssertionError when any process stays, after killing it."""
        for daemon in self._daemons:
            daemon.end()
        try:
            wait_until(lambda: not self.left_over())
        finally:
            for pid in self.left_over():
                self.place.kill(pid)
            for daemon in self._daemons:
                shutil.rmtree(self.machine.path(daemon.directory))


def sees(*devices: str) -> dict[str, str]:
    """The environment of who is to see these GPUs, named by ordinal or UUID."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(devices)}


def threads(percentage: str) -> dict[str, str]:
    return {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": percentage}


def memory(limit: str) -> dict[str, str]:
    return {"CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": limit}


def wait_until(holds: Callable[[], object]) -> None:
    """Wait for something that must become so soon."""
    deadline = time.monotonic() + _LONGEST_WAIT_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
