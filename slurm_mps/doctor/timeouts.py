"""Whether Slurm gives prolog and epilog the time that their own deadlines allow them. Pure.

Seen on Slurm 22.05, 24.11 and 26.05 (docs/observations.md): a script that outlives its timeout gets SIGTERM and then
SIGKILL with its process group, whatever it was about to say or to undo, and the node is drained as "Prolog error".
The time counts for each script by itself. A prolog that outlives MessageTimeout less 2 s costs nothing, but users of
newer releases read that it hung.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import ceil, inf

from .finding import Finding, problem, warning

_UNLIMITED = ("0", "65534")  # the latter is how Slurm shows a timeout that is not set (INFINITE16)
_START_SECONDS = 1.0  # between Slurm's clock and ours: fork, sh, Python
_HUNG_SECONDS = 2.0  # before MessageTimeout, slurmd says that the prolog hung
_OR = "or more in slurm.conf, or a lower"


def _seconds(config: Mapping[str, str], *names: str) -> tuple[str, float]:
    """The first of these settings that Slurm shows, and its value; infinity where it shows no number, or no limit."""
    for name in names:
        found = re.match(r"\s*(\d+)(?:\s|$)", config.get(name, ""))
        if found:
            return name, inf if found[1] in _UNLIMITED else float(found[1])
    return "", inf


def check_deadlines(config: Mapping[str, str], prolog_seconds: float, epilog_seconds: float) -> Iterator[Finding]:
    """Compare Slurm's timeouts with the deadlines of our own hooks (SiteConfig.deadlines_prolog, _epilog).

    `config` is what ``scontrol show config`` prints, name to value, such as ``"MessageTimeout": "10 sec"``. From 25.05
    on there is PrologTimeout and EpilogTimeout; Slurm shows them in the place of PrologEpilogTimeout when one is set.
    """
    own = (
        ("prolog", prolog_seconds, "what it had done is not undone"),
        ("epilog", epilog_seconds, "what it had not put back stays as it is"),
    )
    for hook, wanted, left in own:
        name, seconds = _seconds(config, f"{hook.title()}Timeout", "PrologEpilogTimeout")
        if seconds < wanted + _START_SECONDS:
            yield problem(
                f"{name} is {seconds:g} s, and the {hook} of slurm-mps may take {wanted:g} s",
                f"{name}={ceil(wanted + _START_SECONDS)} {_OR} {hook} in [deadlines] of mps.toml",
                f"Slurm kills it before it can say what is slow: {left}, and the node is drained",
            )
    name, seconds = _seconds(config, "MessageTimeout")
    if seconds < prolog_seconds + _HUNG_SECONDS:
        yield warning(
            f"{name} is {seconds:g} s, and the prolog of slurm-mps may take {prolog_seconds:g} s",
            f"{name}={ceil(prolog_seconds + _HUNG_SECONDS)} {_OR} prolog in [deadlines] of mps.toml",
            f'{_HUNG_SECONDS:g} s before that Slurm may tell the user "Prolog hung on node …", though it has not',
        )
