"""``slurm-mps verify``: what the ranks of a step really have, as a table and in plain words, node by node."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from time import monotonic, sleep
from typing import TYPE_CHECKING

from .output import Column, Exit, add_table_options, chosen, complain, print_json, print_table, refuse, seconds

if TYPE_CHECKING:
    from ..verify.report import Evidence
    from ..verify.step import Step

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
    Column("priority", "PRIORITY", hidden=True),
    Column("uuid", "UUID", hidden=True),
)
#: How wide the cells of a column can become, where its heading is not as wide anyway.
_WIDTHS = {"gpu": 17, "pid": 7, "server": 7, "sms": 7, "uuid": 40}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "verify",
        help="inside a step: is every rank an MPS client, on which GPU, with which limits",
        description="Run with srun in a job: every rank finds out what it really has, and the first rank of each node "
        "prints it. Exit status: 0 fine, 1 a problem was found, 2 usage, 3 not in a Slurm step or no CUDA driver here.",
    )
    add_table_options(parser, COLUMNS, "verify/1")
    parser.add_argument(
        "--timeout",
        type=seconds(1, 600),
        metavar="SECONDS",
        help="for each rank's report (10, and 0.5 for each GPU)",
    )
    parser.set_defaults(run=run, is_reported_elsewhere=_first_rank_reports_it)


def _step() -> Step | None:
    from ..verify.step import read_step

    return read_step(os.environ, os.uname().nodename)


def _why_no_step() -> str:
    from ..verify.step import VARIABLES

    why = "verify looks at the ranks of a Slurm step; start it with srun in a job"
    missing = [name for name in VARIABLES if name not in os.environ]
    if not missing:
        return why
    return (
        f"{why}; if you did, its container lacks {', '.join(missing)}: let SLURM_* in "
        "(podman run -e 'SLURM_*', enroot start --env NAME, apptainer without --cleanenv)"
    )


def _first_rank_reports_it() -> bool:
    """Whether the first rank of this node has the same command line, and prints what is wrong with it."""
    step = _step()
    return step is not None and not step.is_first


def _is_component_without_gpu(step: Step) -> bool:
    """Whether this node's part of a heterogeneous job was refused MPS for having no GPU, and runs all the same."""
    from ..errors import NodeError
    from ..job.verdict import NO_GPU
    from ..job.verdict_file import read_verdict

    try:
        verdicts = [read_verdict(int(job_id)) for job_id in step.job_ids] if len(step.job_ids) > 1 else []
    except NodeError:  # damaged: the plugin starts no task then
        return False
    return any(verdict and verdict.exit_status == NO_GPU for verdict in verdicts)


def run(options: argparse.Namespace) -> int:
    """Run this rank's part; the first rank of a node prints, and has the exit status."""
    columns = chosen(COLUMNS, options)
    step = _step()
    if step is None:
        return refuse(options, Exit.NOT_HERE, _why_no_step())
    if _is_component_without_gpu(step):
        if step.is_first:
            complain(f"{step.node}: this component of the job has no GPU and runs without MPS")
            if options.json:
                print_json(options, Exit.FINE, node=step.node, problems=[], ranks=[], daemons=[])
        return Exit.FINE
    from ..verify.look import report_node, report_rank, step_gpus
    from ..verify.meeting import MeetingError

    # With srun -K a task that ends badly has Slurm terminate all others; they finish their reports all the same.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # The driver brings a server's GPUs up one after the other, 0.4 to 0.5 s each (O79).
    timeout = options.timeout or 10 + step_gpus(os.environ) / 2
    end = monotonic() + timeout / 2
    try:
        if not step.is_first:
            report_rank(step, os.environ, timeout)
            return Exit.FINE
        evidence = report_node(step, os.environ, timeout)
    except MeetingError as error:
        message = f"rank {step.rank}: {error}"
        if step.is_first:
            return refuse(options, Exit.PROBLEM, message)
        complain(message)  # a report is the first rank's alone
        return Exit.PROBLEM
    status = _print(evidence, columns, step, options)
    if status and len(step.nodes) > 1:
        sleep(max(0.0, end - monotonic()))  # ranks of other nodes may be starting, and not ignore SIGTERM yet
    return status


def _print(evidence: Evidence, columns: list[Column], step: Step, options: argparse.Namespace) -> int:
    """Print the node's part of the answer. Returns the exit status."""
    from ..verify.judge import problems
    from ..verify.table import document, rows, summary

    wrong = problems(evidence)
    status = Exit.PROBLEM if wrong else Exit.FINE
    error = ""
    if all(rank.no_driver for rank in evidence.ranks):
        status = Exit.NOT_HERE
        error = f"there is no CUDA driver here: {evidence.ranks[0].error}"
        complain(_of_node(step, error))
    if options.json:
        print_json(options, status, **({"error": error} if error else {}), **document(evidence, wrong))
        return status
    several = len(step.nodes) > 1
    widths = _WIDTHS | {"node": max(map(len, step.nodes))} if several else {}  # so that the nodes' columns line up
    print_table(rows(evidence), columns, noheader=options.noheader, widths=widths)
    if options.format or options.noheader:  # a program reads the table
        for problem in wrong:
            complain(_of_node(step, problem))
    else:
        sentences = [_of_node(step, sentence) for sentence in wrong or [summary(evidence)]]
        print("\n".join(["", *sentences, *([""] if several else [])]))
    sys.stdout.flush()
    return status


def _of_node(step: Step, sentence: str) -> str:
    """Say which node is meant, where several print."""
    return f"{step.node}: {sentence}" if len(step.nodes) > 1 else sentence
