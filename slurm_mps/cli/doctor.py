"""``slurm-mps doctor``: checks this host for whatever keeps jobs from MPS."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..units import printable
from .output import Column, Exit, add_table_options, chosen, complain, console, print_json, print_table, refuse

if TYPE_CHECKING:
    from ..doctor.finding import Check, Finding

_TEXT_MAX = 600
_MANY = 5  # checks that were left out for one reason, which may be a mistake
COLUMNS = (
    Column("check", "CHECK"),
    Column("severity", "SEVERITY"),
    Column("what", "WHAT", longest=_TEXT_MAX),
    Column("why", "WHY", hidden=True, longest=_TEXT_MAX),
    Column("fix", "FIX", longest=_TEXT_MAX),
)
#: Of --list.
LIST_COLUMNS = (Column("check", "CHECK"), Column("question", "QUESTION"), Column("where", "WHERE"))
_STYLES = {"problem": "red", "warning": "yellow", "not checked": "dim"}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "doctor",
        help="what this host allows, and what is wrong with it",
        description="Checks this host's Slurm files, plugin, prolog, epilog, driver and GPUs: a login node's, a "
        "compute node's or the controller's. Each finding says what is wrong, why it matters and what fixes it. The "
        "command changes no file; root sees more than a user. Exit status: 0 fine, 1 a problem was found (with "
        "--strict also a warning), 2 usage, 3 nothing to look at: there is no Slurm here, or the checks that were "
        "named are for other hosts, 4 the same, and root could look.",
    )
    parser.add_argument("checks", nargs="*", metavar="CHECK", help="only these checks (default: all)")
    parser.add_argument(
        "--list",
        action="store_true",
        help=f"list the checks and what each asks; -o then takes {','.join(column.name for column in LIST_COLUMNS)}",
    )
    parser.add_argument("--explain", action="store_true", help="print what the manual says of these checks")
    parser.add_argument("--strict", action="store_true", help="take warnings for problems")
    parser.add_argument("-v", "--verbose", action="store_true", help="show also what is fine, and what was not checked")
    add_table_options(parser, COLUMNS, "doctor/1")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Examine this host and print what was found. Returns the exit status."""
    from ..doctor.examine import all_checks, examine, explain

    checks = all_checks()
    if options.list:
        return _print_checks(checks, options)
    unknown = [check for check in options.checks if check not in checks]
    if unknown:
        return refuse(options, Exit.USAGE, f"there is no check {printable(unknown[0])!r}; see slurm-mps doctor --list")
    if options.explain:
        if not options.checks or options.json:
            return refuse(options, Exit.USAGE, "--explain takes the name of a check, and no --json")
        print("\n\n".join(map(explain, options.checks)))
        return Exit.FINE
    columns = chosen(COLUMNS, options)
    findings = examine(os.environ, options.checks)
    status = _status(findings, strict=options.strict)
    if options.json:
        print_json(options, status, root=os.geteuid() == 0, findings=[vars(one) for one in findings])
    elif options.format or options.noheader:
        _print_rows(findings, columns, options)
    else:
        print_findings(findings, verbose=options.verbose or bool(options.checks))
    sys.stdout.flush()
    return status


def _status(findings: Sequence[Finding], *, strict: bool) -> int:
    bad = {"problem", "warning"} if strict else {"problem"}
    if any(one.severity in bad for one in findings):
        return Exit.PROBLEM
    no_slurm = any(one.check == "slurm-conf" and one.severity == "not checked" for one in findings)
    if no_slurm or all(one.severity == "not checked" for one in findings):
        return Exit.NOT_ROOT if any(one.needs_root for one in findings) else Exit.NOT_HERE
    return Exit.FINE


def _print_checks(checks: Mapping[str, Check], options: argparse.Namespace) -> int:
    options.report = "doctor-checks/1"
    columns = chosen(LIST_COLUMNS, options)
    rows = [{"check": one.id, "question": one.question, "where": one.where} for one in checks.values()]
    if options.json:
        print_json(options, Exit.FINE, checks=rows)
    else:
        print_table(rows, columns, noheader=options.noheader)
    return Exit.FINE


def _shown(findings: Sequence[Finding], *, verbose: bool) -> list[Finding]:
    return [one for one in findings if verbose or one.fix]


def _print_rows(findings: Sequence[Finding], columns: Sequence[Column], options: argparse.Namespace) -> None:
    rows = [{**vars(one), "style": _STYLES.get(one.severity, "")} for one in _shown(findings, verbose=options.verbose)]
    print_table(rows, columns, noheader=options.noheader)


def print_findings(findings: Sequence[Finding], *, verbose: bool = False) -> None:
    """Print a paragraph for each finding (the fact, its consequence, the fix, where to read on), then the counts."""
    out = console()
    for one in _shown(findings, verbose=verbose):
        head = f"{one.severity}: {one.check}: {printable(one.what, _TEXT_MAX)}"
        out.print(head, style=_STYLES.get(one.severity), soft_wrap=True)
        if one.why:
            print(f"    why: {one.why}")
        if one.fix:
            print(f"    fix: {printable(one.fix, _TEXT_MAX)}\n    see: slurm-mps doctor --explain {one.check}")
    counts = {severity: len({one.check for one in findings if one.severity == severity}) for severity in _SEVERITIES}
    total = len({one.check for one in findings})
    words = [f"{count} {_SEVERITIES[severity][count != 1]}" for severity, count in counts.items() if count]
    print(f"{total} check{'s' * (total != 1)}: {', '.join(words)}")
    left_out = [one for one in findings if one.severity == "not checked"]
    for reason, count in Counter(one.what for one in left_out).items():
        if count >= _MANY:
            print(f"{count} checks left out: {reason}")
    if any(one.needs_root for one in left_out):
        complain(f"root sees more: {', '.join(sorted({one.check for one in left_out if one.needs_root}))}")


_SEVERITIES = {
    "problem": ("problem", "problems"),
    "warning": ("warning", "warnings"),
    "fine": ("fine", "fine"),
    "not checked": ("not checked here", "not checked here"),
}
