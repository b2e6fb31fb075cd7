"""Checks of prolog and epilog: that slurmd runs ours, in which order with others, and with what."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from ... import __version__
from ...errors import MpsError
from ...node.paths import hidden_from_users, others_can_write, way_in
from ...slurm.host import NotKnownError
from ..finding import COMPUTE, check, fine, problem, warning
from ..scripts import Script, read_script

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..facts import Facts
    from ..finding import Finding

_KILLS = re.compile(
    r"(?<![\w-])(kill|pkill|killall|skill|fuser)\s+(?!-0\b|-l\b|\])|nvidia-smi\b[^\n|;]*(\s-r\b|--gpu-reset)"
)
_SETS_MODE = re.compile(r"nvidia-smi\b[^\n|;]*(\s-c[\s=\d]|--compute-mode|\s-mig\b|--multi-instance-gpu)")
_RUNS_MPS = re.compile(r"(?<!grep )(?<!pidof )nvidia-cuda-mps-(control|server)\b")
_SETS_VARIABLE = re.compile(r"\b(export|unset)\s+(CUDA_MPS_\w+|CUDA_VISIBLE_DEVICES\b)")
_NOT_FOLLOWED = "Doctor finds a script of slurm-mps in the site's own script by its path alone."
_ASCENDING = "A loop or run-parts, as DeepOps' script has it, runs a directory's scripts in ascending order."


def _wired(facts: Facts, key: str, parts: list[Script]) -> Iterator[Finding]:
    patterns = facts.all(key)
    beside = f"{facts.conf_directory}/{key.lower()}.d"
    line = f"{facts.where(key)}: {key}={beside}/*"
    lies = next((script.path for script in facts.our_hooks if f"/{key.lower()}.d/" in script.path), "")
    if not patterns:
        yield problem(f"{key} is not set", line if lies or not facts.is_compute else f"slurm-mps install, and {line}")
    elif not facts.is_compute:
        yield fine(f"{key}={','.join(patterns)}")
    elif not any(part.is_ours for part in parts):
        if not facts.is_root and any(part.code is None for part in parts):
            raise NotKnownError(f"a script of {key} can be read by root only", needs_root=True)
        site = patterns[0] if os.path.isfile(patterns[0]) else ""  # its line in slurm.conf stays as it is
        if site and lies and any(part.may_run(lies) for part in parts):
            told = f"not checked: whether {site} runs {lies}, and what it runs before and after"
            yield warning(told, _call(key, site, lies), f"{_NOT_FOLLOWED} {_ASCENDING}")
            return
        if site:
            fix = _call(key, site, lies) if lies else f"slurm-mps install, which names the line for {site}"
        else:
            fix = line if lies else f"slurm-mps install, which puts our {key.lower()} where {patterns[0]} finds it"
        yield problem(f"{key}={','.join(patterns)} runs no script of slurm-mps", fix)


def _call(key: str, caller: str, hook: str) -> str:
    """What to write into a script of the site's that is to run ours; `slurm-mps install` says the same."""
    return f"{caller}, as its {'last' if key == 'Prolog' else 'first'} line: {hook} || exit 1"


@check(
    "prolog-wired",
    "slurmd runs slurm-mps' prolog",
    why="Jobs that ask for MPS fail: no prolog set it up.",
)
def prolog_wired(facts: Facts) -> Iterator[Finding]:
    yield from _wired(facts, "Prolog", facts.prolog_parts)


@check(
    "epilog-wired",
    "slurmd runs slurm-mps' epilog",
    why="Control daemons outlive their jobs, and GPUs stay EXCLUSIVE_PROCESS.",
)
def epilog_wired(facts: Facts) -> Iterator[Finding]:
    yield from _wired(facts, "Epilog", facts.epilog_parts)


def _ours_and_others(parts: list[Script]) -> tuple[list[Script], Script | None, list[Script]]:
    """Who runs before our script, that, and who runs after it; nobody where it is not among them."""
    at = next((number for number, part in enumerate(parts) if part.is_ours), None)
    return ([], None, []) if at is None else (parts[:at], parts[at], parts[at + 1 :])


@check(
    "prolog-order",
    "no script that runs after slurm-mps' prolog undoes what it did",
    why="Slurm runs the scripts of a pattern in reverse order of their names: what follows meets the job's own daemon.",
    where=COMPUTE,
)
def prolog_order(facts: Facts) -> Iterator[Finding]:
    _, ours, after = _ours_and_others(facts.prolog_parts)
    for part in after:
        found = _first(_KILLS, part) or _first(_SETS_MODE, part)
        if ours and found and not part.is_ours:
            fix = f"give it a name that sorts behind slurm-mps' prolog: {_rename(part.top, '50')}"
            if part.top == ours.top:
                fix = f"{ours.top}: have it done before {ours.path} runs"
            yield warning(f"{part.path} runs after slurm-mps' prolog, and has {found!r}", fix)


@check(
    "epilog-order",
    "no script that runs before slurm-mps' epilog kills its processes",
    why="A clean-up such as DeepOps' 50-exclusive-gpu takes the job's control daemon for a leftover. Slurm runs the "
    "scripts of a pattern in reverse order of their names.",
    where=COMPUTE,
)
def epilog_order(facts: Facts) -> Iterator[Finding]:
    before, ours, _ = _ours_and_others(facts.epilog_parts)
    for part in before:
        found = _first(_KILLS, part)
        if ours and found:
            if part.top == ours.top:
                fix = _call("Epilog", ours.top, ours.path)
            else:
                fix = f"give it a name that sorts in front of slurm-mps' epilog: {_rename(part.top, '50')}"
            yield warning(f"{part.path} runs before slurm-mps' epilog, and has {found!r}", fix)


def _first(kind: re.Pattern[str], script: Script) -> str:
    """What of that kind stands first in a script, or nothing."""
    found = kind.search(script.code or "")
    return found[0].strip() if found else ""


def _rename(path: str, number: str) -> str:
    return f"mv {path} {os.path.dirname(path)}/{number}-{_bare(path)}"


def _bare(path: str) -> str:
    return re.sub(r"^[\dz]+[-_]", "", os.path.basename(path))


def _others(facts: Facts) -> list[Script]:
    return [part for part in (*facts.prolog_parts, *facts.epilog_parts) if not part.is_ours]


@check(
    "other-mode-setter",
    "no other script sets compute modes",
    why="slurm-mps puts back the mode that it found; two that change it undo one another.",
    where=COMPUTE,
)
def other_mode_setter(facts: Facts) -> Iterator[Finding]:
    for script in _others(facts):
        found = _first(_SETS_MODE, script)
        if found:
            yield warning(f"{script.path} has {found!r}", "leave the compute mode to slurm-mps, or set it at boot")


@check(
    "other-mps-script",
    "no other script starts or ends MPS",
    why="Two control daemons cannot have one GPU in EXCLUSIVE_PROCESS; the job's servers do not start.",
    where=COMPUTE,
)
def other_mps_script(facts: Facts) -> Iterator[Finding]:
    for script in _others(facts):
        found = _first(_RUNS_MPS, script)
        if found:
            yield warning(f"{script.path} runs {found}", f"take it out of {os.path.dirname(script.path)}")


@check(
    "task-prolog",
    "TaskProlog leaves the variables of MPS and CUDA_VISIBLE_DEVICES alone",
    why="TaskProlog runs after the plugin, and its values win: a task joins another control daemon, or gets another "
    "GPU; with gpus.compute_mode = unchanged it runs without MPS, and nothing tells.",
    where=COMPUTE,
)
def task_prolog(facts: Facts) -> Iterator[Finding]:
    for path in facts.all("TaskProlog"):
        found = _first(_SETS_VARIABLE, read_script(path))
        if found:
            yield problem(f"TaskProlog={path} has {found!r}", "take the line out; the plugin sets these variables")


@check(
    "scripts-executable",
    "every script that slurmd runs is executable",
    why="To slurmd a script that it cannot run is one that failed: the node drains at its next job.",
    where=COMPUTE,
)
def scripts_executable(facts: Facts) -> Iterator[Finding]:
    called = [script for script in facts.our_hooks if script.path != script.top]
    for script in (*facts.prologs, *facts.epilogs, *called):
        if not script.is_executable:
            yield problem(f"{script.path} is not executable", f"chmod 755 {script.path}, or take it away")


@check(
    "scripts-owner",
    "only root can write what slurmd runs",
    why="slurmd runs it as root: who can write it is root.",
    where=COMPUTE,
)
def scripts_owner(facts: Facts) -> Iterator[Finding]:
    named = {
        path for part in (*facts.prolog_parts, *facts.epilog_parts) for path in (part.path, part.values.get("package"))
    }
    pythons = {script.values.get("python") for script in facts.our_hooks}
    written = {others_can_write(path) for path in named | pythons if path} - {""}
    for path in sorted(written):
        yield problem(f"{path} can be written by others than root", f"chown root: {path}; chmod go-w {path}")


@check(
    "hooks-twice",
    "slurm-mps' prolog and epilog run once",
    why="The second run costs every job its time again; of two versions one does not understand the other.",
    where=COMPUTE,
)
def hooks_twice(facts: Facts) -> Iterator[Finding]:
    for parts in (facts.prolog_parts, facts.epilog_parts):
        ours = list(dict.fromkeys(part.path for part in parts if part.is_ours))  # by name and by a loop is no fault
        if len(ours) > 1:
            yield warning(f"slurmd runs {' and '.join(ours)}", "remove the older")


@check(
    "hooks-package",
    "the Python and the package that the hooks name are there",
    why="A hook without them fails, and its node drains, for jobs that ask for MPS.",
    where=COMPUTE,
)
def hooks_package(facts: Facts) -> Iterator[Finding]:
    for script in facts.our_hooks:
        values = script.values
        for key in ("python", "package"):
            if not values.get(key):
                yield problem(f"{script.path} has no {key}=", "slurm-mps install, which writes it again")
            elif not os.path.exists(values[key]):
                yield problem(
                    f"{script.path}: {key}={values[key]} is not there",
                    "install slurm-mps there; or slurm-mps install of the one that is here, which mends the line",
                )
        hook = f"{values.get('package', '')}/hook.py"
        if os.path.isdir(values.get("package", "")) and not os.path.exists(hook):
            yield problem(f"{script.path}: {hook} is not there", "install the package again")


@check(
    "hooks-python",
    "the hooks' Python runs and imports slurm-mps as they do",
    why="A hook that cannot start fails, and its node drains, for jobs that ask for MPS.",
    where=COMPUTE,
)
def hooks_python(facts: Facts) -> Iterator[Finding]:
    try:
        yield fine(f"slurm-mps {facts.hook_versions[0]}")
    except NotKnownError:
        raise
    except MpsError as error:
        yield problem(f"{facts.hook_values()['python']}: {error}", "install Python 3.11 or newer and the package again")


@check(
    "hooks-version",
    "the hooks run the slurm-mps that this command is of",
    why="Of two installations one is old: status, reconcile and doctor may not understand what the hooks write.",
    where=COMPUTE,
)
def hooks_version(facts: Facts) -> Iterator[Finding]:
    try:
        version = facts.hook_versions[0]
    except MpsError:
        raise NotKnownError("the hooks' Python does not run") from None
    if version != __version__:
        yield problem(
            f"the hooks run slurm-mps {version}, this is {__version__}", "slurm-mps install of the one that is to stay"
        )


@check(
    "config-compiler",
    "the hooks can check mps.toml",
    why="After each change of mps.toml the next prolog checks it with jsonschema, in a process of its own; without it "
    "the prolog fails and the node drains.",
    where=COMPUTE,
)
def config_compiler(facts: Facts) -> Iterator[Finding]:
    try:
        _ = facts.hook_versions
        said = facts.compiler
    except MpsError:
        raise NotKnownError("the hooks' Python does not run") from None
    if said:
        python = facts.hook_values()["python"]
        lacks = "'jsonschema>=4.10'" if "jsonschema" in said else "slurm-mps"
        yield problem(f"{python} -m slurm_mps.config.file: {said}", f"{python} -m pip install {lacks}")


@check(
    "python-for-users",
    "a job's user can run the hooks' Python",
    why="The plugin runs a program of slurm-mps in the job's tasks, as their user; and users run slurm-mps verify.",
    where=COMPUTE,
)
def python_for_users(facts: Facts) -> Iterator[Finding]:
    values = facts.hook_values()
    for path in (values["python"], f"{values['package']}/hook.py"):
        closed = hidden_from_users(path)
        if closed:
            prefix = os.path.dirname(os.path.dirname(values["python"]))
            yield problem(f"users cannot reach {path}: {closed} is closed to them", way_in(closed, prefix))
