"""Exit statuses, tables for people and reports for programs, for all commands.

Promises: the answer goes to stdout and commentary to stderr. With ``--json`` stdout has exactly one JSON object,
however a command ends: ``report`` (its kind and version), ``slurm_mps``, ``status`` (the exit status), then the
answer, or ``error`` where there is none (docs/json.md). There is colour on a terminal, or where FORCE_COLOR wants it,
and none where NO_COLOR is set; a table in a pipe is as wide as it needs to be and has no decoration; text that a user
of the node chose (a program's name, say) cannot move the cursor or forge a line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NoReturn

from .. import __version__
from ..units import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_WIDEST = 100_000  # a table in a pipe is never folded


class Exit(IntEnum):
    """The exit status of a command."""

    FINE, PROBLEM, USAGE, NOT_HERE, NOT_ROOT = range(5)


@dataclass(frozen=True)
class Column:
    """One field of a table: its name for ``-o`` and its heading."""

    name: str
    heading: str
    right: bool = False  #: numbers stand right
    hidden: bool = False  #: shown only when asked for
    spare: int = 0  #: where a terminal is too narrow, the highest goes first
    longest: int = 200  #: no cell has more characters


class WrongUsageError(Exception):
    """A command line that its parser does not take; `options` are what is known of the command all the same."""

    def __init__(self, parser: argparse.ArgumentParser, options: argparse.Namespace, message: str) -> None:
        super().__init__(message)
        self.parser = parser
        self.options = options


class Parser(argparse.ArgumentParser):
    """A parser that raises for a wrong command line, so that main() prints the message."""

    def error(self, message: str) -> NoReturn:
        """Raises: WrongUsageError."""
        known = {name: self.get_default(name) for name in ("report", "is_reported_elsewhere")}
        raise WrongUsageError(self, argparse.Namespace(**known), message)


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises: SystemExit with status 2 when it is wrong; the message has been printed, with --json also as a report.
    """
    try:
        return _parse(parser, arguments)
    except WrongUsageError as error:
        if _is_reported_elsewhere(error.options):
            raise SystemExit(Exit.FINE) from None
        error.parser.print_usage(sys.stderr)
        print(f"{error.parser.prog}: error: {error}", file=sys.stderr, flush=True)
        report = getattr(error.options, "report", None)
        if report and any(len(word) > 2 and "--json".startswith(word) for word in arguments):
            _print_report(report, Exit.USAGE, {"error": str(error)})
        raise SystemExit(Exit.USAGE) from None


def _is_reported_elsewhere(options: argparse.Namespace) -> bool:
    """Whether another process has the same command line, prints what is wrong with it, and ends with the status."""
    asked = getattr(options, "is_reported_elsewhere", None)
    return bool(asked and asked())


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        message = f"unrecognized arguments: {printable(' '.join(unknown), 200)}"
        raise WrongUsageError(parser, options, message)
    return options


def seconds(least: float, most: float) -> Callable[[str], float]:
    """Make a parser of an option that takes seconds."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: expected seconds, {least:g} to {most:g}")
        return value

    return read


def add_json_option(parser: argparse.ArgumentParser, report: str) -> None:
    """``--json``; `report` is the report's kind and version, such as ``status/1``."""
    parser.add_argument("--json", action="store_true", help="print a report for programs")
    parser.set_defaults(report=report)


def add_table_options(parser: argparse.ArgumentParser, columns: Sequence[Column], report: str = "") -> None:
    """``-o`` and ``--noheader``, as Slurm's own commands have them, and ``--json`` where there is a report."""
    if report:
        add_json_option(parser, report)
    names = ",".join(column.name for column in columns)
    parser.add_argument("-o", "--format", metavar="FIELDS", help=f"which columns, in this order: {names}")
    parser.add_argument("-n", "--noheader", action="store_true", help="leave out the headings")


def chosen(columns: Sequence[Column], options: argparse.Namespace) -> list[Column]:
    """The columns that ``-o`` names, or all that are shown unless asked.

    Raises: SystemExit with status 2 and the fields there are, when it names another.
    """
    if not options.format:
        return [column for column in columns if not column.hidden]
    known = {column.name: column for column in columns}
    names = [name.strip().lower() for name in options.format.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        message = f"--format={options.format}: there is no field {unknown[0]!r}; choose from {','.join(known)}"
        raise SystemExit(refuse(options, Exit.USAGE, message))
    return [known[name] for name in names]


def console(*, fitted: bool = False) -> Console:
    """Stdout as rich knows it: of the terminal's width if `fitted`, else as wide as what is printed.

    With NO_COLOR rich would still print bold; here it means that nothing is decorated.
    """
    from rich.console import Console

    return Console(
        width=None if fitted else _WIDEST,
        color_system=None if os.environ.get("NO_COLOR") else "auto",
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=False,
    )


def make_table(
    rows: Sequence[Mapping[str, object]],
    columns: Sequence[Column],
    *,
    noheader: bool = False,
    widths: Mapping[str, int] | None = None,
) -> Table:
    """`rows` name their cells as the columns do; the key `style` holds a row's colour, if any.

    None and what is missing show as ``-``. widths: how wide the columns of these names are at least.
    """
    from rich.table import Table

    table = Table(box=None, show_header=not noheader, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(
            column.heading,
            justify="right" if column.right else "left",
            min_width=(widths or {}).get(column.name),
            no_wrap=True,
            overflow="crop",
        )
    for row in rows:
        cells = [_cell(row.get(column.name), column.longest) for column in columns]
        table.add_row(*cells, style=str(row.get("style") or "") or None)
    return table


def print_table(
    rows: Sequence[Mapping[str, object]],
    columns: Sequence[Column],
    *,
    noheader: bool = False,
    widths: Mapping[str, int] | None = None,
) -> None:
    """Print `rows` as make_table() has them, as wide as they are: a number is never cut, a terminal wraps the line."""
    table = make_table(rows, columns, noheader=noheader, widths=widths)
    out = console()
    with out.capture() as capture:
        out.print(table)
    for line in capture.get().splitlines():
        print(line.rstrip())


def fitting(rows: Sequence[Mapping[str, object]], columns: Sequence[Column], width: int) -> list[Column]:
    """The columns that fit into `width` characters. Spare columns go first, then the last ones; one always stays."""
    widths = {
        column.name: max([len(column.heading), *(len(_cell(row.get(column.name), column.longest)) for row in rows)])
        for column in columns
    }
    fits = list(columns)
    while len(fits) > 1 and sum(widths[column.name] + 2 for column in fits) - 2 > width:
        fits.remove(max(reversed(fits), key=lambda column: column.spare))
    return fits


def _cell(value: object, longest: int) -> str:
    return "-" if value is None or value == "" else printable(str(value), longest)


def print_json(options: argparse.Namespace, status: int, **fields: Any) -> None:
    """Print the command's report for programs; `status` is the exit status that it ends with."""
    _print_report(options.report, status, fields)


def _print_report(report: str, status: int, fields: Mapping[str, Any]) -> None:
    head = {"report": report, "slurm_mps": __version__, "status": status}
    print(json.dumps({**head, **fields}, indent=2), flush=True)


def refuse(options: argparse.Namespace, status: int, *messages: str) -> int:
    """Say why there is no answer: on stderr, and with --json also in a report without one. Returns the exit status."""
    if status == Exit.USAGE and _is_reported_elsewhere(options):
        return Exit.FINE
    for message in messages:
        complain(message)
    if getattr(options, "json", False):  # top and metrics have no report
        print_json(options, status, error="; ".join(messages))
    return status


def leave(status: int) -> None:
    """End at once: a thread that waits in a driver that hangs would keep an interpreter from its end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def complain(message: str) -> None:
    """Say something on stderr, as one line."""
    print(f"slurm-mps: {message}", file=sys.stderr, flush=True)
