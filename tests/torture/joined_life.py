"""Jobs that share GPUs in any order, beside a plain model: who holds a GPU and how, and whether its daemon must be up.

Prologs and epilogs of two users' jobs, a site that changes how GPUs are shared, hooks that are killed anywhere, daemons
that die, reconcile. No hook ever fails, which would drain the node. After each step the jobs that are surely there have
the servers that they must have, or say that they have none; at the end the node is as before.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.harness.gpunode import EPILOG, PROLOG, asked, job_environment
from tests.harness.site import STATE_DIRECTORY
from tests.torture.strike import ALL_USERS, CAN_DIE, JOINED, PATIENCE, configure

if TYPE_CHECKING:
    from tests.torture.strike import StruckNode

FOUND = (2, 0)  # the modes of the two GPUs that jobs are given
EXCLUSIVE_PROCESS = 3
SEPARATE = f'{PATIENCE}[gpus]\nsharing = "separate"\n'
WAYS = {"refuse": PATIENCE, "separate": SEPARATE, "joined": JOINED, "joined of all users": ALL_USERS}

job_ids = st.sampled_from((21, 22, 23, 24))
users = st.sampled_from(("alice", "alice", "alice", "bob"))


@dataclass
class Job:
    """up: it holds its GPU and has a daemon; refused: it holds nothing; unsure: a hook of it was killed.

    way: what the site said when it last began.
    """

    gpu: int
    user: str
    restart: int
    state: str
    way: str

    def may_be_beside(self, other: Job) -> bool:
        return self.way == other.way != "refuse" and (self.way != "joined" or self.user == other.user)

    @property
    def is_joined(self) -> bool:
        return self.way.startswith("joined")


class JoinedLife(RuleBasedStateMachine):
    """Give it a node by subclassing with `node`."""

    node: ClassVar[StruckNode]
    orders: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).orders += 1
        self.jobs: dict[int, Job] = {}
        self.dead: set[int] = set()  #: GPUs whose daemon was killed since a prolog was there
        self.restarts: Counter[int] = Counter()

    @initialize()
    def fresh(self) -> None:
        self.node.reset()
        self.change_sharing("joined")

    # ------------------------------------------------------------------------------------------------ the model's own

    def _environment(self, job_id: int) -> dict[str, str]:
        job = self.jobs[job_id]
        environment = job_environment(job_id, user=job.user, gpus=str(job.gpu), **asked())
        return {**environment, "SLURM_JOB_RESTART_COUNT": str(job.restart)}

    def _holders(self, gpu: int, *states: str) -> list[Job]:
        return [job for job in self.jobs.values() if job.gpu == gpu and job.state in (states or ("up",))]

    def _way_of(self, job_id: int) -> str:
        """How the node says that a job holds its GPU, in the model's words."""
        ledger = self.node.machine.read(f"{STATE_DIRECTORY}/gpus/{self.node.uuids[self.jobs[job_id].gpu]}")
        found: list[str] = re.findall(rf"^holder {job_id} way=(\S+)", ledger, re.MULTILINE)
        return {"whole": "refuse", "joined-all": "joined of all users"}.get(found[0], found[0])

    def _prolog(self, job_id: int) -> None:
        job = self.jobs[job_id]
        result = self.node.run(PROLOG, env=self._environment(job_id))
        assert result.returncode == 0, result.stderr
        status = self.node.verdict(job_id)["status"]
        if job.state == "up" and not (job.is_joined and job.gpu in self.dead):
            assert status == "ready", self.node.verdict(job_id)
            return
        if job.state == "unsure" and status == "ready" and self._way_of(job_id) != self.way:
            job.state, job.way = (
                "up",
                self._way_of(job_id),
            )  # its killed prolog had come to its end, and nothing is done
            return
        job.way = self.way
        others = [one for one in self._holders(job.gpu, "up", "unsure") if one is not job]
        if all(job.may_be_beside(one) for one in others):
            assert status == "ready", self.node.verdict(job_id)
        elif any(one.state == "up" and not job.may_be_beside(one) for one in others):
            assert status == "refused", self.node.verdict(job_id)
        job.state = "up" if status == "ready" else "refused"
        if status == "ready":
            self.dead.discard(job.gpu)

    def _is_gone(self, job_id: int) -> None:
        job = self.jobs.pop(job_id)
        if not self._holders(job.gpu, "up", "unsure"):
            self.dead.discard(job.gpu)

    # ------------------------------------------------------------------------------------------------------- the rules

    @rule(way=st.sampled_from(tuple(WAYS)))
    def change_sharing(self, way: str) -> None:
        self.way = way
        configure(self.node, WAYS[way])

    @rule(job_id=job_ids, gpu=st.integers(0, 1), user=users)
    def start(self, job_id: int, gpu: int, user: str) -> None:
        if job_id in self.jobs:
            return
        self.restarts[job_id] += 1
        self.jobs[job_id] = Job(gpu, user, self.restarts[job_id], "refused", self.way)
        self._prolog(job_id)

    @rule(job_id=job_ids)
    def start_again(self, job_id: int) -> None:
        """slurmd runs the prolog of a job once more."""
        if job_id in self.jobs:
            self._prolog(job_id)

    @rule(job_id=job_ids)
    def end(self, job_id: int) -> None:
        if job_id in self.jobs:
            result = self.node.run(EPILOG, env=self._environment(job_id))
            assert (result.returncode, result.stderr) == (0, "")
            self._is_gone(job_id)

    @rule(job_id=job_ids, gpu=st.integers(0, 1), at=st.integers(1, 70), hook=st.sampled_from((PROLOG, EPILOG)))
    def kill_a_hook(self, job_id: int, gpu: int, at: int, hook: str) -> None:
        if job_id not in self.jobs:
            self.restarts[job_id] += 1
            self.jobs[job_id] = Job(gpu, "alice", self.restarts[job_id], "refused", self.way)
        self.node.struck((hook,), self._environment(job_id), CAN_DIE, at=at, error=0)
        job = self.jobs[job_id]
        job.state = "unsure"
        if hook == PROLOG and job.way != self.way:
            job.way = "either"

    @precondition(lambda self: any(job.state == "up" for job in self.jobs.values()))
    @rule(gpu=st.integers(0, 1))
    def kill_a_daemon(self, gpu: int) -> None:
        uuid = self.node.uuids[gpu]
        found = [process for process, place in self.node.control_daemons() if f"/{uuid}/" in place]
        self.node.kill(*found)
        if found:
            self.dead.add(gpu)

    @rule()
    def reconcile(self) -> None:
        """Slurm has forgotten the jobs of which a hook was killed."""
        there = [job_id for job_id, job in self.jobs.items() if job.state != "unsure"]
        self.node.slurm_says(dict.fromkeys(there, "RUNNING|NONE|n1"))
        result = self.node.reconcile()
        assert result.returncode == 0, f"{result.stdout}{result.stderr}"
        for job_id in set(self.jobs) - set(there):
            self._is_gone(job_id)

    # ---------------------------------------------------------------------------------------------- what always holds

    @invariant()
    def jobs_have_the_servers_that_they_must_have(self) -> None:
        for gpu in (0, 1):
            up = {job_id: job for job_id, job in self.jobs.items() if job.gpu == gpu and job.state == "up"}
            if gpu in self.dead or self._holders(gpu, "unsure"):
                continue
            servers = set()
            for job_id, job in up.items():
                place = f"{STATE_DIRECTORY}/jobs/{job_id}/{'joined-0' if job.is_joined else 'pipe'}"
                said = self.node.client(None, user=job.user, CUDA_MPS_PIPE_DIRECTORY=place).stdout
                servers.add(said.rpartition("mps=")[2].strip())
            joined = any(job.is_joined for job in up.values())
            assert len(servers) == (1 if joined else len(up)), servers
            assert not servers & {"", "none"}, servers

    @invariant()
    def modes_are_what_the_holders_need(self) -> None:
        modes = self.node.compute_modes()
        for gpu in (0, 1):
            if holders := self._holders(gpu):
                assert modes[gpu] == (0 if holders[0].way == "separate" else EXCLUSIVE_PROCESS)
            elif not self._holders(gpu, "unsure"):
                assert modes[gpu] == FOUND[gpu]

    def teardown(self) -> None:
        for job_id in list(self.jobs):
            result = self.node.run(EPILOG, env=self._environment(job_id))
            assert (result.returncode, result.stderr) == (0, "")
        assert self.node.left() == ""
