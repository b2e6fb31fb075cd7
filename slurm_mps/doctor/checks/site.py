"""Checks of the site's configuration and of the places where slurm-mps keeps things."""

from __future__ import annotations

import errno
import glob
import os
from collections.abc import Iterator
from shutil import which

from ...config.load import mps_of_partition
from ...config.settings import (
    ALL_USERS,
    CONFIG_DIRECTORY,
    CONFIG_NAME,
    CONFIG_PATH,
    PARTITIONS_PATH,
    STATE_DIRECTORY,
    joins_all,
)
from ...errors import NodeError
from ...job.reconcile import BUSY, KEPT, LEFT, Repair
from ...node.control import SERVER_PROGRAM, server_path
from ...node.engines import ENROOT, OTHERS
from ...node.paths import closed_to_users, others_can_write, steps
from ...node.reading import read_text
from ...slurm.host import EPILOG, PROLOG
from ...units import printable
from ..facts import Facts
from ..finding import COMPUTE, Finding, check, fine, problem, warning

_LITTLE_BYTES, _LITTLE_FILES = 16 * 2**20, 1000
_NO_BYTES, _NO_FILES = 2**20, 20
_ENVIRONMENT_FILES = ("/etc/environment", "/etc/default/slurmd", "/etc/sysconfig/slurmd")
_PROFILES = "/etc/profile.d"


@check(
    "owner",
    "only root can write what root runs or trusts",
    why="slurmd and the prolog run these files as root: whoever writes them is root. The prolog refuses an mps.toml "
    "and a /run/slurm-mps that others can write, and the node drains.",
)
def owner(facts: Facts) -> Iterator[Finding]:
    paths = [os.path.realpath(CONFIG_DIRECTORY), f"{os.path.realpath(CONFIG_DIRECTORY)}/{CONFIG_NAME}", facts.conf_path]
    paths += [facts.plugstack_path, facts.plugin_path]
    if facts.is_compute:
        parts = (*facts.parts[PROLOG], *facts.parts[EPILOG], *facts.our_hooks)
        paths += [path for part in parts for path in (part.path, *part.values.values())]
        program = facts.site.paths_control_program
        paths += [STATE_DIRECTORY, program, which(SERVER_PROGRAM, path=server_path(program)) or ""]
    for path in dict.fromkeys(others_can_write(path) for path in paths if path and os.path.lexists(path)):
        if path:
            yield problem(f"{path} can be written by others than root", f"chown root: {path}; chmod go-w {path}")


@check(
    "site-config",
    "mps.toml is right",
    why="The prolog refuses a file with a mistake, and one that may be somebody else's. Every job that asks for MPS "
    "then drains its node.",
)
def site_config(facts: Facts) -> Iterator[Finding]:
    name = f"{os.path.realpath(CONFIG_DIRECTORY)}/{CONFIG_NAME}"
    if os.path.islink(name):
        yield problem(f"{name} is a link, which the prolog does not follow", "put the file itself there")
    elif os.path.exists(name) and not os.path.isfile(name):
        yield problem(f"{name} is not a plain file", f"mv {name} {name}.old; write the file, or do without")
        return
    elif os.path.exists(name) and os.stat(name).st_nlink > 1:
        what = f"{name} has a second name somewhere, which the prolog does not trust"
        yield problem(what, f"cp -p {name} {name}.new && mv {name}.new {name}")
    for wrong in facts.site_problems:
        yield problem(wrong, f"correct the line; slurm-mps config check {CONFIG_PATH}")
    partitions = facts.all("PartitionName")
    unasked = [os.path.basename(path) for path in glob.glob(f"{PARTITIONS_PATH}/*")]
    named = {name: f"{CONFIG_PATH} has a table [partition.{name}]" for name in facts.sites if name}
    for partition, what in (named | {name: f"there is {PARTITIONS_PATH}/{name}" for name in unasked}).items():
        if partitions and partition not in partitions:
            fix = f"one of {', '.join(name for name in partitions if name != 'DEFAULT')}"
            yield warning(f"{what}, and slurm.conf has no such partition", fix)
    for partition in unasked:
        try:
            mps_of_partition(partition)
        except NodeError as error:
            yield problem(str(error), f"echo per-node >{PARTITIONS_PATH}/{partition}")
    if any(map(joins_all, facts.sites.values())):
        yield fine(ALL_USERS)
    yield fine(CONFIG_PATH if os.path.exists(CONFIG_PATH) else f"there is no {CONFIG_PATH}; the defaults hold")


@check(
    "state-directory",
    "/run/slurm-mps is a directory with POSIX ACLs that users can walk to",
    why="The prolog follows no link and trusts no other place. A job's tasks read their verdict and reach their "
    "control daemon there. An ACL opens a job's directory to the job's user alone.",
    where=COMPUTE,
)
def state_directory(_facts: Facts) -> Iterator[Finding]:
    for path in steps(STATE_DIRECTORY):
        if os.path.islink(path):
            yield problem(f"{path} is a link, which the prolog does not follow", f"make {path} a directory")
            return
        if os.path.lexists(path) and not os.path.isdir(path):
            yield problem(f"{path} is not a directory", f"rm {path}")
            return
    closed = closed_to_users(f"{STATE_DIRECTORY}/jobs/1")
    if closed:
        yield problem(f"users cannot enter {closed} on the way to {STATE_DIRECTORY}/jobs", f"chmod o+x {closed}")
    path = next(path for path in (STATE_DIRECTORY, "/run", "/") if os.path.isdir(path))
    try:
        os.getxattr(path, "system.posix_acl_access")
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            fix = f"mount a tmpfs at {path}, or mount it with the option acl"
            yield problem(f"{path}: the file system has no POSIX ACLs", fix)


@check(
    "containers",
    "container engines give their containers the state directory",
    why="In a container without it a program finds no control daemon: it fails, or runs without MPS.",
)
def containers(facts: Facts) -> Iterator[Finding]:
    has_gpus = facts.is_compute and facts.gpus_in_slurm
    for engine in OTHERS:
        if engine.needs_directory and not os.path.isdir(STATE_DIRECTORY):
            fix = "systemd-tmpfiles --create" if has_gpus else f"{engine.path}: take the line out"
            why = f"{engine.name} then starts no container at all."
            yield problem(f"{engine.path} binds {STATE_DIRECTORY}, which is not there", fix, why)
    for engine in (*OTHERS, ENROOT) if has_gpus else ():
        if engine.lacks_line:
            yield warning(f"{engine.name} mounts no /run/slurm-mps", f"{engine.path}: {engine.line}")


@check(
    "run-space",
    "/run has room and can be written",
    why="A prolog that cannot write its journal fails, and the node drains.",
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
    what = f"{path} has room for {bytes_left // 2**20} MiB and {files_left} files"
    if bytes_left < _NO_BYTES or files_left < _NO_FILES:
        yield problem(what, f"find out what fills it: du -xs {path}/*")
    elif bytes_left < _LITTLE_BYTES or files_left < _LITTLE_FILES:
        yield warning(what, f"find out what fills it: du -xs {path}/*")


@check(
    "logs-directory",
    "the directory for logs can be made, and only root can write it",
    why="Otherwise the daemons' logs lie in /run, where they take room from the state, and are gone with their job.",
    where=COMPUTE,
)
def logs_directory(facts: Facts) -> Iterator[Finding]:
    path = facts.site.paths_logs
    parent = os.path.dirname(path)
    link = next((one for one in steps(path) if os.path.islink(one)), "")
    written, closed = others_can_write(path, group_is_trusted=True), closed_to_users(f"{path}/1")
    if link:
        fix = f"{CONFIG_PATH}: paths.logs = the real path"
        yield warning(f"{link} is a link, which slurm-mps does not follow to the logs", fix)
    elif not os.path.isdir(parent):
        yield warning(f"{parent} is not there, and slurm-mps makes {path} itself only", f"mkdir -p {parent}")
    elif written:
        yield warning(f"{written} can be written by others than root", f"chown root: {written}; chmod o-w {written}")
    elif closed:
        yield warning(f"users cannot enter {closed} to read their logs", f"chmod o+x {closed}")


@check(
    "stale-state",
    "nothing is left of jobs that are over",
    why="A control daemon or a ledger of a crashed job keeps its GPU from the next MPS job.",
    where=COMPUTE,
)
def stale_state(facts: Facts) -> Iterator[Finding]:
    for one in facts.stale:
        if one.outcome in (BUSY, KEPT) or one.thing == CONFIG_PATH:
            continue
        what = f"{one.thing}: {one.why}"
        if one.why.startswith("Slurm does not say"):
            yield warning(what, "slurm-mps reconcile --dry-run, when slurmctld answers")
        else:
            yield problem(what, _by_hand(one) if one.outcome == LEFT else "slurm-mps reconcile")


def _by_hand(one: Repair) -> str:
    """What to do about something that reconcile does not touch."""
    if one.thing.startswith("/"):
        return f"slurm-mps reconcile leaves it; move it away: {printable(one.thing, 200)}"
    kind, _, name = one.thing.rpartition(" ")
    path = f"{STATE_DIRECTORY}/{'jobs' if kind == 'job' else 'gpus'}/{name}"
    return f"slurm-mps reconcile leaves it; end the processes of that job, then rm -r {path}"


@check(
    "mps-variables",
    "no file sets MPS's variables for everybody",
    why="A program without MPS joins the control daemon that they name, or gets limits that its user did not ask for.",
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
            if "CUDA_MPS_" in code and "unset" not in code:
                what = f"{path}:{number}: {printable(line.strip(), 80)}"
                yield warning(what, "take the line out; the plugin sets these variables")
