"""Checks of Slurm's own files and daemons."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator

from ...errors import MpsError, NodeError
from ...node.paths import hidden_from_users
from ...node.processes import uid_of
from ...node.reading import read_text
from ...slurm.host import NotKnownError, RefusedError, TwoReleasesError
from ...units import printable
from ..facts import UNSET_BY_DEFAULT, Facts
from ..finding import COMPUTE, Finding, check, fine, problem, warning
from ..timeouts import check_deadlines

#: The releases of Slurm that slurm-mps was run with, oldest first (docs/support.md).
TRIED = ((22, 5), (24, 11), (26, 5))
#: Before it slurmstepd drops its privileges while it ends the extern step, in which RunInJob runs the epilog.
_RUN_IN_JOB_WORKS = (26, 5)
_TIMEOUTS = ("MessageTimeout", "PrologTimeout", "EpilogTimeout", "PrologEpilogTimeout")
_TYPES = ("ProctrackType", "TaskPlugin", "GresTypes", "JobContainerType")
_COMPARED = ("Prolog", "Epilog", "PrologFlags", *_TIMEOUTS, "PlugStackConfig", *_TYPES, "SlurmdUser")
_IMPLY_ALLOC = {"contain", "deferbatch", "runinjob", "x11"}
#: Where systemd looks for units, the first found counts (systemd.unit(5)).
_UNITS = ("/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system")
_OUR_DIRECTORIES = ("/run/slurm-mps", "/var/log/slurm-mps")
_SHM, _SHM_KNOWN_BRANCH = "/dev/shm", 580  # noqa: S108 - looked for, not used


def _number(release: str) -> tuple[int, ...]:
    """Year and month."""
    return tuple(int(part) for part in release.split(".")[:2])


@check(
    "slurm-conf",
    "slurm.conf can be read with all that it includes, and Slurm accepts it",
    why="Slurm's commands and daemons do not start without a configuration that they accept.",
)
def slurm_conf(facts: Facts) -> Iterator[Finding]:
    named = facts.environment.get("SLURM_CONF", "")
    if named and not facts.conf_path:
        what = f"SLURM_CONF={printable(named, 200)} names no file"
        yield problem(what, "unset SLURM_CONF, or give it the path of slurm.conf")
    elif not facts.conf_path:
        if not facts.programs:
            raise NotKnownError("there is no Slurm here")
        yield problem(
            "there is no slurm.conf: not in /etc/slurm, and SLURM_CONF is not set",
            "put the cluster's slurm.conf there; or start slurmd, on a node that gets it from the controller",
        )
    else:
        for missing in facts.conf.problems:
            if not missing.endswith(os.strerror(errno.EACCES)):  # the check slurm-files
                yield problem(missing, "put the file there, or take the Include line out")
        try:
            _ = facts.controller
        except RefusedError as error:
            if not facts.conf.problems:
                fix = f"change {facts.conf_path} until scontrol show config accepts it"
                yield problem(f"Slurm refuses {facts.conf_path}: {error}", fix)
        except MpsError:
            pass  # the check slurmctld
        yield fine(f"{facts.conf_path}, {len(facts.conf.lines)} lines")


@check(
    "slurm-files",
    "users can read the files that every command of Slurm reads",
    why="Every srun, sbatch and salloc of a user ends there, with MPS or without.",
)
def slurm_files(facts: Facts) -> Iterator[Finding]:
    if facts.is_controller_alone:
        raise NotKnownError("on a controller that is no node users run nothing, and its files may be closed")
    if not facts.conf_path:
        raise NotKnownError("there is no slurm.conf here")
    paths = [facts.conf_path]
    try:
        paths += [*facts.conf.files, facts.plugstack_path]
        paths += [*facts.plugstack.files, *([facts.plugin_path] if facts.our_lines else [])]
    except NotKnownError:
        pass  # what is closed to this user is among those before
    hidden = {closed: path for path in reversed(paths) if (closed := hidden_from_users(path))}
    for closed, path in hidden.items():
        if closed == path:
            yield problem(f"users cannot read {path}", f"chmod o+r {path}")
        else:
            yield problem(f"users cannot enter {closed} on the way to {path}", f"chmod o+x {closed}")


@check(
    "slurm-version",
    "slurm-mps was run with this release of Slurm",
    why="What Slurm gives to prologs and plugins differs between releases.",
)
def slurm_version(facts: Facts) -> Iterator[Finding]:
    tried = [f"{year}.{month:02d}" for year, month in TRIED]
    try:
        release = facts.release
    except TwoReleasesError as error:
        yield problem(error.message, error.hint)
        return
    if _number(release) < TRIED[0]:
        yield problem(f"Slurm {release} is older than {tried[0]}", "upgrade Slurm")
    elif _number(release) not in TRIED:
        fix = "try it: srun --mps --gres=gpu:1 slurm-mps verify; docs/support.md says what was run on which release"
        yield warning(f"slurm-mps was run with Slurm {', '.join(tried)}, and not with {release}", fix)
    yield fine(f"Slurm {release}")


@check(
    "slurmctld",
    "slurmctld answers",
    why="doctor then sees the files only, and not the configuration in force. Jobs that run do not need slurmctld.",
)
def slurmctld(facts: Facts) -> Iterator[Finding]:
    if facts.conf.problems:
        raise NotKnownError("slurm.conf cannot be read whole")
    try:
        yield fine(f"slurmctld of Slurm {facts.controller.value('SLURM_VERSION')} answers")
    except RefusedError:
        raise NotKnownError("Slurm's commands refuse slurm.conf") from None
    except NodeError as error:
        yield warning(f"slurmctld does not answer: {error}", "on the controller: systemctl status slurmctld")


@check(
    "config-in-force",
    "slurmctld has what slurm.conf says",
    why="doctor judges the file. A line that slurmctld has not read yet is not in force.",
)
def config_in_force(facts: Facts) -> Iterator[Finding]:
    try:
        controller = facts.controller
    except MpsError:
        raise NotKnownError("slurmctld does not answer") from None
    for key in _COMPARED:
        given = facts.conf.settings(key)
        has = controller.value(key)
        if not given and key.lower() in UNSET_BY_DEFAULT and not key.endswith("Timeout") and _is_set(has):
            yield warning(f"{facts.conf_path} has no {key}, and slurmctld has {has}", "scontrol reconfigure")
        if not given or key.lower() not in controller.config:
            continue
        says = ",".join(value for _, value in given) if key in ("Prolog", "Epilog") else given[-1][1]
        if _meaning(key, says) != _meaning(key, has):
            line = f"{given[-1][0].place}: {key}={says}"
            yield warning(f"{line}, and slurmctld has {has or 'none'}", "scontrol reconfigure")


def _is_set(value: str) -> bool:
    return value.lower() not in ("", "none", "no", "65534", "job_container/none")


def _meaning(key: str, value: str) -> frozenset[str]:
    """A value without what Slurm adds when it shows it."""
    value = re.sub(r"(?<=\d) (sec|min)\b|\(\d+\)$", "", value.strip())
    words = {word.strip().lower() or "none" for word in value.split(",")}
    if key.endswith(("Type", "Plugin")):
        words = {word.rpartition("/")[2] for word in words}
    if key == "PrologFlags" and words & _IMPLY_ALLOC:
        words.add("alloc")
    if key == "PrologFlags" and "x11" in words:
        words.add("contain")
    return frozenset(words)


@check(
    "slurmd",
    "slurmd runs on this node, and its restart leaves control daemons alone",
    why="Slurm starts no job on this node.",
    where=COMPUTE,
)
def slurmd(facts: Facts) -> Iterator[Finding]:
    unit = next((f"{place}/slurmd.service" for place in _UNITS if os.path.isfile(f"{place}/slurmd.service")), "")
    drop_ins = {os.path.basename(path): path for place in reversed(_UNITS) for path in _conf_files(place)}
    where, mode = unit, "control-group" if unit else "none"  # systemd.kill(5)
    for path in (unit, *(drop_ins[name] for name in sorted(drop_ins))) if unit else ():
        for found in re.findall(r"^KillMode\s*=\s*(\S+)", _text(path), re.MULTILINE):
            where, mode = path, found
    if mode not in ("process", "none"):
        why = "Control daemons run in slurmd's unit. systemd ends them with slurmd, and their jobs lose MPS."
        yield warning(f"{where}: KillMode is {mode}", "KillMode=process in [Service]; systemctl daemon-reload", why)
    if not any(one.node_name in ("", facts.node_name) for one in facts.slurmds):
        if not facts.is_root and uid_of(1) is None:
            raise NotKnownError("only root sees whether slurmd runs", needs_root=True)
        yield warning(f"no slurmd of node {facts.node_name} runs", "systemctl start slurmd")


def _conf_files(place: str) -> list[str]:
    try:
        names = os.listdir(f"{place}/slurmd.service.d")
    except OSError:
        return []
    return [f"{place}/slurmd.service.d/{name}" for name in names if name.endswith(".conf")]


@check(
    "node-drained",
    "no failed prolog or epilog keeps this node out of service",
    why="Slurm drains a node whose prolog or epilog fails. slurmd's log and syslog (under slurm-mps) have the cause.",
    where=COMPUTE,
)
def node_drained(facts: Facts) -> Iterator[Finding]:
    try:
        controller = facts.controller
    except MpsError:
        raise NotKnownError("slurmctld does not answer") from None
    state, reason = controller.node_state, controller.node_reason
    ours = re.match(r"(prolog|epilog) (error|failed)|slurm-mps|batch job complete fail", reason, re.IGNORECASE)
    if "DRAIN" in state and ours:
        fault = _text("/run/slurm-mps/last-fault")[:500].strip()
        yield warning(
            f"node {facts.node_name} is {state}: {reason}{f'; the last fault here: {fault}' if fault else ''}",
            f"fix the cause, then: scontrol update NodeName={facts.node_name} State=RESUME",
        )


@check(
    "slurmd-user",
    "slurmd runs as root",
    why="Prolog and epilog run as SlurmdUser. Only root may set compute modes and end a job's control daemon.",
)
def slurmd_user(facts: Facts) -> Iterator[Finding]:
    user = facts.value("SlurmdUser", "root")
    if re.sub(r"\(.*", "", user) not in ("root", "0"):
        yield problem(f"SlurmdUser={user}", f"{facts.where('SlurmdUser')}: SlurmdUser=root")


@check(
    "prolog-flags",
    "the prolog runs on all nodes of a job when the job is allocated",
    why="Without Alloc the prolog runs at a node's first step: what salloc gives the user finds no control daemon.",
)
def prolog_flags(facts: Facts) -> Iterator[Finding]:
    given, words = facts.value("PrologFlags"), facts.words("PrologFlags")
    if not words & ({"alloc"} | _IMPLY_ALLOC):
        has = f"PrologFlags={given} has no Alloc" if given else "PrologFlags=Alloc is not set"
        yield problem(has, f"{facts.where('PrologFlags')}: PrologFlags={','.join(filter(None, ['Alloc', given]))}")
    if "runinjob" in words and _number(facts.release) < _RUN_IN_JOB_WORKS:
        why = (
            "Slurm before 26.05 sometimes runs the epilog as the job's user. It can put nothing back; the node drains."
        )
        fix = f"{facts.where('PrologFlags')}: PrologFlags without RunInJob"
        yield problem(f"PrologFlags={given}, and this is Slurm {facts.release}", fix, why)


def _plugins(facts: Facts, key: str) -> set[str]:
    """The plugins that a key names, with or without their kind: ``cgroup`` for ``task/cgroup``."""
    return {word.rpartition("/")[2] for word in facts.words(key)}


@check(
    "proctrack",
    "Slurm finds every process of a job at its end",
    why="A process that outlives its job keeps the GPU. The next MPS job finds it there, and the node drains.",
)
def proctrack(facts: Facts) -> Iterator[Finding]:
    kind = facts.value("ProctrackType", "proctrack/cgroup")
    if _plugins(facts, "ProctrackType") == {"pgid"}:
        what = f"{facts.where('ProctrackType')}: {kind} loses a process that makes a session of its own"
        yield warning(what, "ProctrackType=proctrack/cgroup")
    yield fine(kind)


@check(
    "cgroup-conf",
    "Slurm does what cgroup.conf says",
    why="slurmd does not start, or does not confine what it should: a process without the job's control daemon can "
    "open GPUs of other jobs.",
)
def cgroup_conf(facts: Facts) -> Iterator[Finding]:
    file = f"{facts.conf_directory}/cgroup.conf"
    confined = facts.cgroup.get("constraindevices", "no").lower() in ("yes", "true", "1")
    if confined and "cgroup" not in _plugins(facts, "TaskPlugin"):
        fix = f"{facts.where('TaskPlugin')}: TaskPlugin=task/affinity,task/cgroup"
        yield problem(f"{file} has ConstrainDevices=yes, and TaskPlugin has no task/cgroup", fix)
    if not confined and facts.site.gpus_sharing == "joined":
        yield problem(
            f"{file}: ConstrainDevices=no, and gpus.sharing joins jobs: each is refused", "ConstrainDevices=yes"
        )
    plugin = facts.cgroup.get("cgroupplugin", "autodetect").lower()
    mount = facts.cgroup.get("cgroupmountpoint", "/sys/fs/cgroup")
    unified = os.path.exists(f"{mount}/cgroup.controllers")
    name, places, wrong = f"{plugin.replace('/', '_')}.so", facts.plugin_directories, ""
    if plugin == "disabled":
        wrong = "slurm.conf uses cgroups"
    elif plugin.startswith("cgroup/") and places and not any(os.path.exists(f"{one}/{name}") for one in places):
        wrong = f"there is no {name} in {places[0]}"
    elif plugin == f"cgroup/{'v1' if unified else 'v2'}":
        wrong = f"{mount} is {'' if unified else 'not '}cgroup v2"
    if wrong and facts.is_compute and "cgroup" in _plugins(facts, "ProctrackType") | _plugins(facts, "TaskPlugin"):
        yield problem(f"{file}: {plugin}, and {wrong}", "CgroupPlugin=autodetect")
    yield fine(
        f"ConstrainDevices={'yes' if confined else 'no'}: a job can open {'its own' if confined else 'all'} GPUs"
    )


@check(
    "slurm-timeouts",
    "Slurm gives prolog and epilog the time that they may take",
    why="Slurm kills a hook that takes longer. The hook cannot say what is slow or undo its work, and the node drains.",
)
def slurm_timeouts(facts: Facts) -> Iterator[Finding]:
    config = {
        name: value for name in _TIMEOUTS if (value := facts.value(name, "10" if name == "MessageTimeout" else ""))
    }
    yield from check_deadlines(config, facts.site.deadlines_prolog, facts.site.deadlines_epilog)


@check(
    "private-directories",
    "no job has a /run or /var/log of its own, nor a /dev/shm that its driver cannot do without",
    why="A task looks for its control daemon in /run/slurm-mps. A directory that only its job sees does not have it.",
)
def private_directories(facts: Facts) -> Iterator[Finding]:
    private = _private(facts)
    for where, path in private:
        if any(own == path or own.startswith(f"{path}/") for own in _OUR_DIRECTORIES):
            yield problem(f"{where} gives each job its own {path}", f"{where}: take {path} out")
    for where, path in private:
        if path == _SHM and facts.is_compute and facts.driver.branch < _SHM_KNOWN_BRANCH:
            yield warning(
                f"{where} gives each job its own {path}, and driver {facts.driver.version} is older than "
                f"r{_SHM_KNOWN_BRANCH}",
                "try: srun --mps --gres=gpu:1 slurm-mps verify",
                f"Drivers before r{_SHM_KNOWN_BRANCH} may share memory in {path} by name, which the job does not see.",
            )


def _private(facts: Facts) -> list[tuple[str, str]]:
    """The directories that each job has for itself, each with the file that says so."""
    found = []
    if facts.value("NamespaceType"):  # from 25.11 on
        name = f"{facts.conf_directory}/namespace.yaml"
        words = re.findall(r"^\s*-?\s*dirs\s*:(.*)$", _text(name), re.MULTILINE | re.IGNORECASE)
        found += [(name, path.rstrip("/")) for text in words for path in re.findall(r"/[\w./-]+", text)]
    if facts.value("JobContainerType").partition("/")[2] == "tmpfs":
        name = f"{facts.conf_directory}/job_container.conf"
        directories = f"/tmp,{_SHM}"  # noqa: S108 - Slurm's default
        try:
            lines = facts.other_conf("job_container.conf").lines
        except NotKnownError:
            lines = ()
        for line in lines:
            directories = line.pairs().get("dirs", directories)
        found += [(name, path.rstrip("/")) for path in directories.split(",")]
    return found


def _text(path: str) -> str:
    """A small file of the system's; "" where there is none to read."""
    try:
        return read_text(path, 65536)
    except OSError:
        return ""
