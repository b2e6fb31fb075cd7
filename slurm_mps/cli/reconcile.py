"""``slurm-mps reconcile``: repair what jobs that are over left on this node."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from .output import Column, Exit, add_table_options, chosen, complain, print_json, print_table, refuse

if TYPE_CHECKING:
    from ..job.reconcile import Repair

COLUMNS = (
    Column("thing", "THING"),
    Column("outcome", "OUTCOME"),
    Column("why", "WHY", longest=2000),
)
_START_SECONDS = 60.0


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "reconcile",
        help="on a compute node, as root: repair what jobs that are over left",
        description="Takes down what jobs left that are over: jobs of an earlier boot, and those that Slurm reports as "
        "over. It is safe at any time. Exit status: 0 fine or repaired, 1 a problem is left, 2 usage, 3 no slurm-mps "
        "here, 4 not root.",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and change nothing")
    add_table_options(parser, COLUMNS, "reconcile/1")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Repair this node and print what was found. Returns the exit status where there was nothing to look at."""
    columns = chosen(COLUMNS, options)
    if os.geteuid() != 0:
        return refuse(options, Exit.NOT_ROOT, "reconcile changes what belongs to root; run it as root")
    from ..errors import MpsError
    from ..job.reconcile import LEFT, Reconciler, Repair
    from ..job.watch import Watch
    from ..node.nvml import Gpus

    os.chdir("/")
    repairs: list[Repair] = []

    def give_up(message: str) -> int:
        repairs.append(Repair("this node", LEFT, message))
        return _print(repairs, columns, options)

    watch = Watch(_START_SECONDS, give_up)
    reconciler = Reconciler(os.environ, Gpus(), watch, repairs.append, dry_run=options.dry_run)
    try:
        if not reconciler.run():
            os._exit(refuse(options, Exit.NOT_HERE, "nothing of slurm-mps is on this node"))
    except MpsError as error:
        repairs.append(Repair("this node", LEFT, str(error)))
    status = _print(repairs, columns, options)
    sys.stderr.flush()
    os._exit(status)  # the watch's thread may wake while an interpreter is torn down, and crash it


def _print(repairs: list[Repair], columns: list[Column], options: argparse.Namespace) -> int:
    """The repairs, without the jobs that are merely not over; as a report for programs all of them."""
    from ..job.reconcile import KEPT, LEFT

    status = Exit.PROBLEM if any(repair.outcome == LEFT for repair in repairs) else Exit.FINE
    if options.json:
        print_json(options, status, dry_run=options.dry_run, repairs=[vars(repair) for repair in repairs])
        return status
    shown = [repair for repair in repairs if repair.outcome != KEPT]
    if shown or options.format:
        rows = [{**vars(one), "style": "red" if one.outcome == LEFT else ""} for one in shown]
        print_table(rows, columns, noheader=options.noheader)
    elif not options.noheader:
        print("nothing is left of jobs that are over")
    sys.stdout.flush()
    for repair in repairs:
        if repair.outcome == KEPT:
            complain(f"{repair.thing} is not over: {repair.why}")
    return status
