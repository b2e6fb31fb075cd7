"""Where this process stands in its Slurm step, from the variables that slurmstepd gives a task. Pure."""

from __future__ import annotations

from ..record import record
from ..slurm.hostlist import expand_hosts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


@record
class Step:
    """One task of a step. launch_addresses: where srun and the job's first node may be reached, as Slurm says."""

    job_id: str
    step_id: str
    cluster: str
    rank: int
    size: int
    local_id: int
    node_id: int
    host: str
    hosts: tuple[str, ...]
    launch_addresses: tuple[str, ...]

    @property
    def name(self) -> str:
        """What tells this step from all others; no secret."""
        return f"{self.cluster}.{self.job_id}.{self.step_id}"


def read_step(environment: Mapping[str, str], hostname: str) -> Step | None:
    """Read the variables of a task; None outside a step, and in a batch script itself (-5 to newer Slurms)."""
    try:
        size = int(environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"])
        rank = int(environment["SLURM_PROCID"])
        hosts = expand_hosts(environment.get("SLURM_STEP_NODELIST") or environment["SLURM_NODELIST"])
        addresses = (environment.get(name, "") for name in ("SLURM_LAUNCH_NODE_IPADDR", "SLURM_SRUN_COMM_HOST"))
        step = Step(
            job_id=environment["SLURM_JOB_ID"],
            step_id=environment["SLURM_STEP_ID"],
            cluster=environment.get("SLURM_CLUSTER_NAME", ""),
            rank=rank,
            size=size,
            local_id=int(environment.get("SLURM_LOCALID", rank)),
            node_id=int(environment.get("SLURM_NODEID", 0)),
            host=environment.get("SLURMD_NODENAME", hostname),
            hosts=tuple(hosts),
            launch_addresses=tuple(dict.fromkeys(filter(None, addresses))),
        )
    except (KeyError, ValueError):
        return None
    return step if 0 <= rank < size and step.step_id.isdecimal() else None
