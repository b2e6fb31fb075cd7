"""What all commands have in common: exit statuses, tables for people, reports for programs.

Promises: the answer goes to stdout and commentary to stderr; there is colour only on a terminal, and none where
NO_COLOR is set; a table in a pipe is as wide as it needs to be and has no decoration; text that a user of the node
chose (a program's name, say) cannot move the cursor or forge a line.
"""

from __future__ import annotations

import json
import os
import sys

from slurm_mps import __version__
from slurm_mps.units import printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence
    from typing import Any

    from rich.console import Console
    from rich.table import Table

FINE, PROBLEM, USAGE, NOT_HERE, NOT_ROOT = range(5)
EXIT_STATUSES = "Exit status: 0 fine, 1 a problem was found, 2 usage, 3 not applicable here, 4 needs root."
_WIDEST = 100_000  # a table in a pipe is never folded


class Column:
    """One field of a table: its name for ``-o`` and its heading."""

    def __init__(self, name: str, heading: str, *, right: bool = False, hidden: bool = False, spare: int = 0) -> None:
        self.name = name
        self.heading = heading
        self.right = right  #: numbers stand right
        self.hidden = hidden  #: shown only when asked for
        self.spare = spare  #: where a terminal is too narrow, the highest goes first


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print a report for programs")


def add_table_options(parser: argparse.ArgumentParser, columns: Sequence[Column]) -> None:
    """``--json``, ``-o`` and ``--noheader``, as Slurm's own commands have them."""
    add_json_option(parser)
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
        complain(f"--format={options.format}: there is no field {unknown[0]!r}; choose from {','.join(known)}")
        raise SystemExit(USAGE)
    return [known[name] for name in names]


def console(*, fitted: bool = False) -> Console:
    """Stdout as rich knows it: of the terminal's width if `fitted`, else as wide as what is printed."""
    from rich.console import Console

    return Console(width=None if fitted else _WIDEST, highlight=False, markup=False, emoji=False, soft_wrap=False)


def make_table(
    rows: Sequence[Mapping[str, object]], columns: Sequence[Column], *, noheader: bool = False, style: str = "style"
) -> Table:
    """`rows` name their cells as the columns do; the key `style` holds a row's colour, if any.

    None and what is missing show as ``-``.
    """
    from rich.table import Table

    table = Table(box=None, show_header=not noheader, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.heading, justify="right" if column.right else "left", no_wrap=True, overflow="crop")
    for row in rows:
        cells = [_cell(row.get(column.name)) for column in columns]
        table.add_row(*cells, style=str(row.get(style) or "") or None)
    return table


def print_table(rows: Sequence[Mapping[str, object]], columns: Sequence[Column], *, noheader: bool = False) -> None:
    """Print `rows` as make_table() has them, as wide as they are: a number is never cut, a terminal wraps the line."""
    table = make_table(rows, columns, noheader=noheader)
    out = console()
    with out.capture() as capture:
        out.print(table)
    for line in capture.get().splitlines():
        print(line.rstrip())


def fitting(rows: Sequence[Mapping[str, object]], columns: Sequence[Column], width: int) -> list[Column]:
    """The columns that fit into `width` characters, each whole: what is spare goes first, then the last; one stays."""
    widths = {
        column.name: max([len(column.heading), *(len(_cell(row.get(column.name))) for row in rows)])
        for column in columns
    }
    fits = list(columns)
    while len(fits) > 1 and sum(widths[column.name] + 2 for column in fits) - 2 > width:
        fits.remove(max(reversed(fits), key=lambda column: column.spare))
    return fits


def _cell(value: object) -> str:
    return "-" if value is None or value == "" else printable(str(value), 200)


def print_json(report: str, **fields: Any) -> None:
    """Print a report for programs; `report` is its kind and version, such as ``status/1``."""
    print(json.dumps({"report": report, "slurm_mps": __version__, **fields}, indent=2), flush=True)


def leave(status: int) -> None:
    """End at once: a thread that waits in a driver that hangs would keep an interpreter from its end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def complain(message: str) -> None:
    """Say something on stderr, as one line."""
    print(f"slurm-mps: {message}", file=sys.stderr, flush=True)
