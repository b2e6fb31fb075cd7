"""The rooms of slurm_mps, and the one rule of who may import whom (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.lint.test_privileged import runtime_nodes

PACKAGE = Path(__file__).parents[2] / "slurm_mps"
GROUND = ("errors", "units", "record")
COMMANDS = ("doctor", "install", "verify", "status", "job_log", "metrics")
#: What each room may import beside the ground and itself; `hook` is the entry of prolog and epilog.
MAY_IMPORT = {
    "node": (),
    "slurm": ("node",),
    "config": ("node",),
    "job": ("slurm", "config", "node"),
    "task": ("node", "job_log", "job.verdict", "job.verdict_file"),
    **dict.fromkeys(COMMANDS, (*COMMANDS, "job", "slurm", "config", "node")),
    "cli": (*COMMANDS, "job", "slurm", "config", "node"),
    "hook": ("job", "node"),
}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py" and "share" not in path.relative_to(PACKAGE).parts
}


def imports(module: str) -> set[str]:
    """The modules of ours that a module imports when it runs, by their names below slurm_mps."""
    parents = module.split(".")[:-1]
    found = set()
    for node in runtime_nodes(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            above = parents[: len(parents) - node.level + 1] if node.level else []
            base = [*above, *(node.module or "").split(".")] if node.module else above
            base = base[1:] if base[:1] == ["slurm_mps"] else base
            names = {".".join([*base, alias.name]) for alias in node.names} | {".".join(base)}
            found |= names & MODULES.keys()
    return found - {module}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_room_imports_only_what_is_below_it(module: str) -> None:
    room = module.partition(".")[0]
    allowed = (*GROUND, *(() if room in GROUND else (room, *MAY_IMPORT[room])))
    wrong = {one for one in imports(module) if not any(f"{one}.".startswith(f"{name}.") for name in allowed)}
    assert wrong == set()


def test_no_import_goes_in_a_circle() -> None:
    TopologicalSorter({module: imports(module) for module in MODULES}).prepare()


def test_few_modules_lie_outside_the_rooms() -> None:
    assert sorted(module for module in MODULES if "." not in module) == sorted([*GROUND, "hook"])
