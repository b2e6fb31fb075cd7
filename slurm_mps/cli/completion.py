"""``slurm-mps completion``: what a shell needs to complete commands and options, made from the parser by shtab."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from .output import Exit, refuse

SHELLS = ("bash", "zsh", "fish", "tcsh")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser], whole: argparse.ArgumentParser) -> None:
    """Register the command; `whole` is the parser that it completes."""
    parser = commands.add_parser(
        "completion",
        help="print a script that completes commands and options in a shell",
        description="Prints the script; the packages install it. For a shell that runs now: "
        'eval "$(slurm-mps completion bash)"; for all of them: slurm-mps completion bash '
        "> /etc/bash_completion.d/slurm-mps. Exit status: 0 fine, 2 usage.",
    )
    parser.add_argument("shell", nargs="?", choices=SHELLS, help="for which shell")
    parser.set_defaults(run=run, whole=whole)


def run(options: argparse.Namespace) -> int:
    if options.shell is None:
        return refuse(
            options, Exit.USAGE, f"which shell? slurm-mps completion {', '.join(SHELLS[:-1])} or {SHELLS[-1]}"
        )
    import shtab

    from ..doctor.examine import all_checks

    parser = options.whole
    _tell_values(parser, {"FILE": shtab.FILE, "DIR": shtab.DIRECTORY}, {"CHECK": list(all_checks())})
    script: str = shtab.complete(parser, options.shell)
    if options.shell == "zsh":  # shtab 1.7 has one value only completed where there may be several; `*:` is zsh's word
        script = script.replace('"(*)::', '"*:')
    print(script)
    return Exit.FINE


def _tell_values(parser: argparse.ArgumentParser, kinds: Mapping[str, object], words: Mapping[str, list[str]]) -> None:
    """What a value's word in the help calls a file or a directory is completed as one, and what has `words` by them.

    The parser itself does without these, for to know them costs the other commands time.
    """
    for action in parser._actions:  # noqa: SLF001 - argparse has no other way to walk a parser; shtab does it, too
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            helps = {choice.dest: choice.help for choice in action._choices_actions}  # noqa: SLF001 - as above
            for name, one in action.choices.items():
                one.description = helps.get(name)  # one line, where its page has a paragraph
                _tell_values(one, kinds, words)
        elif action.metavar in words:
            action.choices = words[str(action.metavar)]
        elif action.metavar in kinds or action.dest == "file":
            action.complete = kinds.get(str(action.metavar), kinds["FILE"])  # type: ignore[attr-defined]
