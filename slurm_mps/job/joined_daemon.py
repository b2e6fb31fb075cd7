"""The control daemon that joined jobs share: where it lies, whether it is alive, and its end.

A job of any way that needs the GPU helps to end a daemon that is CLOSING: the epilog that was to may have been killed.
A second time does no harm.
"""

from __future__ import annotations

from ..config.settings import STATE_DIRECTORY
from ..errors import DeadlineError, NodeError, raise_all
from ..node import control, processes
from ..node.control import ControlDaemon, Patience
from ..node.messages import tell_admin
from ..record import replace
from . import logs
from .ledger import CLOSING
from .state import DAEMONS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..config.settings import SiteConfig
    from ..node.nvml import Gpus
    from .actions import JobOnNode
    from .ledger import JoinedDaemon, LedgerEntry
    from .state import NodeState

_SEARCH_SECONDS = 2.0
_LOGS_SECONDS = 1.0

DIRECTORY = f"{STATE_DIRECTORY}/{DAEMONS}"


def daemon_path(gpu: str) -> str:
    """Where a GPU's daemons lie, one after the other, with one place for the marks of them all."""
    return f"{DIRECTORY}/{gpu}"


def log_path(gpu: str, config: SiteConfig) -> str:
    return f"{config.paths_logs}/{gpu}"


def pipe_path(gpu: str, daemon: JoinedDaemon) -> str:
    return f"{daemon_path(gpu)}/{daemon.starter}"


def control_daemon(gpu: str, daemon: JoinedDaemon, config: SiteConfig) -> ControlDaemon:
    return ControlDaemon(config.paths_control_program, pipe_path(gpu, daemon), log_path(gpu, config))


def is_alive(daemon: JoinedDaemon) -> bool:
    """Whether the process is there that the ledger names. It is not asked: one silent client makes it deaf (O50)."""
    return daemon.process is not None and processes.identify(daemon.process.pid) == daemon.process


def patience(config: SiteConfig, seconds: Callable[[float], float]) -> Patience:
    """How long to wait for the end of daemons, where `seconds` says how much of what is wanted there is."""
    wanted = config.deadlines_quit + 2 * config.deadlines_signal + 2 * _SEARCH_SECONDS
    share = seconds(wanted) / wanted
    return Patience(
        force_after_seconds=2,
        quit_seconds=share * config.deadlines_quit,
        signal_seconds=share * config.deadlines_signal,
        search_seconds=share * _SEARCH_SECONDS,
    )


def put_back(gpu: str, entry: LedgerEntry, gpus: Gpus) -> LedgerEntry:
    """Put back the compute mode that was found. Returns: the entry of a GPU whose mode nobody has changed."""
    if entry.mode_found is not None and gpus.compute_mode(gpu) != entry.mode_found:
        gpus.set_compute_mode(gpu, entry.mode_found)
    return replace(entry, mode_found=None)


def help_to_close(gpu: str, daemon: JoinedDaemon, job: JobOnNode) -> None:
    """End a daemon that is in a job's way, where it is CLOSING. What cannot be ended is not this job's fault."""
    try:
        close({gpu: daemon} if daemon.stage == CLOSING else {}, job.state, job.gpus, job.config, job.seconds)
    except NodeError as error:
        tell_admin(f"job {job.journal.job_id}: {error}")


def close(
    closing: Mapping[str, JoinedDaemon],
    state: NodeState,
    gpus: Gpus,
    config: SiteConfig,
    seconds: Callable[[float], float],
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """End GPUs' daemons that are CLOSING, all at once and outside the lock; then forget each that is gone.

    Raises: NodeError with what could not be ended.
    """
    if not closing:
        return
    there = {gpu: control_daemon(gpu, daemon, config) for gpu, daemon in closing.items()}
    problems: list[Exception] = []
    stuck: set[str] = set()
    how_long = patience(config, seconds)
    for uid in {daemon.uid for daemon in closing.values()}:  # of their servers: one, but for one that was left behind
        ours = [there[gpu] for gpu, daemon in closing.items() if daemon.uid == uid]
        try:
            control.quit_all(ours, uid, how_long, meanwhile)
        except NodeError as error:
            problems.append(error)
            stuck |= _stuck(ours, how_long.search_seconds)
    for gpu, daemon in closing.items():
        if there[gpu].pipe_directory not in stuck:
            try:
                _forget(gpu, daemon, state, gpus, config, seconds)
            except NodeError as error:
                problems.append(error)
    raise_all(problems)


def _stuck(daemons: Sequence[ControlDaemon], timeout_seconds: float) -> set[str]:
    """The pipe directories of daemons of which a process is still there; all where that cannot be found out."""
    places = {daemon.pipe_directory for daemon in daemons}
    try:
        return places & {one.pipe_directory for one in control.search(DIRECTORY, timeout_seconds)}
    except NodeError:
        return places


def _forget(
    gpu: str, daemon: JoinedDaemon, state: NodeState, gpus: Gpus, config: SiteConfig, seconds: Callable[[float], float]
) -> None:
    """Take a daemon that is gone out of its GPU's ledger; without holders the GPU gets its compute mode back."""
    state.ledgers.lock(seconds(config.deadlines_command))
    try:
        entry = state.ledgers.read(gpu)
        if entry.daemon is None or entry.daemon.starter != daemon.starter or entry.daemon.stage != CLOSING:
            return  # somebody else was faster
        state.daemons().remove_tree(gpu)
        entry = replace(entry, daemon=None)
        state.ledgers.write(gpu, entry if entry.holders else put_back(gpu, entry, gpus))
    finally:
        state.ledgers.unlock()
    forget_logs(gpu, state, config)


def make_logs(gpu: str, uid: int | None, state: NodeState, config: SiteConfig, *, anew: bool) -> bool:
    """Make the log directory of a GPU whose daemon is STARTING, as logs.make() does."""
    try:
        state.lock_gpu_logs(gpu, _LOGS_SECONDS)
    except DeadlineError as error:
        tell_admin(f"{gpu}: its logs are not written below {config.paths_logs}: {error}")
        return False
    try:
        return logs.make(gpu, uid, (), config, anew=anew)
    finally:
        state.unlock_gpu_logs(gpu)


def forget_logs(gpu: str, state: NodeState, config: SiteConfig) -> bool:
    """Remove the logs of a GPU that has neither a daemon nor jobs that are to have one. Returns: whether it has none.

    Not under the ledgers' lock: a file system that hangs would stop all jobs of the node. A job that starts a daemon
    has written so in the ledger before it makes its log directory, so that the two do not meet.
    """
    try:
        state.lock_gpu_logs(gpu, _LOGS_SECONDS)
    except DeadlineError:
        return False
    try:
        entry = state.ledgers.read(gpu)
        if entry.daemon is not None or entry.holders:
            return False
        logs.forget(gpu, config)
        return True
    finally:
        state.unlock_gpu_logs(gpu)
