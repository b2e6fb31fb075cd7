"""Which jobs and nodes of the cluster use MPS, according to Slurm (docs/decisions/0013).

Slurm does not show the options of plugins; etc/job_submit.lua marks the jobs. There is an adapter for each source of
the same facts: squeue's JSON, and pyslurm.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import NodeError
from ..units import printable
from .hostlist import hosts_of
from .jobs import OVER
from .programs import find_program

_MARK = re.compile(r"mps(?::([\w.:+=,-]{1,300}))?(?:;|$)")
_FIELDS = ("threads", "mem", "priority")


@dataclass(frozen=True)
class ListedJob:
    """A job as Slurm tells of it; nodes: a host list, empty while it waits; name: the id that squeue shows."""

    job_id: int
    user: str
    state: str
    nodes: str
    admin_comment: str
    name: str


@dataclass(frozen=True)
class MpsJob:
    """A job that asked for MPS, is not over, and what it asked."""

    job_id: int
    name: str
    user: str
    state: str
    nodes: tuple[str, ...]
    daemons: str
    request: Mapping[str, str]
    node_list: str


# ----------------------------------------------------------------------------------------------------- squeue --json


class Squeue:
    """Slurm's own client, of 22.05 and later; it needs Slurm's serializer and openapi plugins where it runs."""

    name = "squeue --json"

    def __init__(self, program: str | None = None) -> None:
        self._program = program or find_program("squeue", os.environ.get("PATH", ""))

    def jobs(self, timeout_seconds: float) -> list[ListedJob]:
        """Raises: NodeError."""
        if not self._program:
            raise NodeError("squeue is not in PATH")
        argv = [self._program, "--json"]
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "SLURM_CONF") if name in os.environ}
        try:
            done = subprocess.run(argv, env=kept, capture_output=True, timeout=timeout_seconds, check=False)  # noqa: S603
        except subprocess.TimeoutExpired:
            raise NodeError(f"squeue did not answer within {timeout_seconds:g} s") from None
        except OSError as error:
            raise NodeError(f"{self._program}: {error.strerror}") from None
        if done.returncode:
            words = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"]
            raise NodeError(f"squeue --json: {printable(words[-1], 200)}")
        return parse_squeue(done.stdout)


def parse_squeue(data: bytes) -> list[ListedJob]:
    """Read squeue's JSON, of any release: a state has become a list, and a number may be an object. Pure.

    Raises: NodeError when it is none.
    """
    try:
        jobs = json.loads(data)["jobs"]
        return [
            ListedJob(
                job_id=_number(job["job_id"]),
                user=str(job.get("user_name") or job.get("user_id") or ""),
                state=_state(job["job_state"]),
                nodes=str(job.get("nodes") or ""),
                admin_comment=str(job.get("admin_comment") or ""),
                name=_name(
                    _number(job["job_id"]),
                    array=_number(job.get("array_job_id")),
                    task=_number(job.get("array_task_id")),
                    waiting=str(job.get("array_task_string") or ""),
                    heterogeneous=_number(job.get("het_job_id")),
                    component=_number(job.get("het_job_offset")),
                ),
            )
            for job in jobs
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise NodeError("squeue --json did not print a list of jobs") from None


def _number(value: Any) -> int:
    """A number, or {"set": true, "number": 7} as newer releases have it; 0 where there is none."""
    if isinstance(value, dict):
        value = value["number"] if value["set"] else 0
    return int(value or 0)


def _name(job_id: int, *, array: int, task: int, waiting: str, heterogeneous: int, component: int) -> str:
    """The id that squeue shows: 4711, 4711_3 and 4711_[4-9] of an array, 4711+1 of a heterogeneous job."""
    if array:
        return f"{array}_[{waiting}]" if waiting else f"{array}_{task}"
    return f"{heterogeneous}+{component}" if heterogeneous else str(job_id)


def _state(value: Any) -> str:
    return str(value[0]) if isinstance(value, list) else str(value)


# ------------------------------------------------------------------------------------------------------------ pyslurm


class Pyslurm:
    """The library of that name, of 23.02 and later, where it is installed and fits the Slurm that runs."""

    name = "pyslurm"

    def __init__(self, module: Any) -> None:
        self._module = module

    def jobs(self, timeout_seconds: float) -> list[ListedJob]:
        """Bounded by Slurm's own MessageTimeout, not by `timeout_seconds`. Raises: NodeError."""
        del timeout_seconds
        try:
            found = self._module.Jobs.load()
            return [
                ListedJob(
                    job_id=int(job.id),
                    user=str(job.user_name or job.user_id),
                    state=str(job.state),
                    nodes=str(job.allocated_nodes or ""),
                    admin_comment=str(job.admin_comment or ""),
                    name=_name(
                        int(job.id),
                        array=_number(job.array_id),
                        task=_number(job.array_task_id),
                        waiting=str(job.array_tasks_waiting or ""),
                        heterogeneous=_number(job.heterogeneous_id),
                        component=_number(job.heterogeneous_offset),
                    ),
                )
                for job in found.values()
            ]
        except Exception as error:  # its own RPCError, or an attribute that another release has not
            raise NodeError(f"pyslurm: {printable(str(error), 200)}") from None


def open_source() -> Squeue | Pyslurm:
    """pyslurm where it can be loaded, or else squeue."""
    try:
        import pyslurm
    except Exception:  # not there, or built against another libslurm
        return Squeue()
    return Pyslurm(pyslurm) if hasattr(pyslurm, "Jobs") else Squeue()


# ---------------------------------------------------------------------------------------------------------- who asked


def mps_jobs(jobs: Iterable[ListedJob], nodes: Collection[str] = ()) -> list[MpsJob]:
    """Jobs that are marked and not over; on these nodes alone, if any are given. Pure."""
    found = []
    for job in jobs:
        mark = _MARK.match(job.admin_comment)
        if not mark or job.state in OVER:
            continue
        words = [word for word in (mark[1] or "").split(",") if word]
        request = dict(word.split("=", 1) for word in words if "=" in word)
        its_nodes = tuple(hosts_of(job.nodes) or filter(None, [job.nodes]))
        if nodes and not set(its_nodes) & set(nodes):
            continue
        found.append(
            MpsJob(
                job_id=job.job_id,
                name=job.name,
                user=job.user,
                state=job.state,
                nodes=its_nodes,
                daemons="per-gpu" if "per-gpu" in words else "per-node",
                request={name: request[name].replace("+", ",") for name in _FIELDS if name in request},
                node_list=job.nodes,
            )
        )
    return sorted(found, key=lambda job: job.job_id)


def by_node(jobs: Iterable[MpsJob]) -> dict[str, list[int]]:
    """Each node that has a job with MPS, and its jobs. Pure."""
    found: dict[str, list[int]] = {}
    for job in jobs:
        for node in job.nodes:
            found.setdefault(node, []).append(job.job_id)
    return found


def unknown_nodes(nodes: Collection[str], timeout_seconds: float) -> list[str]:
    """The names that no node has; empty where sinfo does not answer."""
    try:
        known = _output(["sinfo", "--all", "--noheader", "--Node", "--format=%N"], timeout_seconds).split()
    except (OSError, subprocess.SubprocessError):
        return []
    return [node for node in nodes if node not in known]


def marks_jobs(timeout_seconds: float) -> bool:
    """Whether the controller has a job_submit script that could mark jobs; True where scontrol does not answer."""
    try:
        text = _output(["scontrol", "show", "config"], timeout_seconds)
    except (OSError, subprocess.SubprocessError):
        return True
    found = re.search(r"^JobSubmitPlugins\s*=\s*(.*)$", text, re.MULTILINE)
    return not found or "lua" in found[1].split(",")


def _output(argv: list[str], timeout_seconds: float) -> str:
    program = find_program(argv[0], os.environ.get("PATH", "")) or argv[0]
    line = [program, *argv[1:]]
    return subprocess.run(line, capture_output=True, text=True, timeout=timeout_seconds, check=True).stdout  # noqa: S603
