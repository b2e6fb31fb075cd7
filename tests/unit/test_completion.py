"""Completion as a shell does it: the script is read by a real bash, and bash is asked what would follow."""

from __future__ import annotations

import subprocess
import sys

import pytest

from slurm_mps.cli.completion import SHELLS
from slurm_mps.cli.main import build_parser, command_names

COMMAND = [sys.executable, "-m", "slurm_mps.cli.main", "completion"]
#: What bash does at a tab: the words so far in COMP_WORDS, the function that `complete` was given, its COMPREPLY.
ASK = """
eval "$("$@")"
set -- $(complete -p slurm-mps)
while [ "$1" != -F ]; do shift; done
IFS=' ' read -ra COMP_WORDS <<<"$LINE"
[ "${LINE% }" = "$LINE" ] || COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
COMP_LINE=$LINE COMP_POINT=${#LINE}
"$2"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def completed(line: str) -> set[str]:
    done = subprocess.run(
        ["bash", "--norc", "-c", ASK, "bash", *COMMAND, "bash"],
        env={"LINE": line, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stderr == ""
    return set(done.stdout.split())


def test_bash_completes_every_command() -> None:
    assert completed("slurm-mps ") >= set(command_names(build_parser()))
    assert completed("slurm-mps unin") == {"uninstall"}
    assert completed("slurm-mps config ch") == {"check"}


def test_bash_completes_options_and_values() -> None:
    assert completed("slurm-mps install --slurm-") == {"--slurm-conf", "--slurm-include"}
    assert completed("slurm-mps uninstall --f") == {"--force"}
    assert completed("slurm-mps completion f") == {"fish"}
    assert completed("slurm-mps install --plugin /etc/hostn") == {"/etc/hostname"}


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shells_script_names_every_command(shell: str) -> None:
    """Those of other shells than bash are shtab's word; that they name what the parser has is ours."""
    script = subprocess.run([*COMMAND, shell], capture_output=True, text=True, timeout=30, check=True).stdout
    assert all(name in script for name in command_names(build_parser()))
