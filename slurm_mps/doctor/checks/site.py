"""Checks of the site's configuration and of the places where slurm-mps keeps things."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from ...config.settings import CONFIG_DIRECTORY, CONFIG_NAME, CONFIG_PATH, STATE_DIRECTORY
from ...job.reconcile import BUSY, KEPT, LEFT
from ...node.paths import closed_to_users, others_can_write, steps
from ...node.reading import read_text
from ...slurm.host import NotKnownError
from ...units import printable
from ..finding import COMPUTE, check, fine, problem, warning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...job.reconcile import Finding as StaleFinding
    from ..facts import Facts
    from ..finding import Finding

_LITTLE_BYTES, _LITTLE_FILES = 16 * 2**20, 1000
_NO_BYTES = 2**20
_ENVIRONMENT_FILES = ("/etc/environment", "/etc/default/slurmd", "/etc/sysconfig/slurmd")
_PROFILES = "/etc/profile.d"
_VARIABLE = "CUDA_MPS_"


@check(
    "site-config",
    "mps.toml is right",
    why="The prolog refuses a file with a mistake: every job that asks for MPS drains its node.",
)
def site_config(facts: Facts) -> Iterator[Finding]:
    for wrong in facts.site_problems:
        yield problem(wrong, f"mend the line; slurm-mps config check {CONFIG_PATH}")
    yield fine(CONFIG_PATH if os.path.exists(CONFIG_PATH) else f"there is no {CONFIG_PATH}; the defaults hold")


@check(
    "site-config-owner",
    "only root can write mps.toml and slurm.conf",
    why="They decide what runs as root; the prolog refuses an mps.toml that others can write, and the node drains.",
)
def site_config_owner(facts: Facts) -> Iterator[Finding]:
    if not os.path.isdir(CONFIG_DIRECTORY):
        raise NotKnownError(f"there is no {CONFIG_DIRECTORY}")
    paths = [os.path.realpath(CONFIG_DIRECTORY), f"{os.path.realpath(CONFIG_DIRECTORY)}/{CONFIG_NAME}", facts.conf_path]
    written = {others_can_write(path) for path in paths if path and os.path.lexists(path)} - {""}
    for path in sorted(written):
        yield problem(f"{path} can be written by others than root", f"chown root: {path}; chmod go-w {path}")
    name = f"{os.path.realpath(CONFIG_DIRECTORY)}/{CONFIG_NAME}"
    if os.path.islink(name):
        yield problem(f"{name} is a link, which the prolog does not follow", "put the file itself there")
    elif os.path.isfile(name) and os.stat(name).st_nlink > 1:
        told = f"{name} has a second name somewhere, which the prolog does not trust"
        yield problem(told, f"cp -p {name} {name}.new && mv {name}.new {name}")
    elif os.path.exists(name) and not os.path.isfile(name):
        yield problem(f"{name} is no plain file", f"mv {name} {name}.old; write the file, or do without")


@check(
    "state-directory",
    "/run/slurm-mps is a place that only root can write",
    why="The prolog trusts no other, and the node drains.",
    where=COMPUTE,
)
def state_directory(_facts: Facts) -> Iterator[Finding]:
    for path in steps(STATE_DIRECTORY):
        if os.path.islink(path):
            yield problem(f"{path} is a link, which the prolog does not follow", f"make {path} a directory")
            return
        if os.path.lexists(path) and not os.path.isdir(path):
            yield problem(f"{path} is no directory", f"rm {path}")
            return
    written = others_can_write(STATE_DIRECTORY)
    if written:
        yield problem(f"{written} can be written by others than root", f"chown root: {written}; chmod go-w {written}")


@check(
    "user-path",
    "a job's user can walk to the job's directory",
    why="Its tasks cannot read the prolog's verdict or reach their control daemon, and fail.",
    where=COMPUTE,
)
def user_path(_facts: Facts) -> Iterator[Finding]:
    closed = closed_to_users(f"{STATE_DIRECTORY}/jobs/1")
    if closed:
        yield problem(f"users cannot enter {closed} on the way to {STATE_DIRECTORY}/jobs", f"chmod o+x {closed}")


@check(
    "acl",
    "the file system of /run has POSIX ACLs",
    why="A job's directory is opened to the job's user alone by an ACL; without, MPS jobs are a fault of the node.",
    where=COMPUTE,
)
def acl(_facts: Facts) -> Iterator[Finding]:
    path = next(path for path in (STATE_DIRECTORY, "/run", "/") if os.path.isdir(path))
    try:
        os.getxattr(path, "system.posix_acl_access")
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            yield problem(
                f"{path}: the file system has no POSIX ACLs", f"mount a tmpfs at {path}, or with the option acl"
            )


@check(
    "run-space",
    "/run has room and can be written",
    why="A journal that cannot be written stops the prolog, and the node drains.",
    where=COMPUTE,
)
def run_space(_facts: Facts) -> Iterator[Finding]:
    path = next(path for path in (STATE_DIRECTORY, "/run") if os.path.isdir(path))
    room = os.statvfs(path)
    if room.f_flag & os.ST_RDONLY:
        yield problem(f"{path} is mounted read-only", f"mount -o remount,rw {path}")
        return
    if not room.f_blocks:
        return  # a file system without bounds
    bytes_left = room.f_bavail * room.f_frsize
    files_left = room.f_favail if room.f_files else _LITTLE_FILES
    told = f"{path} has room for {bytes_left // 2**20} MiB and {files_left} files"
    if bytes_left < _NO_BYTES or files_left < 20:
        yield problem(told, f"find out who fills it: du -xs {path}/*")
    elif bytes_left < _LITTLE_BYTES or files_left < _LITTLE_FILES:
        yield warning(told, f"find out who fills it: du -xs {path}/*")


@check(
    "logs-directory",
    "the logs' directory can be made, and only root can write it",
    why="Otherwise the daemons' logs lie in /run, where they take the room of the state, and are gone with their job.",
    where=COMPUTE,
)
def logs_directory(facts: Facts) -> Iterator[Finding]:
    path = facts.site.paths_logs
    parent = os.path.dirname(path)
    link = next((one for one in steps(path) if os.path.islink(one)), "")
    written = others_can_write(path, group_is_trusted=True)
    if link:
        yield warning(
            f"{link} is a link, which is not followed to the logs", f"{CONFIG_PATH}: paths.logs = the real path"
        )
    elif not os.path.isdir(parent):
        yield warning(f"{parent} is not there, and only {path} itself is made", f"mkdir -p {parent}")
    elif written:
        yield warning(f"{written} can be written by others than root", f"chown root: {written}; chmod o-w {written}")
    elif closed_to_users(f"{path}/1"):
        yield warning(f"users cannot enter {closed_to_users(f'{path}/1')} to read their logs", "chmod o+x on it")


@check(
    "stale-state",
    "nothing is left of jobs that are over",
    why="A crashed job's daemon or ledger keeps its GPU from the next MPS job.",
    where=COMPUTE,
)
def stale_state(facts: Facts) -> Iterator[Finding]:
    for one in facts.stale:
        if one.outcome in (BUSY, KEPT) or one.thing == CONFIG_PATH:
            continue
        if one.why.startswith("Slurm does not say"):
            yield warning(f"{one.thing}: {one.why}", "slurm-mps reconcile --dry-run, when slurmctld answers")
        else:
            yield problem(f"{one.thing}: {one.why}", _fix(one) if one.outcome == LEFT else "slurm-mps reconcile")


def _fix(one: StaleFinding) -> str:
    """What to do about what reconcile does not touch."""
    if one.thing.startswith("/"):
        return f"slurm-mps reconcile leaves it; move it away: {printable(one.thing, 200)}"
    kind, _, name = one.thing.rpartition(" ")
    path = f"{STATE_DIRECTORY}/{'jobs' if kind == 'job' else 'gpus'}/{name}"
    return f"slurm-mps reconcile leaves it; end what still runs of it, then rm -r {path}"


@check(
    "mps-variables",
    "nobody sets MPS's variables for everybody",
    why="A program without MPS joins whoever's daemon they name; limits that they set are not what the job asked.",
)
def mps_variables(_facts: Facts) -> Iterator[Finding]:
    try:
        profiles = [f"{_PROFILES}/{name}" for name in sorted(os.listdir(_PROFILES))]
    except OSError:
        profiles = []
    for path in (*_ENVIRONMENT_FILES, *profiles):
        try:
            lines = read_text(path, 65536).splitlines()
        except OSError:
            continue
        for number, line in enumerate(lines, start=1):
            code = line.partition("#")[0]
            if _VARIABLE in code and "unset" not in code:
                yield warning(
                    f"{path}:{number}: {printable(line.strip(), 80)}", "take the line out; the plugin sets them"
                )
