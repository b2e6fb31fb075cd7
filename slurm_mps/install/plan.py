"""Which changes this node needs, and what is left to do by hand: slurm.conf is the site's, and is not written.

The order is that in which they are made: what is called before what calls it. A `required` line in plugstack.conf
whose plugin is missing stops every srun, and slurmd from starting; a Prolog that is missing drains the node (both seen
on Slurm 22.05).
"""

from __future__ import annotations

import glob
import os
import re
import shlex
import sys
from dataclasses import dataclass, replace

from ..config.settings import CONFIG_PATH
from ..errors import MpsError
from ..job.verdict import VERDICT_VERSION
from ..slurm.plugin_file import read_plugin
from .build import PLUGIN, build_plugin, read_plugin_for, share_directory
from .changes import DIRECTORY, LINES, Change, require_roots
from .site import (
    EPILOG,
    PROLOG,
    ScriptPlace,
    SlurmConf,
    ask_running,
    find_plugin_directory,
    find_release,
    find_script_place,
    find_stack_place,
    plugin_directories,
    read_slurm_conf,
    runs_before,
    slurmd_runs,
    stack_lines,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container, Mapping

SCRIPTS = {PROLOG: "10-slurm-mps.sh", EPILOG: "95-slurm-mps.sh"}
STACK_FILE = "slurm-mps.conf"
_OURS = "# slurm-mps: the --mps options of srun, sbatch and salloc\n"  # above our line in plugstack.conf
_COMMAND, _COMMAND_PLACES = "slurm-mps", ("/usr/local/bin", "/usr/bin")
_UNITS, _UNIT = "/etc/systemd/system", "slurm-mps-reconcile.service"
_PACKAGED_UNITS = ("/lib/systemd/system", "/usr/lib/systemd/system")
STATE_JOBS = "/run/slurm-mps/jobs"


@dataclass(frozen=True)
class Options:
    """What the admin may say. `login_node`: the plugin and its line alone, where jobs are submitted and none runs."""

    slurm_conf: str | None = None
    plugin: str | None = None
    plugin_dir: str | None = None
    slurm_include: str | None = None
    login_node: bool = False


class WrongOptionError(MpsError):
    """An option of `install` or `uninstall` names what cannot be meant."""


@dataclass(frozen=True)
class Todo:
    """Something to do by hand: where, the lines to put there or to type, and why."""

    where: str
    lines: tuple[str, ...]
    why: str = ""


@dataclass(frozen=True)
class Plan:
    """What installing comes to here. `by_hand`: what the site's files lack. `read_at_start`: what slurmd reads then."""

    release: str
    conf: SlurmConf
    changes: list[Change]
    by_hand: list[Todo]
    read_at_start: tuple[str, ...]


def make_plan(options: Options, environment: Mapping[str, str], ours: Container[str]) -> Plan:
    """Look at this node's Slurm, build the plugin if none is given, and say what is to be done.

    `ours` are the paths that an earlier installation wrote.
    Raises: NoSlurmError; WrongOptionError; MpsError when something is missing, is of another release, or is not root's
    alone.
    """
    directory = _named("--plugin-dir", options.plugin_dir)
    if options.slurm_include is not None:
        _named("--slurm-include", options.slurm_include, holds="slurm/spank.h")
    require_file("--plugin", options.plugin)
    require_file("--slurm-conf", options.slurm_conf)
    release, program = find_release(environment)
    conf = read_slurm_conf(options.slurm_conf, environment)
    directory = directory or find_plugin_directory(conf, program)
    changes: list[Change] = []
    by_hand: list[Todo] = []
    if not options.login_node:
        changes += _config(ours)
    changes += _plugin(options, environment, release, f"{directory}/{PLUGIN}", ours)
    if not options.login_node:
        places = [find_script_place(conf, setting, name) for setting, name in SCRIPTS.items()]
        changes += [change for place in places for change in _script(place)]
        changes += [*_command(ours), *_unit(ours)]
        by_hand += _slurm_conf_lines(conf, places) + _callers(places)
    stack_changes, stack_by_hand = _stack(conf, program, directory, ours)
    changes += stack_changes
    stack = find_stack_place(conf, STACK_FILE)
    read_at_start = (f"{directory}/{PLUGIN}", stack.path, *stack.files)
    return Plan(release, conf, _with_directories(changes), by_hand + stack_by_hand, read_at_start)


def _named(option: str, directory: str | None, *, holds: str = "") -> str | None:
    """The directory that an option names, if it was given: a place that is there, for nothing is made on a typo's word.

    Slurm ends a word of plugstack.conf at a blank, and make and its shell take a name apart at more than that.
    """
    if directory is None:
        return None
    if not re.fullmatch(r"/[\w./+@=,-]*", directory, re.ASCII):
        raise WrongOptionError(f"{option}={directory!r}: expected an absolute path of letters, digits and _./+@=,-")
    if not os.path.isdir(directory):
        raise WrongOptionError(f"{option}={directory}: there is no such directory")
    if holds and not os.path.exists(f"{directory}/{holds}"):
        raise WrongOptionError(f"{option}={directory}: there is no {holds} in it")
    return directory.rstrip("/") or "/"


def require_file(option: str, path: str | None) -> None:
    """Raises: WrongOptionError where an option was given and names no file."""
    if path is not None and not os.path.isfile(path):
        raise WrongOptionError(f"{option}={path}: there is no such file")


def _share(name: str) -> bytes:
    path = f"{share_directory()}/{name}"
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise MpsError(f"{path}: {error.strerror}", "install slurm-mps from its own wheel") from None


def _config(ours: Container[str]) -> list[Change]:
    """The sample, where there is no configuration; one that is there stays, also across an upgrade."""
    real = os.path.realpath(CONFIG_PATH)
    if not os.path.exists(CONFIG_PATH):
        return [Change(CONFIG_PATH, data=_share("etc/mps.toml"))]
    if real not in ours:
        return []
    with open(real, "rb") as file:
        return [Change(CONFIG_PATH, data=file.read())]


def _with_directories(changes: list[Change]) -> list[Change]:
    """The changes, and before the first the directories that are missing."""
    missing: list[str] = []
    for change in changes:
        directory = os.path.dirname(change.path)
        new = []
        while not os.path.isdir(directory) and directory not in missing:
            new.append(directory)
            directory = os.path.dirname(directory)
        missing += reversed(new)
    return [Change(path, DIRECTORY, mode=0o755) for path in missing] + changes


def _plugin(
    options: Options, environment: Mapping[str, str], release: str, target: str, ours: Container[str]
) -> list[Change]:
    """The plugin; one that a package put there for this Slurm stays."""
    if options.plugin:
        return [Change(target, data=read_plugin_for(release, options.plugin))]
    if os.path.exists(target) and os.path.realpath(target) not in ours:
        try:
            found = read_plugin(target)
            if found.loads_in(release) and found.verdict_version >= VERDICT_VERSION:
                return []
        except MpsError:
            pass  # no plugin of ours, or an old one: it is kept, and put back at the end
    return [Change(target, data=build_plugin(release, options.slurm_include, environment))]


def _script(place: ScriptPlace) -> list[Change]:
    """Prolog or epilog, with the paths of this Python and this package in it, which root runs for every MPS job."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for path in (os.path.dirname(sys.executable), sys.executable, package, f"{package}/hook.py"):
        try:
            require_roots(path)
        except MpsError as error:
            raise MpsError(f"{error}, and root's prolog would run what is there", "install slurm-mps as root") from None
    text = _share(f"{place.setting.lower()}/{SCRIPTS[place.setting]}").decode()
    for name, value in (("python", sys.executable), ("package", package)):
        text = re.sub(rf"(?m)^{name}=.*$", f"{name}={shlex.quote(value)}".replace("\\", r"\\"), text)
    return [Change(place.path, data=text.encode(), mode=0o755)]


def _command(ours: Container[str]) -> list[Change]:
    """``slurm-mps`` where users' PATH has it, unless it is there."""
    program = f"{os.path.dirname(sys.executable)}/{_COMMAND}"
    places = [f"{place}/{_COMMAND}" for place in _COMMAND_PLACES]
    if not os.path.exists(program) or any(os.path.exists(one) and os.path.realpath(one) not in ours for one in places):
        return []
    return [Change(places[0], data=f'#!/bin/sh\nexec {shlex.quote(program)} "$@"\n'.encode(), mode=0o755)]


def _unit(ours: Container[str]) -> list[Change]:
    """The unit that repairs a node at boot, not enabled; a package's own stays."""
    if not os.path.isdir(_UNITS) or any(os.path.exists(f"{place}/{_UNIT}") for place in _PACKAGED_UNITS):
        return []
    if os.path.exists(f"{_UNITS}/{_UNIT}") and f"{_UNITS}/{_UNIT}" not in ours:
        return []
    program = f"{os.path.dirname(sys.executable)}/{_COMMAND}"
    text = re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={program}", _share(f"etc/{_UNIT}").decode())
    return [Change(f"{_UNITS}/{_UNIT}", data=text.encode())]


def _stack(
    conf: SlurmConf, slurm_program: str, directory: str, ours: Container[str]
) -> tuple[list[Change], list[Todo]]:
    """The line for plugstack.conf, unless one is there already; on a configless node it is the controller's to add.

    The plugin goes by its name where Slurm looks for plugins, and by its path elsewhere.
    """
    searched = [os.path.realpath(one) for one in plugin_directories(conf, slurm_program)]
    plugin = PLUGIN if os.path.realpath(directory) in searched else f"{directory}/{PLUGIN}"
    place = find_stack_place(conf, STACK_FILE)
    theirs = _admins_lines(place.files, ours)
    for path, line in theirs:
        instead = f"{path}, in place of '{line}'"
        if not line.startswith("required"):
            why = "what an optional plugin says is ignored: a task would then run without MPS, unnoticed"
            return [], [Todo(instead, (f"required {plugin}",), why)]
        named = line.split()[1]
        found = [named] if os.path.isabs(named) else [f"{one}/{named}" for one in searched]
        if os.path.realpath(f"{directory}/{PLUGIN}") not in map(os.path.realpath, found):
            why = "Slurm would look for another file than the one that is installed"
            return [], [Todo(instead, (f"required {plugin}",), why)]
        return [], []
    if conf.is_copy:
        why = "this node takes its configuration from the controller"
        return [], [Todo("plugstack.conf on the controller", (f"required {plugin}",), why)]
    text = f"{_OURS}required {plugin}\n".encode()
    return [Change(place.path, data=text) if place.own_file else Change(place.path, LINES, text)], []


# --------------------------------------------------------------------------------------------------------- by hand


def _slurm_conf_lines(conf: SlurmConf, places: list[ScriptPlace]) -> list[Todo]:
    """What slurm.conf lacks."""
    lines = [f"{place.setting}={os.path.dirname(place.path)}/*" for place in places if not place.value]
    flags = ",".join(conf.all("PrologFlags")).split(",")
    if not {"alloc", "contain"} & {flag.strip().lower() for flag in flags}:
        lines.append(f"PrologFlags={','.join([*filter(None, flags), 'Alloc'])}")
    kinds = [kind.strip() for kind in ",".join(conf.all("GresTypes")).split(",") if kind.strip()]
    if "gpu" not in kinds:
        lines.append(f"GresTypes={','.join([*kinds, 'gpu'])}")
    if not lines:
        return []
    where = "slurm.conf on the controller" if conf.is_copy else conf.path or f"{conf.directory}/slurm.conf"
    why = "only when slurm-mps is on every node: a node whose Prolog matches no file drains at its next job"
    return [Todo(f"{where}, the same on all nodes", tuple(lines), why)]


def _callers(places: list[ScriptPlace]) -> list[Todo]:
    """The site's own single scripts, which have to run ours."""
    todo = []
    for place in places:
        if place.caller and not calls(place.caller, place.path):
            end = "last" if place.setting == PROLOG else "first"
            why = "before anything that ends GPU processes" if place.setting == EPILOG else "when all else is done"
            todo.append(Todo(f"{place.caller}, as its {end} line", (f"{place.path} || exit 1",), why))
    return todo


def calls(script: str, path: str) -> bool:
    """Whether a script of the site's names a path outside its comments."""
    try:
        with open(script, encoding="utf-8", errors="replace") as file:
            return any(path in line for line in file if not line.lstrip().startswith("#"))
    except OSError:
        return False


def _order(places: list[ScriptPlace]) -> list[Todo]:
    """Epilog scripts that run before ours could end the job's control daemon before it is asked to quit."""
    (epilog,) = (place for place in places if place.setting == EPILOG)
    before = runs_before(epilog)
    if not before:
        return []
    why = "Slurm runs them in reverse order, so these come before ours, which takes MPS down in good order"
    directory = os.path.dirname(epilog.path)
    return [Todo(f"{directory}: if one of these ends GPU processes, a name below 95", tuple(before), why)]


def afterwards(options: Options, plan: Plan, changed: Container[str], environment: Mapping[str, str]) -> list[Todo]:
    """What makes Slurm take up what is in its files now, as far as it has not done so yet.

    `changed` are the paths that this run writes.
    """
    if options.login_node:
        return []
    conf, units = plan.conf, os.path.isdir(_UNITS)
    anything = any(change.path in changed for change in plan.changes)
    places = [find_script_place(conf, setting, name) for setting, name in SCRIPTS.items()]
    todo = _order(places) if anything else []
    if not conf.is_copy and (plan.by_hand or not _is_in_force(conf, places, environment)):
        todo.append(Todo("then, once", ("scontrol reconfigure",), "the controller and slurmd read slurm.conf again"))
    newest = max([_changed_at(path) for path in plan.read_at_start])
    if plan.by_hand or any(path in changed for path in plan.read_at_start) or not slurmd_runs(since=newest):
        todo.append(Todo("on each node", ("systemctl restart slurmd",), "slurmd reads plugstack.conf when it starts"))
    if units and not glob.glob(f"{_UNITS}/*.wants/{_UNIT}"):
        todo.append(
            Todo("on this node, if you like", (f"systemctl enable {_UNIT}",), "repairs at boot what a crash left")
        )
    if anything:
        todo.append(Todo("where users submit, if jobs run elsewhere", ("slurm-mps install --login-node",)))
    return todo


def _changed_at(path: str) -> float:
    try:
        return os.stat(path).st_ctime
    except OSError:
        return 0


def _is_in_force(conf: SlurmConf, places: list[ScriptPlace], environment: Mapping[str, str]) -> bool:
    """Whether slurmctld has the scripts' settings as slurm.conf has them; it is asked only where slurmd runs."""
    running = ask_running(environment) if slurmd_runs() else None
    return running is not None and all(running[place.setting.lower()] == conf.all(place.setting) for place in places)


# ------------------------------------------------------------------------------------------------- before uninstalling


def jobs_with_mps() -> list[str]:
    """The jobs that have MPS on this node, by their state on disk."""
    try:
        return sorted(os.listdir(STATE_JOBS))
    except FileNotFoundError:
        return []


def still_needed(conf: SlurmConf, ours: Container[str]) -> list[str]:
    """Why Slurm would miss our scripts: a message for each place that still runs them.

    A pattern of which nothing is left counts: Slurm then drains the node at its next job.
    """
    problems = []
    for setting, name in SCRIPTS.items():
        place = find_script_place(conf, setting, name)
        where = f"{conf.path}: {setting}={place.value}"
        if place.caller and os.path.realpath(place.path) in ours and calls(place.caller, place.path):
            problems.append(f"{place.caller} runs {place.path}")
        elif place.value and not place.caller and os.path.realpath(place.path) in ours:
            left = [path for path in glob.glob(place.value) if os.path.realpath(path) not in ours]
            if not left:
                problems.append(f"{where} would match no file, and Slurm drains a node whose {setting} matches none")
    return problems


def still_in_force(conf: SlurmConf, ours: Container[str], environment: Mapping[str, str]) -> list[str] | None:
    """The same of what slurmctld has, which is what slurmd does until ``scontrol reconfigure``.

    Returns: nothing where no slurmd runs; None when slurmctld is silent.
    """
    if not slurmd_runs():
        return []
    running = ask_running(environment)
    if running is None:
        return None
    told = replace(conf, settings={**conf.settings, **running})
    return [f"{problem} (so slurmctld has it; scontrol reconfigure)" for problem in still_needed(told, ours)]


def stack_still_names_it(conf: SlurmConf, ours: Container[str]) -> list[str]:
    """The admin's own lines in plugstack.conf, which need the plugin that we would remove."""
    return [f"{path}: {line}" for path, line in _admins_lines(find_stack_place(conf, STACK_FILE).files, ours)]


def _admins_lines(files: tuple[str, ...], ours: Container[str]) -> list[tuple[str, str]]:
    """The lines in force that name the plugin and that `install` did not write: file and line.

    A file that was once changed by us may have been written anew since: ours is the one line below our remark.
    """
    lines = stack_lines(files, PLUGIN)
    for path in {path for path, _ in lines if os.path.realpath(path) in ours}:
        with open(path, encoding="utf-8", errors="replace") as file:
            own = re.search(f"^{re.escape(_OURS)}(required \\S+)$", file.read(), re.MULTILINE)
        if own and (path, own[1]) in lines:
            lines.remove((path, own[1]))
    return lines
