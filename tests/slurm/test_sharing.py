"""Several jobs on one GPU, as Slurm gives it to them with gres/mps and gres/shard."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from tests.harness.cluster import waits_for
from tests.harness.site import STATE_DIRECTORY, Site

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.cluster import Job

SEPARATE = '[gpus]\nsharing = "separate"\nshards_per_gpu = 4\n'
JOINED = '[gpus]\nsharing = "joined"\nshards_per_gpu = 4\n'
ALL_USERS = f'{JOINED}joined_users = "all"\n[limits.memory]\nmax = "64G"\n'
#: A rank that says what it has of a GPU.
LOOK = "simulated-gpus client --hold 0.1"


@pytest.fixture(scope="module", params=[False, True], ids=["free", "constrained"])
def sharded(request: pytest.FixtureRequest) -> Iterator[Site]:
    with Site(nodes=1, gpus_per_node=1, shards_per_node=4, constrain_devices=request.param) as site:
        yield site


@pytest.fixture(scope="module")
def parted() -> Iterator[Site]:
    """Two GPUs, each in a hundred parts."""
    with Site(nodes=1, gpus_per_node=2, mps_per_node=200, constrain_devices=True) as site:
        yield site


def start(site: Site, *ask: str, user: str = "alice") -> Job:
    """A job whose client stays until it is let go."""
    script = f"echo started; {LOOK}; {waits_for()}; echo over"
    return site.cluster.sbatch("-n1", *ask, script=script, user=user)


def outputs(site: Site, *jobs: Job) -> list[str]:
    for job in jobs:
        site.cluster.let_go(job)
        site.cluster.wait(job)
    return [site.cluster.output(job) for job in jobs]


def test_separate_each_job_has_its_own_daemon_and_limits(sharded: Site) -> None:
    """A shard is a quarter of the GPU's threads and memory; a GPU that was exclusive is DEFAULT meanwhile."""
    sharded.configure(SEPARATE)
    sharded.set_compute_mode("n1", 0, 3)
    before = sharded.snapshot()
    jobs = [start(sharded, "--gres=shard:1", "--mps"), start(sharded, "--gres=shard:2", "--mps", user="bob")]
    for job in jobs:
        sharded.cluster.until_output(job, "uuid=")
    during = sharded.compute_modes("n1")
    first, second = outputs(sharded, *jobs)
    assert "sms=32 free=35" in first
    assert "sms=66 free=71" in second
    assert first.rpartition("mps=")[2] != second.rpartition("mps=")[2]
    assert during == ["Default"]
    assert sharded.snapshot() == before
    sharded.set_compute_mode("n1", 0, 0)


def test_refused_the_second_job_is_told_who_holds_the_gpu_and_the_first_is_not_disturbed(sharded: Site) -> None:
    sharded.configure("")
    before = sharded.snapshot()
    holder = start(sharded, "--gres=shard:1", "--mps-threads=25")
    sharded.cluster.until_output(holder, "uuid=")
    late = start(sharded, "--gres=shard:1", "--mps", user="bob")
    said = outputs(sharded, late)[0]
    during = sharded.compute_modes("n1")
    held = outputs(sharded, holder)[0]
    assert f"is held by MPS job {holder}, and this site shares no GPU between MPS jobs; ask for a whole GPU" in said
    assert "started" not in said
    assert during == ["Exclusive_Process"]
    assert "over" in held
    assert "FAILED" not in held
    assert not any(state.drained for state in sharded.cluster.node_states().values())
    assert sharded.snapshot() == before


def test_a_job_beside_one_that_uses_the_gpu_without_mps_is_refused_and_no_node_drains(sharded: Site) -> None:
    """Slurm gave both a part of it, and an exclusive GPU would take the other's programs away."""
    sharded.configure("")
    before = sharded.snapshot()
    plain = sharded.cluster.sbatch("-n1", "--gres=shard:1", script="srun simulated-gpus client --work 60")
    sharded.cluster.until_output(plain, "uuid=")
    said = sharded.cluster.run_batch("-n1", "--gres=shard:1", "--mps", script="echo started", state="FAILED")
    sharded.cluster.scancel(plain)
    sharded.cluster.wait_idle()
    assert f"is in use by job {plain}, which runs programs there without MPS; submit the job again" in said
    assert not any(state.drained for state in sharded.cluster.node_states().values())
    assert sharded.snapshot() == before


@pytest.mark.every_release
@pytest.mark.parametrize(
    ("options", "ranks", "sms", "free_mib"),
    [
        ((), 1, 32, 35600),  # a quarter of the threads, and of the memory
        ((), 4, 32, 8700),  # which the job's processes divide
        (("--mps-threads=10", "--mps-mem=2G"), 1, 12, 1900),
    ],
)
def test_gres_mps_alone_asks_for_that_part_of_a_gpu(
    parted: Site, options: tuple[str, ...], ranks: int, sms: int, free_mib: int
) -> None:
    """No option of ours is needed: Slurm says how much of the GPU a job has, and it has as much of the memory."""
    parted.configure(SEPARATE)
    before = parted.snapshot()
    script = f"srun {LOOK} && srun slurm-mps verify"
    said = parted.cluster.run_batch(f"-n{ranks}", "--gres=mps:25", *options, script=script)
    looks = [dict(word.split("=") for word in line.split()) for line in said.splitlines() if line.startswith("uuid=")]
    assert len(looks) == ranks
    for look in looks:
        assert look["mps"] != "none"
        assert int(look["sms"]) == sms
        assert free_mib * 0.9 < int(look["free"]) < free_mib * 1.1
    assert parted.snapshot() == before


@pytest.mark.parametrize(
    ("config", "ask", "said"),
    [
        (
            SEPARATE,
            ("--gres=mps:25", "--mps-threads=50"),
            "--mps-threads=50 is more than --gres=mps gives the job of a GPU (25 %); ask for --mps-threads=25 or less",
        ),
        (SEPARATE, ("--gres=mps:0", "--mps"), "this job has no GPU on this node"),
        (
            "",
            ("--gres=mps:25",),
            "and this site gives MPS jobs whole ones; ask for --gres=gpu:1 --mps-threads=25, or your admin",
        ),
    ],
)
def test_a_part_that_cannot_be_had_is_refused_with_the_numbers(
    parted: Site, config: str, ask: tuple[str, ...], said: str
) -> None:
    """One message in the job's output; the job fails and the node stays in service."""
    parted.configure(config)
    before = parted.snapshot()
    output = parted.cluster.run_batch("-n1", *ask, script="echo started", state="FAILED")
    assert said in output
    assert "started" not in output
    assert not any(state.drained for state in parted.cluster.node_states().values())
    assert parted.snapshot() == before


def test_joined_jobs_have_one_server_and_limits_of_their_own(parted: Site) -> None:
    """Each job looks as if it were alone: its part, its clients in status, its logs; the GPU stays exclusive."""
    parted.configure(JOINED)
    before = parted.snapshot()
    first = start(parted, "--gres=mps:25")
    parted.cluster.until_output(first, "uuid=")
    during = parted.compute_modes("n1")
    look = f"srun {LOOK}; srun slurm-mps verify; srun --overlap slurm-mps status; echo looked; {waits_for()}"
    second = parted.cluster.sbatch("-n2", "--gres=mps:50", script=look, until="looked")
    other = start(parted, "--gres=mps:25", user="bob")
    told = outputs(parted, other)[0]
    parted.cluster.let_go(first)
    parted.cluster.wait(first)
    parted.cluster.let_go(second)
    parted.cluster.wait(second)
    one, two = parted.cluster.output(first), parted.cluster.output(second)
    assert "sms=32 free=35" in one
    assert two.count("sms=66 free=35") == 2
    assert {line.rpartition("mps=")[2] for line in (one + two).splitlines() if "mps=" in line} != {"none"}
    assert len({line.rpartition("mps=")[2] for line in (one + two).splitlines() if line.startswith("uuid=")}) == 1
    assert "2 ranks, all clients, each GPU's ranks share one server" in two
    assert "is held by an MPS job of another user; this site joins jobs of one user only" in told
    assert during[0] == "Exclusive_Process"
    assert not any(state.drained for state in parted.cluster.node_states().values())
    assert parted.snapshot() == before
    logs = parted.node("n1", "slurm-mps", "logs", str(second), user="alice")
    assert logs.returncode == 0, logs.stderr


def clients(site: Site, user: str | None) -> dict[int, int]:
    """How many programs of each job somebody sees."""
    said = json.loads(site.node("n1", "slurm-mps", "status", "--json", user=user).stdout)
    return {
        job["job_id"]: sum(len(gpu["clients"]) for one in job["daemons"] for gpu in one["gpus"]) for job in said["jobs"]
    }


@pytest.mark.parametrize(("config", "other"), [(JOINED, "alice"), (ALL_USERS, "bob")], ids=["same", "all"])
def test_each_joined_job_shows_its_own_programs(parted: Site, config: str, other: str) -> None:
    """And its own logs, which are root's where the daemon serves all users: they name everybody's programs."""
    parted.configure(config)
    before = parted.snapshot()
    client = "srun -n1 simulated-gpus client --hold 60 &"
    script = f"srun slurm-mps verify; {client} {waits_for()}; kill %1; wait; echo over"
    jobs = [parted.cluster.sbatch("-n2", "--gres=mps:25", script=script, user=user) for user in ("alice", other)]
    said = [parted.cluster.until_output(job, "mps=").rpartition("mps=")[2].split()[0] for job in jobs]
    verified = [parted.cluster.output(job) for job in jobs]
    seen = clients(parted, None), clients(parted, "alice")
    server_uid = parted.node("n1", "ps", "-o", "uid=", "-p", said[0]).stdout.strip()
    logs = [parted.node("n1", "slurm-mps", "logs", str(jobs[0]), user=user).returncode for user in (None, "alice")]
    outputs(parted, *jobs)
    later = [parted.node("n1", "slurm-mps", "logs", str(jobs[0]), user=user).returncode for user in (None, "alice")]
    first, second = (int(str(job)) for job in jobs)
    assert said[0] == said[1] != "none"
    assert all("2 ranks, all clients, each GPU's ranks share one server" in output for output in verified)
    assert seen == ({first: 1, second: 1}, {first: 1} if other == "bob" else {first: 1, second: 1})
    assert (server_uid == "0") is (other == "bob")
    assert logs == later == ([0, 4] if other == "bob" else [0, 0])
    assert parted.snapshot() == before


def test_a_fault_is_explained_across_joined_jobs_and_the_next_step_of_any_tries_the_server(parted: Site) -> None:
    """Who did nothing wrong reads that another job may have; a job that comes later finds a server that works."""
    parted.configure(JOINED)
    before = parted.snapshot()
    victim = parted.cluster.sbatch("-n1", "--gres=mps:25", script="srun simulated-gpus client --work 20; echo over")
    parted.cluster.until_output(victim, "uuid=")
    culprit = parted.cluster.sbatch("-n1", "--gres=mps:25", script=f"srun simulated-gpus client --fault; {waits_for()}")
    parted.cluster.until_output(culprit, "FAILED")
    said = parted.cluster.until_output(victim, "over")
    assert re.search(
        r"process \d+, perhaps another job's of yours, hit a GPU fault on GPU-\S+ and took rank 0 along", said
    )
    marks = parted.node("n1", "find", f"{STATE_DIRECTORY}/daemons", "-name", "suspect*").stdout.split()
    next_one = parted.cluster.sbatch("-n1", "--gres=mps:25", script=f"srun {LOOK}")
    parted.cluster.wait(next_one)
    assert len(marks) == 1
    assert "sms=32 " in parted.cluster.output(next_one)
    assert not parted.node("n1", "find", f"{STATE_DIRECTORY}/daemons", "-name", "suspect*").stdout
    outputs(parted, culprit)
    assert parted.snapshot() == before


def test_a_job_from_before_its_daemon_died_leaves_its_mark_where_the_next_step_looks(parted: Site) -> None:
    """The next job's prolog started another daemon, and the first job has that one since."""
    parted.configure(JOINED)
    before = parted.snapshot()
    first = parted.cluster.sbatch("-n1", "--gres=mps:25", script=f"echo started; {waits_for()}; srun false; echo over")
    parted.cluster.until_output(first, "started")
    there = [str(one.pid) for one in parted.machine.processes() if one.comm.startswith("nvidia-cuda-mps")]
    parted.machine.run(["kill", "-9", *there])  # the server may go with its daemon
    second = start(parted, "--gres=mps:25")
    parted.cluster.until_output(second, "uuid=")
    outputs(parted, first)
    marks = parted.node("n1", "find", f"{STATE_DIRECTORY}/daemons", "-name", "suspect*").stdout.split()
    third = parted.cluster.run_batch("-n1", "--gres=mps:25", script=f"srun {LOOK}")
    after = parted.node("n1", "find", f"{STATE_DIRECTORY}/daemons", "-name", "suspect*").stdout
    outputs(parted, second)
    assert (len(marks), after) == (1, "")
    assert "sms=32 " in third
    assert parted.snapshot() == before


def test_a_fault_of_another_users_job_names_nobody_and_the_next_step_tries_the_server(parted: Site) -> None:
    """The logs are root's: the victim reads nothing of whose program it was. The mark is there for all users' steps."""
    parted.configure(ALL_USERS)
    before = parted.snapshot()
    victim = parted.cluster.sbatch(
        "-n1", "--gres=mps:25", script="srun simulated-gpus client --work 20; echo over", user="bob"
    )
    parted.cluster.until_output(victim, "uuid=")
    culprit = parted.cluster.sbatch("-n1", "--gres=mps:25", script=f"srun simulated-gpus client --fault; {waits_for()}")
    parted.cluster.until_output(culprit, "FAILED")
    said = parted.cluster.until_output(victim, "over")
    marks = parted.node("n1", "find", f"{STATE_DIRECTORY}/daemons", "-name", "suspect*").stdout.split()
    next_one = parted.cluster.sbatch("-n1", "--gres=mps:25", script=f"srun {LOOK}", user="bob")
    parted.cluster.wait(next_one)
    after = parted.node("n1", "find", f"{STATE_DIRECTORY}/daemons", "-name", "suspect*").stdout
    outputs(parted, culprit)
    assert "FAILED" in said
    assert "mps:" not in said
    assert "Traceback" not in said
    assert (len(marks), after) == (1, "")
    assert "sms=32 " in parted.cluster.output(next_one)
    assert parted.snapshot() == before


def test_an_array_of_small_jobs_over_shared_gpus(parted: Site) -> None:
    """Thirty jobs come and go on two GPUs: each has its part, no node drains, nothing is left."""
    parted.configure(f"{JOINED}[deadlines]\nprolog = 30\n")  # a job that waits longer than 4.5 s is refused
    before = parted.snapshot()
    parted.cluster.sbatch("-n1", "--array=1-30", "--gres=mps:25", "-o", "array-%a.out", script=LOOK)
    parted.cluster.wait_idle(120)
    said = parted.machine.run(["sh", "-c", "cat /home/alice/array-*.out"]).check().stdout.splitlines()
    assert [line for line in said if "sms=32 free=35" not in line or "mps=none" in line] == []
    assert len(said) == 30
    assert not any(state.drained for state in parted.cluster.node_states().values())
    assert parted.snapshot() == before
