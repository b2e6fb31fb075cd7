"""The logs of a job's control daemon and server. A failure here costs neither the job nor the node anything but logs.

/var/log/slurm-mps/          root 0711; /var/log itself may be its group's to write, as Ubuntu has it
  <job id>/                  root 0700 + ACL user:<uid>:r-x; control.log and server.log, written by the daemon
    gpu-0/, gpu-1/, ...      the same for each GPU with a daemon of its own, or kept of one that the job had with others
    verdict                  0644, in a directory 0711: of a job without MPS, where /run cannot keep it
  GPU-.../                   the logs of a GPU whose jobs are joined, while they run
    joined-daemon            0644  a name for them, kept with each job's part
"""

from __future__ import annotations

import os
from time import time_ns

from ..errors import NodeError
from ..node.files import Directory, make_trusted, open_trusted
from ..node.messages import tell_admin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from ..config.settings import SiteConfig

_LOGS = ("control.log", "server.log")
JOINED_DAEMON = "joined-daemon"
_SLACK = 16
_VERDICTS = "/var/log/slurm-mps"  # wherever the site keeps logs: the plugin knows this one (spank/verdict.c)


def _attempt(whose: int | str, what: str, work: Callable[[], None]) -> bool:
    """Do `work` on the logs of a job, or of a GPU. A failure is reported to the admin, and has no other effect."""
    who = f"job {whose}" if isinstance(whose, int) else whose
    try:
        work()
        return True
    except NodeError as error:
        tell_admin(f"{who}: its logs are not {what}: {error}")
    except OSError as error:
        tell_admin(f"{who}: its logs are not {what}: {os.strerror(error.errno or 0)}")
    return False


def make(whose: int | str, uid: int | None, parts: Sequence[str], config: SiteConfig, *, anew: bool = True) -> bool:
    """Make the log directory of a job, or of a GPU whose jobs are joined, with its parts, and let its user read it.

    `uid` is None where jobs of all users are joined: only root reads their logs. Without `anew` older logs stay.
    Returns: False when there can be none.
    """

    def work() -> None:
        with make_trusted(config.paths_logs, 0o711, group_is_trusted=True) as logs:
            if anew:
                logs.remove_tree(str(whose))
            with logs.make(str(whose), 0o700) as own:
                for part in parts:
                    own.make(part, 0o755).close()
                if isinstance(whose, str) and not own.exists(JOINED_DAEMON):
                    own.write(JOINED_DAEMON, f"{whose}.{time_ns()}".encode(), mode=0o644)
                own.grant_user(uid)

    return _attempt(whose, f"written below {config.paths_logs}", work)


def leave_verdict(job_id: int, verdict: bytes, config: SiteConfig, jobs: Collection[int]) -> None:
    """Leave the verdict of a job that has nothing in the state directory. It is removed when the job's logs would be.

    Raises: NodeError.
    """
    with make_trusted(_VERDICTS, 0o711, group_is_trusted=True) as logs:
        logs.remove_tree(str(job_id))
        with logs.make(str(job_id), 0o711) as own:
            own.write("verdict", verdict, mode=0o644)
        _prune(logs, config.logs_max_jobs, (*jobs, job_id))


def _prune(logs: Directory, keep_jobs: int, running: Collection[int]) -> None:
    """Remove logs of jobs that are over where there are too many."""
    for job_id in _too_many(logs, keep_jobs, running):
        logs.remove_tree(str(job_id))


def _over(logs: Directory, running: Collection[int]) -> list[int]:
    return [int(name) for name in logs.names() if name.isdigit() and int(name) not in running]


def _too_many(logs: Directory, keep_jobs: int, running: Collection[int]) -> list[int]:
    """The jobs whose logs are removed: the oldest of the user who has most, so that no user pushes out another's.

    A few more than necessary are removed, so that not every job has to look.
    """
    over = _over(logs, running)
    if len(over) <= keep_jobs:
        return []
    by_user: dict[int | None, list[tuple[int, int]]] = {}
    for job_id in over:
        name = str(job_id)
        by_user.setdefault(logs.user_let_in(name), []).append((logs.changed_ns(name), job_id))
    theirs = [sorted(jobs, reverse=True) for jobs in by_user.values()]
    extra = len(over) - keep_jobs + keep_jobs // _SLACK
    return [max(filter(None, theirs), key=lambda jobs: (len(jobs), -jobs[-1][0])).pop()[1] for _ in range(extra)]


def _cut(own: Directory, limit_bytes: int) -> None:
    """Leave the end of each log of a directory, and of the directories in it."""
    for name in own.names():
        if name in _LOGS:
            own.cut(name, limit_bytes, mode=0o644)
        elif name.startswith("gpu-"):
            with own.subdirectory(name) as part:
                _cut(part, limit_bytes)


def untidy(config: SiteConfig, jobs: Collection[int]) -> list[int]:
    """Ended jobs whose logs are longer or more than keep() leaves: a reboot ended them, or the site changed its
    limits.

    Raises: NodeError when the directory cannot be looked at.
    """
    try:
        with open_trusted(config.paths_logs, group_is_trusted=True) as logs:
            over = sorted(_over(logs, jobs))
            if config.logs_keep == "never":
                return over
            extra = _too_many(logs, config.logs_max_jobs, jobs)
            limit = config.logs_max_kib * 1024
            return [job for job in over if job in extra or _is_long(logs, str(job), limit)]
    except FileNotFoundError:
        return []


def of_gpus(config: SiteConfig) -> list[str]:
    """The GPUs that there are logs of; none where the directory cannot be looked at, which untidy() reports."""
    try:
        with open_trusted(config.paths_logs, group_is_trusted=True) as logs:
            return [name for name in logs.names() if name.startswith("GPU-")]
    except (FileNotFoundError, NodeError):
        return []


def _is_long(parent: Directory, name: str, limit_bytes: int) -> bool:
    """Whether a log in this directory, or in one of the directories in it, is longer than _cut() leaves it."""
    with parent.subdirectory(name) as own:
        return any(
            (name in _LOGS and len(own.read_tail(name, limit_bytes + 1)) > limit_bytes)
            or (name.startswith("gpu-") and _is_long(own, name, limit_bytes))
            for name in own.names()
        )


def keep_part(job_id: int, gpu: str, part: str, config: SiteConfig) -> None:
    """Copy the logs of a GPU's daemon for a job that leaves it. The same user may read the copy."""

    def work() -> None:
        with make_trusted(config.paths_logs, 0o711, group_is_trusted=True) as logs:
            if config.logs_keep == "never" or not logs.exists(gpu):
                return
            with logs.subdirectory(gpu) as joined, logs.make(str(job_id), 0o700) as own, own.make(part, 0o755) as ours:
                for name in (*_LOGS, JOINED_DAEMON):
                    if joined.exists(name):
                        ours.write(name, joined.read_tail(name, config.logs_max_kib * 1024), mode=0o644)
                own.grant_user(logs.user_let_in(gpu))

    _attempt(job_id, "kept", work)


def forget(whose: int | str, config: SiteConfig) -> None:
    """Remove the logs of a job that was refused: they are empty, and would push out an older job's."""

    def work() -> None:
        with make_trusted(config.paths_logs, 0o711, group_is_trusted=True) as logs:
            logs.remove_tree(str(whose))

    _attempt(whose, "removed", work)


def keep(job_id: int, config: SiteConfig, jobs: Collection[int]) -> None:
    """Cut or remove a job's logs when the daemon is gone, as the site wants. A second run does no harm.

    `jobs` are all jobs that still run.
    """

    def work() -> None:
        with make_trusted(config.paths_logs, 0o711, group_is_trusted=True) as logs:
            if config.logs_keep == "never":
                logs.remove_tree(str(job_id))
                return
            if job_id in jobs and logs.exists(str(job_id)):
                with logs.subdirectory(str(job_id)) as own:
                    own.touch()  # the age of logs is when their job ended: job ids begin anew
            _prune(logs, config.logs_max_jobs, [job for job in jobs if job != job_id])
            if logs.exists(str(job_id)):
                with logs.subdirectory(str(job_id)) as own:
                    _cut(own, config.logs_max_kib * 1024)

    _attempt(job_id, "kept", work)
