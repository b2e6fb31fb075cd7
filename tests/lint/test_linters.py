"""Linters as tests. A missing tool is an error here: `make test` installs them all."""

from __future__ import annotations

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


LINTERS = {
    "spank": ["make", "--no-print-directory", "-C", "spank", "check"],
    "simulator": ["make", "--no-print-directory", "-C", "tests/simulator", "check"],
    "mypy": [sys.executable, "-m", "mypy"],
    "ruff": [sys.executable, "-m", "ruff", "check", "--no-cache", "."],
    "format": [sys.executable, "-m", "ruff", "format", "--no-cache", "--check", "."],
    "shellcheck": ["shellcheck", *git_files("*.sh", "packaging/scripts/*", "slurm_mps/cli/slurm-mps")],
}


@pytest.mark.parametrize("name", LINTERS)
def test_linter_has_nothing_to_say(name: str) -> None:
    done = subprocess.run(LINTERS[name], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


def test_hooks_are_posix_sh_and_short() -> None:
    """Slurm runs them with whatever /bin/sh is; what they decide belongs into Python."""
    for name in ("prolog/10-slurm-mps.sh", "epilog/95-slurm-mps.sh"):
        text = (ROOT / name).read_text()
        assert text.startswith("#!/bin/sh\n")
        assert len(text.splitlines()) <= 22
        subprocess.run(["shellcheck", "--shell=sh", ROOT / name], check=True)
