"""``slurm-mps top``: what ``status`` shows, again and again, in a terminal."""

from __future__ import annotations

import argparse
import os
import sys
from time import monotonic, strftime
from typing import TYPE_CHECKING

from .output import Column, Exit, add_table_options, chosen, leave, refuse, seconds
from .status import COLUMNS, job_name, job_numbers, remarks, rows

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..status.daemon import Memory
    from ..status.node import NodeView

_QUIT = (b"q", b"Q", b"\x03", b"\x04")
_REMARKS_MAX = 5
_OVERHEAD_LINES = 3  # the line on top, an empty one, the headings


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "top",
        help="what status shows, live",
        description="Shows in a terminal what slurm-mps status shows, until q or Ctrl-C. "
        "Exit status: 0 fine, 1 Slurm does not know a job, 2 usage, 3 not in a terminal, or slurm-mps has not been "
        "used on this node.",
    )
    parser.add_argument("jobs", nargs="*", type=job_name, metavar="JOBID", help="these jobs alone")
    parser.add_argument(
        "-i", "--iterate", type=seconds(0.1, 60), default=2.0, metavar="SECONDS", help="look again after so long (2)"
    )
    add_table_options(parser, COLUMNS)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Show this node until the user quits. Returns the exit status."""
    columns = chosen(COLUMNS, options)
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or os.environ.get("TERM", "dumb") == "dumb":
        return refuse(options, Exit.NOT_HERE, "top needs a terminal; slurm-mps status prints the same once")
    from ..errors import NodeError
    from ..status.daemon import Memory
    from ..status.node import look

    try:
        options.jobs = job_numbers(options.jobs)
    except NodeError as error:
        return refuse(options, Exit.PROBLEM, str(error))
    memory = Memory()
    view = look(options.jobs, memory=memory)
    if view is None:
        return refuse(
            options, Exit.NOT_HERE, "slurm-mps has not been used since this node started; is this a compute node?"
        )
    ends = _ends()
    view = _live(view, memory, columns, options, ends)
    if view.stuck:
        leave(Exit.FINE)
    return Exit.FINE


def _ends() -> int:
    """A descriptor that can be read when a signal wants this to end.

    A handler that raises could raise anywhere, and the exception be lost. A parent may also have SIGINT ignored, as
    nohup and a shell's `&` do.
    """
    import signal

    ends, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    return ends


def _live(view: NodeView, memory: Memory, columns: list[Column], options: argparse.Namespace, ends: int) -> NodeView:
    import termios
    import tty

    from rich.live import Live

    from ..status.node import look
    from .output import console

    out = console(fitted=True)
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    try:
        tty.setcbreak(terminal)
        with Live(console=out, screen=True, auto_refresh=False) as live:
            while True:
                live.update(_frame(view, columns, out.size.width, out.size.height, options), refresh=True)
                if _told_to_quit(terminal, ends, options.iterate):
                    return view
                view = look(options.jobs, memory=memory) or view
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _told_to_quit(terminal: int, ends: int, wait_seconds: float) -> bool:
    """Wait, and meanwhile for a key or a signal; a terminal that is gone is one that wants no more."""
    import select

    end = monotonic() + wait_seconds
    while (left := end - monotonic()) > 0:
        ready, _, _ = select.select([terminal, ends], [], [], left)
        if ends in ready:
            return True
        if ready:
            key = os.read(terminal, 1)
            if not key or key in _QUIT:
                return True
    return False


def _frame(
    view: NodeView, columns: list[Column], width: int, height: int, options: argparse.Namespace
) -> RenderableType:
    """One screen: who is here, the table as far as it fits, what is wrong."""
    from rich.console import Group
    from rich.text import Text

    from ..units import printable
    from .output import fitting, make_table

    clients = {client.pid for job in view.jobs for d in job.daemons for gpu in d.gpus for client in gpu.clients}
    listed = list(rows(view))
    shown = fitting(listed, columns, width)
    left_out = ", ".join(column.name for column in columns if column not in shown)
    beside = _OVERHEAD_LINES + 1 + bool(left_out)  # a row at least, and which columns are not there
    below = [
        Text(printable(line, 500), style="red", no_wrap=True)
        for line in _some(remarks(view), min(_REMARKS_MAX, height - beside))
    ]
    if left_out:
        below.append(Text(f"too narrow for {left_out}", style="dim", no_wrap=True))
    room = max(1, height - _OVERHEAD_LINES - len(below))
    more = f", {len(listed) - room} not shown" if len(listed) > room else ""
    head = (
        f"slurm-mps  {os.uname().nodename}  {strftime('%H:%M:%S')}  {_count(len(view.jobs), 'job')}, "
        f"{_count(len(clients), 'client')}{more}  (q quits)"
    )
    table = make_table(listed[:room], shown, noheader=options.noheader)
    return Group(Text(printable(head, 200), no_wrap=True), Text(""), table, *below)


def _some(lines: list[str], room: int) -> list[str]:
    """The first of them, and of the others how many they are."""
    if len(lines) <= room:
        return lines
    shown = max(0, room - 1)
    return [*lines[:shown], f"{len(lines) - shown} remarks{' more' * bool(shown)}; slurm-mps status tells them"]


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
