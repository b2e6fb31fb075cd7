"""Keep the logs of a job's control daemon and server when the job ends. Losing a log costs neither job nor node."""

from __future__ import annotations

import os

from ..errors import NodeError
from .files import Directory, make_trusted
from .messages import tell_admin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..config import SiteConfig

_LOGS = ("control.log", "server.log")


def _prune(logs: Directory, keep: int) -> None:
    """Remove the logs of the oldest jobs; job ids grow."""
    jobs = sorted((name for name in logs.names() if name.isdigit()), key=int)
    for name in jobs[: max(0, len(jobs) - keep)]:
        logs.remove_tree(name)


def _copy(source: Directory, job_id: int, config: SiteConfig) -> None:
    with make_trusted(config.paths_logs, 0o711) as logs:
        logs.remove_tree(str(job_id))
        _prune(logs, config.logs_max_jobs - 1)
        with logs.make(str(job_id), 0o700) as target:
            for name in _LOGS:
                try:
                    data = source.read_tail(name, config.logs_max_kib * 1024)
                except FileNotFoundError:
                    continue
                target.write(name, data)


def keep_logs(job_directory: Directory, job_id: int, config: SiteConfig) -> None:
    """Copy the end of each log below the site's log directory; a second time finds the source gone and does nothing."""
    if config.logs_keep == "never":
        return
    try:
        source = job_directory.subdirectory("log")
    except FileNotFoundError:
        return
    try:
        with source:
            _copy(source, job_id, config)
    except NodeError as error:
        tell_admin(f"job {job_id}: its logs are not kept: {error}")
    except OSError as error:
        tell_admin(f"job {job_id}: its logs are not kept: {os.strerror(error.errno or 0)}")
