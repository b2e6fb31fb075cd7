"""Where this process stands in its Slurm step, from the variables that slurmstepd gives a task. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..slurm.hostlist import expand_hosts

#: What read_step() needs.
VARIABLES = (
    *("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST"),
    *("SLURM_GTIDS", "SLURM_PROCID", "SLURM_LOCALID"),
)


@dataclass(frozen=True)
class Step:
    """One task of a step.

    name: tells this node's part of the step from every other, and is no secret. node_ranks: the step's ranks on this
    node. nodes: the names of the step's nodes. job_ids: the job's id, or the ids of all components of a heterogeneous
    job.
    """

    name: str
    rank: int
    local_id: int
    node_ranks: tuple[int, ...]
    node: str
    nodes: tuple[str, ...]
    job_ids: frozenset[str]

    @property
    def is_first(self) -> bool:
        """Whether this rank reports for its node."""
        return self.rank == self.node_ranks[0]


def read_step(environment: Mapping[str, str], hostname: str) -> Step | None:
    """Read the variables of a task; None outside a step, and in a batch script itself (-5 to newer Slurms)."""
    try:
        node_ranks = tuple(map(int, environment["SLURM_GTIDS"].split(",")))
        step = Step(
            name=f"{environment['SLURM_JOB_ID']}.{environment['SLURM_STEP_ID']}.{node_ranks[0]}",
            rank=int(environment["SLURM_PROCID"]),
            local_id=int(environment["SLURM_LOCALID"]),
            node_ranks=node_ranks,
            node=environment.get("SLURMD_NODENAME", hostname),
            nodes=tuple(expand_hosts(environment["SLURM_STEP_NODELIST"])),
            job_ids=_job_ids(environment),
        )
    except (KeyError, ValueError):
        return None
    return step if step.rank in node_ranks and environment["SLURM_STEP_ID"].isdecimal() else None


def _job_ids(environment: Mapping[str, str]) -> frozenset[str]:
    """SLURM_JOB_ID, which names the leader in every component of a heterogeneous job, and the components' own ids.

    ``srun A : B`` outside a job sets the older names alone (22.05). A list that another job left does not begin with
    this job's id.
    """
    job_id = environment["SLURM_JOB_ID"]
    for prefix in ("SLURM_JOB_ID_HET_GROUP_", "SLURM_JOB_ID_PACK_GROUP_"):
        if environment.get(f"{prefix}0") == job_id:
            return frozenset(value for name, value in environment.items() if name.startswith(prefix))
    return frozenset({job_id})
