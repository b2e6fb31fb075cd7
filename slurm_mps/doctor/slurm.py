"""Checks of Slurm's own files and daemons."""

from __future__ import annotations

import errno
import os
import re

from ..errors import MpsError
from ..node.reading import read_text
from ..slurm.timeouts import DeadlineProblem, check_deadlines
from ..units import printable
from .finding import COMPUTE, NoAnswerError, NotCheckedError, check, fine, problem, warning
from .paths import hidden_from_users
from .place import UNSET_BY_DEFAULT, RefusedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from .finding import Said
    from .place import Place

#: The releases of Slurm that slurm-mps was run with, oldest first (docs/support.md).
TRIED = ((22, 5), (24, 11), (26, 5))
#: Before it slurmstepd drops its privileges while it ends the extern step, in which RunInJob runs the epilog.
_RUN_IN_JOB_WORKS = (26, 5)
_COMPARED = (
    "Prolog",
    "Epilog",
    "PrologFlags",
    "MessageTimeout",
    "PrologTimeout",
    "EpilogTimeout",
    "PrologEpilogTimeout",
    "PlugStackConfig",
    "ProctrackType",
    "TaskPlugin",
    "GresTypes",
    "JobContainerType",
    "SlurmdUser",
)
_IMPLY_ALLOC = {"contain", "deferbatch", "runinjob", "x11"}
#: Where systemd looks for units, the first found counts (systemd.unit(5)).
_UNITS = ("/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system")
_OUR_DIRECTORIES = ("/run/slurm-mps", "/var/log/slurm-mps")
_SHM_KNOWN_BRANCH = 580
_EVERY_SRUN = "Every srun, sbatch and salloc of a user ends there, with MPS or without."


def _number(release: str) -> tuple[int, ...]:
    """Year and month."""
    return tuple(int(part) for part in release.split(".")[:2])


def name_hidden(place: Place, paths: Sequence[str], named_before: Collection[str] = ()) -> Iterator[Said]:
    """Name what keeps users from reading files that every command of Slurm's reads.

    On a controller that is no node users run nothing, and its files may be closed.
    """
    if place.is_controller_alone:
        return
    named = set(named_before)
    for path in paths:
        hidden = hidden_from_users(path)
        if hidden in named | {""}:
            continue
        named.add(hidden)
        if hidden == path:
            yield problem(f"users cannot read {path}", f"chmod o+r {path}", _EVERY_SRUN)
        else:
            yield problem(f"users cannot enter {hidden} on the way to {path}", f"chmod o+x {hidden}", _EVERY_SRUN)


@check(
    "slurm-conf",
    "slurm.conf and all that it includes can be read, and Slurm takes them",
    why="Slurm's commands and daemons do not start with a configuration that they refuse.",
)
def slurm_conf(place: Place) -> Iterator[Said]:
    wanted = place.environment.get("SLURM_CONF", "")
    if wanted and not place.conf_path:
        named = f"SLURM_CONF={printable(wanted, 200)} names no file"
        yield problem(named, "unset SLURM_CONF, or give it the path of slurm.conf", "Slurm's commands read no other.")
        return
    try:
        files = place.slurm_conf.files
    except NotCheckedError:
        hidden = list(name_hidden(place, [path for path in (place.conf_path,) if path]))
        yield from hidden
        if hidden:
            return
        raise
    yield from name_hidden(place, files)
    for missing in place.slurm_conf.problems:
        closed = missing.endswith(os.strerror(errno.EACCES))
        yield problem(
            missing, "let every user read it" if closed else "put the file there, or take the Include line out"
        )
    try:
        _ = place.running
    except RefusedError as error:
        if not place.slurm_conf.problems:
            yield problem(f"Slurm refuses {place.conf_path}: {error}", f"mend {place.conf_path}; scontrol show config")
    except (MpsError, NotCheckedError):
        pass  # another finding
    yield fine(f"{place.conf_path}, {len(place.slurm_conf.lines)} lines")


@check(
    "slurm-version",
    "this Slurm is one that slurm-mps is run with",
    why="What Slurm gives to prologs and plugins differs between releases; others than these were never tried.",
)
def slurm_version(place: Place) -> Iterator[Said]:
    numbers = _number(place.release)
    tried = [f"{year}.{month:02d}" for year, month in TRIED]
    try_it = "try it: srun --mps --gres=gpu:1 slurm-mps verify; docs/support.md says what was run on which release"
    if numbers in TRIED:
        yield fine(f"Slurm {place.release}")
    elif numbers < TRIED[0]:
        yield problem(f"Slurm {place.release} is older than {tried[0]}", "upgrade Slurm")
    elif numbers > TRIED[-1]:
        yield warning(f"Slurm {place.release} is newer than {tried[-1]}", try_it)
    else:
        after = next(index for index, one in enumerate(TRIED) if one > numbers)
        told = (
            f"slurm-mps was run with Slurm {tried[after - 1]} and {tried[after]}, and not with {place.release} between"
        )
        yield warning(f"{told} them", try_it)


@check(
    "slurmctld",
    "slurmctld answers",
    why="Without it doctor sees the files only, and not what is in force; jobs that run do not need it.",
)
def slurmctld(place: Place) -> Iterator[Said]:
    if place.slurm_conf.problems:
        raise NotCheckedError("slurm.conf cannot be read whole")
    try:
        yield fine(f"slurmctld of Slurm {place.running.config.get('slurm_version', '?')} answers")
    except RefusedError:
        raise NotCheckedError("Slurm's commands refuse slurm.conf") from None
    except NoAnswerError as error:
        yield warning(str(error), "systemctl status slurmctld, on the controller")
    except MpsError as error:
        yield warning(f"slurmctld does not answer: {error}", "systemctl status slurmctld, on the controller")


@check(
    "config-in-force",
    "slurmctld has what slurm.conf says",
    why="A line that was changed and not taken over does nothing yet; what is checked here is the file.",
)
def config_in_force(place: Place) -> Iterator[Said]:
    try:
        config = place.running.config
    except MpsError:
        raise NotCheckedError("slurmctld does not answer") from None
    for key in _COMPARED:
        given = place.slurm_conf.settings(key)
        has = config.get(key.lower(), "(null)")
        if not given and key.lower() in UNSET_BY_DEFAULT and not key.endswith("Timeout") and _is_set(has):
            yield warning(f"{place.conf_path} has no {key}, and slurmctld has {has}", "scontrol reconfigure")
        if not given or key.lower() not in config:
            continue
        says = ",".join(value for _, value in given) if key in ("Prolog", "Epilog") else given[-1][1]
        if _meaning(key, says) != _meaning(key, has):
            yield warning(f"{given[-1][0].place}: {key}={says}, and slurmctld has {has}", "scontrol reconfigure")


def _is_set(value: str) -> bool:
    return value.lower() not in ("", "(null)", "none", "no", "65534", "job_container/none")


def _meaning(key: str, value: str) -> frozenset[str]:
    """A value without what Slurm adds when it shows it."""
    value = re.sub(r"(?<=\d) (sec|min)\b|\(\d+\)$", "", value.strip())
    words = {word.strip().lower() for word in value.split(",")}
    if key.endswith(("Type", "Plugin")):
        words = {word.rpartition("/")[2] for word in words}
    words = {"none" if word == "(null)" else word for word in words}
    if key == "PrologFlags" and words & _IMPLY_ALLOC:
        words.add("alloc")
    if key == "PrologFlags" and "x11" in words:
        words.add("contain")
    return frozenset(words)


def _plugins(place: Place, key: str) -> set[str]:
    """The plugins that a key names, with or without their kind: ``cgroup`` for ``task/cgroup``."""
    return {word.rpartition("/")[2] for word in place.words(key)}


@check(
    "slurmd",
    "slurmd runs on this node",
    why="No job comes here, and no prolog.",
    where=COMPUTE,
)
def slurmd(place: Place) -> Iterator[Said]:
    path = place.slurmd_pid_file(place.node_name)
    try:
        pid = int(read_text(path, 32))
        comm = read_text(f"/proc/{pid}/comm").strip()
    except (OSError, ValueError):
        yield warning(f"no slurmd of node {place.node_name} runs (by {path})", "systemctl start slurmd")
        return
    if not comm.startswith("slurmd"):
        yield warning(f"process {pid}, by {path} the slurmd of this node, is {comm}", "systemctl restart slurmd")


@check(
    "slurmd-unit",
    "a restart of slurmd leaves control daemons alone",
    why="They run in slurmd's own unit; systemd ends all of it unless KillMode is process, and their jobs lose MPS.",
    where=COMPUTE,
)
def slurmd_unit(_place: Place) -> Iterator[Said]:
    unit = next((f"{place}/slurmd.service" for place in _UNITS if os.path.isfile(f"{place}/slurmd.service")), "")
    if not unit:
        raise NotCheckedError("slurmd is no unit of systemd here")
    drop_ins = {os.path.basename(path): path for place in reversed(_UNITS) for path in _conf_files(place)}
    where, mode = unit, "control-group"  # systemd.kill(5)
    for path in (unit, *(drop_ins[name] for name in sorted(drop_ins))):
        for found in re.findall(r"^KillMode\s*=\s*(\S+)", _text(path), re.MULTILINE):
            where, mode = path, found
    if mode not in ("process", "none"):
        yield warning(f"{where}: KillMode is {mode}", "KillMode=process in [Service]; systemctl daemon-reload")


def _conf_files(place: str) -> list[str]:
    try:
        names = os.listdir(f"{place}/slurmd.service.d")
    except OSError:
        return []
    return [f"{place}/slurmd.service.d/{name}" for name in names if name.endswith(".conf")]


@check(
    "node-drained",
    "this node is not out of service for a failed prolog or epilog",
    why="A prolog or epilog that fails drains its node; the cause is in syslog under slurm-mps and in slurmd's log.",
    where=COMPUTE,
)
def node_drained(place: Place) -> Iterator[Said]:
    try:
        running = place.running
    except MpsError:
        raise NotCheckedError("slurmctld does not answer") from None
    reason = running.node_reason
    ours = re.match(r"(prolog|epilog) (error|failed)|slurm-mps|batch job complete fail", reason, re.IGNORECASE)
    if "DRAIN" in running.node_state and ours:
        told = _last_fault()
        what = f"node {place.node_name} is {running.node_state}: {reason}"
        yield warning(
            f"{what}; the last fault that slurm-mps told: {told}" if told else what,
            f"mend it, then: scontrol update NodeName={place.node_name} State=RESUME",
        )


def _last_fault() -> str:
    return _text("/run/slurm-mps/last-fault")[:500].strip()


@check(
    "slurmd-user",
    "slurmd runs as root",
    why="Prolog and epilog run as SlurmdUser; only root may set compute modes and end a job's daemon.",
)
def slurmd_user(place: Place) -> Iterator[Said]:
    user = place.value("SlurmdUser", "root")
    if re.sub(r"\(.*", "", user) not in ("root", "0"):
        yield problem(f"SlurmdUser={user}", f"{place.where('SlurmdUser')}: SlurmdUser=root")


@check(
    "prolog-flags",
    "the prolog runs when the job is allocated, on all its nodes",
    why="Without Alloc it runs at the first step on each node: what salloc gives the user finds no control daemon.",
)
def prolog_flags(place: Place) -> Iterator[Said]:
    given = place.value("PrologFlags")
    if not place.words("PrologFlags") & ({"alloc"} | _IMPLY_ALLOC):
        has = f"PrologFlags={given} has no Alloc" if given else "PrologFlags=Alloc is not set"
        yield problem(has, f"{place.where('PrologFlags')}: PrologFlags={','.join(filter(None, ['Alloc', given]))}")
    if "runinjob" in place.words("PrologFlags") and _number(place.release) < _RUN_IN_JOB_WORKS:
        told = f"PrologFlags={given}: Slurm before 26.05 now and then runs an epilog as the job's user; the node drains"
        yield problem(told, f"{place.where('PrologFlags')}: PrologFlags without RunInJob")


@check(
    "proctrack",
    "Slurm finds every process of a job at its end",
    why="A process that got away keeps the job's GPU: the next MPS job meets it there, and the node drains.",
)
def proctrack(place: Place) -> Iterator[Said]:
    kind = place.value("ProctrackType", "proctrack/cgroup")
    if _plugins(place, "ProctrackType") == {"pgid"}:
        yield warning(
            f"{place.where('ProctrackType')}: {kind} loses a process that makes a session of its own",
            "ProctrackType=proctrack/cgroup",
        )
    else:
        yield fine(kind)


@check(
    "constrain-devices",
    "cgroup.conf confines devices where it says so",
    why="A process that misses the job's control daemon reaches GPUs of other jobs, although the site means it not to.",
)
def constrain_devices(place: Place) -> Iterator[Said]:
    if place.cgroup.get("constraindevices", "no").lower() not in ("yes", "true", "1"):
        yield fine("devices are not confined (ConstrainDevices=no): Slurm leaves every GPU open to every job")
    elif "cgroup" not in _plugins(place, "TaskPlugin"):
        yield problem(
            f"{place.conf_directory}/cgroup.conf has ConstrainDevices=yes, and TaskPlugin has no task/cgroup",
            f"{place.where('TaskPlugin')}: TaskPlugin=task/affinity,task/cgroup",
        )
    else:
        yield fine("devices are confined (ConstrainDevices=yes)")


@check(
    "cgroup-plugin",
    "cgroup.conf names a cgroup version that this node and this Slurm have",
    why="slurmd does not start, or does not confine what it should.",
    where=COMPUTE,
)
def cgroup_plugin(place: Place) -> Iterator[Said]:
    if "cgroup" not in _plugins(place, "ProctrackType") | _plugins(place, "TaskPlugin"):
        raise NotCheckedError("this Slurm uses no cgroups")
    plugin = place.cgroup.get("cgroupplugin", "autodetect").lower()
    where = f"{place.conf_directory}/cgroup.conf"
    mount = place.cgroup.get("cgroupmountpoint", "/sys/fs/cgroup")
    unified = os.path.exists(f"{mount}/cgroup.controllers")
    file = f"{plugin.replace('/', '_')}.so"
    places = place.plugin_directories
    if plugin.startswith("cgroup/") and places and not any(os.path.exists(f"{one}/{file}") for one in places):
        yield problem(f"{where}: {plugin}, and there is no {file} in {places[0]}", "CgroupPlugin=autodetect")
    elif plugin == "cgroup/v1" and unified:
        yield problem(f"{where}: {plugin}, and {mount} is cgroup v2", "CgroupPlugin=autodetect")
    elif plugin == "cgroup/v2" and not unified:
        yield problem(f"{where}: {plugin}, and {mount} is not cgroup v2", "CgroupPlugin=autodetect")
    elif plugin == "disabled":
        yield problem(f"{where}: {plugin}, and slurm.conf uses cgroups", "CgroupPlugin=autodetect")


def _deadline_problems(place: Place) -> list[DeadlineProblem]:
    names = ("MessageTimeout", "PrologTimeout", "EpilogTimeout", "PrologEpilogTimeout")
    config = {name: value for name in names if (value := place.value(name, "10" if name == "MessageTimeout" else ""))}
    return check_deadlines(config, place.site.deadlines_prolog, place.site.deadlines_epilog)


@check(
    "slurm-timeouts",
    "Slurm gives prolog and epilog the time that they may take",
    why="A hook that Slurm kills can neither say what is slow nor undo what it did, and the node drains.",
)
def slurm_timeouts(place: Place) -> Iterator[Said]:
    yield from (problem(one.what, one.change, one.why) for one in _deadline_problems(place) if one.serious)


@check(
    "message-timeout",
    "the prolog ends before Slurm says that it hangs",
    why="Slurm tells the user that the prolog hung, though it has not.",
)
def message_timeout(place: Place) -> Iterator[Said]:
    yield from (warning(one.what, one.change, one.why) for one in _deadline_problems(place) if not one.serious)


@check(
    "private-directories",
    "no job has a /run or /var/log of its own",
    why="The job's tasks look for their daemon in /run/slurm-mps; in a directory that only they see there is none.",
)
def private_directories(place: Place) -> Iterator[Said]:
    for where, path in _private(place):
        if any(own == path or own.startswith(f"{path}/") for own in _OUR_DIRECTORIES):
            yield problem(f"{where} gives each job its own {path}", f"{where}: take {path} out")


@check(
    "private-shm",
    "MPS clients share what they need of /dev/shm",
    why="Older drivers keep memory in /dev/shm by name, which a job with a /dev/shm of its own does not see.",
    where=COMPUTE,
)
def private_shm(place: Place) -> Iterator[Said]:
    private = [where for where, path in _private(place) if path == "/dev/shm"]  # noqa: S108 - it is looked for, not used
    if not private:
        return
    if place.driver.branch < _SHM_KNOWN_BRANCH:
        yield warning(
            f"{private[0]} gives each job its own /dev/shm, and driver {place.driver.version} is older than "
            f"r{_SHM_KNOWN_BRANCH}, which is known not to need it",
            "try: srun --mps --gres=gpu:1 slurm-mps verify",
        )


def _private(place: Place) -> list[tuple[str, str]]:
    """Where it is said, and which directory each job has for itself."""
    found = []
    kind = place.value("JobContainerType")
    if place.value("NamespaceType"):  # from 25.11 on
        name = f"{place.conf_directory}/namespace.yaml"
        words = re.findall(r"^\s*-?\s*dirs\s*:(.*)$", _text(name), re.MULTILINE | re.IGNORECASE)
        found += [(name, path.rstrip("/")) for text in words for path in re.findall(r"/[\w./-]+", text)]
    if kind.partition("/")[2] == "tmpfs":
        name = f"{place.conf_directory}/job_container.conf"
        directories = "/tmp,/dev/shm"  # noqa: S108 - Slurm's default
        try:
            lines = place.other_conf("job_container.conf").lines
        except NotCheckedError:
            lines = ()
        for line in lines:
            directories = line.pairs().get("dirs", directories)
        found += [(name, path.rstrip("/")) for path in directories.split(",")]
    if place.value("UsePAM", "no").lower() in ("1", "yes") and "pam_namespace" in _text("/etc/pam.d/slurm"):
        name = "/etc/security/namespace.conf"
        lines_of_pam = (line.split() for line in _text(name).splitlines())
        found += [(name, words[0].rstrip("/")) for words in lines_of_pam if words and words[0].startswith("/")]
    return found


def _text(path: str) -> str:
    """A small file of the system's; "" where there is none to read."""
    try:
        return read_text(path, 65536)
    except OSError:
        return ""
