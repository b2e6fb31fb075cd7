"""``slurm-mps verify``: what the ranks of a step really have, as a table and in plain words."""

from __future__ import annotations

import json
import os
from time import monotonic

from slurm_mps.cli.output import NOT_HERE, add_json_option, complain

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from slurm_mps.verify.judge import Findings
    from slurm_mps.verify.link import Link
    from slurm_mps.verify.session import Result
    from slurm_mps.verify.step import Step

_SECONDS_MAX = 600.0


def _seconds(text: str) -> float:
    """Raises: ValueError, of which argparse makes a message."""
    seconds = float(text)
    if not 1 <= seconds <= _SECONDS_MAX:
        raise ValueError(text)
    return seconds


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "verify",
        help="inside a step: is every rank an MPS client, on which GPU, with which limits",
        description="Run with srun in a job: every rank finds out what it really has, and rank 0 prints it. "
        "Exit status: 0 fine, 1 a problem was found, 2 usage, 3 not in a Slurm step or no CUDA driver here.",
    )
    add_json_option(parser)
    parser.add_argument("--no-mpi", action="store_true", help="do without the MPI that the step was started with")
    parser.add_argument("--timeout", type=_seconds, default=10, metavar="SECONDS", help="for each rank's report (10)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run this rank's part; rank 0 prints. Returns the exit status, which is the same for all."""
    from slurm_mps.verify.step import read_step

    step = read_step(os.environ, os.uname().nodename)
    if step is None:
        complain("verify looks at the ranks of a Slurm step; start it with srun in a job")
        return NOT_HERE
    from slurm_mps.verify.link import LinkError
    from slurm_mps.verify.session import verify

    try:
        link = _open(step, options)
        result = verify(step, os.environ, link, options.timeout)
    except LinkError as error:
        complain(f"rank {step.rank}: {error}")
        return 1
    if result.findings:
        _print(result, result.findings, link.through if options.json else "")
    link.close()
    return result.status


def _open(step: Step, options: argparse.Namespace) -> Link:
    from slurm_mps.verify.link import open_link
    from slurm_mps.verify.mpi import open_mpi_link

    mpi = None if options.no_mpi else open_mpi_link(step, os.environ)
    return mpi or open_link(step, os.environ, monotonic() + 2 * options.timeout)


def _print(result: Result, findings: Findings, through: str) -> None:
    """A table for people; a report for programs where it is to say how it was gathered."""
    from slurm_mps.verify.table import document, summary, table

    if result.status == NOT_HERE:
        complain(f"there is no CUDA driver here: {findings.ranks[0].error}")
    if through:
        report = {**document(findings, result.problems, result.status), "gathered_through": through}
        print(json.dumps(report), flush=True)
    else:
        print("\n".join([table(findings), "", *(result.problems or [summary(findings)])]), flush=True)
