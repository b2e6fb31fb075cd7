"""``slurm-mps status --cluster``: which jobs and nodes of the cluster use MPS."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from ..units import printable
from .output import Column, Exit, chosen, complain, print_json, print_table, refuse

if TYPE_CHECKING:
    from ..slurm.cluster import MpsJob

COLUMNS = (
    Column("job", "JOB", right=True),
    Column("user", "USER"),
    Column("state", "STATE"),
    Column("daemons", "DAEMONS"),
    Column("threads", "THREADS", right=True),
    Column("mem", "MEM", right=True),
    Column("priority", "PRIORITY", hidden=True),
    Column("nodes", "NODES"),
)
_SLURM_SECONDS = 15.0


def run(options: argparse.Namespace) -> int:
    """Print what Slurm says. Returns the exit status."""
    from ..errors import NodeError
    from ..slurm.cluster import by_node, marks_jobs, mps_jobs, open_source, unknown_nodes
    from ..slurm.hostlist import expand_hosts

    options.report = "cluster/1"
    columns = chosen(COLUMNS, options)
    try:
        nodes = expand_hosts(options.nodelist) if options.nodelist else []
    except ValueError as error:
        return refuse(options, Exit.USAGE, f"-w: {error}")
    where = " on these nodes" if nodes else ""
    source = open_source()
    try:
        jobs = mps_jobs(source.jobs(_SLURM_SECONDS), nodes)
    except NodeError as error:
        return refuse(options, Exit.PROBLEM, str(error))
    if options.jobs:
        jobs = [job for job in jobs if any(_is_named(job, name) for name in options.jobs)]
    missing = [name for name in options.jobs if not any(_is_named(job, name) for job in jobs)]
    problems = [f"job {name}: Slurm shows you no such job that asks for MPS{where}" for name in missing]
    without = [node for node in nodes if node not in by_node(jobs)]
    unknown = unknown_nodes(without, _SLURM_SECONDS) if without else []
    problems += [f"-w: {printable(node)}: Slurm shows you no such node" for node in unknown]
    status = Exit.PROBLEM if problems else Exit.FINE
    if not jobs and not marks_jobs(_SLURM_SECONDS):
        return refuse(
            options,
            Exit.NOT_HERE,
            "Slurm does not show what jobs ask of plugins, and no job_submit script marks them here; "
            "install etc/job_submit.lua of slurm-mps on the controller (JobSubmitPlugins=lua)",
        )
    if options.json:
        listed = [{name: value for name, value in vars(job).items() if name != "node_list"} for job in jobs]
        print_json(options, status, asked=source.name, jobs=listed, nodes=by_node(jobs), problems=problems)
        return status
    rows = [{**vars(job), **job.request, "job": job.name, "nodes": job.node_list} for job in jobs]
    print_table(rows, columns, noheader=options.noheader)
    if not jobs and not problems:
        complain("no job that Slurm shows you asks for MPS")
    for problem in problems:
        complain(problem)
    return status


def _is_named(job: MpsJob, name: str) -> bool:
    """Whether `name` is what squeue calls the job, its number, or the array or heterogeneous job that it belongs to."""
    return name in (job.name, str(job.job_id), re.split("[_+]", job.name)[0])
