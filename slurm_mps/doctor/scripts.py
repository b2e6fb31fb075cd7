"""Checks of prolog and epilog: that slurmd runs ours, in which order with others, and with what."""

from __future__ import annotations

import os
import re

from .. import __version__
from ..errors import MpsError
from .finding import COMPUTE, NotCheckedError, check, fine, problem, warning
from .paths import closed_to_users, others_can_write

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from .finding import Said
    from .place import Place, Script

_COMMENT = re.compile(r"^\s*#.*$", re.MULTILINE)
_KILLS = re.compile(
    r"(?<![\w-])(kill|pkill|killall|skill|fuser)\s+(?!-0\b|-l\b)|nvidia-smi\b[^\n|;]*(\s-r\b|--gpu-reset)"
)
_SETS_MODE = re.compile(r"nvidia-smi\b[^\n|;]*(\s-c[\s=\d]|--compute-mode|\s-mig\b|--multi-instance-gpu)")
_RUNS_MPS = re.compile(r"(?<!grep )(?<!pidof )nvidia-cuda-mps-(control|server)\b")


def _code(script: Script) -> str:
    """What a script does, without its comments."""
    return _COMMENT.sub("", script.text or "")


def _unreadable(scripts: list[Script]) -> bool:
    return any(script.text is None for script in scripts)


def _wired(place: Place, key: str, scripts: list[Script]) -> Iterator[Said]:
    patterns = [pattern for _, pattern in place.values(key)]
    beside = f"{place.conf_directory}/{key.lower()}.d"
    line = f"{place.where(key)}: {key}={beside}/*"
    if not patterns:
        lies = any(f"/{key.lower()}.d/" in script.path for script in place.our_hooks)
        yield problem(f"{key} is not set", line if lies or not place.is_compute else f"slurm-mps install, and {line}")
    elif not place.is_compute:
        yield fine(f"{key}={','.join(patterns)}")
    elif not any(script.calls_ours for script in scripts):
        if _unreadable(scripts):
            raise NotCheckedError(f"a script of {key} can be read by root only", needs_root=True)
        told = f"{key}={','.join(patterns)} runs no script of slurm-mps"
        there = [path for script in place.our_hooks if f"/{key.lower()}.d/" in (path := script.path)]
        yield problem(
            told, line if there else f"slurm-mps install, which puts our {key.lower()} where {patterns[0]} finds it"
        )


@check(
    "prolog-wired",
    "slurmd runs slurm-mps' prolog",
    why="Jobs that ask for MPS fail: no prolog set it up.",
)
def prolog_wired(place: Place) -> Iterator[Said]:
    yield from _wired(place, "Prolog", place.prologs)


@check(
    "epilog-wired",
    "slurmd runs slurm-mps' epilog",
    why="Control daemons outlive their jobs, and GPUs stay EXCLUSIVE_PROCESS.",
)
def epilog_wired(place: Place) -> Iterator[Said]:
    yield from _wired(place, "Epilog", place.epilogs)


def _ours_and_others(scripts: list[Script]) -> tuple[list[Script], list[Script]]:
    """Who runs before our script and who after it; nobody where it is not among them."""
    at = next((number for number, script in enumerate(scripts) if script.calls_ours), None)
    return ([], []) if at is None else (scripts[:at], scripts[at + 1 :])


@check(
    "prolog-order",
    "no script that runs after slurm-mps' prolog undoes what it did",
    why="Slurm runs the scripts of a pattern in reverse order of their names: what follows meets the job's own daemon.",
    where=COMPUTE,
)
def prolog_order(place: Place) -> Iterator[Said]:
    for script in _ours_and_others(place.prologs)[1]:
        found = _KILLS.search(_code(script)) or _SETS_MODE.search(_code(script))
        if found:
            yield warning(
                f"{script.path} runs after slurm-mps' prolog, and has {found[0].strip()!r}",
                f"give it a name that sorts behind slurm-mps' prolog: mv {script.path} "
                f"{os.path.dirname(script.path)}/50-{_bare(script.path)}",
            )


@check(
    "epilog-order",
    "no script that runs before slurm-mps' epilog kills its processes",
    why="A clean-up such as DeepOps' 50-exclusive-gpu takes the job's control daemon for a leftover; Slurm runs the "
    "scripts of a pattern in reverse order of their names.",
    where=COMPUTE,
)
def epilog_order(place: Place) -> Iterator[Said]:
    for script in _ours_and_others(place.epilogs)[0]:
        found = _KILLS.search(_code(script))
        if found:
            yield warning(
                f"{script.path} runs before slurm-mps' epilog, and has {found[0].strip()!r}",
                f"give it a name that sorts in front of slurm-mps' epilog: mv {script.path} "
                f"{os.path.dirname(script.path)}/50-{_bare(script.path)}",
            )


def _bare(path: str) -> str:
    return re.sub(r"^[\dz]+[-_]", "", os.path.basename(path))


def _other_scripts(place: Place) -> list[Script]:
    return [script for script in (*place.prologs, *place.epilogs) if not script.calls_ours]


@check(
    "other-mode-setter",
    "no other script sets compute modes",
    why="slurm-mps puts back the mode that it found; two that change it undo one another.",
    where=COMPUTE,
)
def other_mode_setter(place: Place) -> Iterator[Said]:
    for script in _other_scripts(place):
        found = _SETS_MODE.search(_code(script))
        if found:
            yield warning(
                f"{script.path} has {found[0].strip()!r}", "leave the compute mode to slurm-mps, or set it at boot"
            )


@check(
    "other-mps-script",
    "no other script starts or ends MPS",
    why="Two control daemons cannot have one GPU in EXCLUSIVE_PROCESS; the job's servers do not start.",
    where=COMPUTE,
)
def other_mps_script(place: Place) -> Iterator[Said]:
    for script in _other_scripts(place):
        found = _RUNS_MPS.search(_code(script))
        if found:
            yield warning(f"{script.path} runs {found[0]}", f"take it out of {os.path.dirname(script.path)}")


@check(
    "scripts-executable",
    "every script that slurmd runs is executable",
    why="To slurmd a script that it cannot run is one that failed: the node drains at its next job.",
    where=COMPUTE,
)
def scripts_executable(place: Place) -> Iterator[Said]:
    for script in (*place.prologs, *place.epilogs):
        if not script.executable:
            yield problem(f"{script.path} is not executable", f"chmod 755 {script.path}, or take it away")


@check(
    "scripts-owner",
    "only root can write what slurmd runs",
    why="slurmd runs it as root: who can write it is root.",
    where=COMPUTE,
)
def scripts_owner(place: Place) -> Iterator[Said]:
    named = {
        path for script in (*place.prologs, *place.epilogs) for path in (script.path, script.values.get("package"))
    }
    pythons = {script.values.get("python") for script in place.our_hooks}
    written = {others_can_write(path) for path in named | pythons if path} - {""}
    for path in sorted(written):
        yield problem(f"{path} can be written by others than root", f"chown root: {path}; chmod go-w {path}")


@check(
    "hooks-twice",
    "slurm-mps' prolog and epilog run once",
    why="The second run costs every job its time again; of two versions one does not understand the other.",
    where=COMPUTE,
)
def hooks_twice(place: Place) -> Iterator[Said]:
    for scripts in (place.prologs, place.epilogs):
        ours = [script.path for script in scripts if script.is_ours]
        if len(ours) > 1:
            yield warning(f"slurmd runs {' and '.join(ours)}", "remove the older")


@check(
    "hooks-package",
    "the Python and the package that the hooks name are there",
    why="A hook without them fails, and its node drains, for jobs that ask for MPS.",
    where=COMPUTE,
)
def hooks_package(place: Place) -> Iterator[Said]:
    for script in place.our_hooks:
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
def hooks_python(place: Place) -> Iterator[Said]:
    try:
        yield fine(f"slurm-mps {place.hook_python()}")
    except MpsError as error:
        yield problem(f"{place.hook_values()['python']}: {error}", "install Python 3.11 or newer and the package again")


@check(
    "hooks-version",
    "the hooks run the slurm-mps that this command is of",
    why="Of two installations one is old: status, reconcile and doctor may not understand what the hooks write.",
    where=COMPUTE,
)
def hooks_version(place: Place) -> Iterator[Said]:
    try:
        version = place.hook_python()
    except MpsError:
        raise NotCheckedError("the hooks' Python does not run") from None
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
def config_compiler(place: Place) -> Iterator[Said]:
    try:
        place.hook_python()
        said = place.compiler()
    except MpsError:
        raise NotCheckedError("the hooks' Python does not run") from None
    if said:
        python = place.hook_values()["python"]
        lacks = "'jsonschema>=4.10'" if "jsonschema" in said else "slurm-mps"
        yield problem(f"{python} -m slurm_mps.config_file: {said}", f"{python} -m pip install {lacks}")


@check(
    "python-for-users",
    "a job's user can run the hooks' Python",
    why="The plugin runs a program of slurm-mps in the job's tasks, as their user; and users run slurm-mps verify.",
    where=COMPUTE,
)
def python_for_users(place: Place) -> Iterator[Said]:
    values = place.hook_values()
    for path in (values["python"], f"{values['package']}/probe.py"):
        closed = closed_to_users(path)
        if closed:
            yield problem(
                f"users cannot enter {closed} on the way to {path}", f"chmod o+x {closed}, or install elsewhere"
            )
        elif os.path.exists(path) and not os.stat(path).st_mode & 0o004:
            yield problem(f"users cannot read {path}", f"chmod o+r {path}")
