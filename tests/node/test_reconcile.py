"""``slurm-mps reconcile``: what it repairs, what it leaves, and that it leaves what is not over or not ours."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import signal
import subprocess
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, time
from typing import TYPE_CHECKING

import pytest

from slurm_mps import __version__
from tests.harness.gpunode import PROLOG, asked, job_environment
from tests.harness.site import STATE_DIRECTORY
from tests.torture.node import COMMAND, REAL_BOOT_ID, MistreatedNode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.site import Site

ETC = Path(__file__).parents[2] / "etc"
LOGS = "/var/log/slurm-mps"
SHORT = "[deadlines]\nepilog = 1\nquit = 0.3\nsignal = 0.3\n"
UNKNOWN: dict[int, str] = {}


@pytest.fixture(scope="module")
def shared_node() -> Iterator[MistreatedNode]:
    with MistreatedNode() as node:
        node.prolog(1).check()
        node.epilog(1).check()
        yield node


@pytest.fixture
def node(shared_node: MistreatedNode) -> Iterator[MistreatedNode]:
    """A node whose Slurm knows no job. Whatever the test did, it must be as before once it is over."""
    before = shared_node.snapshot()
    shared_node.slurm_says(UNKNOWN)
    yield shared_node
    shared_node.fault()
    shared_node.configure("")
    shared_node.run("sh", "-c", f"while umount {REAL_BOOT_ID} 2>/dev/null; do :; done; rm -rf {LOGS}")
    after = shared_node.settled(before)
    shared_node.clean()
    shared_node.kill(*shared_node.mps_processes())
    shared_node.set_compute_modes(0, 0, 0, 0)
    assert after == before


def uuid(node: MistreatedNode, index: int) -> str:
    return node.run("nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader").check().stdout.split()[index]


def settle(node: MistreatedNode, *jobs: int) -> None:
    """Wait until the jobs' servers are up: they write to their logs until then."""
    for job in jobs:
        server = node.control(job, "get_server_list").stdout.strip()
        assert node.control(job, f"get_server_status {server}").stdout == "ACTIVE\n"


def crash(node: MistreatedNode, job_id: int = 4711, **spank: str) -> None:
    """A job whose processes and whose epilog were killed: all but the MPS processes is left."""
    node.prolog(job_id, gpus="0,1", **(spank or asked("25", "8G"))).check()
    node.kill(*node.mps_processes())


@contextmanager
def as_slurmstepd(node: MistreatedNode, program: str = "/usr/local/sbin/slurmstepd") -> Iterator[None]:
    """A process of root's, of a program of this name, with the title of a step of job 4711."""
    if "slurmstepd" in program:
        node.run("cp", "/usr/bin/sleep", program).check()
    step = node.start("bash", "-c", f"exec -a 'slurmstepd: [4711.batch]' {program} 60")
    name = Path(program).name
    while not any(process.comm == name for process in node.machine.processes()):
        assert step.poll() is None
    try:
        yield
    finally:
        node.machine.signal(step, signal.SIGKILL)
        step.wait(5)


# ------------------------------------------------------------------------------------------------- which job is over


@pytest.mark.parametrize("kind", ["per-node", "per-gpu"])
def test_a_job_of_an_earlier_boot_is_taken_down_and_nobody_is_asked(node: MistreatedNode, kind: str) -> None:
    """Its processes and modes went with the boot; journal, ledgers and what its log has too much go now."""
    node.slurm_says(None)
    node.prolog(4711, SPANK_MPS=kind).check()
    node.machine.path(f"{LOGS}/4711/server.log").write_bytes(b"x" * 3 * 1024**2)
    node.reboot(2)
    assert node.repairs() == {"job 4711": "repaired"}
    assert not node.asked()
    assert (node.files(), node.compute_modes()) == ([], [2, 0, 0, 0]), "the new boot's mode is not the old ledger's"
    assert node.machine.path(f"{LOGS}/4711/server.log").stat().st_size == 1024**2
    node.set_compute_modes(0)


def test_a_job_that_slurm_does_not_know_any_more_is_taken_down(node: MistreatedNode) -> None:
    """Daemon, server, directories, compute modes: as its own epilog would have left it."""
    node.set_compute_modes(0, 2)
    node.prolog(4711).check()
    node.prolog(4712, gpus="2").check()
    node.slurm_says({4712: "RUNNING|N/A|n1"})
    assert node.repairs() == {"job 4711": "repaired", "job 4712": "kept"}
    assert node.compute_modes() == [0, 2, 3, 0]
    assert " sms=132 " in node.client(4712).stdout
    node.epilog(4712).check()
    node.set_compute_modes(0, 0)


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        ("RUNNING|N/A|n[1-2]", "kept"),
        ("COMPLETING|1|n1", "repaired"),
        ("COMPLETING|NONE|n1", "kept"),
        ("COMPLETING|NONE|n2", "repaired"),
        ("RUNNING|N/A|n[2-3]", "repaired"),
        ("PENDING|NONE|", "repaired"),
    ],
)
def test_what_slurm_says_decides(node: MistreatedNode, said: str, outcome: str) -> None:
    """A job that is here is left alone, whatever else it is; one that is elsewhere, or waits again, is over here."""
    crash(node)
    node.slurm_says({4711: said})
    assert node.repairs() == {"job 4711": outcome}
    assert (node.files() == []) == (outcome == "repaired")
    node.epilog(4711).check()


@pytest.mark.parametrize("said", ["fails", "nonsense", "is not whole"])
def test_a_slurm_that_does_not_answer_leaves_the_job(node: MistreatedNode, said: str) -> None:
    """Nothing is guessed, nothing changed: the job is named, with Slurm's own words, and the status is 1."""
    node.prolog(4711).check()
    settle(node, 4711)
    before = node.tree()
    if said == "fails":
        node.slurm_says(None)
    else:
        text = "echo nonsense" if said == "nonsense" else "yes '1|FAILED|1|n1' | head -c 100000"
        node.machine.write("/usr/local/bin/squeue", f"#!/bin/sh\n{text}\n", mode=0o755)
    result = node.reconcile()
    assert result.returncode == 1
    assert "job 4711 left Slurm does not say whether it is over: " in " ".join(result.stdout.split())
    assert node.tree() == before
    node.epilog(4711).check()


def test_a_slurmstepd_keeps_its_job_where_slurm_is_silent(node: MistreatedNode) -> None:
    """Only root's slurmstepd, or Debian's: a program of root's of another name, with its title, proves nothing."""
    node.slurm_says(None)
    node.prolog(4711).check()
    with as_slurmstepd(node, "/usr/bin/sleep"):
        assert node.repairs(status=1) == {"job 4711": "left"}
    for program in ("slurmstepd", "slurmstepd-wlm"):
        with as_slurmstepd(node, f"/usr/local/sbin/{program}"):
            assert node.repairs() == {"job 4711": "kept"}
    node.epilog(4711).check()


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        ({4711: f"COMPLETED|{int(time())}|n1"}, "kept"),
        ({4711: "COMPLETED|1000000000|n1"}, "repaired"),
        (UNKNOWN, "left"),
    ],
    ids=["just over", "long over", "forgotten"],
)
def test_a_slurmstepd_that_hangs_keeps_no_job(node: MistreatedNode, said: dict[int, str], outcome: str) -> None:
    """The controller calls the job over for minutes. Where it has forgotten the job, an admin is to look."""
    crash(node)
    node.slurm_says(said)
    with as_slurmstepd(node):
        assert node.repairs(status=int(outcome == "left")) == {"job 4711": outcome}
    node.epilog(4711).check()


def test_a_job_that_comes_back_while_slurm_is_asked_is_left(node: MistreatedNode) -> None:
    """What Slurm said is of the run before: the new one has a journal of its own, and keeps its daemon."""
    crash(node)
    again = {**job_environment(4711, gpus="0"), **asked("50"), "SLURM_JOB_RESTART_COUNT": "1"}
    node.slurm_says(UNKNOWN, before=" ".join(["env", *(f"{name}={value}" for name, value in again.items()), PROLOG]))
    assert node.repairs() == {"job 4711": "kept"}
    assert " sms=66 " in node.client(4711).check().stdout
    node.epilog(4711).check()


def test_a_job_whose_hook_is_at_work_is_left_to_it(node: MistreatedNode) -> None:
    """A busy lock is a prolog or epilog; the other jobs are repaired all the same."""
    crash(node, 4712)
    node.fault("daemon.start=hang")
    node.configure("[deadlines]\nprolog = 20\ndaemon_start = 10\n")
    prolog = node.start(PROLOG, env=job_environment(4711, gpus="3", **asked()))
    while not any(process.comm.startswith("nvidia-cuda-mps") for process in node.machine.processes()):
        assert prolog.poll() is None
    assert node.repairs() == {"job 4711": "busy", "job 4712": "repaired"}
    node.machine.signal(prolog, signal.SIGKILL)
    prolog.wait(5)
    assert node.repairs() == {"job 4711": "repaired"}


# ------------------------------------------------------------------------------------------ what has no journal


def test_a_gpu_whose_holder_is_gone_gets_back_its_mode(node: MistreatedNode) -> None:
    """A ledger entry of a job without a journal holds nothing; a job that shares the GPU keeps it as it is."""
    node.set_compute_modes(2, 2)
    crash(node)
    node.run("rm", "-r", f"{STATE_DIRECTORY}/jobs/4711").check()
    assert node.repairs() == {uuid(node, 0): "repaired", uuid(node, 1): "repaired"}
    assert (node.files(), node.compute_modes()) == ([], [2, 2, 0, 0])
    node.configure('[gpus]\nsharing = "separate"\n')
    crash(node)
    node.prolog(4712, gpus="0").check()
    node.run("rm", "-r", f"{STATE_DIRECTORY}/jobs/4711").check()
    node.slurm_says({4712: "RUNNING|N/A|n1"})
    assert node.repairs() == {"job 4712": "kept", uuid(node, 0): "repaired", uuid(node, 1): "repaired"}
    assert node.compute_modes() == [0, 2, 0, 0]
    assert "holder 4711" not in node.machine.read(f"{STATE_DIRECTORY}/gpus/{uuid(node, 0)}")
    node.epilog(4712).check()
    assert node.compute_modes()[0] == 2
    node.set_compute_modes(0, 0)


def test_a_ledger_that_describes_nothing_is_removed(node: MistreatedNode) -> None:
    """One of an earlier boot, and a write that was cut short; neither says anything about the modes of now."""
    crash(node)
    node.reboot()
    node.run("rm", "-r", f"{STATE_DIRECTORY}/jobs/4711").check()
    node.machine.path(f"{STATE_DIRECTORY}/gpus/.{uuid(node, 3)}.new").touch(mode=0o600)
    assert node.repairs() == {uuid(node, index): "repaired" for index in (0, 1, 3)}
    assert node.files() == []


def test_a_directory_without_a_journal_is_removed_unasked(node: MistreatedNode) -> None:
    """A prolog that died before its first note changed nothing."""
    node.slurm_says(None)
    node.run("sh", "-c", f"umask 077; mkdir {STATE_DIRECTORY}/jobs/4711; >{STATE_DIRECTORY}/jobs/4711/.journal.new")
    assert node.repairs() == {"job 4711": "repaired"}
    assert (node.files(), node.asked()) == ([], False)


@pytest.mark.parametrize("kind", ["per-node", "per-gpu"])
@pytest.mark.parametrize("removed", [STATE_DIRECTORY, f"{STATE_DIRECTORY}/jobs/4711", "journal"])
def test_processes_without_a_state_are_ended_when_their_job_is_over(
    node: MistreatedNode, kind: str, removed: str
) -> None:
    """Somebody removed the state by hand. While the job runs it is named, status 1; then its processes go, and a GPU
    whose ledger is lost is named and left."""
    node.prolog(4711, SPANK_MPS=kind).check()
    daemons = node.control_daemons()
    path = f"{STATE_DIRECTORY}/jobs/4711/journal" if removed == "journal" else removed
    node.run("rm", "-r", path).check()
    node.slurm_says({4711: "RUNNING|N/A|n1"})
    assert node.repairs(status=1)["job 4711"] == "left"
    assert (node.control_daemons(), node.compute_modes()) == (daemons, [3, 3, 0, 0])
    node.slurm_says(UNKNOWN)
    lost = removed == STATE_DIRECTORY
    gpus = {uuid(node, index): "left" if lost else "repaired" for index in (0, 1)}
    assert node.repairs(status=int(lost)) == {"job 4711": "repaired", **gpus}
    assert (node.mps_processes(), node.files()) == ([], [])
    assert node.compute_modes() == ([3, 3, 0, 0] if lost else [0, 0, 0, 0])
    node.set_compute_modes(0, 0)
    assert node.repairs() == {}


def joined(node: MistreatedNode, *jobs: int) -> None:
    node.confine_devices()
    node.configure('[gpus]\nsharing = "joined"\n')
    for job in jobs:
        node.prolog(job, gpus="0").check()


def test_a_lost_daemon_of_joined_jobs_is_ended_and_not_the_one_that_came_after(node: MistreatedNode) -> None:
    """Somebody removed ledger and job by hand, and the next job started a daemon beside the one that nobody knows."""
    joined(node, 1)
    assert "mps=none" not in node.client(None, CUDA_MPS_PIPE_DIRECTORY=f"{STATE_DIRECTORY}/jobs/1/joined-0").stdout
    there = node.mps_processes()
    node.kill(*(process for process in there if process.uid))
    node.run("rm", "-r", f"{STATE_DIRECTORY}/jobs/1", f"{STATE_DIRECTORY}/gpus/{uuid(node, 0)}").check()
    joined(node, 2)
    node.slurm_says({2: "RUNNING|N/A|n1"})
    assert node.repairs() == {"job 2": "kept", uuid(node, 0): "repaired"}
    assert not {process.pid for process in there} & {process.pid for process in node.mps_processes()}
    assert "mps=none" not in node.client(None, CUDA_MPS_PIPE_DIRECTORY=f"{STATE_DIRECTORY}/jobs/2/joined-0").stdout
    assert node.run("slurm-mps", "logs", "2").returncode == 0
    node.epilog(2).check()
    node.set_compute_modes(0)  # what the lost ledger knew is lost
    assert (node.mps_processes(), node.repairs()) == ([], {})


@pytest.mark.parametrize("left", ["state", "nothing"])
def test_logs_of_joined_jobs_go_when_their_daemon_went_with_the_boot(node: MistreatedNode, left: str) -> None:
    """/run is a file system of each boot's own on most machines."""
    joined(node, 1)
    node.reboot()
    if left == "nothing":
        node.run("rm", "-r", STATE_DIRECTORY).check()
    logs = f"logs of {uuid(node, 0)}"
    seen = node.repairs("--dry-run")
    things = {logs} if left == "nothing" else {"job 1", uuid(node, 0)}
    assert set(seen) == {logs, *things}
    assert node.repairs() == dict.fromkeys(things, "repaired")
    assert node.run("sh", "-c", f"ls -d {LOGS}/GPU-*").stdout == ""


def test_processes_of_another_node_of_this_machine_are_not_ours(node: MistreatedNode) -> None:
    """Their pipe directory is of the same name, but in a /run of their own (containers, simulated nodes)."""
    node.machine.add_node("n2")
    run = node.machine.run
    run(["simulated-gpus", "create", "1"], node="n2").check()
    environment = job_environment(4713, gpus="0", **asked())
    run([PROLOG], env=environment, node="n2").check()
    assert node.repairs() == {}
    assert len(node.mps_processes()) == 2
    run(["/etc/slurm/epilog.d/95-slurm-mps.sh"], env=environment, node="n2").check()
    assert node.mps_processes() == []


def test_what_is_not_ours_is_named_and_left(node: MistreatedNode) -> None:
    """Strange files, a journal that is damaged, one that is newer: named with the path, status 1; the rest goes on."""
    crash(node, 4711)
    node.prolog(4712, gpus="2").check()
    node.prolog(4713, gpus="3").check()
    strange = [f"{STATE_DIRECTORY}/notes", f"{STATE_DIRECTORY}/jobs/notes"]
    for path in (*strange, f"{STATE_DIRECTORY}/jobs/4712/notes"):
        node.machine.write(path, "do not remove\n")
    journal = node.machine.path(f"{STATE_DIRECTORY}/jobs/4713/journal")
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-20])
    found = node.repairs(status=1)
    assert found == {"job 4711": "repaired", "job 4712": "left", "job 4713": "left", **dict.fromkeys(strange, "left")}
    assert all(node.machine.read(path) == "do not remove\n" for path in strange)
    assert "jobs/4712 holds 'notes', which slurm-mps did not put there" in node.reconcile().stdout
    newer = whole.replace(b"slurm-mps journal 1\n", b"slurm-mps journal 2\n")
    journal.write_bytes(newer)
    assert node.repairs(status=1)["job 4713"] == "left"
    assert "journal version 2 is newer than version 1" in node.reconcile().stdout
    assert journal.read_bytes() == newer != whole
    journal.write_bytes(whole)
    node.run("rm", *strange, f"{STATE_DIRECTORY}/jobs/4712/notes").check()
    assert node.repairs() == {"job 4712": "repaired", "job 4713": "repaired"}


def test_the_last_fault_is_ours(node: MistreatedNode) -> None:
    """The prolog leaves it for the health check, for good; the health check leaves beside it that it was reported."""
    node.fault("nvml.init=9")
    assert node.prolog(4711).returncode == 1
    node.fault()
    node.run("touch", "-d", "1 hour ago", f"{STATE_DIRECTORY}/last-fault").check()
    node.run("sh", "-s", text=(ETC / "health-check.sh").read_text()).check()
    kept = node.run("sh", "-c", f"cd {STATE_DIRECTORY} && echo last-fault*").stdout.split()
    assert kept == ["last-fault", "last-fault-reported"]
    assert node.repairs() == {}
    node.run("rm", f"{STATE_DIRECTORY}/last-fault-reported").check()


# ---------------------------------------------------------------------------------------------------------- the logs


def test_logs_that_a_reboot_left_long_are_cut(node: MistreatedNode) -> None:
    """With the state on a tmpfs nothing but the logs outlives a boot; those of jobs that run are theirs."""
    node.configure("[logs]\nmax_kib = 16\nmax_jobs = 2\n")
    node.prolog(4711, SPANK_MPS="per-gpu").check()
    node.slurm_says({4711: "RUNNING|N/A|n1"})
    for place in ("10", "11", "12/gpu-0", "4711/gpu-0"):
        node.machine.write(f"{LOGS}/{place}/server.log", "x" * 50_000)
    wanted = {"job 4711": "kept", "logs of job 10": "repaired", "logs of job 11": "repaired"}
    assert node.repairs("--dry-run") == {
        name: outcome.replace("repaired", "would repair")
        for name, outcome in {**wanted, "logs of job 12": "repaired"}.items()
    }
    assert node.repairs() == {**wanted, "logs of job 12": "repaired"}
    sizes = node.run("find", LOGS, "-name", "server.log", "-size", "+8k", "-printf", "%P %s\n").stdout.split("\n")
    assert sorted(sizes)[1:] == ["11/server.log 16384", "12/gpu-0/server.log 16384", "4711/gpu-0/server.log 50000"]
    node.configure('[logs]\nkeep = "never"\n')
    assert node.repairs() == {"job 4711": "kept", "logs of job 11": "repaired", "logs of job 12": "repaired"}
    assert node.run("ls", LOGS).stdout.split() == ["4711"]
    node.epilog(4711).check()


def test_a_wrong_configuration_is_said_and_stops_nothing(node: MistreatedNode) -> None:
    """Jobs carry the one they were brought up with."""
    crash(node)
    node.configure("[logs]\nmax_kib = 0\n")
    assert node.repairs(status=1) == {"/etc/slurm/mps.toml": "left", "job 4711": "repaired"}


# -------------------------------------------------------------------------------------------------------- the command


def test_a_dry_run_says_what_would_be_done_and_changes_nothing(node: MistreatedNode) -> None:
    """One of each kind of damage: afterwards all is as before, and the real run repairs exactly what was named."""
    crash(node, 4711)
    node.run("mv", f"{STATE_DIRECTORY}/gpus", "/run/kept").check()
    node.run("rm", "-r", f"{STATE_DIRECTORY}/jobs/4711").check()
    node.prolog(4712, gpus="2").check()
    node.prolog(4713, gpus="3").check()
    node.run("sh", "-c", f"mv /run/kept/* {STATE_DIRECTORY}/gpus; rmdir /run/kept; cd {STATE_DIRECTORY}/jobs; "
             "rm 4713/journal; mkdir -m 700 4714").check()  # fmt: skip
    node.machine.write(f"{LOGS}/12/server.log", "x" * 2_000_000)
    settle(node, 4712, 4713)
    node.configure("# new\n")
    before = node.tree(), node.compute_modes(), node.control_daemons()
    would = node.repairs("--dry-run")
    assert (node.tree(), node.compute_modes(), node.control_daemons()) == before
    done = node.repairs()
    assert set(would.values()) == {"would repair"}
    assert set(done.values()) == {"repaired"}
    assert set(done) == {*would, uuid(node, 3)}, "the ledger of 4713 shows only when its directory is gone"
    assert set(would) == {uuid(node, 0), uuid(node, 1), *(f"job {job}" for job in (4712, 4713, 4714)), "logs of job 12"}
    node.run("rm", "-r", STATE_DIRECTORY).check()
    assert node.reconcile("--dry-run").returncode == 3
    assert not node.machine.path(STATE_DIRECTORY).exists()
    node.run_job(4711)  # makes it again for the tests that follow


@pytest.mark.alone
def test_a_driver_that_hangs_ends_it(node: MistreatedNode) -> None:
    """Inside NVML no deadline reaches: it says what it did so far and what hangs, with status 1."""
    node.configure(SHORT)
    crash(node)
    node.run("sh", "-c", f"umask 077; mkdir {STATE_DIRECTORY}/jobs/1").check()
    node.fault("nvml.init=hang")
    start = monotonic()
    assert node.repairs(status=1) == {"job 1": "repaired", "this node": "left"}
    assert monotonic() - start < 4
    node.fault()
    assert node.repairs() == {"job 4711": "repaired"}


#: Each thread starts late, as on a busy machine, and the process takes its time to go away.
LATE_THREADS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>
struct start { void *(*run)(void *); void *with; };
static void *late(void *start) { usleep(600000); return ((struct start *)start)->run(((struct start *)start)->with); }
int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *with)
{
    int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *) = dlsym(RTLD_NEXT, "pthread_create");
    struct start *start = malloc(sizeof(*start));
    start->run = run;
    start->with = with;
    return real(thread, attributes, late, start);
}
__attribute__((destructor)) static void linger(void) { usleep(800000); }
"""


def test_its_watch_does_not_outlive_the_interpreter(node: MistreatedNode, tmp_path: Path) -> None:
    """A thread that began to run while Python was taken down crashed it: all was done, and the status a signal's."""
    command = ["gcc", "-shared", "-fPIC", "-o", str(tmp_path / "late.so"), "-xc", "-", "-ldl"]
    subprocess.run(command, input=LATE_THREADS, text=True, check=True, timeout=60)
    shutil.copy(tmp_path / "late.so", node.machine.path("/run/late.so"))
    freed_is_overwritten = "GLIBC_TUNABLES=glibc.malloc.tcache_count=0:glibc.malloc.perturb=165"
    result = node.run("env", "LD_PRELOAD=/run/late.so", freed_is_overwritten, COMMAND, "reconcile")
    assert (result.returncode, result.stdout) == (0, "nothing is left of jobs that are over\n")


def test_its_exit_status_and_streams(node: MistreatedNode) -> None:
    """0 with a line on stdout when all is well; 2 usage, 3 where slurm-mps never was, 4 for anybody but root."""
    result = node.reconcile()
    assert (result.returncode, result.stdout) == (0, "nothing is left of jobs that are over\n")
    assert node.reconcile("--nonsense").returncode == 2
    result = node.run(COMMAND, "reconcile", user="alice")
    assert (result.returncode, result.stdout) == (4, "")
    assert "run it as root" in result.stderr
    node.run("rm", "-r", STATE_DIRECTORY).check()
    result = node.reconcile("--json")
    error = "nothing of slurm-mps is on this node"
    assert (result.returncode, json.loads(result.stdout)["error"]) == (3, error)
    assert error in result.stderr
    node.prolog(4711).check()
    node.slurm_says({4711: "RUNNING|N/A|n1"})
    result = node.reconcile()
    assert result.stderr == "slurm-mps: job 4711 is not over: to Slurm it is RUNNING\n"
    report = json.loads(node.reconcile("--json", "--dry-run").stdout)
    why = "to Slurm it is RUNNING"
    assert report.pop("slurm_mps") == __version__
    assert report == {
        "report": "reconcile/1",
        "dry_run": True,
        "status": 0,
        "repairs": [{"thing": "job 4711", "outcome": "kept", "why": why}],
    }
    node.epilog(4711).check()


def test_the_unit_runs_it_at_boot_before_slurmd() -> None:
    """systemd finds nothing wrong with the sample unit but that the program is not installed here."""
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[method-assign,assignment]
    unit.read(ETC / "slurm-mps-reconcile.service")
    assert unit["Service"]["ExecStart"] == "/opt/slurm-mps/bin/slurm-mps reconcile"
    assert "slurmd.service" in unit["Unit"]["Before"].split()
    assert unit["Service"]["SuccessExitStatus"] == "3"


# ---------------------------------------------------------------------------------------------------- on a real Slurm


@pytest.mark.every_release
def test_real_jobs_are_known_for_what_they_are(site: Site) -> None:
    """One with a step, one that salloc holds without any, one that waits again with the same id, and one over."""
    start = ["-wn1", "--gres=gpu:1", "--mps"]
    running = site.cluster.sbatch(*start, script="sleep 60\n")
    site.cluster.wait_running(running)
    holding = site.machine.popen(
        ["salloc", "-Q", "--kill-command=KILL", *start, "sleep", "60"],
        user="alice",
        cwd="/home/alice",
        stderr=subprocess.DEVNULL,
    )
    up = Counter({"nvidia-cuda-mps": 4, "sleep": 2})
    site.cluster.until("both are up", lambda: Counter(p.comm for p in site.machine.processes()) >= up or None, 20)
    assert re.search(
        r"^job .* node=n1 ", site.machine.read(f"{STATE_DIRECTORY}/jobs/{running}/journal", node="n1"), re.MULTILINE
    )
    found = reconcile(site)
    assert found == {f"job {running}": "kept", f"job {int(str(running)) + 1}": "kept"}
    site.fault("n1", "nvml.SetComputeMode=4")
    site.machine.run(["scontrol", "requeuehold", str(running)]).check()
    site.cluster.scancel(site.cluster.sbatch(script="true"))
    site.machine.signal(holding, signal.SIGTERM)
    site.cluster.until("n1 is drained", lambda: site.cluster.node_states()["n1"].drained or None, 30)
    site.cluster.until(
        "no epilog is at work",
        lambda: "COMPLETING" not in site.machine.run(["squeue", "-h", "-tall", "-o%T"]).stdout or None,
        30,
    )
    assert set(reconcile(site, 1).values()) == {"left"}
    site.fault("n1")
    assert set(reconcile(site).values()) == {"repaired"}
    assert site.state_files("n1") == []
    site.cluster.scancel(running)
    site.cluster.resume("n1")


def reconcile(site: Site, status: int = 0) -> dict[str, str]:
    result = site.node("n1", COMMAND, "reconcile", "--json")
    assert result.returncode == status, f"{result.stdout}{result.stderr}"
    return {repair["thing"]: repair["outcome"] for repair in json.loads(result.stdout)["repairs"]}
