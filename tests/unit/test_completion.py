"""Completion as a shell does it: a real bash, fish and zsh read the script and are asked what would follow."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from slurm_mps.cli.completion import SHELLS
from slurm_mps.cli.main import build_parser
from slurm_mps.doctor.examine import all_checks
from tests.harness.reports import command_names

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

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


#: The same of fish, which answers such a question itself.
ASK_FISH = """
complete -C "$LINE" | string replace --regex '\\t.*' ''
true
"""
#: zsh completes where there is a terminal only: one that zsh itself makes, in which what it adds is written down.
ASK_ZSH = """
zmodload zsh/zpty
zpty asked zsh -d -i
zpty -r -m asked said '*@@ready*'
zpty -w -n asked "$LINE"$'\\t'
while zpty -r asked said; do :; done
"""
ZSHRC = """
PROMPT= RPROMPT=
autoload -U compinit
compinit -u -D
eval "$(<$ZDOTDIR/script)"
compadd() {
	if [[ ${@[1,(i)(-|--)]} == *-(O|A|D)\\ * ]]; then builtin compadd "$@"; return; fi
	local -a found
	builtin compadd -O found "$@"
	print -rl -- $found >>$ZDOTDIR/answer
	builtin compadd "$@"
}
ended() { exit }
comppostfuncs=(ended)
bindkey '^I' complete-word
precmd() { print -r -- @@ready }
"""


def run(argv: list[str], **env: str) -> str:
    given = {"PATH": "/usr/bin:/bin", **env}
    done = subprocess.run(argv, env=given, capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(params=["bash", "fish", "zsh"])
def completed(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], set[str]]:
    """What a real shell makes of a line and a tab."""
    shell: str = request.param

    def complete(line: str) -> set[str]:
        if shell == "bash":
            return set(run(["bash", "--norc", "-c", ASK, "bash", *COMMAND, shell], LINE=line).split())
        (tmp_path / "script").write_text(run([*COMMAND, shell]))
        if shell == "fish":
            ask = f"source {tmp_path}/script; {ASK_FISH}"
            return set(run(["fish", "--no-config", "-c", ask], LINE=line, HOME=str(tmp_path)).split())
        (tmp_path / ".zshrc").write_text(ZSHRC)
        (tmp_path / "answer").write_text("")
        run(["zsh", "-f", "-c", ASK_ZSH], LINE=line, ZDOTDIR=str(tmp_path), TERM="dumb")
        return set((tmp_path / "answer").read_text().split())

    return complete


def test_commands_are_completed(completed: Callable[[str], set[str]]) -> None:
    assert completed("slurm-mps ") >= set(command_names(build_parser()))
    assert completed("slurm-mps unin") == {"uninstall"}
    assert completed("slurm-mps config ch") == {"check"}


def test_options_and_values_are_completed(completed: Callable[[str], set[str]]) -> None:
    assert completed("slurm-mps install --slurm-") == {"--slurm-conf", "--slurm-include"}
    assert completed("slurm-mps uninstall --f") == {"--force"}
    assert completed("slurm-mps completion f") == {"fish"}
    assert {name.rpartition("/")[2] for name in completed("slurm-mps install --plugin /etc/hostn")} == {"hostname"}


def test_checks_of_doctor_are_completed_each_of_several(completed: Callable[[str], set[str]]) -> None:
    gres = {check for check in all_checks() if check.startswith("gres-")}
    assert len(gres) > 3
    assert completed("slurm-mps doctor gres-") == gres
    assert completed("slurm-mps doctor mig gres-") == gres


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shells_script_names_every_command(shell: str) -> None:
    """That of tcsh, which is asked no more than this, too."""
    script = subprocess.run([*COMMAND, shell], capture_output=True, text=True, timeout=30, check=True).stdout
    assert all(name in script for name in command_names(build_parser()))
