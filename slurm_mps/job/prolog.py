"""The prolog, which slurmd runs before a job: it brings the job's MPS up, and leaves the verdict for its tasks."""

from __future__ import annotations

import os
from time import monotonic

from ..config.load import load_config, mps_of_partition
from ..config.settings import DEFAULTS, STATE_DIRECTORY
from ..errors import MpsError, NodeError, RequestError
from ..record import replace
from . import logs
from .actions import JobOnNode
from .hook import Hook
from .joined import unconfined
from .ledger import JOINED
from .lifecycle import bring_up, is_up, take_down, undo_all
from .request import VARIABLES, asks_for_mps, may_have_mps_unasked, read_request, run_of_job, slurm_number
from .state import NodeState
from .verdict import refused, without
from .watch import BRING_UP_SHARE, UNDO_SHARE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..config.settings import SiteConfig
    from .journal import Journal
    from .verdict import Verdict

_UNDO_SECONDS = 0.3  # of the watch's last words


class Prolog(Hook):
    name = "prolog"
    done = "ready"
    seconds = DEFAULTS.deadlines_prolog

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._journal: Journal | None = None
        self._asked = asks_for_mps(environment)
        super().__init__(environment)

    def work(self, job_id: int) -> None:
        state = self._open_state()
        state.lock_job(job_id, self.watch.left)
        run = run_of_job(self.environment)
        left = state.open_journal(job_id)
        if left:
            old = self._on_node(state, left, left.read_config() or DEFAULTS)
            if is_up(old, run):
                return
            take_down(replace(old, deadline=old.undo_deadline))
        if not self._asked:
            may = may_have_mps_unasked(self.environment)
            unasked = mps_of_partition(self.environment.get("SLURM_JOB_PARTITION", "")) if may else ""
            if not unasked:
                self.done = ""  # what was left was of another job, whose id this one has
                return
            self.environment = {**self.environment, VARIABLES["--mps"]: unasked}
        uid = slurm_number(self.environment, "SLURM_JOB_UID")
        node = self.environment.get("SLURMD_NODENAME", "")
        self._journal = journal = state.begin_journal(job_id, uid, run, node)
        request = read_request(self.environment)
        if self.config.gpus_sharing == JOINED and not any(name.startswith("MIG-") for name in request.gpus):
            self._see_devices_confined()
        journal.write_config(self.config)
        bring_up(request, self._on_node(state, journal, self.config))

    def _see_devices_confined(self) -> None:
        """Raises: RequestError. The site's configuration is wrong on all nodes: draining them would fix nothing."""
        why = unconfined(self.environment.get("SLURM_CONF", ""))
        if why:
            raise RequestError(f"this site joins jobs on a GPU, and {why}", hint="tell your admin", reason="site")

    def _open_state(self) -> NodeState:
        """Open the state directory and read the configuration, whose policy decides about a fault of either."""
        try:
            self.state = NodeState()
        except NodeError:
            self._configure()
            raise
        self._configure()
        return self.state

    def _configure(self) -> None:
        partition = self.environment.get("SLURM_JOB_PARTITION", "")
        try:
            self.config = load_config(self.state, self.watch.left, partition)
        except NodeError:
            self.config = (self.state and self.state.read_compiled_config(partition=partition)) or DEFAULTS
            raise
        self.watch.set(self.config.deadlines_prolog)

    def _on_node(self, state: NodeState, journal: Journal, config: SiteConfig) -> JobOnNode:
        return JobOnNode(state, journal, self.gpus, config, self.watch.at(BRING_UP_SHARE), self.watch.at(UNDO_SHARE))

    # ---------------------------------------------------------------------------------------------- what goes wrong

    def refuse(self, error: RequestError) -> int:
        """The job's tasks fail with the message; the node stays in service."""
        if self._journal is None:
            return self.node_fault(str(error))
        try:
            if self.state and not self._asked and error.reason == "mig":  # it runs as before
                self.state.remove_journal(self._journal)
                return 0
            self._tell_tasks(refused(str(error), error.reason))
        except NodeError as fault:
            return self.node_fault(f"{error}; and the verdict cannot be written: {fault}")
        self.note("refused", error.reason)
        return 0

    def give_up(self, message: str) -> int:
        """The watch's last act. NVML probably hangs, so only undos that do not need NVML run."""
        if self.state and self._journal:
            job = self._on_node(self.state, self._journal, self.config)
            undo_all(replace(job, deadline=monotonic() + _UNDO_SECONDS), claims=not self._journal.claims)
        return self.node_fault(message)

    def node_fault(self, message: str) -> int:
        """Report to the admin, then follow the site's policy: fail the job here, let it run, or have Slurm drain the
        node.
        """
        super().node_fault(message)
        policy = self.config.policy_node_fault
        try:
            if policy != "drain" and self.job_id is not None:
                # What could not be undone is in the way of a job that runs: a wrong compute mode, a daemon on its GPU.
                runs = policy == "run_without_mps" and not (self._journal and self._journal.undo)
                why = f"this node cannot give it MPS: {message}"
                self._tell_tasks(without(why) if runs else refused(why, "node_fault"))
                return 0
            if self.state and self._journal and not self._journal.undo:
                self.state.remove_journal(self._journal)  # the job goes elsewhere, its epilog may never come here
        except MpsError as error:
            self.tell(str(error))
        return 1

    def _tell_tasks(self, verdict: Verdict) -> None:
        """Leave a verdict where the plugin looks for it: with the job's state, or with its logs if there is no state.

        Raises: NodeError when the job's tasks would find no verdict.
        """
        job_id = self.job_id or 0
        try:
            if self._journal:
                self._journal.tell_tasks(verdict)
                return
        except NodeError as error:
            self.tell(str(error))
        if not self._asked:
            raise NodeError(f"without {STATE_DIRECTORY} a job that did not ask for MPS would run without it")
        elsewhere = f"{STATE_DIRECTORY}/jobs/{job_id}"
        if not self._journal and os.path.lexists(elsewhere):
            raise NodeError(f"{elsewhere} is there already, and may belong to a daemon that runs")
        jobs = self.state.job_ids() if self.state else []
        logs.leave_verdict(job_id, verdict.encode(), self.config, jobs)
