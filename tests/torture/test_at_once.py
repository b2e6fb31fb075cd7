"""Hooks that run at the same time: of one job, of jobs that follow each other on a GPU, of a whole node at once."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.harness.gpunode import EPILOG, PROLOG, asked, job_environment
from tests.harness.site import PYTHON, STATE_DIRECTORY

from .node import COMMAND, MistreatedNode

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Run = tuple[Sequence[str], dict[str, str]]

#: Longer than 32 hooks take side by side on a busy machine of two cores.
PATIENT = "[deadlines]\nprolog = 100\nepilog = 100\ndaemon_start = 50\ncommand = 50\nquit = 20\nsignal = 10\n"
SHARED = f'{PATIENT}[gpus]\nsharing = "separate"\n'
JOBS = range(101, 133)


@pytest.fixture(scope="module")
def big_node() -> Iterator[MistreatedNode]:
    with MistreatedNode(gpus=8) as node:
        node.slurm_says({})
        yield node


@pytest.fixture
def node(big_node: MistreatedNode) -> Iterator[MistreatedNode]:
    """Eight GPUs; afterwards as before."""
    before = big_node.snapshot()
    yield big_node
    big_node.fault()
    after = big_node.settled(before)
    big_node.kill(*big_node.mps_processes())
    big_node.run("rm", "-rf", STATE_DIRECTORY)
    big_node.set_compute_modes(*before.compute_modes)
    assert after.processes == before.processes
    assert (after.files, after.compute_modes) == ((), before.compute_modes)


def environment(job_id: int, gpus: str, restart: int = 0) -> dict[str, str]:
    return {**job_environment(job_id, gpus=gpus, **asked("25", "8G")), "SLURM_JOB_RESTART_COUNT": str(restart)}


def at_once(node: MistreatedNode, *runs: Run) -> list[tuple[int, str]]:
    """Start all of them, wait for all. Returns exit status and standard error of each."""
    started = [
        node.machine.popen(argv, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for argv, given in runs
    ]
    return [(one.returncode, said[1].decode()) for one in started if (said := one.communicate(timeout=120))]


WELL = (0, "")


def test_32_jobs_that_start_and_end_at_once(node: MistreatedNode) -> None:
    """The first jobs after a boot, with a configuration that is new to all: each is ready, with its own daemon."""
    node.configure(SHARED)
    jobs = {job: environment(job, str(job % 8)) for job in JOBS}
    assert set(at_once(node, *(([PROLOG], one) for one in jobs.values()))) == {WELL}
    assert {job: node.verdict(job)["status"] for job in jobs} == dict.fromkeys(jobs, "ready")
    assert sorted(place for _, place in node.control_daemons()) == [node.pipe_directory(job) for job in jobs]
    ends = at_once(node, *(([EPILOG], one) for one in jobs.values()), ([COMMAND, "reconcile"], {}))
    assert set(ends) == {WELL}


def test_jobs_that_start_at_once_on_a_slow_disk(node: MistreatedNode) -> None:
    """All of them find the site configuration changed: one compiles it, and none fails for what another did."""
    slow = ["strace", "-f", "-b", "execve", "-s", "100", "-e", "trace=fsync,execve"]
    hook = [PYTHON, "-I", "-S", f"{node.package}/hook.py"]
    for number in range(2):
        node.configure(f"{SHARED}# {number}\n")
        jobs = {job: environment(job, str(job % 8)) for job in JOBS[:4]}
        traced = {
            job: [*slow, "-e", f"inject=fsync:delay_enter={10_000 * (1 + job % 4)}", "-o", f"/tmp/{job}"]
            for job in jobs
        }
        assert set(at_once(node, *(([*traced[job], *hook, "prolog"], one) for job, one in jobs.items()))) == {WELL}, (
            number
        )
        assert sum(node.machine.read(f"/tmp/{job}").count("slurm_mps.config.file") for job in jobs) == 1
        assert set(at_once(node, *(([EPILOG], one) for one in jobs.values()))) == {WELL}, number


def test_of_32_jobs_on_8_gpus_8_get_one(node: MistreatedNode) -> None:
    """Where GPUs are not shared, the others are refused, and none of those who come and go changes another's mode."""
    node.configure(PATIENT)
    node.set_compute_modes(2, 2)
    jobs = {job: environment(job, str(job % 8)) for job in JOBS}
    assert set(at_once(node, *(([PROLOG], one) for one in jobs.values()))) == {WELL}
    ready = [job for job in jobs if node.verdict(job)["status"] == "ready"]
    assert sorted(job % 8 for job in ready) == list(range(8))
    others = [job for job in jobs if job not in ready]
    holders = {job % 8: job for job in ready}
    assert all(f"is held by MPS job {holders[job % 8]}," in node.verdict(job)["message"] for job in others)
    assert set(at_once(node, *(([EPILOG], jobs[job]) for job in others))) == {WELL}
    assert node.compute_modes() == [3] * 8
    assert set(at_once(node, *(([EPILOG], jobs[job]) for job in ready))) == {WELL}
    assert node.compute_modes() == [2, 2, 0, 0, 0, 0, 0, 0]
    node.set_compute_modes(0, 0)


@pytest.mark.parametrize("first", ["epilog", "prolog"])
def test_the_epilog_of_a_run_beside_the_prolog_of_the_next(node: MistreatedNode, first: str) -> None:
    """A job that is requeued onto its node: one waits for the other, and what is there then is whole or nothing."""
    node.configure(PATIENT)
    for number in range(3):
        again = environment(4711, "0,1", restart=1)
        node.run(PROLOG, env=environment(4711, "0,1")).check()
        runs = [([EPILOG], again), ([PROLOG], again)]
        assert at_once(node, *(runs if first == "epilog" else runs[::-1])) == [WELL, WELL], number
        daemons = node.control_daemons()
        if node.files():
            assert node.verdict(4711)["status"] == "ready", number
            assert len(daemons) == 1, number
            assert " sms=32 free=8047 " in node.client(4711).check().stdout, number
        else:
            assert (daemons, set(node.compute_modes())) == ([], {0}), number
        node.epilog(4711).check()


def test_the_next_job_comes_while_the_last_ones_epilog_still_works(node: MistreatedNode) -> None:
    """Slurm gives a GPU on when the epilog is through; should it come earlier, it is refused or ready, never half."""
    node.configure(PATIENT)
    node.set_compute_modes(2)
    for delay in (0, 150, 400):
        node.fault(f"command.quit=slow:{delay}")
        node.run(PROLOG, env=environment(4711, "0")).check()
        assert at_once(node, ([EPILOG], environment(4711, "0")), ([PROLOG], environment(4712, "0"))) == [WELL, WELL]
        verdict = node.verdict(4712)
        if verdict["status"] == "ready":
            assert node.compute_modes()[0] == 3, delay
            assert " sms=32 free=8047 " in node.client(4712).check().stdout, delay
        else:
            assert "is held by MPS job 4711" in verdict["message"], delay
            assert node.compute_modes()[0] == 2, delay
        node.epilog(4712).check()
        assert node.compute_modes()[0] == 2, delay
    node.set_compute_modes(0)


def test_reconcile_beside_everything(node: MistreatedNode) -> None:
    """Over and over while jobs come and go: it ends none that runs, and takes nothing from under a hook."""
    node.configure(PATIENT)
    for number in range(2):
        jobs = {job: environment(job, str(job % 8)) for job in JOBS[:8]}
        node.slurm_says(dict.fromkeys(jobs, "RUNNING|NONE|n1"))
        repairs: list[Run] = [([COMMAND, "reconcile", "--json"], {}) for _ in range(3)]
        assert set(at_once(node, *(([PROLOG], one) for one in jobs.values()), *repairs)) == {WELL}, number
        assert all(node.verdict(job)["status"] == "ready" for job in jobs), number
        assert " sms=32 free=8047 " in node.client(JOBS[number]).check().stdout, number
        node.slurm_says({})
        assert set(at_once(node, *(([EPILOG], one) for one in jobs.values()), *repairs)) == {WELL}, number
        assert (node.files(), node.mps_processes()) == ([], []), number
    assert json.loads(node.reconcile("--json").stdout)["repairs"] == []
