"""``slurm-mps status``: the jobs with MPS on this node and what each of their clients has; or which the cluster has."""

from __future__ import annotations

import argparse
import os
import re
from argparse import ArgumentTypeError
from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from ..units import MIB
from .output import Column, Exit, add_table_options, chosen, complain, print_json, refuse, seconds

if TYPE_CHECKING:
    from ..status.node import ClientView, DaemonView, GpuView, JobView, NodeView, ProgramView

COLUMNS = (
    Column("job", "JOB", right=True),
    Column("user", "USER"),
    Column("gpu", "GPU"),
    Column("mode", "MODE", spare=4),
    Column("found", "FOUND", spare=5),
    Column("daemon", "DAEMON", right=True, spare=3),
    Column("server", "SERVER", right=True, spare=2),
    Column("state", "STATE"),
    Column("client", "CLIENT", right=True),
    Column("inside", "INSIDE", right=True, hidden=True),
    Column("task", "TASK", right=True),
    Column("threads", "SM CAP", right=True),
    Column("memory", "MEM MIB", right=True),
    Column("limit", "LIMIT MIB", right=True),
    Column("command", "COMMAND", spare=1),
    Column("uuid", "UUID", hidden=True),
)
#: As nvidia-smi's table writes compute modes.
MODE_WORDS = {0: "Default", 1: "E. Thread", 2: "Prohibited", 3: "E. Process"}
_GPU_LETTERS = len("GPU-51000000-99a9")
_SLURM_SECONDS = 15.0
_JOB_NAME = re.compile(r"[0-9]{1,10}(?:[_+][0-9]{1,10})?")


def job_name(text: str) -> str:
    """A job as squeue names it: 4711, 4711_3 of an array, 4711+1 of a heterogeneous job. Raises: ArgumentTypeError."""
    if not _JOB_NAME.fullmatch(text):
        raise ArgumentTypeError(f"{text!r}: expected a job's id, such as 4711, 4711_3 or 4711+1")
    return text


def job_numbers(names: Iterable[str]) -> list[int]:
    """The number that each of these jobs has beside its name, which Slurm is asked for. Raises: NodeError."""
    from ..slurm.jobs import number_of

    return [int(name) if name.isdecimal() else number_of(name, os.environ, _SLURM_SECONDS) for name in names]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "status",
        help="who uses MPS on this node, or with --cluster in the cluster",
        description="Shows the jobs with MPS on this node (root: all, a user: their own), their control daemons, "
        "servers and clients. Exit status: 0 fine, 1 a problem was found, 2 usage, 3 not applicable here.",
    )
    parser.add_argument("jobs", nargs="*", type=job_name, metavar="JOBID", help="these jobs alone")
    parser.add_argument(
        "--cluster",
        action="store_true",
        help="ask Slurm which jobs and nodes use MPS; -o then takes job,user,state,daemons,threads,mem,priority,nodes",
    )
    parser.add_argument("-w", "--nodelist", metavar="NODES", help="with --cluster: on these nodes alone")
    parser.add_argument(
        "--timeout", type=seconds(0.1, 60), default=2.0, metavar="SECONDS", help="for each control daemon's answer (2)"
    )
    add_table_options(parser, COLUMNS, "status/1")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print what is on this node. Returns the exit status."""
    if options.cluster:
        from . import cluster

        return cluster.run(options)
    if options.nodelist:
        return refuse(options, Exit.USAGE, "-w goes with --cluster; without it status shows the node that it runs on")
    from ..errors import NodeError
    from ..status.node import look
    from .output import leave

    columns = chosen(COLUMNS, options)
    try:
        view = look(job_numbers(options.jobs), options.timeout)
    except NodeError as error:
        return refuse(options, Exit.PROBLEM, str(error))
    if view is None:
        return refuse(
            options,
            Exit.NOT_HERE,
            "slurm-mps has not been used since this node started; is this a compute node? "
            "Of a job elsewhere: srun --overlap --jobid=JOBID slurm-mps status",
        )
    status = Exit.PROBLEM if view.problems else Exit.FINE
    _print(view, columns, options, status)
    if view.stuck:
        leave(status)
    return status


def _print(view: NodeView, columns: list[Column], options: argparse.Namespace, status: int) -> None:
    from .output import print_table

    if options.json:
        print_json(options, status, **document(view))
        return
    print_table(list(rows(view)), columns, noheader=options.noheader)
    for line in remarks(view):
        complain(line)


def remarks(view: NodeView) -> list[str]:
    """Lines for stderr: jobs without MPS, and the problems that were found."""
    lines = [f"job {job.job_id} has no MPS here: {job.message}" for job in view.jobs if job.message]
    if not view.jobs and not view.problems:
        lines.append("no job has MPS on this node" if view.of_all else "no job of yours has MPS on this node")
    return [*lines, *view.problems]


# ------------------------------------------------------------------------------------------------------- the table


def rows(view: NodeView) -> Iterator[dict[str, object]]:
    """A row for each client on each GPU, and one for each GPU without."""
    for job in view.jobs:
        yield from _job_rows(job)


@cache
def user_name(uid: int) -> str:
    """A user's name, looked up once: where accounts are kept elsewhere that can take its time."""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _job_rows(job: JobView) -> Iterator[dict[str, object]]:
    here: dict[str, object] = {"job": job.job_id, "user": user_name(job.uid)}
    if not job.daemons:
        yield {**here, "state": job.state, "style": "yellow"}
    for daemon in job.daemons:
        for gpu in daemon.gpus:
            on_gpu = {**here, **_daemon_cells(job, daemon), **_gpu_cells(gpu)}
            if not (gpu.clients or gpu.without_mps):
                yield on_gpu
            for client in gpu.clients:
                yield {**on_gpu, **_client_cells(client)}
            for program in gpu.without_mps:
                yield {**on_gpu, "server": None, "state": "no MPS", "style": "red", **_program_cells(program)}


def _daemon_cells(job: JobView, daemon: DaemonView) -> dict[str, object]:
    if daemon.pid is None:
        return {"state": "gone", "style": "red"}
    if not daemon.servers:
        state = "silent" if daemon.problem else job.state if job.state != "ready" else "no server"
        return {
            "daemon": daemon.pid or None,
            "state": state,
            "style": "red" if state in ("silent", "no server") else "",
        }
    from ..status.daemon import HEALTHY

    server = daemon.servers[0]
    is_healthy = server.state in HEALTHY
    state = server.state or "silent"
    return {"daemon": daemon.pid or None, "server": server.pid, "state": state, "style": "" if is_healthy else "red"}


def _gpu_cells(gpu: GpuView) -> dict[str, object]:
    return {
        "gpu": f"{gpu.uuid[:_GPU_LETTERS]} {gpu.profile}".strip(),
        "uuid": gpu.uuid,
        "mode": None if gpu.mode is None else MODE_WORDS.get(gpu.mode, gpu.mode),
        "found": None if gpu.mode_found is None else MODE_WORDS.get(gpu.mode_found, gpu.mode_found),
    }


def _program_cells(program: ProgramView) -> dict[str, object]:
    return {
        "client": program.pid,
        "inside": program.pid_inside,
        "task": task(program),
        "memory": None if program.memory_bytes is None else program.memory_bytes // MIB,
        "command": program.command,
    }


def _client_cells(client: ClientView) -> dict[str, object]:
    return {
        **_program_cells(client),
        "server": client.server,
        "threads": None if client.thread_percentage is None else f"{client.thread_percentage:g}%",
        "limit": None if client.limit_bytes is None else client.limit_bytes // MIB,
    }


def task(program: ProgramView) -> str | None:
    """Step and rank as Slurm counts them: ``0.3``; ``batch`` for what the job's script started itself."""
    return f"{program.step}.{program.rank}" if program.rank is not None else program.step


# ------------------------------------------------------------------------------------------------ the report


def document(view: NodeView) -> dict[str, Any]:
    """The report for programs. Compute modes have NVML's names, sizes are in bytes, and an unknown value is null."""
    return {"jobs": [_job(job) for job in view.jobs], "problems": list(view.problems)}


def _job(job: JobView) -> dict[str, Any]:
    return {
        "job_id": job.job_id,
        "uid": job.uid,
        "user": user_name(job.uid),
        "state": job.state,
        "message": job.message or None,
        "thread_percentage": float(job.threads) if job.threads else None,
        "auto": list(job.auto),
        "daemons": [_daemon(daemon) for daemon in job.daemons],
    }


def _daemon(daemon: DaemonView) -> dict[str, Any]:
    return {
        "pipe_directory": daemon.place.pipe_directory,
        "log_directory": daemon.place.log_directory,
        "pid": daemon.pid or None,
        "problem": daemon.problem or None,
        "limit_bytes": daemon.place.memory_bytes,
        "servers": [{"pid": server.pid, "state": server.state or None} for server in daemon.servers],
        "gpus": [_gpu(gpu) for gpu in daemon.gpus],
    }


def _gpu(gpu: GpuView) -> dict[str, Any]:
    from ..node.nvml import COMPUTE_MODES

    return {
        "uuid": gpu.uuid,
        "mig_profile": gpu.profile or None,
        "compute_mode": None if gpu.mode is None else COMPUTE_MODES.get(gpu.mode),
        "compute_mode_found": None if gpu.mode_found is None else COMPUTE_MODES.get(gpu.mode_found),
        "clients": [vars(client) for client in gpu.clients],
        "without_mps": [vars(program) for program in gpu.without_mps],
    }
