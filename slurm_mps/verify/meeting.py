"""The ranks of a step on one node meet in a directory; the first rank collects their reports. Nothing leaves the node.

The first rank makes the directory, with an unpredictable name and mode 0700, and holds a lock on it. The others look
for one of their own user's that somebody holds: another user can neither make, enter, lock nor remove such a
directory. The kernel frees the lock however the first rank ends, so what a killed run left behind misleads nobody.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from glob import glob
from time import monotonic, sleep

from ..errors import NodeError
from ..node.reading import read_plain
from .report import RankReport, parse_report
from .step import Step

#: All tasks of a step on a node share these, also with job_container/tmpfs, which makes them the job's own.
PLACES = ("/dev/shm", "/tmp")  # noqa: S108 - only directories of unpredictable names, or the user's own, are used
_PAUSE_SECONDS = 0.03
_REPORT_MAX = 1 << 20


class MeetingError(Exception):
    """The ranks of the node cannot meet."""


class Meeting:
    """The directory, held open. It takes one file for each report, and one for each claim."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self._fd = fd

    def claim(self, name: str) -> bool:
        """Whether this rank is the first one that claims `name`.

        Raises: MeetingError.
        """
        try:
            os.close(self._create(name))
        except FileExistsError:
            return False
        except OSError as error:
            raise self._unwritten(error) from None
        return True

    def put(self, report: RankReport) -> None:
        """Give the first rank a report, whole or not at all.

        Raises: MeetingError.
        """
        unfinished = f".{report.rank}"
        try:
            with open(self._create(unfinished), "w", encoding="ascii") as file:
                json.dump(vars(report), file)
            os.rename(unfinished, str(report.rank), src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except OSError as error:
            raise self._unwritten(error) from None

    def _create(self, name: str) -> int:
        return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=self._fd)

    def _unwritten(self, error: OSError) -> MeetingError:
        return MeetingError(f"its report cannot be written to {self.path}: {error.strerror}")

    def collect(self, ranks: Collection[int], deadline: float) -> list[RankReport]:
        """The reports of these ranks, as far as they come before the deadline.

        Raises: MeetingError for one that is none.
        """
        expected = {str(rank) for rank in ranks}
        while expected - (there := set(os.listdir(self._fd))) and monotonic() < deadline:
            sleep(_PAUSE_SECONDS)
        return [self._read(name) for name in sorted(expected & there, key=int)]

    def _read(self, name: str) -> RankReport:
        try:
            report = parse_report(read_plain(f"{self.path}/{name}", _REPORT_MAX))
        except (OSError, ValueError, NodeError):
            report = None
        if report is None or report.rank != int(name):
            raise MeetingError(f"what rank {name} has written cannot be read; is its slurm-mps of another version?")
        return report

    def is_over(self) -> bool:
        """Whether the first rank has let go of the directory, or has ended."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def wait(self, deadline: float) -> None:
        """Stay until the meeting is over, or the deadline; clear up after a first rank that could not."""
        while not self.is_over():
            if monotonic() > deadline:
                return
            sleep(_PAUSE_SECONDS)
        if os.path.exists(self.path):
            _remove(self.path)


def _prefix(step: Step) -> str:
    """Without the uid: a container may call the user root. Whose the directory is, its owner tells."""
    return f"slurm-mps-verify-{step.name}-"


@contextmanager
def open_meeting(step: Step) -> Iterator[Meeting]:
    """Make the directory, for as long as the context lasts. For the first rank of a node.

    Raises: MeetingError when no directory can be made.
    """
    path, fd = _make(_prefix(step))
    try:
        yield Meeting(path, fd)
    finally:
        _remove(path)
        os.close(fd)  # frees the lock


def _make(prefix: str) -> tuple[str, int]:
    """Make a directory and lock it. Only then it takes the name that the others look for; nobody can guess either name.

    Raises: MeetingError.
    """
    problems = []
    for place in PLACES:
        hidden, path = f"{place}/.{prefix}{os.urandom(8).hex()}", f"{place}/{prefix}{os.urandom(8).hex()}"
        try:
            os.mkdir(hidden, 0o700)
            fd = os.open(hidden, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(hidden, path)
        except OSError as error:
            problems.append(f"{place}: {error.strerror}")
        else:
            return path, fd
    raise MeetingError(f"the ranks of this node have no place for their reports ({'; '.join(problems)})")


def _remove(path: str) -> None:
    from shutil import rmtree

    rmtree(path, ignore_errors=True)


def find_meeting(step: Step, deadline: float) -> Meeting:
    """The directory that the first rank of this node holds.

    Raises: MeetingError when there is none before the deadline.
    """
    while monotonic() < deadline:
        for path in (path for place in PLACES for path in glob(f"{place}/{_prefix(step)}*")):
            if meeting := _enter(path):
                return meeting
        sleep(_PAUSE_SECONDS)
    raise MeetingError(
        f"rank {step.node_ranks[0]}, which collects this node's reports, has no directory for them in "
        f"{' or '.join(PLACES)}: it ended, or runs in another container"
    )


def _enter(path: str) -> Meeting | None:
    """None for a link, for what is not ours or lies on another file system, and for what nobody holds.

    Where users may share file systems of their own (user_allow_other in fuse.conf), another user's can say that it is
    ours.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    meeting = Meeting(path, fd)
    status, place = os.fstat(fd), os.stat(os.path.dirname(path))
    if (status.st_uid, status.st_dev) == (os.getuid(), place.st_dev) and not meeting.is_over():
        return meeting
    os.close(fd)
    return None
