"""Checks of prolog and epilog: slurmd runs ours, other scripts leave their work alone, and they can run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from ... import __version__
from ...errors import NodeError
from ...node.paths import hidden_from_users, way_in
from ...slurm.host import EPILOG, PROLOG, NotKnownError
from ..facts import Facts
from ..finding import COMPUTE, Finding, check, fine, problem, warning
from ..scripts import Script, read_script

_KILLS = re.compile(
    r"(?<![\w-])(kill|pkill|killall|skill|fuser)\s+(?!-0\b|-l\b|\])|nvidia-smi\b[^\n|;]*(\s-r\b|--gpu-reset)"
)
_SETS_MODE = re.compile(r"nvidia-smi\b[^\n|;]*(\s-c[\s=\d]|--compute-mode|\s-mig\b|--multi-instance-gpu)")
_RUNS_MPS = re.compile(r"(?<!grep )(?<!pidof )nvidia-cuda-mps-(control|server)\b")
_SETS_VARIABLE = re.compile(r"\b(export|unset)\s+(CUDA_MPS_\w+|CUDA_VISIBLE_DEVICES\b)")


def _first(kind: re.Pattern[str], script: Script) -> str:
    """What of that kind stands first in a script, or nothing."""
    found = kind.search(script.code or "")
    return found[0].strip() if found else ""


def _wired(facts: Facts, key: str, parts: list[Script]) -> Iterator[Finding]:
    """Whether slurmd runs our script as `key`; of a site's single script `slurm-mps install` names the same line."""
    patterns = facts.all(key)
    line = f"{facts.where(key)}: {key}={facts.conf_directory}/{key.lower()}.d/*"
    lies = next((script.path for script in facts.our_hooks if f"/{key.lower()}.d/" in script.path), "")
    if not patterns:
        yield problem(f"{key} is not set", line if lies or not facts.is_compute else f"slurm-mps install, and {line}")
        return
    ours = list(dict.fromkeys(part.path for part in parts if part.is_ours))
    if len(ours) > 1:
        why = "The second run costs every job its time again. Of two versions one does not understand the other."
        yield warning(f"slurmd runs {' and '.join(ours)}", "remove the older", why)
    if not facts.is_compute or ours:
        yield fine(f"{key}={','.join(patterns)}")
        return
    if not facts.is_root and any(part.code is None for part in parts):
        raise NotKnownError(f"a script of {key} can be read by root only", needs_root=True)
    what, site = f"{key}={','.join(patterns)} runs no script of slurm-mps", patterns[0]
    call = f"{site}, as its {'last' if key == PROLOG else 'first'} line: {lies} || exit 1"
    if not os.path.isfile(site):
        fix = line if lies else f"slurm-mps install, which puts the {key.lower()} where {site} finds it"
        yield problem(what, fix)
    elif not lies:
        yield problem(what, f"slurm-mps install, which names the line for {site}")
    elif any(part.may_run(lies) for part in parts):
        why = (
            f"doctor follows {site} to the path of a script, and no further. A loop or run-parts, as DeepOps' script "
            "has it, runs a directory in ascending order: another script may come first."
        )
        yield warning(f"not checked: whether {site} runs {lies}, and what it runs before and after", call, why)
    else:
        yield problem(what, call)


@check(
    "prolog-wired",
    "slurmd runs the prolog of slurm-mps, once",
    why="Jobs that ask for MPS fail, because no prolog sets it up.",
)
def prolog_wired(facts: Facts) -> Iterator[Finding]:
    yield from _wired(facts, PROLOG, facts.parts[PROLOG])


@check(
    "epilog-wired",
    "slurmd runs the epilog of slurm-mps, once",
    why="Control daemons outlive their jobs, and GPUs stay EXCLUSIVE_PROCESS.",
)
def epilog_wired(facts: Facts) -> Iterator[Finding]:
    yield from _wired(facts, EPILOG, facts.parts[EPILOG])


@check(
    "script-order",
    "no script disturbs a job's control daemon after our prolog or before our epilog",
    why="A clean-up such as DeepOps' 50-exclusive-gpu ends the control daemon of the job. Slurm runs the scripts of a "
    "pattern in reverse order of their names.",
    where=COMPUTE,
)
def script_order(facts: Facts) -> Iterator[Finding]:
    for key, parts in facts.parts.items():
        at = next((number for number, part in enumerate(parts) if part.is_ours), len(parts))
        ours = parts[at].path if at < len(parts) else ""
        others = parts[at + 1 :] if key == PROLOG else parts[:at]
        for part in others if ours else ():
            found = _first(_KILLS, part) or (_first(_SETS_MODE, part) if key == PROLOG else "")
            if not found or part.is_ours:
                continue
            where, name = os.path.split(part.top)
            if part.top == parts[at].top:
                fix = f"{part.top}: put {ours} {'behind' if key == PROLOG else 'in front of'} it"
            else:
                fix = f"rename it: mv {part.top} {where}/50-{re.sub(r'^[0-9z]+[-_]', '', name)}"
            order = "after the prolog" if key == PROLOG else "before the epilog"
            yield warning(f"{part.path} runs {order} of slurm-mps, and has {found!r}", fix)


@check(
    "other-scripts",
    "no other script sets compute modes, or starts or ends MPS",
    why="slurm-mps puts back the compute mode that it found, and its control daemon needs the GPU for itself.",
    where=COMPUTE,
)
def other_scripts(facts: Facts) -> Iterator[Finding]:
    for script in (*facts.parts[PROLOG], *facts.parts[EPILOG]):
        sets, runs = _first(_SETS_MODE, script), _first(_RUNS_MPS, script)
        if sets and not script.is_ours:
            yield warning(f"{script.path} has {sets!r}", "leave the compute mode to slurm-mps, or set it at boot")
        if runs and not script.is_ours:
            yield warning(f"{script.path} runs {runs}", f"take it out of {os.path.dirname(script.path)}")


@check(
    "task-prolog",
    "TaskProlog leaves the variables of MPS and CUDA_VISIBLE_DEVICES alone",
    why="TaskProlog runs after the plugin, and its values win: a task joins another control daemon, or gets another "
    "GPU. With gpus.compute_mode = unchanged the task runs without MPS, and no message says so.",
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
    why="A script that slurmd cannot run counts as one that failed. The node drains at its next job.",
    where=COMPUTE,
)
def scripts_executable(facts: Facts) -> Iterator[Finding]:
    called = [script for script in facts.our_hooks if script.path != script.top]
    for script in (*facts.tops, *called):
        if not script.is_executable:
            yield problem(f"{script.path} is not executable", f"chmod 755 {script.path}, or take it away")


@check(
    "hooks-python",
    "the hooks' Python runs, imports this slurm-mps, and can check mps.toml",
    why="A hook that cannot start fails for each job that asks for MPS, and so does a prolog that cannot check a "
    "changed mps.toml: the node drains. Commands of another version may not understand what the hooks write.",
    where=COMPUTE,
)
def hooks_python(facts: Facts) -> Iterator[Finding]:
    for script in facts.our_hooks:
        for key in ("python", "package"):
            path = script.values.get(key, "")
            if not os.path.exists(f"{path}/hook.py" if key == "package" else path):
                what = f"{script.path}: {key}={path} is not there"
                yield problem(what, "slurm-mps install, of the slurm-mps that is there")
                return
    try:
        version, _ = facts.hook_versions
    except NodeError as error:
        yield problem(f"{facts.hook_values()['python']}: {error}", "install Python 3.11 or newer and slurm-mps again")
        return
    if version != __version__:
        what = f"the hooks run slurm-mps {version}, and this command is of {__version__}"
        yield problem(what, "slurm-mps install, of the one that is to stay")
    python, wrong = facts.hook_values()["python"], facts.compiler
    if wrong:
        lacks = "'jsonschema>=4.10'" if "jsonschema" in wrong else "slurm-mps"
        yield problem(f"{python} -m slurm_mps.config.file: {wrong}", f"{python} -m pip install {lacks}")
    yield fine(f"slurm-mps {version}")


@check(
    "python-for-users",
    "a job's user can run the hooks' Python",
    why="The plugin runs a program of slurm-mps as the job's user, and users run slurm-mps verify.",
    where=COMPUTE,
)
def python_for_users(facts: Facts) -> Iterator[Finding]:
    values = facts.hook_values()
    for path in (values["python"], f"{values['package']}/hook.py"):
        closed = hidden_from_users(path)
        if closed:
            prefix = os.path.dirname(os.path.dirname(values["python"]))
            yield problem(f"users cannot reach {path}: {closed} is closed to them", way_in(closed, prefix))
