"""The MPS control daemon: start it, command it, know it again, end it.

The control program answers nonsense with exit 0 (O1-O5), so nothing counts as done that was not read back. Commands
go through its standard input, one a line, all in one process (O7); they are put together here from typed values and
checked once more before they leave, for a line end in one would be a second command run as root.

This module knows the command text and nothing else does: a speaker of the v3 protocol can stand beside it (M15).
"""

from __future__ import annotations

from time import monotonic, sleep

from ..errors import NodeError
from ..record import record
from ..units import format_control_percentage, format_memory, format_thread_percentage, printable
from . import processes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .files import Directory
    from .processes import ProcessIdentity

DAEMON_PROGRAM = "nvidia-cuda-mps-control"
SERVER_PROGRAM = "nvidia-cuda-mps-server"
PID_FILE = "nvidia-cuda-mps-control.pid"
LOCK_FILE = "control_lock"
#: A socket's path may have 107 bytes, and a longer one is refused without a word (O6).
PIPE_DIRECTORY_MAX = 107 - len("/control_privileged")
_TURNED_AWAY = "Cannot send command"
_TURNED_AWAY_SECONDS = 0.02
_STRAY_SECONDS = 1.0
_NAMED_PIDS = 20
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./")
_GRAMMAR = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-. ")


@record
class Limits:
    """What every client of a daemon may have: percent of threads, bytes of memory on each GPU (None: all), priority.

    A priority of None is the driver's own and not set, for drivers that do not know it.
    """

    thread_percentage: float
    memory_bytes: int | None = None
    client_priority: int | None = None


def limit_commands(limits: Limits, device_count: int) -> list[str]:
    """The control commands that set a daemon's limits and ask for them again."""
    lines = [f"set_default_active_thread_percentage {format_thread_percentage(limits.thread_percentage)}"]
    if limits.memory_bytes is not None:
        size = format_memory(limits.memory_bytes)
        lines += [f"set_default_device_pinned_mem_limit {device} {size}" for device in range(device_count)]
    lines.append("get_default_active_thread_percentage")
    if limits.memory_bytes is not None:
        lines += [f"get_default_device_pinned_mem_limit {device}" for device in range(device_count)]
    if limits.client_priority is not None:
        lines += [f"set_default_client_priority {limits.client_priority}", "get_default_client_priority"]
    return lines


@record
class Patience:
    """How long each way of ending a daemon may take, in seconds."""

    force_after_seconds: int  #: ``quit -t``: the daemon itself forces its clients out after this
    quit_seconds: float
    signal_seconds: float


@record
class Stray:
    """A control daemon or server, found by its pipe directory alone: its user, and the GPUs that it was started on."""

    process: ProcessIdentity
    uid: int
    pipe_directory: str
    gpus: tuple[str, ...]


def find_below(directory: str, place: str) -> list[Stray]:
    """Every control daemon of root's, and every server, with a pipe directory below `directory`, which need not be
    there any more; `place`, which it is in, tells this node from others (see processes.find_programs).
    """
    found = []
    for one in processes.find_programs((DAEMON_PROGRAM, SERVER_PROGRAM), place):
        pipe = one.environment.get("CUDA_MPS_PIPE_DIRECTORY", "")
        if not (pipe.startswith(f"{directory}/") and _PLAIN.issuperset(pipe)):
            continue  # a server's environment is its user's to write, and so is one that only looks like a server
        if one.program == SERVER_PROGRAM or one.uid == 0:
            gpus = one.environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
            named = tuple(gpu for gpu in gpus if gpu.startswith("GPU-") and len(gpu) < 96 and _PLAIN.issuperset(gpu))
            found.append(Stray(one.process, one.uid, pipe, named))
    return found


@record
class ControlDaemon:
    """One control daemon, known by its pipe directory. It may or may not be running."""

    program: str
    pipe_directory: str
    log_directory: str

    @property
    def _environment(self) -> dict[str, str]:
        return {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "CUDA_MPS_PIPE_DIRECTORY": self.pipe_directory,
            "CUDA_MPS_LOG_DIRECTORY": self.log_directory,
        }

    def start(self, gpu_uuids: Sequence[str], timeout_seconds: float, log_limit_bytes: int) -> None:
        """Start the daemon in the background on exactly these GPUs.

        Its logs stop growing at `log_limit_bytes`, which it does not mind (O49): each connection is two lines of them,
        and the job's user can make a hundred thousand a second.
        Raises: NodeError when the program says no; whether it says yes and starts nothing (O5) shows in process().
        """
        if len(self.pipe_directory) > PIPE_DIRECTORY_MAX:
            raise NodeError(f"{self.pipe_directory} is too long for the control daemon's sockets")
        environment = {**self._environment, "CUDA_VISIBLE_DEVICES": ",".join(gpu_uuids)}
        outcome = processes.run([self.program, "-d"], environment, timeout_seconds, file_limit_bytes=log_limit_bytes)
        if outcome.status:
            said = printable((outcome.errors or outcome.output).strip() or "no message", 200)
            raise NodeError(f"{self.program} -d ended with status {outcome.status}: {said}")

    def command(self, lines: Sequence[str], timeout_seconds: float) -> list[str]:
        """Send commands in one go and give back the lines of the answer that say something.

        The daemon talks to one at a time; while somebody else has its ear this tries again (O40).
        Raises: NodeError when no daemon is there or the answer is an error; DeadlineError when none comes.
        """
        for line in lines:
            if not _GRAMMAR.issuperset(line):
                raise NodeError(f"{printable(line)!r} is no control command")
        text = "".join(f"{line}\n" for line in lines)
        end = monotonic() + timeout_seconds
        outcome = processes.run([self.program], self._environment, timeout_seconds, text)
        while outcome.status and _TURNED_AWAY in outcome.errors and monotonic() + _TURNED_AWAY_SECONDS < end:
            sleep(_TURNED_AWAY_SECONDS)
            outcome = processes.run([self.program], self._environment, end - monotonic(), text)
        if outcome.status:
            said = printable(outcome.errors.strip() or "no message", 200)
            raise NodeError(
                f"control daemon of {self.pipe_directory}: {self.program} ended with status {outcome.status}: {said}"
            )
        return [line for line in outcome.output.splitlines() if line.strip()]

    def set_limits(self, limits: Limits, device_count: int, timeout_seconds: float) -> None:
        """Set the defaults of servers to come, and read them back.

        Devices go by the daemon's ordinal, which all driver releases take.
        Raises: NodeError when what is read back is not what was set.
        """
        percent = format_control_percentage(limits.thread_percentage)
        lines = limit_commands(limits, device_count)
        expected = [percent, percent]
        if limits.memory_bytes is not None:
            expected += [format_memory(limits.memory_bytes)] * device_count
        if limits.client_priority is not None:
            expected.append(str(limits.client_priority))
        answer = self.command(lines, timeout_seconds)
        if answer != expected:
            raise NodeError(
                f"control daemon of {self.pipe_directory}: asked for {'; '.join(lines)}, "
                f"and it reads back {printable(' '.join(answer) or 'nothing', 200)!r} "
                f"instead of {' '.join(expected)!r}"
            )

    def start_server(self, uid: int, timeout_seconds: float) -> None:
        """Have a server started for a user; it is up 0.15 s and more later, and not waited for (O26)."""
        self.command([f"start_server -uid {uid}"], timeout_seconds)

    def protect(self, pipe: Directory) -> None:
        """Make root's files in the pipe directory root's alone: the daemon leaves them writable by all (O37)."""
        for name in (PID_FILE, LOCK_FILE):
            pipe.protect(name)

    def process(self, pipe: Directory) -> ProcessIdentity | None:
        """The running daemon, by the pid file that it keeps in its pipe directory.

        The file says where to look and proves nothing. None when the process it names is not this daemon.
        """
        try:
            text = pipe.read_tail(PID_FILE, 16).strip()
        except FileNotFoundError:
            return None
        if not text.isdigit():
            return None
        process = processes.identify(int(text))
        return process if process and self._is_ours(process.pid, DAEMON_PROGRAM, (0,)) else None

    def _is_ours(self, pid: int, program: str, uids: Sequence[int]) -> bool:
        return processes.runs_program(pid, (program,), uids, f"CUDA_MPS_PIPE_DIRECTORY={self.pipe_directory}")

    def find_processes(self, server_uid: int) -> list[ProcessIdentity]:
        """Every process of this daemon: itself and its servers, also when they have lost one another.

        Looks at each process of the node; for the way out when something went wrong.
        """
        found = []
        for pid in processes.pids():
            process = processes.identify(pid)
            ours = self._is_ours(pid, DAEMON_PROGRAM, (0,)) or self._is_ours(pid, SERVER_PROGRAM, (0, server_uid))
            if process and ours and processes.identify(pid) == process:
                found.append(process)
        return found

    def end(self, server_uid: int, patience: Patience) -> None:
        """End whatever of this daemon is still there, without asking; its directory need not be there.

        Raises: NodeError that names what is still there after all that.
        """
        self._end_by_signals([], server_uid, patience)

    def quit(self, pipe: Directory | None, server_uid: int, patience: Patience) -> None:
        """End the daemon and its servers: ask, then use signals, each with a time of its own.

        The servers are the daemon's own children, noted before it is asked: they run as the job's user, who can change
        what a server says of itself, but not whose child it is. Without `pipe` (an earlier try removed the directory),
        or without a daemon, what is left is searched for.
        Raises: NodeError that names what is still there after all that.
        """
        daemon = self.process(pipe) if pipe else None
        ours = [daemon, *processes.children(daemon)] if daemon else []
        if daemon and self._quit_politely(ours, patience):
            return
        self._end_by_signals(ours, server_uid, patience)

    def _quit_politely(self, ours: list[ProcessIdentity], patience: Patience) -> bool:
        """Ask the daemon to quit, and see that it went and took its servers along."""
        end = monotonic() + patience.quit_seconds
        try:
            self.command([f"quit -t {patience.force_after_seconds}"], patience.quit_seconds)
        except NodeError:
            return False  # it does not answer, or went by itself
        return all(processes.wait_ended(process, max(0.0, end - monotonic())) for process in ours)

    def _end_by_signals(self, ours: list[ProcessIdentity], server_uid: int, patience: Patience) -> None:
        """Without the daemon nobody says whose servers are whose: all that look like its are ended, and waited for."""
        ours = ours or self.find_processes(server_uid)
        for number in (processes.SIGTERM, processes.SIGKILL):
            left = _alive(ours)
            for process in left:
                processes.signal_process(process, number)
            end = monotonic() + patience.signal_seconds
            for process in left:
                processes.wait_ended(process, max(0.0, end - monotonic()))
        self._kill_strays(server_uid)
        stuck = _alive(ours)
        if not stuck:
            return
        pids = ", ".join(str(process.pid) for process in stuck[:_NAMED_PIDS])
        raise NodeError(
            f"MPS processes {pids} of {self.pipe_directory} are still there after quit, SIGTERM and SIGKILL",
            hint="a process that SIGKILL does not end waits in the driver; the GPU may need a reset",
        )

    def _kill_strays(self, server_uid: int) -> None:
        """End what else looks like ours: a server that a daemon on its way out had just started.

        The job's user can make such, and more than can be waited for: they are no fault of the node.
        """
        found = self.find_processes(server_uid)
        for process in found:
            processes.signal_process(process, processes.SIGKILL)
        end = monotonic() + _STRAY_SECONDS
        for process in found:
            processes.wait_ended(process, max(0.0, end - monotonic()))


def _alive(some: list[ProcessIdentity]) -> list[ProcessIdentity]:
    return [process for process in some if processes.identify(process.pid) == process]
