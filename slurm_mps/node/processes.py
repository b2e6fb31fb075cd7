"""Every process that slurm-mps starts, looks at or signals.

Promises:
 - A child gets an environment made from nothing, standard streams of its own and no other descriptor.
 - No wait is without a deadline, and no answer is read without a bound.
 - A signal goes only to a process proved to be the one meant: by pidfd, after its start time, its program and its
   environment were compared. Never by name, never by a bare pid.
 - No file system that a user chose is asked: nothing is opened or looked up through /proc/PID/exe, root, cwd or fd.

``subprocess`` is not used: it costs the prolog more than the work itself (docs/decisions/0003).
"""

from __future__ import annotations

import os
import resource
import select
from time import CLOCK_BOOTTIME, clock_gettime, monotonic

from ..errors import DeadlineError, NodeError
from ..record import record
from ..units import printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

SIGTERM, SIGKILL = 15, 9  # the signal module costs 5 ms to import for these two numbers
OUTPUT_LIMIT_BYTES = 262144  # ps has 100 bytes for each of 16 x 60 clients, and more for a long program name
PROC_LIMIT_BYTES = 65536
#: e_machine of elf(5), in uname's words.
_MACHINES = {0x3E: "x86_64", 0xB7: "aarch64", 0x15: "ppc64le"}
_MACHINE_AT = 18
_REAP_SECONDS = 0.5
_SIGXFSZ = 25
# statx(2): struct statx is 256 bytes, and stx_uid is at 20
_AT_FDCWD, _AT_STATX_DONT_SYNC, _STATX_UID = -100, 0x4000, 0x8
_STATX_SIZE, _STATX_UID_AT = 256, 20
_SIGNALS = tuple(number for number in range(1, 32) if number not in (9, 19))  # all that can be given a default again


@record
class Outcome:
    """A program's output and exit status; ``status`` is negative for a signal."""

    status: int
    output: str
    errors: str


def _to_close(program: str) -> list[int]:
    """Descriptors that a child must not have: those that we were started with and left inheritable, and NVML's, which
    it opens without O_CLOEXEC. Python's own close by themselves.
    """
    try:
        fds = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError as error:
        raise NodeError(f"{program} cannot be started: {os.strerror(error.errno or 0)}") from None
    found = []
    for fd in fds:
        try:
            if fd > 2 and os.get_inheritable(fd):
                found.append(fd)
        except OSError:
            pass  # the one that listed the others
    return found


def _pipes(program: str) -> list[tuple[int, int]]:
    """Three pipes, or none: who runs out of descriptors half-way needs those it has to undo its work."""
    pipes: list[tuple[int, int]] = []
    try:
        while len(pipes) < 3:
            pipes.append(os.pipe())
    except OSError as error:
        for fd in (fd for pipe in pipes for fd in pipe):
            os.close(fd)
        raise NodeError(f"{program} cannot be started: {os.strerror(error.errno or 0)}") from None
    return pipes


class Child:
    """A started program, its pipes and its end; wait_all() reads its output."""

    def __init__(
        self, argv: Sequence[str], environment: Mapping[str, str], text: bytes, file_limit_bytes: int | None
    ) -> None:
        to_close = _to_close(argv[0])
        (stdin, self._input), (self._output, stdout), (self._errors, stderr) = _pipes(argv[0])
        streams = ((stdin, 0), (stdout, 1), (stderr, 2))
        actions: list[tuple[int, ...]] = [(os.POSIX_SPAWN_DUP2, fd, number) for fd, number in streams]
        actions += [(os.POSIX_SPAWN_CLOSE, fd) for fd in to_close]
        signals = [number for number in _SIGNALS if file_limit_bytes is None or number != _SIGXFSZ]
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            if file_limit_bytes is not None:  # the child inherits it, and we have our own back at once
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit_bytes, limits[1]))
            self._pid = os.posix_spawn(
                argv[0],
                list(argv),
                dict(environment),
                file_actions=actions,
                setpgroup=0,
                setsigmask=(),
                setsigdef=signals,
            )
        except OSError as error:
            for fd in (self._input, self._output, self._errors):
                os.close(fd)
            raise NodeError(f"{argv[0]}: {os.strerror(error.errno or 0)}") from None
        finally:
            if file_limit_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            for fd, _ in streams:
                os.close(fd)
        try:
            self._end = os.pidfd_open(self._pid)
        except OSError as error:
            for fd in (self._input, self._output, self._errors):
                os.close(fd)
            os.killpg(self._pid, SIGKILL)
            os.waitpid(self._pid, 0)
            raise NodeError(f"{argv[0]} cannot be watched: {os.strerror(error.errno or 0)}") from None
        self._text = text
        self._read = {self._output: b"", self._errors: b""}
        self._open = {self._output, self._errors, self._end}  #: what the program has not closed or ended yet
        self._outcome: Outcome | None = None
        self._closed = False
        os.set_blocking(self._input, False)
        self._feed()

    def _feed(self) -> None:
        """Send as much of the text as the child's pipe takes now, and close it when all is sent."""
        try:
            while self._text:
                self._text = self._text[os.write(self._input, self._text) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._text = b""  # the program does not want the rest
        os.close(self._input)
        self._input = -1

    def awaited(self) -> dict[int, int]:
        """The descriptors to poll, and for what; none when the program has ended and closed its streams."""
        if self._closed:
            return {}
        feeding = {self._input: select.POLLOUT} if self._input >= 0 and self._open else {}
        return {**dict.fromkeys(self._open, select.POLLIN), **feeding}

    def attend(self, fd: int) -> None:
        """Read, write or close a descriptor that is ready."""
        if fd == self._input:
            self._feed()
        elif fd == self._end:
            self._open.discard(fd)
        else:
            chunk = os.read(fd, 4096)
            if len(self._read[fd]) < OUTPUT_LIMIT_BYTES:
                self._read[fd] += chunk
            if not chunk:
                self._open.discard(fd)

    def close(self) -> Outcome | None:
        """The program's outcome. A program that still runs is killed with its process group, and its outcome is
        None.
        """
        if self._closed:
            return self._outcome
        self._closed = True
        if not self._open:
            _, status = os.waitpid(self._pid, 0)
            output, errors = (self._read[fd].decode("utf-8", "replace") for fd in (self._output, self._errors))
            self._outcome = Outcome(os.waitstatus_to_exitcode(status), output, errors)
        else:
            self._kill()
        for fd in (self._input, self._output, self._errors, self._end):
            if fd >= 0:
                os.close(fd)
        return self._outcome

    def _kill(self) -> None:
        """End the whole process group; a child that even SIGKILL does not end is left to init."""
        try:
            os.killpg(self._pid, SIGKILL)  # our own child, not reaped yet: its pid cannot be another's
        except ProcessLookupError:
            pass
        if _ended(self._end, _REAP_SECONDS):
            os.waitpid(self._pid, 0)


def _ended(pidfd: int, timeout_seconds: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(max(0, int(timeout_seconds * 1000))))


def spawn(
    argv: Sequence[str], environment: Mapping[str, str], text: str = "", file_limit_bytes: int | None = None
) -> Child:
    """Start a program with `text` on its standard input, and do not wait for it.

    No file that it or what it leaves behind writes becomes longer than `file_limit_bytes`; a write beyond that fails
    (SIGXFSZ is ignored, as Python does).
    Raises: NodeError when it cannot be started.
    """
    return Child(argv, environment, text.encode("utf-8", "surrogateescape"), file_limit_bytes)


def wait_all(children: Sequence[Child], timeout_seconds: float) -> list[Outcome | None]:
    """Wait until all of these programs have ended and closed their streams, in one poll over all.

    Returns: each program's outcome; None for one that did not end in time, whose process group is killed.
    """
    deadline = monotonic() + timeout_seconds
    while waited := {fd: (child, events) for child in children for fd, events in child.awaited().items()}:
        poll = select.poll()
        for fd, (_, events) in waited.items():
            poll.register(fd, events)
        ready = poll.poll(max(0, int((deadline - monotonic()) * 1000) + 1))
        if not ready or monotonic() > deadline:
            break
        for fd, _ in ready:
            waited[fd][0].attend(fd)
    return [child.close() for child in children]


def run(argv: Sequence[str], environment: Mapping[str, str], timeout_seconds: float, text: str = "") -> Outcome:
    """Run a program to its end with `text` on its standard input.

    Raises: DeadlineError after `timeout_seconds`, with the program's process group killed; NodeError when it cannot
    be started.
    """
    (outcome,) = wait_all([spawn(argv, environment, text)], timeout_seconds)
    if outcome is None:
        raise DeadlineError(f"{argv[0]} did not answer within {timeout_seconds:g} s")
    return outcome


def architecture_of(program: str) -> str:
    """The architecture that a program is built for, as uname names it; empty for a script. Raises: OSError."""
    with open(program, "rb") as file:
        head = file.read(_MACHINE_AT + 2)
    number = int.from_bytes(head[_MACHINE_AT:], "little")
    return _MACHINES.get(number, f"ELF machine {number}") if head.startswith(b"\x7fELF") else ""


def in_child(work: Callable[[], Iterable[str]], timeout_seconds: float, limit_bytes: int) -> str:
    """Do `work` in a child of this process: it may wait for ever, and even SIGKILL may not end it.

    A child that is late is left behind. It has no standard streams, since slurmd waits until ours are closed.
    Returns: the text that `work` gives, cut at `limit_bytes`.
    Raises: DeadlineError when it is late; NodeError when there can be no child, or it failed.
    """
    try:
        output, other_end = os.pipe()
        pid = os.fork()
    except OSError as error:
        raise NodeError(f"no process can be started: {os.strerror(error.errno or 0)}") from None
    if pid == 0:
        _work_and_end(work, other_end)
    os.close(other_end)
    deadline, data, ready = monotonic() + timeout_seconds, b"", True
    poll = select.poll()
    poll.register(output, select.POLLIN)
    while ready and len(data) < limit_bytes:
        ready = bool(poll.poll(max(0, int((deadline - monotonic()) * 1000) + 1)))
        chunk = os.read(output, 65536) if ready else b""
        if ready and not chunk:
            break
        data += chunk
    os.close(output)
    failed = _end_child(pid, late=not ready)
    if not ready:
        raise DeadlineError(f"not done within {timeout_seconds:g} s")
    if failed and len(data) < limit_bytes:
        raise NodeError("a child of slurm-mps failed")
    return data[:limit_bytes].decode("ascii", "replace")


def _work_and_end(work: Callable[[], Iterable[str]], output: int) -> None:
    """The child's life."""
    status = 1
    try:
        os.setpgid(0, 0)
        os.closerange(0, 3)
        for text in work():
            data = text.encode("ascii", "replace")
            while data:
                data = data[os.write(output, data) :]
        status = 0
    finally:
        os._exit(status)


def _end_child(pid: int, *, late: bool) -> bool:
    """End a child of in_child() that is late. Returns: whether it failed."""
    if late:
        try:
            os.killpg(pid, SIGKILL)  # our own child, not waited for yet: its pid cannot be another's
        except ProcessLookupError:
            pass
        end = os.pidfd_open(pid)
        gone = _ended(end, _REAP_SECONDS)
        os.close(end)
        if not gone:
            return True
    return os.waitpid(pid, 0)[1] != 0


@record
class ProcessIdentity:
    """One process for good: a pid is reused, a pid with its start time (in clock ticks since boot) is not."""

    pid: int
    start_ticks: int


def identify(pid: int) -> ProcessIdentity | None:
    """The process that has this pid now; None when there is none, or when it has ended.

    A process whose main thread has ended is there as long as another thread runs: a server still holds its GPU (O78).
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, *rest = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    threads = int(rest[16])  # field 20 of /proc/PID/stat; the start time is field 22
    return None if state in (b"Z", b"X") and threads <= 1 else ProcessIdentity(pid, int(rest[18]))


def age_seconds(process: ProcessIdentity) -> float:
    """How long ago a process started."""
    return clock_gettime(CLOCK_BOOTTIME) - process.start_ticks / os.sysconf("SC_CLK_TCK")


def describe(pid: int) -> str:
    """A process in words, with its name and user if they can be read: ``4711 (python3 of uid 20001)``."""
    name = printable(name_of(pid))
    return f"{pid} ({name} of uid {uid_of(pid)})" if name else f"{pid}"


def name_of(pid: int) -> str:
    """A process's name (comm): at first its program's, cut to 15 bytes; empty when the process is gone."""
    return _proc_bytes(pid, "comm").decode("utf-8", "replace").strip()


def children(process: ProcessIdentity) -> list[ProcessIdentity]:
    """The children of a process that the kernel lists, and whose parent is still that process."""
    words = _proc_bytes(process.pid, f"task/{process.pid}/children").split()
    found = [identify(int(pid)) for pid in words]
    ours = [child for child in found if child and parent_of(child.pid) == process.pid]
    return ours if identify(process.pid) == process else []


def _status(pid: int, key: str) -> list[str]:
    """The values of a line of /proc/PID/status; none where the process is gone.

    The process's name stands there, which its user chose: only a line end is escaped in it.
    """
    for line in _proc_bytes(pid, "status").decode("utf-8", "replace").split("\n"):
        name, _, values = line.partition(":")
        if name == key:
            return values.split()
    return []


def _proc_bytes(pid: int, name: str) -> bytes:
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read(PROC_LIMIT_BYTES)
    except OSError:
        return b""


def uid_of(pid: int) -> int | None:
    """The user of a process; None when its user ids differ, as in a setuid program, or when it is gone.

    Its directory in /proc does not tell: it is root's where a user's process has made itself undumpable.
    """
    return _only(_status(pid, "Uid"))


def gid_of(pid: int) -> int | None:
    """The group of a process; None when its group ids differ, or when it is gone."""
    return _only(_status(pid, "Gid"))


def is_of_roots_making(pid: int) -> bool:
    """Whether a process's user or its group is root: only root can start such a process for a user."""
    return 0 in (gid_of(pid), uid_of(pid))


def _only(ids: Sequence[str]) -> int | None:
    return int(ids[0]) if len(set(ids)) == 1 else None


def job_of(pid: int) -> int | None:
    """The Slurm job whose cgroup a process is in, from the kernel; None for no job, or when the process is gone."""
    words = _proc_bytes(pid, "cgroup").decode("utf-8", "replace").replace("\n", "/").split("/")
    found = [word[4:] for word in words if word.startswith("job_") and word[4:].isdigit()]
    return int(found[0]) if found else None


def parent_of(pid: int) -> int | None:
    """The pid of a process's parent; None when the process is gone."""
    parent = _status(pid, "PPid")
    return int(parent[0]) if parent else None


def pid_inside(pid: int) -> int | None:
    """A process's pid in its own pid namespace; None where that namespace is ours, or the process is gone."""
    known = _status(pid, "NSpid")
    return int(known[-1]) if len(known) > 1 else None


def environment_of(pid: int) -> dict[str, str]:
    """The environment that a process was started with, if we may read it and the process has not overwritten it.

    Its user can write it: use it for display only, or for that user.
    """
    text = _proc_bytes(pid, "environ").decode("utf-8", "surrogateescape")
    return dict(word.partition("=")[::2] for word in text.split("\0") if "=" in word)


def roots_title(pid: int, program: str) -> str:
    """The title of a process of root's that runs a program whose name begins with `program`; empty for any other.

    Debian's slurmstepd is slurmstepd-wlm.

    A setuid program that a user starts has a title of the user's choice, but the user's real id. slurmstepd itself
    has another effective id for moments.
    """
    if _status(pid, "Uid")[:1] != ["0"] or not program_of(pid).startswith(program):
        return ""
    return _proc_bytes(pid, "cmdline").replace(b"\0", b" ").decode("utf-8", "replace")


def runs_program(pid: int, program_names: Sequence[str], uids: Sequence[int], variable: str) -> bool:
    """Whether a process runs one of our programs, as one of these users, with this ``NAME=value`` in its environment.

    The program must be root's file, so that a user's own of the same name does not pass; a user who runs the real one
    with such an environment has made it a process of that job.
    """
    if uid_of(pid) not in uids or program_of(pid) not in program_names:
        return False
    return variable.encode() in _proc_bytes(pid, "environ").split(b"\0")


def program_of(pid: int) -> str:
    """The name of the program that a process runs, if root owns the program; else empty.

    The file system that the program lies on may be a user's own, or hang: it is not asked. readlink(2) gives the
    kernel's own path, and AT_STATX_DONT_SYNC the owner that the kernel has.
    """
    name = program_name(pid)
    return name if name and _owner_as_cached(f"/proc/{pid}/exe") == 0 else ""


def program_name(pid: int) -> str:
    """The name of the program that a process runs, whoever owns it; empty for none."""
    try:
        return os.path.basename(os.readlink(f"/proc/{pid}/exe")).removesuffix(" (deleted)")
    except OSError:
        return ""


def _owner_as_cached(path: str) -> int | None:
    """The owner of the file that a path leads to, from the kernel's cache; None where there is no file."""
    import ctypes  # where there is a job with MPS it is there already, for NVML

    found = ctypes.create_string_buffer(_STATX_SIZE)
    if ctypes.CDLL(None).statx(_AT_FDCWD, path.encode(), _AT_STATX_DONT_SYNC, _STATX_UID, found):
        return None
    return int.from_bytes(found.raw[_STATX_UID_AT : _STATX_UID_AT + 4], "little")


def mount_namespace(pid: int | str) -> str:
    """The name of a process's mount namespace, or of ours ("self"); empty where we may not know it."""
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return ""


def pids() -> Iterator[int]:
    """Every process of this machine that we can see."""
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def signal_process(process: ProcessIdentity, number: int) -> bool:
    """Send a signal to exactly this process; False when it is gone."""
    from signal import pidfd_send_signal  # rarely needed, and slow to import

    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        if identify(process.pid) != process:
            return False
        pidfd_send_signal(fd, number)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)


def wait_ended(process: ProcessIdentity, timeout_seconds: float) -> bool:
    """Wait until a process, not necessarily a child, has ended; False when it is still there after the time."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    try:
        return identify(process.pid) != process or _ended(fd, timeout_seconds) or identify(process.pid) != process
    finally:
        os.close(fd)


def wait_all_ended(some: Sequence[ProcessIdentity], deadline: float) -> bool:
    """Wait until all of these processes have ended, or until `deadline` (monotonic). Returns: whether all have."""
    return all(wait_ended(process, max(0.0, deadline - monotonic())) for process in some)


def be_killable() -> None:
    """Let the kernel's OOM killer choose this process and its children like any other: slurmd may be exempt."""
    with open("/proc/self/oom_score_adj", "r+b", buffering=0) as file:
        if int(file.read()) < 0:
            file.write(b"0")


def boot_id() -> str:
    """The kernel's name for this boot; state of another boot describes processes and modes that are gone."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
