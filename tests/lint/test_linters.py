"""Linters as tests. A missing tool is an error here: `make test` installs them all."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def git_files(*patterns: str) -> list[str]:
    listed = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-co", "--exclude-standard", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listed.stdout.split() if (ROOT / name).exists()]


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "ruff", "check", "--no-cache", "."],
        [sys.executable, "-m", "ruff", "format", "--no-cache", "--check", "."],
        [sys.executable, "-m", "mypy"],
        ["shellcheck", *git_files("*.sh")],
        ["make", "--no-print-directory", "-C", "spank", "check"],
        ["make", "--no-print-directory", "-C", "tests/fakes", "check"],
    ],
    ids=["ruff", "format", "mypy", "shellcheck", "spank", "fakes"],
)
def test_linter_has_nothing_to_say(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


def test_hooks_are_posix_sh_and_short() -> None:
    """Slurm runs them with whatever /bin/sh is; what they decide belongs into Python."""
    for name in ("prolog/10-slurm-mps.sh", "epilog/95-slurm-mps.sh"):
        text = (ROOT / name).read_text()
        assert text.startswith("#!/bin/sh\n")
        assert len(text.splitlines()) <= 10
        subprocess.run(["shellcheck", "--shell=sh", ROOT / name], check=True)


PRIVILEGED = [
    name
    for name in git_files("slurm_mps/*.py", "slurm_mps/node/*.py")
    if not name.endswith("/cuda.py") and "/verify/" not in name
]
EFFECTS = {
    *("open", "mkdir", "makedirs", "unlink", "remove", "rmdir", "rename", "replace", "truncate", "link", "symlink"),
    *("chmod", "fchmod", "chown", "lchown", "fchown", "setxattr", "mkfifo", "mknod", "removedirs", "renames"),
    *("system", "popen", "kill", "killpg", "posix_spawn", "posix_spawnp", "execv", "execve", "fork"),
}
DOORS = {
    "slurm_mps/node/files.py": {"open", "mkdir", "unlink", "rmdir", "rename", "setxattr", "fchmod"},
    "slurm_mps/node/processes.py": {"posix_spawn", "killpg"},
}
NEVER_IMPORTED = {"subprocess", "shutil", "tempfile", "pathlib", "glob", "pickle", "socket", "multiprocessing"}


def effects(tree: ast.AST) -> set[str]:
    """The names of os functions that change something, called anywhere in the code."""
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    names = {
        f.attr for f in calls if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name) and f.value.id == "os"
    }
    return names & EFFECTS


def imports(tree: ast.AST) -> set[str]:
    """The top-level names of all imported modules."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("name", PRIVILEGED)
def test_effects_go_through_one_door(name: str) -> None:
    """Files are changed in node/files.py alone, processes started and ended in node/processes.py alone."""
    tree = ast.parse((ROOT / name).read_text())
    assert effects(tree) <= DOORS.get(name, set())
    allowed = {"socket"} if name == "slurm_mps/node/messages.py" else set()
    assert imports(tree) & NEVER_IMPORTED <= allowed


def test_the_lint_sees_an_effect() -> None:
    bad = ast.parse("import os, shutil\ndef f():\n    os.chmod('/x', 0o777)\n    import pickle")
    assert effects(bad) == {"chmod"}
    assert imports(bad) & NEVER_IMPORTED == {"shutil", "pickle"}
