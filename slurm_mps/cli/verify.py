"""``slurm-mps verify``: what the ranks of a step really have, as a table and in plain words."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentTypeError
from time import monotonic, sleep

from slurm_mps.cli.output import (
    NOT_HERE,
    PROBLEM,
    Column,
    add_table_options,
    chosen,
    complain,
    print_json,
    print_table,
    refuse,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from slurm_mps.verify.link import Link
    from slurm_mps.verify.session import Result
    from slurm_mps.verify.step import Step

COLUMNS = (
    Column("node", "NODE"),
    Column("gpu", "GPU"),
    Column("rank", "RANK", right=True),
    Column("pid", "PID", right=True),
    Column("server", "SERVER", right=True),
    Column("sms", "SMS", right=True),
    Column("free", "FREE MIB", right=True),
    Column("limit", "LIMIT MIB", right=True),
    Column("cpu_numa", "CPU NUMA", right=True),
    Column("gpu_numa", "GPU NUMA", right=True),
    Column("uuid", "UUID", hidden=True),
)
_SECONDS_MAX = 600.0
_HEAD_START_SECONDS = 2.0


def _seconds(text: str) -> float:
    """Raises: ArgumentTypeError."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= _SECONDS_MAX:
        raise ArgumentTypeError(f"{text!r}: expected seconds, 1 to {_SECONDS_MAX:g}")
    return seconds


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "verify",
        help="inside a step: is every rank an MPS client, on which GPU, with which limits",
        description="Run with srun in a job: every rank finds out what it really has, and rank 0 prints it. "
        "Exit status: 0 fine, 1 a problem was found, 2 usage, 3 not in a Slurm step or no CUDA driver here.",
    )
    add_table_options(parser, COLUMNS, "verify/1")
    parser.add_argument("--no-mpi", action="store_true", help="do without the MPI that the step was started with")
    parser.add_argument("--timeout", type=_seconds, default=10, metavar="SECONDS", help="for each rank's report (10)")
    parser.set_defaults(run=run, is_said_elsewhere=_rank_0_says_it)


def _rank_0_says_it() -> bool:
    """Whether what is wrong with the command line is said by rank 0 of the step, another process that has the same.

    Gives it the time to: with ``srun --kill-on-bad-exit`` the first rank that ends takes all others along.
    """
    from slurm_mps.verify.step import read_step

    step = read_step(os.environ, os.uname().nodename)
    if step is None or step.rank == 0:
        return False
    sleep(_HEAD_START_SECONDS)
    return True


def run(options: argparse.Namespace) -> int:
    """Run this rank's part; rank 0 prints. Returns the exit status, which is the same for all."""
    from slurm_mps.verify.step import read_step

    columns = chosen(COLUMNS, options)
    step = read_step(os.environ, os.uname().nodename)
    if step is None:
        return refuse(options, NOT_HERE, "verify looks at the ranks of a Slurm step; start it with srun in a job")
    from slurm_mps.verify.link import LinkError
    from slurm_mps.verify.session import verify

    def show(result: Result) -> None:
        if options.json:
            _report(result, link.through, options)
        else:
            _print(result, columns, options)

    try:
        link = _open(step, options)
        status = verify(step, os.environ, link, options.timeout, show)
    except LinkError as error:
        message = f"rank {step.rank}: {error}"
        if step.rank == 0:
            return refuse(options, PROBLEM, message)
        complain(message)  # one report for the whole step, and that is rank 0's
        return PROBLEM
    link.close()
    return status


def _open(step: Step, options: argparse.Namespace) -> Link:
    from slurm_mps.verify.link import open_link
    from slurm_mps.verify.mpi import open_mpi_link

    mpi = None if options.no_mpi else open_mpi_link(step, os.environ)
    return mpi or open_link(step, os.environ, monotonic() + 2 * options.timeout)


def _no_driver(result: Result) -> str:
    """What to say where no rank has a driver; empty where one has."""
    return f"there is no CUDA driver here: {result.findings.ranks[0].error}" if result.status == NOT_HERE else ""


def _report(result: Result, through: str, options: argparse.Namespace) -> None:
    """`through`: how the ranks' reports were gathered."""
    from slurm_mps.verify.table import document

    error = _no_driver(result)
    if error:
        complain(error)
    fields = {"error": error} if error else {}
    found = document(result.findings, result.problems)
    print_json(options, result.status, **fields, **found, gathered_through=through)


def _print(result: Result, columns: list[Column], options: argparse.Namespace) -> None:
    """The table, and below it in words what it means; where fields were chosen the words are commentary."""
    from slurm_mps.verify.table import rows, summary

    error = _no_driver(result)
    if error:
        complain(error)
    print_table(rows(result.findings), columns, noheader=options.noheader)
    if options.format or options.noheader:
        for problem in result.problems:
            complain(problem)
    else:
        print("\n".join(["", *(result.problems or [summary(result.findings)])]))
    sys.stdout.flush()
