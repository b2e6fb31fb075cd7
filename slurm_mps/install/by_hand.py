"""The admin's part of an installation: lines for the site's own files, and commands that make Slurm read them."""

from __future__ import annotations

import glob
import os
from collections.abc import Container
from dataclasses import dataclass

from ..config.settings import STATE_DIRECTORY
from ..errors import MpsError
from ..job.verdict import JOBS
from ..node.engines import OTHERS, Engine
from ..node.reading import read_text
from ..slurm.host import EPILOG, PLUGIN, PROLOG, Controller, Host, without_comments
from .changes import Manifest
from .wanted import SCRIPTS, STACK_FILE, UNIT, UNITS, Options, ScriptPlace, Wanted, script_place, stack_lines_of_others


@dataclass(frozen=True)
class Todo:
    """Something to do by hand: where, the lines to put there or to type, and why."""

    where: str
    lines: tuple[str, ...]
    why: str = ""


def left_to_do(options: Options, wanted: Wanted, host: Host, manifest: Manifest, changed: Container[str]) -> list[Todo]:
    """The admin's tasks once the wanted files are there. `changed` are the paths that this run writes."""
    stack = _stack_line(wanted, host, manifest)
    if options.login_node:
        return stack
    places = [script_place(host, setting) for setting in SCRIPTS]
    lines = [*_slurm_conf_lines(host, places), *_callers(places), *stack]
    anything = any(change.path in changed for change in wanted.changes)
    todo = [*lines]
    if not host.is_copy and (lines or not _is_in_force(host)):
        todo.append(Todo("once, for the cluster", ("scontrol reconfigure",), "slurmctld and slurmd read slurm.conf"))
    if lines or _slurmd_is_older(wanted, host, changed):
        todo.append(Todo("on each node", ("systemctl restart slurmd",), "slurmd reads plugstack.conf when it starts"))
    if os.path.isdir(UNITS) and not glob.glob(f"{UNITS}/*.wants/{UNIT}"):
        todo.append(
            Todo("on this node, if you like", (f"systemctl enable {UNIT}",), "repairs at boot what a crash left")
        )
    todo += [Todo(f"{one.path}, if you like", (one.line,), _for_engine(one)) for one in OTHERS if one.lacks_line]
    if anything:
        todo.append(Todo("where users submit, if jobs run elsewhere", ("slurm-mps install --login-node",)))
    return todo


def _for_engine(one: Engine) -> str:
    first = "" if os.path.isdir(STATE_DIRECTORY) else "; first run systemd-tmpfiles --create"
    return f"{one.name} then gives containers MPS without a flag, and starts none where the directory is missing{first}"


def _slurm_conf_lines(host: Host, places: list[ScriptPlace]) -> list[Todo]:
    """What slurm.conf lacks."""
    lines = [f"{place.setting}={os.path.dirname(place.path)}/*" for place in places if not place.value]
    flags = ",".join(host.all("PrologFlags")).split(",")
    if not {"alloc", "contain"} & {flag.strip().lower() for flag in flags}:
        lines.append(f"PrologFlags={','.join([*filter(None, flags), 'Alloc'])}")
    kinds = [kind.strip() for kind in ",".join(host.all("GresTypes")).split(",") if kind.strip()]
    if "gpu" not in kinds:
        lines.append(f"GresTypes={','.join([*kinds, 'gpu'])}")
    if not lines:
        return []
    where = "slurm.conf on the controller" if host.is_copy else host.conf_path or f"{host.site_directory}/slurm.conf"
    why = "only when slurm-mps is on every node: a node whose Prolog matches no file drains at its next job"
    return [Todo(f"{where}, the same on all nodes", tuple(lines), why)]


def _callers(places: list[ScriptPlace]) -> list[Todo]:
    """The site's own single scripts, which have to run ours."""
    todo = []
    for place in places:
        if place.caller and not _calls(place):
            end = "last" if place.setting == PROLOG else "first"
            why = "before anything that ends GPU processes" if place.setting == EPILOG else "when all else is done"
            todo.append(Todo(f"{place.caller}, as its {end} line", (f"{place.path} || exit 1",), why))
    return todo


def _calls(place: ScriptPlace) -> bool:
    """Whether the site's single script names ours outside its comments."""
    try:
        return place.path in without_comments(read_text(place.caller))
    except OSError:
        return False


def _stack_line(wanted: Wanted, host: Host, manifest: Manifest) -> list[Todo]:
    """The plugin's line, where plugstack.conf has a wrong one, or none and no include that takes a file of ours."""
    for path, line in stack_lines_of_others(host, manifest):
        if not line.startswith("required"):
            why = "what an optional plugin says is ignored: a task would then run without MPS, unnoticed"
            return [Todo(f"{path}, in place of '{line}'", (wanted.stack_line,), why)]
        named = line.split()[1]
        found = [named] if os.path.isabs(named) else [f"{one}/{named}" for one in host.plugin_directories]
        if os.path.realpath(f"{wanted.plugin_directory}/{PLUGIN}") not in map(os.path.realpath, found):
            why = "Slurm would look for another file than the one that is installed"
            return [Todo(f"{path}, in place of '{line}'", (wanted.stack_line,), why)]
        return []
    if host.is_copy:
        why = "this node takes its configuration from the controller"
        return [Todo("plugstack.conf on the controller", (wanted.stack_line,), why)]
    path = host.plugstack_path
    if os.path.exists(path) and path not in manifest and not host.own_stack_file(STACK_FILE):
        return [Todo(path, (wanted.stack_line,), "without it srun, sbatch and salloc know no --mps")]
    return []


def _slurmd_is_older(wanted: Wanted, host: Host, changed: Container[str]) -> bool:
    """Whether slurmd runs, and has not read the plugin and its line as they are now."""
    is_there = os.path.exists(host.plugstack_path)
    files = (*host.plugstack.files, host.own_stack_file(STACK_FILE)) if is_there else (host.plugstack_path,)
    paths = (f"{wanted.plugin_directory}/{PLUGIN}", *files)
    since = min((one.started_seconds for one in host.slurmds), default=0.0)
    return any(path in changed or (os.path.exists(path) and os.stat(path).st_ctime > since) for path in paths)


def _is_in_force(host: Host) -> bool:
    """Whether slurmctld has the scripts' settings as slurm.conf has them; it is asked only where slurmd runs."""
    controller = _ask_where_slurmd_runs(host)
    return controller is not None and all(controller.values(key) == host.all(key) for key in SCRIPTS)


def _ask_where_slurmd_runs(host: Host) -> Controller | None:
    try:
        return host.ask_slurmctld() if host.slurmds else None
    except MpsError:
        return None


# ------------------------------------------------------------------------------------------------- before uninstalling


def jobs_with_mps() -> list[str]:
    """The jobs that have MPS on this node, by their state on disk."""
    try:
        return sorted(os.listdir(JOBS))
    except FileNotFoundError:
        return []


def engines_that_miss() -> list[str]:
    """What to say of engines whose site file binds the state directory, which no boot makes once we are gone."""
    return [
        f"{one.path}: take '{one.line}' out, since {one.name} starts no container when {STATE_DIRECTORY} is gone"
        for one in OTHERS
        if one.needs_directory
    ]


def still_needed(host: Host, ours: Container[str], controller: Controller | None = None) -> list[tuple[str, str]]:
    """Why Slurm would miss our scripts, by slurm.conf or by slurmctld: the action that must come first, and the
    problem.

    A pattern that would match no file counts, since Slurm then drains the node at its next job.
    """
    found = []
    for setting in SCRIPTS:
        place = script_place(host, setting, controller.values(setting) if controller else None)
        if os.path.realpath(place.path) not in ours:
            continue
        if place.caller and _calls(place):
            found.append((f"take its line out of {place.caller}", f"{place.caller} runs {place.path}"))
        elif place.value and not place.caller:
            left = [path for path in glob.glob(place.value) if os.path.realpath(path) not in ours]
            why = f"would match no file, and Slurm drains a node whose {setting} matches none"
            if not left:
                first = "take Prolog= and Epilog= out of slurm.conf, and run scontrol reconfigure"
                found.append((first, f"{host.conf_path}: {setting}={place.value} {why}"))
    return found


def still_in_force(host: Host, ours: Container[str]) -> list[tuple[str, str]] | None:
    """still_needed() by slurmctld's configuration, which slurmd follows until ``scontrol reconfigure``.

    Returns: nothing where no slurmd runs; None when slurmctld is silent.
    """
    if not host.slurmds:
        return []
    controller = _ask_where_slurmd_runs(host)
    if controller is None:
        return None
    return [
        ("run scontrol reconfigure", f"{problem} (so slurmctld has it; scontrol reconfigure)")
        for _, problem in still_needed(host, ours, controller)
    ]
