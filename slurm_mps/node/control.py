"""The MPS control daemon: start it, command it, know it again, end it.

The control program answers nonsense with exit 0 (O1-O5), so nothing counts as done that was not read back. Commands
go through its standard input, one a line, all in one process (O7); they are put together here from typed values and
checked once more before they leave, for a line end in one would be a second command run as root.

This module knows the command text and nothing else does: a speaker of the v3 protocol can stand beside it (M15).
"""

from __future__ import annotations

import os
from time import monotonic, sleep

from ..errors import DeadlineError, NodeError, raise_all
from ..record import record
from ..units import format_memory, format_thread_percentage, printable, printed_memory
from . import processes
from .listen import listener
from .processes import ProcessIdentity, identify, runs_program
from .search import search_lines

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from .files import Directory
    from .processes import Outcome

DAEMON_PROGRAM = "nvidia-cuda-mps-control"
SERVER_PROGRAM = "nvidia-cuda-mps-server"
PID_FILE = "nvidia-cuda-mps-control.pid"
LOCK_FILE = "control_lock"
#: A socket's path may have 107 bytes, and a longer one is refused without a word (O6).
PIPE_DIRECTORY_MAX = 107 - len("/control_privileged")
_TURNED_AWAY = "Cannot send command"
_ALWAYS_ANSWERED = "get_default_active_thread_percentage"
_TURNED_AWAY_SECONDS = 0.02
_STRAY_SECONDS = 1.0
_SEARCH_BYTES = 4 * 1024 * 1024
_NAMED_PIDS = 20
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_GRAMMAR = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-. ")


@record
class Limits:
    """The limits of every client of a daemon: percent of threads, bytes of memory on each GPU (None: all), priority.

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


def limit_answers(limits: Limits, device_count: int) -> list[list[str]]:
    """The answers of a daemon that has done limit_commands(): it prints a size rounded down (O95), or as it is."""
    percent = f"{limits.thread_percentage:.1f}"
    size = limits.memory_bytes
    priority = [] if limits.client_priority is None else [str(limits.client_priority)]
    sizes = [[]] if size is None else [[format_memory(printed_memory(size))], [format_memory(size)]]
    return [[percent, percent, *memory * device_count, *priority] for memory in sizes]


@record
class Patience:
    """How long each way of ending a daemon may take, in seconds."""

    force_after_seconds: int  #: ``quit -t``: the daemon itself forces its clients out after this
    quit_seconds: float
    signal_seconds: float
    search_seconds: float


@record
class Stray:
    """A control daemon or server, found by its pipe directory alone: its user, and the GPUs that it was started on."""

    process: ProcessIdentity
    uid: int
    program: str
    pipe_directory: str
    gpus: tuple[str, ...]


def search(directory: str, timeout_seconds: float) -> list[Stray]:
    """Every control daemon and server of root's making with a pipe directory that is `directory` or lies below it.

    An empty `directory` means all, users' own as well; an empty pipe directory is the driver's default.

    Looks at each process of the node, in a child that is left behind when it is late.
    Raises: NodeError; DeadlineError when the search does not end, as where a process waits in a file system that hangs.
    """
    try:
        names = (DAEMON_PROGRAM, SERVER_PROGRAM)
        lines = processes.in_child(lambda: search_lines(directory, names), timeout_seconds, _SEARCH_BYTES)
    except DeadlineError:
        where = directory or "this node"
        message = f"MPS processes of {where} could not be searched for within {timeout_seconds:g} s"
        hint = "an MPS process hangs (ps: state D)"
        raise DeadlineError(message, hint) from None
    found = []
    for line in lines.splitlines():
        pid, start, uid, name, pipe, gpus = line.split(" ")
        uuids = () if gpus == "-" else tuple(gpus.split(","))
        found.append(Stray(ProcessIdentity(int(pid), int(start)), int(uid), name, pipe, uuids))
    return found


def server_path(program: str) -> str:
    """The PATH in which a control program looks for its server program: not beside itself, as it seems to (O83)."""
    return f"{os.path.dirname(program)}:{_PATH}"


def why_not_run(program: str) -> NodeError | None:
    """Why a control program cannot be started: it is not there, or is built for another architecture; else None."""
    here = os.uname().machine
    try:
        built_for = processes.architecture_of(program)
    except OSError as error:
        from .nvml import NEEDED  # for a message alone: the epilog does without NVML

        hint = f"install the driver's compute utilities, of {NEEDED}, or set paths.control_program in mps.toml"
        return NodeError(f"control program {program}: {os.strerror(error.errno or 0)}", hint=hint)
    if built_for and built_for != here:
        return NodeError(
            f"control program {program} is built for {built_for}, and this node is {here}",
            hint=f"install the driver for {here}",
        )
    return None


@record
class ControlDaemon:
    """One control daemon, known by its pipe directory. It may or may not be running."""

    program: str
    pipe_directory: str
    log_directory: str

    @property
    def _environment(self) -> dict[str, str]:
        return {
            "PATH": server_path(self.program),
            "CUDA_MPS_PIPE_DIRECTORY": self.pipe_directory,
            "CUDA_MPS_LOG_DIRECTORY": self.log_directory,
        }

    def start(self, gpu_uuids: Sequence[str], log_limit_bytes: int, *, all_users: bool = False) -> processes.Child:
        """Start the daemon in the background on exactly these GPUs, and do not wait for it.

        With `all_users` it has one server, which runs as root, for the clients of all users (O74; from driver 580 on).

        Its logs stop growing at `log_limit_bytes`, which the daemon survives (O49): each connection writes two lines,
        and the job's user can make a hundred thousand a second.
        Returns: the program, whose outcome check_start() judges.
        Raises: NodeError when it cannot be started.
        """
        if len(self.pipe_directory) > PIPE_DIRECTORY_MAX:
            raise NodeError(f"{self.pipe_directory} is too long for the control daemon's sockets")
        environment = {**self._environment, "CUDA_VISIBLE_DEVICES": ",".join(gpu_uuids)}
        try:
            options = ["-d", "-M"] if all_users else ["-d"]
            return processes.spawn([self.program, *options], environment, file_limit_bytes=log_limit_bytes)
        except NodeError as error:
            raise why_not_run(self.program) or error from None

    def check_start(self, outcome: Outcome | None, timeout_seconds: float, pipe: Directory) -> None:
        """Check that the program of start() has started a daemon, and take other users' write permission from its
        files.

        The daemon leaves its pid file and its lock writable by all (O37).
        Raises: NodeError; DeadlineError where the program has not ended in time (None).
        """
        if outcome is None:
            raise DeadlineError(f"{self.program} did not answer within {timeout_seconds:g} s")
        if outcome.status:
            text = printable((outcome.errors or outcome.output).strip() or "no message", 200)
            raise NodeError(f"{self.program} -d ended with status {outcome.status}: {text}")
        for name in (PID_FILE, LOCK_FILE):
            pipe.protect(name)
        if self.process() is None:
            raise NodeError(f"{self.program} -d reported success, but no control daemon runs")

    def command(self, lines: Sequence[str], timeout_seconds: float) -> list[str]:
        """Send commands in one go and give back the lines of the answer that say something.

        Raises: NodeError when no daemon is there or the answer is an error; DeadlineError when none comes.
        """
        (answer,) = ask_all([(self, lines)], timeout_seconds)
        if isinstance(answer, NodeError):
            raise answer
        return answer

    def ask(self, lines: Sequence[str]) -> processes.Child:
        """Begin to send commands. Raises: NodeError."""
        for line in lines:
            if not _GRAMMAR.issuperset(line):
                raise NodeError(f"{printable(line)!r} is no control command")
        return processes.spawn([self.program], self._environment, "".join(f"{line}\n" for line in lines))

    def _answer(self, outcome: Outcome | None, timeout_seconds: float) -> list[str] | NodeError:
        if outcome is None:
            return DeadlineError(f"{self.program} did not answer within {timeout_seconds:g} s")
        if outcome.status:
            text = printable(outcome.errors.strip() or "no message", 200)
            message = f"{self.program} ended with status {outcome.status}: {text}"
            return NodeError(f"control daemon of {self.pipe_directory}: {message}")
        return [line for line in outcome.output.split("\n") if line.strip()]

    def process(self) -> ProcessIdentity | None:
        """The running daemon: the process that listens on its socket according to the kernel (O39), if root runs it;
        else None.

        Drivers of branch 535 write no pid file (O83), and where there is one it proves nothing (O37).
        """
        pid = listener(self.pipe_directory)
        process = identify(pid) if pid else None
        variable = f"CUDA_MPS_PIPE_DIRECTORY={self.pipe_directory}"
        return process if process and runs_program(process.pid, (DAEMON_PROGRAM,), (0,), variable) else None


def _turned_away(outcome: Outcome | None, lines: Sequence[str]) -> bool:
    """Whether the daemon was busy with another caller (O40). With drivers 535 and 550 it may then answer nothing
    (O90).
    """
    if outcome is None:
        return False
    silent = not (outcome.output.strip() or outcome.errors.strip())
    return (outcome.status != 0 and _TURNED_AWAY in outcome.errors) or (silent and _ALWAYS_ANSWERED in lines)


def ask_all(
    questions: Sequence[tuple[ControlDaemon, Sequence[str]]],
    timeout_seconds: float,
    meanwhile: Callable[[], None] | None = None,
) -> list[list[str] | NodeError]:
    """Send each daemon its commands, all at once, and call `meanwhile` while they answer.

    A daemon talks to one caller at a time; while it talks to another, this tries again (O40).
    Returns: for each daemon the lines of its answer that say something, or what went wrong (NodeError; DeadlineError
    when no answer comes).
    """
    deadline = monotonic() + timeout_seconds
    answers: dict[int, list[str] | NodeError] = {}
    left = list(enumerate(questions))
    while left:
        asked: list[tuple[int, ControlDaemon, processes.Child]] = []
        for number, (daemon, lines) in left:
            try:
                asked.append((number, daemon, daemon.ask(lines)))
            except NodeError as error:
                answers[number] = error
        if meanwhile:
            meanwhile()
            meanwhile = None
        outcomes = processes.wait_all([child for _, _, child in asked], max(0.0, deadline - monotonic()))
        for (number, daemon, _), outcome in zip(asked, outcomes, strict=True):
            if not _turned_away(outcome, questions[number][1]) or monotonic() + _TURNED_AWAY_SECONDS >= deadline:
                answers[number] = daemon._answer(outcome, timeout_seconds)  # noqa: SLF001 - one class, and its own function
        left = [one for one in left if one[0] not in answers]
        if left:
            sleep(_TURNED_AWAY_SECONDS)
    return [answers[number] for number in range(len(questions))]


def _hint(daemon: ControlDaemon, answer: str) -> str:
    """What to do about a control program that does not know our commands, as one before CUDA 11.5 does not."""
    if "Unknown command" not in answer:
        return ""
    from .nvml import NEEDED  # for a message alone

    return f"{daemon.program} has to be that of {NEEDED}"


def set_limits(limits: Sequence[tuple[ControlDaemon, Limits, int]], timeout_seconds: float) -> None:
    """Set the defaults of each daemon's future servers, for its number of devices, and read them back.

    Devices go by the daemon's ordinal, which all driver releases take.
    Raises: NodeError when what is read back is not what was set.
    """
    asked = [(daemon, limit_commands(wanted, count)) for daemon, wanted, count in limits]
    problems = []
    for (daemon, wanted, count), (_, lines), answer in zip(limits, asked, ask_all(asked, timeout_seconds), strict=True):
        expected = limit_answers(wanted, count)
        if isinstance(answer, NodeError):
            problems.append(answer)
        elif answer not in expected:
            text = printable(" ".join(answer) or "nothing", 200)
            problems.append(
                NodeError(
                    f"control daemon of {daemon.pipe_directory}: asked for {'; '.join(lines)}, "
                    f"and it reads back {text!r} instead of {' '.join(expected[0])!r}",
                    hint=_hint(daemon, text),
                )
            )
    raise_all(problems)


def quit_all(
    daemons: Sequence[ControlDaemon],
    server_uid: int,
    patience: Patience,
    meanwhile: Callable[[], None] | None = None,
    *,
    asked: bool = False,
) -> None:
    """End a job's daemons and their servers: ask, then use signals, each with a time of its own that all share.

    The servers are the daemons' own children, noted before a daemon is asked, or while it quits. They run as the
    job's user, who can change a server's environment, but not its parent. Where no daemon answers, all processes are
    searched. `meanwhile` is called while the daemons quit; `asked`: they were sent quit already.
    Raises: NodeError that names the processes that are still there, or says that the search failed.
    """
    there = []
    for daemon in daemons:
        process = daemon.process()
        there.append((daemon, [process, *processes.children(process)] if process else []))
    end = monotonic() + patience.quit_seconds
    if asked:
        if meanwhile:
            meanwhile()
        answered = [bool(ours) for _, ours in there]
    else:
        questions = [(daemon, [f"quit -t {patience.force_after_seconds}"]) for daemon, ours in there if ours]
        answers = iter(ask_all(questions, patience.quit_seconds, meanwhile))
        # A daemon that does not answer hangs, or went by itself; one that went took its servers along.
        answered = [bool(ours) and not isinstance(next(answers), NodeError) for _, ours in there]
    stuck = {
        daemon: ours
        for (daemon, ours), has_answered in zip(there, answered, strict=True)
        if not has_answered or not processes.wait_all_ended(ours, end)
    }
    if stuck:
        _end_by_signals(stuck, server_uid, patience)


def _end_by_signals(known: dict[ControlDaemon, list[ProcessIdentity]], server_uid: int, patience: Patience) -> None:
    """End a job's daemons by signals: the known processes of each, or those that a search finds.

    Raises: NodeError.
    """
    problems: list[NodeError] = []
    try:
        if not all(known.values()):
            found = _find_processes(known, server_uid, patience.search_seconds)
            known = {daemon: ours or found[daemon] for daemon, ours in known.items()}
    except NodeError as error:
        problems.append(error)
    everything = [process for ours in known.values() for process in ours]
    if not everything and not problems:
        return
    for number in (processes.SIGTERM, processes.SIGKILL):
        kill_all(everything, number, patience.signal_seconds)
    for daemon, ours in known.items():
        if stuck := _alive(ours):
            pids = ", ".join(str(process.pid) for process in stuck[:_NAMED_PIDS])
            problems.append(
                NodeError(
                    f"MPS processes {pids} of {daemon.pipe_directory} are still there after quit, SIGTERM and SIGKILL",
                    hint="a process that SIGKILL does not end waits in the driver; the GPU may need a reset",
                )
            )
    if not problems:  # else the search would fail again, or what it finds hangs with the rest
        # A daemon on its way out may have just started a server, which is no fault of the node.
        found = _find_processes(known, server_uid, patience.search_seconds)
        kill_all([process for ours in found.values() for process in ours], processes.SIGKILL, _STRAY_SECONDS)
    raise_all(problems)


def _find_processes(
    daemons: Collection[ControlDaemon], server_uid: int, timeout_seconds: float
) -> dict[ControlDaemon, list[ProcessIdentity]]:
    """Every process of a job's daemons: the daemons and their servers, also a server that has lost its daemon.

    Raises: NodeError, DeadlineError.
    """
    found: dict[ControlDaemon, list[ProcessIdentity]] = {daemon: [] for daemon in daemons}
    for one in search(os.path.commonpath([daemon.pipe_directory for daemon in daemons]), timeout_seconds):
        for daemon, ours in found.items():
            theirs = one.uid == 0 or (one.uid == server_uid and one.program == SERVER_PROGRAM)
            if one.pipe_directory == daemon.pipe_directory and theirs:
                ours.append(one.process)
    return found


def kill_all(some: Sequence[ProcessIdentity], number: int, timeout_seconds: float) -> None:
    """Send a signal to those of these processes that still run, and wait until all have ended, or the time is
    over.
    """
    for process in (alive := _alive(some)):
        processes.signal_process(process, number)
    processes.wait_all_ended(alive, monotonic() + timeout_seconds)


def _alive(some: Sequence[ProcessIdentity]) -> list[ProcessIdentity]:
    return [process for process in some if processes.identify(process.pid) == process]
