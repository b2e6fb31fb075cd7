"""docs/security.md, the table of walls and the tests say the same."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

from tests.attacks.weakened import WALLS, WIDENED, changes
from tests.harness.cluster import REPOSITORY

PAGE = (REPOSITORY / "docs/security.md").read_text()
PLACES = ("", "slurm_mps", "spank")
FILES = [path for path in (REPOSITORY / "tests").rglob("test_*.py") if path != Path(__file__)]


@cache
def functions_of(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def attacks() -> dict[str, set[str]]:
    """The walls that each test takes down."""
    found: dict[str, set[str]] = {}
    for path in FILES:
        for node in functions_of(path):
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "attack":
                    found[node.name] = {str(value.value) for value in ast.walk(mark) if isinstance(value, ast.Constant)}
    return found


def test_every_wall_can_be_taken_down() -> None:
    """Each change finds its lines in the sources as they are."""
    for file, of_file in changes(list(WALLS)).items():
        text = (REPOSITORY / file).read_text()
        assert [change.old for change in of_file if text.count(change.old) != 1] == [], file


def test_every_wall_is_attacked() -> None:
    used = set().union(*attacks().values())
    assert used | WIDENED == WALLS.keys()


def test_every_attack_and_its_walls_stand_on_the_page() -> None:
    for name, walls in attacks().items():
        rows = [line for line in PAGE.splitlines() if f"`{name}`" in line]
        assert rows, name
        assert all(any(wall in row for row in rows) for wall in walls), (name, walls)


def test_every_test_and_every_place_on_the_page_exists() -> None:
    """A table that names what is gone protects nobody."""
    functions = {node.name for path in FILES for node in functions_of(path)}
    assert set(re.findall(r"`(test_[a-z0-9_]+)`", PAGE)) <= functions
    for name, what in re.findall(r"`([a-z_/]+\.(?:py|c|sh|lua)):?([A-Za-z_.]*)(?:\(\))?`", PAGE):
        (path,) = [found for place in PLACES if (found := REPOSITORY / place / name).is_file()]
        assert what.rpartition(".")[2] in path.read_text(), (name, what)
