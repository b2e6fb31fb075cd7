"""The epilog, which slurmd runs after a job: it takes the job's MPS down, from the state on disk. In this order:

1. The shell script sends quit to the job's control daemons, while Python starts (epilog/95-slurm-mps.sh; `asked`).
2. Lock the job, and read its journal and its configuration. Without a journal there is nothing to do.
3. Run the journal's undos (job/actions.py), from the last line to the first: end the daemons and their servers, and
   open NVML meanwhile; remove the pipe directories and cut the logs; release each GPU, whose compute mode goes back
   when no other job holds it. An undo that fails keeps its line, and the others run.
4. Remove the journal and the job's directory.

A line that stays makes the epilog fail: the node drains, so that Slurm does not give it to the next job.
"""

from __future__ import annotations

from ..config.settings import DEFAULTS
from .actions import JobOnNode
from .hook import Hook
from .lifecycle import take_down
from .state import NodeState
from .watch import UNDO_SHARE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


class Epilog(Hook):
    name = "epilog"
    seconds = DEFAULTS.deadlines_epilog

    def __init__(self, environment: Mapping[str, str], *, asked: bool = False) -> None:
        self._asked = asked  #: whether the script has sent quit to the job's daemons
        super().__init__(environment)

    def work(self, job_id: int) -> None:
        self.state = state = NodeState()
        state.lock_job(job_id, self.watch.left)
        journal = state.open_journal(job_id)
        if journal is None:
            return
        self.config = config = journal.read_config() or DEFAULTS
        self.watch.set(config.deadlines_epilog)
        end = self.watch.at(UNDO_SHARE)
        needs_nvml = config.gpus_compute_mode != "unchanged"
        meanwhile = self.gpus.open if needs_nvml else None
        take_down(JobOnNode(state, journal, self.gpus, config, end, end, meanwhile, asked=self._asked))
        self.note("done")
