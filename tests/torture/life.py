"""The life of a node's jobs in any order, beside a plain model of it.

A model job is what is known of a real one: which GPUs it surely or perhaps holds, and whether its daemons must be up.
After a hook was killed the model knows less, never something else: a GPU is then perhaps held, and its compute mode is
the one found or the one that was set. Whatever came before, an epilog or reconcile makes it known again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.harness.gpunode import EPILOG, PROLOG, asked, job_environment
from tests.harness.site import STATE_DIRECTORY
from tests.torture.strike import CAN_DIE, FAULTS, RECONCILE

if TYPE_CHECKING:
    from tests.harness.machine import Process
    from tests.torture.strike import StruckNode

JOBS = (11, 12, 13, 14)
GPUS = 4
EXCLUSIVE_PROCESS = 3
ADMIN_MODES = (0, 2, 3)
SMS = {25: 32, 50: 66, 100: 132}

job_ids = st.sampled_from(JOBS)
gpu_sets = st.sets(st.integers(0, GPUS - 1), min_size=1, max_size=3)
kinds = st.sampled_from(["per-node", "per-gpu"])
percentages = st.sampled_from(sorted(SMS))


@dataclass
class Job:
    """What the model knows of a job that was here."""

    gpus: set[int]
    kind: str
    threads: int
    restart: int
    #: up; hurt: a daemon of it was killed; idle: it holds nothing, its directory is there; unsure: a hook was killed
    state: str
    stranger: bool = False  #: somebody's file is in its directory

    @property
    def daemons(self) -> int:
        return 1 if self.kind == "per-node" else len(self.gpus)


@dataclass
class Gpu:
    """A GPU's compute mode, and the one to come back when its holders leave."""

    mode: int = 0
    found: int = 0
    holders: set[int] = field(default_factory=set)
    perhaps: set[int] = field(default_factory=set)

    def modes(self) -> set[int]:
        if self.holders or not self.perhaps:
            return {self.mode}
        return {self.mode, self.found, EXCLUSIVE_PROCESS}


class Life(RuleBasedStateMachine):
    """Rules are what happens to a node; give it one by subclassing with `node`."""

    node: ClassVar[StruckNode]
    orders: ClassVar[int] = 0
    steps: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        type(self).orders += 1
        self.jobs: dict[int, Job] = {}
        self.gpus = [Gpu() for _ in range(GPUS)]
        self.running: set[int] = set()  #: by Slurm's word
        self.restarts: Counter[int] = Counter()
        self.reconciled = -1

    @initialize()
    def fresh(self) -> None:
        self.node.reset()
        self.node.set_compute_modes(*[0] * GPUS)
        self._tell_slurm()

    # ------------------------------------------------------------------------------------------------ the model's own

    def _tell_slurm(self) -> None:
        self.node.slurm_says(dict.fromkeys(self.running, "RUNNING|NONE|n1"))

    def _environment(self, job_id: int, job: Job) -> dict[str, str]:
        spank = {**asked(str(job.threads), "8G"), "SPANK_MPS": job.kind}
        gpus = ",".join(map(str, sorted(job.gpus)))
        return {**job_environment(job_id, gpus=gpus, **spank), "SLURM_JOB_RESTART_COUNT": str(job.restart)}

    def _let_go(self, job_id: int) -> None:
        """A job holds nothing any more; the last holder's leaving puts the mode back."""
        for gpu in self.gpus:
            if job_id in gpu.holders or (job_id in gpu.perhaps and len(gpu.perhaps) == 1 and not gpu.holders):
                gpu.mode = gpu.found
            gpu.holders.discard(job_id)
            gpu.perhaps.discard(job_id)

    def _hold(self, job_id: int, job: Job, *, surely: bool) -> None:
        for index in job.gpus:
            gpu = self.gpus[index]
            if not gpu.holders and not gpu.perhaps:
                gpu.found = gpu.mode
            if surely:
                gpu.holders.add(job_id)
                gpu.perhaps.clear()
                gpu.mode = EXCLUSIVE_PROCESS
            else:
                gpu.perhaps.add(job_id)

    def _unsure(self, job_id: int) -> None:
        """A hook of this job was killed: it holds perhaps what it held, or was to hold."""
        job = self.jobs[job_id]
        job.state = "unsure"
        for gpu in self.gpus:
            if job_id in gpu.holders:
                gpu.holders.discard(job_id)
                gpu.perhaps.add(job_id)

    def _path(self, job_id: int) -> str:
        return f"{STATE_DIRECTORY}/jobs/{job_id}"

    def _daemons(self, job_id: int) -> list[Process]:
        return [process for process, place in self.node.control_daemons() if place.startswith(f"{self._path(job_id)}/")]

    # -------------------------------------------------------------------------------------------------------- prologs

    def _start(self, job_id: int, gpus: set[int], kind: str, threads: int) -> Job:
        """A new run of a job: Slurm gives it a restart count of its own."""
        self.restarts[job_id] += 1
        self.running.add(job_id)
        self._tell_slurm()
        return Job(gpus, kind, threads, self.restarts[job_id], "unsure")

    @rule(job_id=job_ids, gpus=gpu_sets, kind=kinds, threads=percentages)
    def prolog(self, job_id: int, gpus: set[int], kind: str, threads: int) -> None:
        """A job starts here: for the first time, or again with the same id, over whatever its last run left."""
        if job_id in self.running:
            return
        self.steps["prolog"] += 1
        old = self.jobs.get(job_id)
        job = self._start(job_id, gpus, kind, threads)
        result = self.node.run(PROLOG, env=self._environment(job_id, job))
        if old and old.stranger:
            assert result.returncode == 1
            assert "which slurm-mps did not put there" in result.stderr
            self._let_go(job_id)
            old.state = "idle"
            self.running.discard(job_id)  # drained; it starts elsewhere
            self._tell_slurm()
            return
        assert (result.returncode, result.stderr) == (0, "")
        self._let_go(job_id)
        self.jobs[job_id] = job
        verdict = self.node.verdict(job_id)
        taken = {holder for index in gpus for holder in self.gpus[index].holders}
        perhaps = {holder for index in gpus for holder in self.gpus[index].perhaps}
        if verdict["status"] == "refused":
            assert taken | perhaps, verdict
            assert "is held by MPS job" in verdict["message"]
            assert int(verdict["message"].rpartition("MPS job ")[2].partition(",")[0]) in taken | perhaps
            job.state = "idle"
            return
        assert verdict["status"] == "ready"
        assert not taken, verdict
        for index in gpus:  # who perhaps held it did not, and so had not changed its mode
            gpu = self.gpus[index]
            if gpu.perhaps:
                gpu.mode = gpu.found
                gpu.perhaps.clear()
        job.state = "up"
        self._hold(job_id, job, surely=True)

    @precondition(lambda self: any(job.state in ("up", "hurt") for job in self.jobs.values()))
    @rule(data=st.data(), hurt=st.booleans())
    def prolog_of_the_same_run_again(self, data: st.DataObject, hurt: bool) -> None:
        """What is up stays as it is; what has lost a daemon is made anew."""
        self.steps["prolog again"] += 1
        job_id = data.draw(st.sampled_from(sorted(j for j in self.jobs if self.jobs[j].state in ("up", "hurt"))))
        job = self.jobs[job_id]
        if hurt and job.state == "up":
            self.node.kill(self._daemons(job_id)[-1])
            job.state = "hurt"
        if job.stranger and job.state == "hurt":
            return
        before = {p.pid for p in self._daemons(job_id)}
        result = self.node.run(PROLOG, env=self._environment(job_id, job))
        assert (result.returncode, result.stderr) == (0, "")
        if job.state == "up":
            assert {p.pid for p in self._daemons(job_id)} == before
        else:  # taken down and brought up again: its GPUs' modes with it
            for index in job.gpus:
                self.gpus[index].mode = EXCLUSIVE_PROCESS
        job.state = "up"

    @rule(job_id=job_ids, gpus=gpu_sets, kind=kinds, threads=percentages, at=st.integers(1, 95))
    def prolog_is_killed(self, job_id: int, gpus: set[int], kind: str, threads: int, at: int) -> None:
        if job_id in self.running or (job_id in self.jobs and self.jobs[job_id].stranger):
            return
        self.steps["prolog killed"] += 1
        old = self.jobs.get(job_id)
        job = self._start(job_id, gpus, kind, threads)
        self.node.struck((PROLOG,), self._environment(job_id, job), CAN_DIE, at=at, error=FAULTS["SIGKILL"])
        self.jobs[job_id] = job
        if old:
            self._unsure(job_id)
        self._hold(job_id, job, surely=False)

    # -------------------------------------------------------------------------------------------------------- the end

    def _ended(self, job_id: int) -> None:
        self._let_go(job_id)
        job = self.jobs[job_id]
        if job.stranger:
            job.state = "idle"
        else:
            del self.jobs[job_id]

    @precondition(lambda self: self.jobs)
    @rule(job_id=job_ids, times=st.integers(1, 2))
    def epilog(self, job_id: int, times: int) -> None:
        """Also of a job that was never here, and a second time."""
        self.steps["epilog"] += 1
        stranger = job_id in self.jobs and self.jobs[job_id].stranger
        for _ in range(times):
            result = self.node.run(EPILOG, env=job_environment(job_id))
            assert result.returncode == int(stranger), result.stderr
            assert ("which slurm-mps did not put there" in result.stderr) == stranger
        self.running.discard(job_id)
        self._tell_slurm()
        if job_id in self.jobs:
            self._ended(job_id)

    @precondition(lambda self: any(job.state != "idle" for job in self.jobs.values()))
    @rule(data=st.data(), at=st.integers(1, 24))
    def epilog_is_killed(self, data: st.DataObject, at: int) -> None:
        """Slurm believes what it likes of the job; nobody comes for it but the next rule."""
        self.steps["epilog killed"] += 1
        job_id = data.draw(st.sampled_from(sorted(j for j in self.jobs if self.jobs[j].state != "idle")))
        self.node.struck((EPILOG,), job_environment(job_id), CAN_DIE, at=at, error=FAULTS["SIGKILL"])
        self.running.discard(job_id)
        self._tell_slurm()
        self._unsure(job_id)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def slurm_forgets(self, data: st.DataObject) -> None:
        """The job is over and no epilog ever came."""
        self.steps["no epilog"] += 1
        self.running.discard(data.draw(st.sampled_from(sorted(self.running))))
        self._tell_slurm()

    @precondition(lambda self: self.jobs and self.reconciled != self.steps.total())
    @rule()
    def reconcile(self) -> None:
        self.steps["reconcile"] += 1
        strangers = [job for job, one in self.jobs.items() if one.stranger and job not in self.running]
        found = self.node.repairs(status=int(bool(strangers)))
        for job_id in sorted(set(self.jobs) - self.running):
            self._ended(job_id)
        assert all(found[f"job {job}"] == "left" for job in strangers), found
        assert all(outcome != "busy" for outcome in found.values()), found
        self.reconciled = self.steps.total()  # once is enough until something else happens

    @precondition(lambda self: self.jobs)
    @rule(at=st.integers(1, 45))
    def reconcile_is_killed(self, at: int) -> None:
        self.steps["reconcile killed"] += 1
        self.node.struck(RECONCILE, {}, CAN_DIE, at=at, error=FAULTS["SIGKILL"])
        for job_id in sorted(set(self.jobs) - self.running):
            if self.jobs[job_id].state != "idle":
                self._unsure(job_id)
            elif not self.jobs[job_id].stranger:
                self.jobs[job_id].state = "unsure"

    # ------------------------------------------------------------------------------------------------ what else happens

    @precondition(lambda self: any(job.state == "up" for job in self.jobs.values()))
    @rule(data=st.data(), whom=st.sampled_from(["daemon", "server"]))
    def something_is_killed(self, data: st.DataObject, whom: str) -> None:
        """A server is started again for the next client; without a daemon the job is hurt."""
        self.steps[f"{whom} killed"] += 1
        job_id = data.draw(st.sampled_from(sorted(j for j in self.jobs if self.jobs[j].state == "up")))
        daemons = self._daemons(job_id)
        if whom == "daemon":
            victim = data.draw(st.integers(0, len(daemons) - 1))
            self.node.kill(daemons[victim])
            self.jobs[job_id].state = "hurt"
        else:
            pids = {daemon.pid for daemon in daemons}
            self.node.kill(*(p for p in self.node.mps_processes() if p.uid and p.ppid in pids))

    @precondition(lambda self: self.jobs)
    @rule(modes=st.lists(st.sampled_from(ADMIN_MODES), min_size=GPUS, max_size=GPUS))
    def reboot(self, modes: list[int]) -> None:
        """The worst case: what is on disk outlives it. Slurm has none of the jobs any more."""
        self.steps["reboot"] += 1
        self.node.reboot(*modes)
        self.running.clear()
        self._tell_slurm()
        self.gpus = [Gpu(mode) for mode in modes]
        for job in self.jobs.values():
            job.state = "unsure" if job.state == "unsure" else "idle"

    @precondition(lambda self: any(gpu.holders for gpu in self.gpus))
    @rule(index=st.integers(0, GPUS - 1), mode=st.sampled_from(ADMIN_MODES))
    def an_admin_changes_a_mode(self, index: int, mode: int) -> None:
        """Of a GPU that is held, too: the one found before is still the one put back."""
        if self.gpus[index].perhaps:
            return  # the model does not know which one was found
        self.steps["admin"] += 1
        self.node.run("simulated-gpus", "set-mode", str(index), str(mode)).check()
        self.gpus[index].mode = mode

    @precondition(lambda self: any(job.state != "unsure" for job in self.jobs.values()))
    @rule(data=st.data())
    def a_stranger_leaves_a_file(self, data: st.DataObject) -> None:
        self.steps["stranger"] += 1
        job_id = data.draw(st.sampled_from(sorted(j for j in self.jobs if self.jobs[j].state != "unsure")))
        self.node.machine.path(f"{self._path(job_id)}/notes").touch()
        self.jobs[job_id].stranger = True

    @precondition(lambda self: any(job.stranger for job in self.jobs.values()))
    @rule()
    def the_strangers_files_are_removed(self) -> None:
        self.steps["stranger gone"] += 1
        for job_id, job in self.jobs.items():
            self.node.machine.path(f"{self._path(job_id)}/notes").unlink(missing_ok=True)
            job.stranger = False

    # ----------------------------------------------------------------------------------------------------- invariants

    @invariant()
    def modes_are_what_the_holders_need_and_others_found(self) -> None:
        modes = self.node.compute_modes()
        wrong = [(index, mode) for index, mode in enumerate(modes) if mode not in self.gpus[index].modes()]
        assert not wrong, (wrong, self.gpus)

    @invariant()
    def what_is_there_is_known(self) -> None:
        jobs = {int(path.name) for path in self.node.machine.path(f"{STATE_DIRECTORY}/jobs").iterdir()}
        sure = {job for job, one in self.jobs.items() if one.state != "unsure"}
        assert sure <= jobs <= set(self.jobs), (sure, jobs, self.jobs)

    @invariant()
    def each_job_has_its_daemons_once(self) -> None:
        daemons = Counter(place for _, place in self.node.control_daemons())
        assert all(count == 1 for count in daemons.values()), daemons
        of_jobs = Counter(int(place.split("/")[4]) for place in daemons)
        for job_id, job in self.jobs.items():
            number = of_jobs.pop(job_id, 0)
            wanted = {"up": [job.daemons], "hurt": [job.daemons - 1], "idle": [0], "unsure": range(job.daemons + 4)}
            assert number in wanted[job.state], (job_id, job, number)
        assert not of_jobs, of_jobs

    @invariant()
    def the_limits_of_what_is_up_are_read_back(self) -> None:
        for job_id, job in self.jobs.items():
            if job.state == "up":
                name = "pipe" if job.kind == "per-node" else f"gpu-{len(job.gpus) - 1}"
                environment = {"CUDA_MPS_PIPE_DIRECTORY": f"{self._path(job_id)}/{name}"}
                lines = "get_default_active_thread_percentage\nget_default_device_pinned_mem_limit 0\n"
                said = self.node.run("nvidia-cuda-mps-control", env=environment, text=lines).stdout.split()
                assert said == [f"{job.threads}.0", "8G"], (job_id, job, said)

    def teardown(self) -> None:
        """Everything ends, half of it by reconcile alone: the node is as it would be without any job."""
        self.the_strangers_files_are_removed()
        for job_id in sorted(self.jobs)[::2]:
            self.epilog(job_id, 1)
        self.running.clear()
        self._tell_slurm()
        self.reconcile()
        assert (self.node.files(), self.node.mps_processes()) == ([], [])
        assert self.node.compute_modes() == [gpu.mode for gpu in self.gpus]
