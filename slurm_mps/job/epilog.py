"""What slurmd runs after a job: take down whatever was brought up for it, from the state on disk.

What cannot be put back drains the node, so that Slurm does not give it to the next job.
"""

from __future__ import annotations

from ..config.settings import DEFAULTS
from .actions import JobOnNode
from .lifecycle import take_down
from .script import Script
from .state import NodeState
from .watch import UNDO_SHARE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


class Epilog(Script):
    """The epilog of one job."""

    name = "epilog"
    seconds = DEFAULTS.deadlines_epilog

    def __init__(self, environment: Mapping[str, str], *, asked: bool = False) -> None:
        self._asked = asked  #: whether the job's daemons have been told to quit
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
