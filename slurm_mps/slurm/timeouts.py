"""Whether Slurm gives prolog and epilog the time that their own deadlines allow them. Pure.

Seen on Slurm 22.05, 24.11 and 26.05 (docs/observations.md): a script that outlives its timeout gets SIGTERM and then
SIGKILL with its process group, whatever it was about to say or to undo, and the node is drained as "Prolog error".
The time counts for each script by itself. A prolog that outlives MessageTimeout less 2 s costs nothing, but users of
newer releases read that it hung.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

_UNLIMITED = 65534  # how Slurm shows a timeout that is not set (INFINITE16)
_START_SECONDS = 1.0  # between Slurm's clock and ours: fork, sh, Python
_HUNG_SECONDS = 2.0  # before MessageTimeout, slurmd says that the prolog hung
_SECTION = "[deadlines] of mps.toml"


@dataclass(frozen=True)
class DeadlineProblem:
    """``what`` is wrong, ``why`` it matters, and the line to ``change``. ``serious``: a node may be drained by it."""

    what: str
    why: str
    change: str
    serious: bool


def _seconds(config: Mapping[str, str], *names: str) -> tuple[str, float] | None:
    """The first of these settings that Slurm shows, and its value; None where it shows none or no number."""
    for name in names:
        found = re.match(r"\s*(\d+)(?:\s|$)", config.get(name, ""))
        if found:
            return name, float(found[1])
    return None


def _killed(hook: str, own_seconds: float, timeout: tuple[str, float] | None) -> DeadlineProblem | None:
    name, seconds = timeout or ("", _UNLIMITED)
    if seconds in (0, _UNLIMITED) or own_seconds + _START_SECONDS <= seconds:
        return None
    left = "what it had not put back stays as it is" if hook == "epilog" else "what it had done is not undone"
    return DeadlineProblem(
        f"{name} is {seconds:g} s, and the {hook} of slurm-mps may take {own_seconds:g} s",
        f"Slurm kills it before it can say what is slow: {left}, and the node is drained",
        f"{name}={math.ceil(own_seconds + _START_SECONDS)} or more in slurm.conf, or a lower {hook} in {_SECTION}",
        serious=True,
    )


def _hung(own_seconds: float, timeout: tuple[str, float] | None) -> DeadlineProblem | None:
    name, seconds = timeout or ("", _UNLIMITED)
    if own_seconds <= seconds - _HUNG_SECONDS:
        return None
    return DeadlineProblem(
        f"{name} is {seconds:g} s, and the prolog of slurm-mps may take {own_seconds:g} s",
        f'{_HUNG_SECONDS:g} s before that Slurm may tell the user "Prolog hung on node …", though it has not',
        f"{name}={math.ceil(own_seconds + _HUNG_SECONDS)} or more in slurm.conf, or a lower prolog in {_SECTION}",
        serious=False,
    )


def check_deadlines(config: Mapping[str, str], prolog_seconds: float, epilog_seconds: float) -> list[DeadlineProblem]:
    """Compare Slurm's timeouts with the deadlines of our own hooks (SiteConfig.deadlines_prolog, _epilog).

    `config` is what ``scontrol show config`` prints, name to value, such as ``"MessageTimeout": "10 sec"``. From 25.05
    on there is PrologTimeout and EpilogTimeout; Slurm shows them in the place of PrologEpilogTimeout when one is set.
    """
    problems = (
        _killed("prolog", prolog_seconds, _seconds(config, "PrologTimeout", "PrologEpilogTimeout")),
        _killed("epilog", epilog_seconds, _seconds(config, "EpilogTimeout", "PrologEpilogTimeout")),
        _hung(prolog_seconds, _seconds(config, "MessageTimeout")),
    )
    return [problem for problem in problems if problem]
