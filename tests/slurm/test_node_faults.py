"""Faults of a node on a real Slurm: by the site's policy the node drains, the job fails, or it runs without MPS."""

from __future__ import annotations

import contextlib
import json
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

import pytest

from tests.harness.cluster import SAMPLES, waits_for
from tests.harness.gpunode import EPILOG, PROLOG, asked, job_environment
from tests.harness.runtime import MOUNT_POINT
from tests.harness.site import PARTITIONS, PYTHON, STATE_DIRECTORY, Site

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from tests.harness.gpunode import GpuNode
    from tests.harness.machine import Result

    Plant = Callable[[Site, str], AbstractContextManager[None]]

POLICIES = ("drain", "fail_job", "run_without_mps")
SHORT = "[deadlines]\ncommand = 0.3\nquit = 0.3\nsignal = 0.3\n"
SLURMD_LOG = "/var/log/slurm/slurmd-n1.log"
ASKED = ("-wn1", "--gres=gpu:1", "--mps-threads=25", "--mps-mem=8G")
SAY = ("sh", "-c", 'echo "ran, $CUDA_MPS_PIPE_DIRECTORY"')


# ------------------------------------------------------------------------------------------------- planting faults


def driver(*faults: str) -> Plant:
    """The simulated driver misbehaves."""

    @contextlib.contextmanager
    def planted(site: Site, _config: str) -> Iterator[None]:
        site.fault("n1", *faults)
        yield
        site.fault("n1")

    return planted


def mounted(*commands: str) -> Plant:
    """Something else is mounted on the node's state directory."""

    @contextlib.contextmanager
    def planted(site: Site, _config: str) -> Iterator[None]:
        site.node("n1", "sh", "-ec", f"mkdir -p {STATE_DIRECTORY}; {'; '.join(commands)}").check()
        yield
        site.node("n1", "umount", STATE_DIRECTORY).check()

    return planted


FULL = (
    f"mkdir -p {STATE_DIRECTORY}",
    f"mount -t tmpfs -o size=4k,mode=711 none {STATE_DIRECTORY}",
    f"cat /dev/zero >{STATE_DIRECTORY}/fill 2>/dev/null || true",
)
CLOCK_NANOSLEEP = "230 "
NOWHERE = {"CUDA_MPS_PIPE_DIRECTORY": "/dev/null"}


@contextlib.contextmanager
def foreign_process(site: Site, _config: str) -> Iterator[None]:
    """A program that outlived its job has a context on the GPU."""
    client = site.machine.popen(["simulated-gpus", "client", "--hold", "60"], node="n1", user="bob", env=NOWHERE)
    listed = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    site.cluster.until("its context", lambda: site.node("n1", *listed).stdout.strip() or None, 10)
    yield
    site.machine.signal(client, signal.SIGKILL)
    client.wait(5)


@contextlib.contextmanager
def newer_ledger(site: Site, _config: str) -> Iterator[None]:
    """A newer slurm-mps has left its note on the GPU."""
    place = f"{STATE_DIRECTORY}/gpus/{site.gpus('n1')[0]['uuid']}"
    text = "slurm-mps ledger 2\nend 00000000\n"
    site.machine.write(place, text, mode=0o600, node="n1")
    yield
    assert site.machine.read(place, node="n1") == text
    site.machine.path(place, node="n1").unlink()


@contextlib.contextmanager
def broken_config(site: Site, config: str) -> Iterator[None]:
    """An admin's typo, after the file was right once."""
    environment = job_environment(999999, SPANK_MPS_THREADS="0")
    for hook in (PROLOG, EPILOG):
        site.node("n1", hook, env=environment).check()
    site.configure(f"{config}[gpus]\ncolour = 'red'\n")
    yield


@dataclass(frozen=True)
class Fault:
    """Something wrong with the node, and words of the message that names it. kept: whether /run can hold anything."""

    plant: Plant
    says: str
    kept: bool = True


FAULTS = {
    "daemon does not start": Fault(driver("daemon.start=exit:1"), "nvidia-cuda-mps-control -d ended with status 1"),
    "daemon does not answer": Fault(driver("command.*=hang"), "nvidia-cuda-mps-control did not answer within 0.3 s"),
    "NVML error": Fault(driver("nvml.init=9"), "nvmlInit_v2: Driver Not Loaded (NVML error 9)"),
    "GPU lost": Fault(driver("gpu.0=lost"), "GPU is lost (NVML error 15)"),
    "compute mode refused": Fault(driver("nvml.SetComputeMode=4"), "nvmlDeviceSetComputeMode: Insufficient Perm"),
    "foreign process": Fault(foreign_process, "(simulated-gpus of uid 20002), though Slurm has just given it to this"),
    "disk full": Fault(mounted(*FULL), "No space left on device", kept=False),
    "read-only /run": Fault(
        mounted(f"mount --bind {STATE_DIRECTORY} {STATE_DIRECTORY}", f"mount -o remount,bind,ro {STATE_DIRECTORY}"),
        "Read-only file system",
        kept=False,
    ),
    "no ACLs": Fault(mounted(f"mount -t ramfs none {STATE_DIRECTORY}"), "the file system has no POSIX ACLs"),
    "newer state": Fault(newer_ledger, "ledger version 2 is newer than version 1"),
    "broken configuration": Fault(broken_config, "mps.toml: gpus.colour: unknown; expected one of compute_mode"),
}


def said_by_slurmd(site: Site, after: int) -> str:
    return site.machine.read(SLURMD_LOG)[after:]


def messages(result: Result) -> list[str]:
    """What the plugin said in the job's output."""
    return [line for line in result.stderr.splitlines() if "error: mps: " in line]


@pytest.mark.parametrize(
    ("fault", "policy"),
    [
        (fault, policy)
        for number, fault in enumerate(FAULTS)
        for policy in POLICIES
        if policy == POLICIES[number % 3] or fault in ("NVML error", "disk full")
    ],
)
def test_a_fault_of_the_node_goes_by_the_sites_policy(site: Site, fault: str, policy: str) -> None:
    """Each is named to whoever has to act on it; nothing is left, and the node works once it is well.

    Each fault by one policy, and by all of them one fault that leaves room in /run and one that does not: how a fault
    is told does not hang on what it is (tests/node/test_hooks_failures.py).
    """
    it = FAULTS[fault]
    config = f'{SHORT}[policy]\nnode_fault = "{policy}"\n'
    site.configure(config)
    logged = len(site.machine.read(SLURMD_LOG))
    with it.plant(site, config):
        result = site.cluster.srun(*ASKED, *SAY)
        site.cluster.wait_idle()
        state = site.cluster.node_states()["n1"]
        last_fault = site.machine.path(f"{STATE_DIRECTORY}/last-fault", node="n1")
        remembered = last_fault.read_text() if it.kept else it.says
    slurmd = said_by_slurmd(site, logged)
    if policy == "drain":
        site.cluster.resume("n1")
        assert (state.state, state.reason.split(" [")[0]) == ("IDLE+DRAIN", "Prolog error")
        assert "prolog failed: rc:1 output:slurm-mps: job " in slurmd
        assert it.says in slurmd
        assert (result.returncode != 0, result.stdout) == (True, "")
    else:
        runs = policy == "run_without_mps"
        (message,) = messages(result)
        assert state.state == "IDLE"
        assert ("RUNS WITHOUT MPS on this node, with no limits" in message) == runs
        assert ": this node cannot give it MPS: " in message
        assert it.says in message
        assert (result.returncode == 0, result.stdout) == (runs, "ran, /dev/null\n" if runs else "")
    assert it.says in remembered


@pytest.mark.every_release
@pytest.mark.parametrize(
    ("policy", "state", "ran", "told"),
    [("run_without_mps", "COMPLETED", ["one", "two"], 3), ("fail_job", "FAILED", [], 1)],
)
def test_a_batch_job_ends_or_runs_by_the_sites_policy(
    site: Site, policy: str, state: str, ran: list[str], told: int
) -> None:
    """Its output says why, once for each step on the node. Of a node that drains see test_job_kinds.py."""
    site.configure(f'[policy]\nnode_fault = "{policy}"\n')
    site.fault("n1", "nvml.init=9")
    output = site.cluster.run_batch(*ASKED, script="srun echo one\nsrun echo two", state=state)
    said = [words for _, words in site.cluster.said(output) if words.startswith("job ")]
    assert ([line for line in output.splitlines() if line in ("one", "two")], len(said)) == (ran, told)


# ----------------------------------------------------------------------------------------------- running without MPS

WITHOUT = '[policy]\nnode_fault = "run_without_mps"\n'
NO_DAEMON = "daemon.start=exit:1"
ENVIRONMENT = 'import json, os; print(json.dumps({k: v for k, v in os.environ.items() if "CUDA" in k or "_MPS_" in k}))'


@pytest.fixture
def daemon_of_the_node(site: Site) -> Iterator[None]:
    """A control daemon where every program looks that is not told otherwise."""
    site.node("n1", "nvidia-cuda-mps-control", "-d").check()
    yield
    quit_it = "echo quit | nvidia-cuda-mps-control; rm -rf /tmp/nvidia-mps /var/log/nvidia-mps"
    site.node("n1", "sh", "-c", quit_it).check()


@pytest.mark.usefixtures("daemon_of_the_node")
def test_a_job_without_mps_is_nobodys_client(site: Site) -> None:
    """Neither the node's own daemon nor one that the user's environment names; nothing promises a limit."""
    site.configure(WITHOUT)
    site.fault("n1", NO_DAEMON)
    stale = {
        "CUDA_MPS_LOG_DIRECTORY": "/tmp",
        "CUDA_MPS_CLIENT_PRIORITY": "1",
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "10",
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=1G",
    }
    for env in (stale, {**stale, "CUDA_MPS_PIPE_DIRECTORY": "/tmp/nvidia-mps"}):
        client = site.cluster.srun(*ASKED, "simulated-gpus", "client", env=env).check()
        shown = json.loads(site.cluster.srun(*ASKED, PYTHON, "-c", ENVIRONMENT, env=env).check().stdout)
        assert "sms=132 free=142629 total=143155 mps=none" in client.stdout
        assert shown.pop("CUDA_MPS_SET_BY_SLURM") == "CUDA_MPS_PIPE_DIRECTORY=/dev/null"
        assert shown.pop("SLURM_MPS_NODE_FAULT").startswith("this node cannot give it MPS: ")
        assert {name: value for name, value in shown.items() if "SPANK" not in name} == {
            "CUDA_MPS_PIPE_DIRECTORY": "/dev/null", "CUDA_VISIBLE_DEVICES": "0"
        }  # fmt: skip
    ours = site.cluster.srun("-wn1", "--gres=gpu:1", "simulated-gpus", "client").check().stdout
    assert "mps=none" not in ours, "the node's daemon would have been found"


@pytest.mark.parametrize("faulty", ["n1", "n2"])
def test_each_node_of_a_job_decides_for_itself(site: Site, faulty: str) -> None:
    """The tasks of one node run without, those of the other with MPS and its limits, wherever the script runs."""
    site.configure(WITHOUT)
    site.fault(faulty, "nvml.init=9")
    told = 'echo "$SLURMD_NODENAME ${SLURM_MPS_NODE_FAULT:+without} $(simulated-gpus client)"'
    script = f"srun -N2 --ntasks-per-node=1 sh -c '{told}'"
    output = site.cluster.run_batch("-N2", "--gres=gpu:1", "--mps-threads=25", script=script)
    ran = {line.split()[0]: line for line in output.splitlines() if "uuid=" in line}
    well = "n2" if faulty == "n1" else "n1"
    assert f"{faulty} without uuid=" in ran[faulty]
    assert " sms=132 " in ran[faulty]
    assert "mps=none" in ran[faulty]
    assert f"{well}  uuid=" in ran[well]
    assert " sms=32 " in ran[well]
    assert "mps=none" not in ran[well]
    said = [node for node, _ in site.cluster.said(output)]
    assert said == [faulty] * (2 if faulty == "n1" else 1)


def test_verify_says_that_the_job_runs_without_mps(site: Site) -> None:
    """And why, which nothing else in a step would."""
    site.configure(WITHOUT)
    site.fault("n1", NO_DAEMON)
    result = site.cluster.srun("-n2", *ASKED, f"{MOUNT_POINT}/bin/slurm-mps", "verify")
    assert result.returncode != 0
    assert (
        "ranks 0-1 run without MPS: this node cannot give it MPS: /usr/bin/nvidia-cuda-mps-control -d" in result.stdout
    )
    assert "; this site lets jobs run without MPS on a faulty node" in result.stdout


def test_what_a_step_asks_has_no_effect_without_mps(site: Site) -> None:
    """The job runs, so its steps do, too."""
    site.configure(WITHOUT)
    site.fault("n1", NO_DAEMON)
    script = "srun --mps-threads=10 --mps-mem=1G simulated-gpus client"
    output = site.cluster.run_batch(*ASKED, script=script)
    assert "sms=132 free=142629 " in output


def test_a_new_job_is_not_told_of_anothers_fault(site: Site) -> None:
    """What stands in the environment of a job without MPS is not for the jobs that it submits."""
    script = "echo ${SLURM_MPS_NODE_FAULT:-no fault}"
    env = {"SLURM_MPS_NODE_FAULT": "of another job"}
    assert site.cluster.run_batch("--gres=gpu:1", script=script, env=env) == "no fault\n"


# -------------------------------------------------------------------------------------------------- not by the policy


def test_a_users_mistake_is_no_fault_of_the_node(site: Site) -> None:
    """Where faults let a job run without MPS, a wrong request fails it all the same, and never drains."""
    site.configure(WITHOUT)
    result = site.cluster.srun("-wn1", "--gres=gpu:1", "--mps-mem=200G", *SAY)
    (message,) = messages(result)
    assert (result.returncode != 0, result.stdout) == (True, "")
    assert "--mps-mem=200G is more than GPU-" in message
    assert "WITHOUT" not in message


@pytest.mark.parametrize("policy", POLICIES)
def test_state_of_the_same_job_that_cannot_be_read_drains(gpu_node: GpuNode, policy: str) -> None:
    """A daemon of the job may still run on its GPU, which this version does not know how to end."""
    gpu_node.configure(f'[policy]\nnode_fault = "{policy}"\n')
    gpu_node.prolog(4711).check()
    journal = gpu_node.machine.path(f"{STATE_DIRECTORY}/jobs/4711/journal")
    whole = journal.read_bytes()
    journal.write_bytes(b"slurm-mps journal 3\nend 00000000\n")
    result = gpu_node.run(PROLOG, env=job_environment(4711, SLURM_JOB_RESTART_COUNT="1", **asked()))
    journal.write_bytes(whole)
    assert result.returncode == 1
    assert "journal version 3 is newer than version 1" in result.stderr


def test_a_job_does_not_run_where_something_could_not_be_undone(gpu_node: GpuNode) -> None:
    """Its programs would meet the wrong compute mode, or a daemon on their GPU: it fails, and the epilog goes on."""
    is_set = "nvidia-smi --query-gpu=compute_mode --format=csv,noheader | grep -q Exclusive"
    breaks = f"#!/bin/sh\nuntil {is_set}; do :; done\nsimulated-gpus fault nvml.SetComputeMode=4\nexit 1\n"
    gpu_node.machine.write("/run/breaks-nvml", breaks, mode=0o755)
    gpu_node.configure(f'[paths]\ncontrol_program = "/run/breaks-nvml"\n{WITHOUT}')
    result = gpu_node.prolog(4711, gpus="0")
    verdict = gpu_node.verdict(4711)
    assert (result.returncode, verdict["status"], gpu_node.epilog(4711).returncode) == (0, "refused", 1), verdict
    assert "; and it could not be undone: " in verdict["message"]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_job_that_can_be_told_nowhere_drains(gpu_node: GpuNode, policy: str) -> None:
    """Neither /run nor /var/log takes its verdict: its tasks would say that no prolog ran."""
    gpu_node.configure(f'[policy]\nnode_fault = "{policy}"\n')
    no_logs = "mkdir -p /var/log/slurm-mps", "mv /var/log/slurm-mps /var/log/kept", "touch /var/log/slurm-mps"
    gpu_node.run("sh", "-ec", "; ".join((*FULL, *no_logs))).check()
    result = gpu_node.prolog(4711)
    logs_again = "rm /var/log/slurm-mps", "mv /var/log/kept /var/log/slurm-mps"
    gpu_node.run("sh", "-ec", "; ".join((f"umount {STATE_DIRECTORY}", *logs_again))).check()
    assert result.returncode == 1
    assert "No space left on device" in result.stderr
    assert ("/var/log/slurm-mps: Not a directory" in result.stderr) == (policy != "drain")


def test_a_job_that_did_not_ask_drains_where_its_tasks_do_not_look(gpu_node: GpuNode) -> None:
    """They look for a verdict in /run alone, and would run without MPS."""
    gpu_node.configure('[policy]\nnode_fault = "fail_job"\n')
    gpu_node.machine.write(f"{PARTITIONS}/gpu", "per-node\n")
    gpu_node.run("sh", "-ec", "; ".join(FULL)).check()
    result = gpu_node.run(PROLOG, env=job_environment(4711, SLURM_JOB_PARTITION="gpu"))
    gpu_node.run("umount", STATE_DIRECTORY).check()
    gpu_node.run("rm", "-r", PARTITIONS).check()
    assert result.returncode == 1, result
    assert "a job that did not ask for MPS would run without it" in result.stderr


def somebody_on_a_gpu(node: GpuNode) -> subprocess.Popen[bytes]:
    """A program without MPS that has a context."""
    other = node.start("simulated-gpus", "client", "--hold", "60", user="bob", env=NOWHERE)
    while not node.run("nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader").stdout.strip():
        assert other.poll() is None
    return other


@pytest.mark.parametrize("setting", ['compute_mode = "unchanged"', 'sharing = "separate"'])
def test_who_else_is_on_a_shared_gpu_is_no_fault(gpu_node: GpuNode, setting: str) -> None:
    """Where the compute mode is left alone a server starts beside other programs."""
    gpu_node.configure(f"[gpus]\n{setting}\n")
    other = somebody_on_a_gpu(gpu_node)
    result = gpu_node.prolog(4711)
    works = gpu_node.client(4711).stdout
    gpu_node.machine.signal(other, signal.SIGKILL)
    other.wait(5)
    assert (result.returncode, result.stderr) == (0, "")
    assert "mps=none" not in works


def test_a_process_that_is_about_to_end_is_waited_for(gpu_node: GpuNode) -> None:
    """A driver that is slow to let go of the last job's program drains no node."""
    other = somebody_on_a_gpu(gpu_node)
    prolog = gpu_node.start(PROLOG, env=job_environment(4711, **asked()))
    doing = Path(f"/proc/{gpu_node.machine.host_pid(prolog)}/syscall")
    while not doing.read_text().startswith(CLOCK_NANOSLEEP):
        assert prolog.poll() is None
    gpu_node.machine.signal(other, signal.SIGKILL)
    status = prolog.wait(10)
    gpu_node.epilog(4711).check()
    other.wait(5)
    assert status == 0


# ------------------------------------------------------------------------------------------------------ hung helpers

IMPATIENT = "MessageTimeout=3\nHealthCheckProgram=/etc/slurm/health-check.sh\nHealthCheckInterval=1"
STUBBORN = ("command.quit=ignore", "daemon.sigterm=ignore", "server.sigterm=ignore")
FREEZER = "/sys/fs/cgroup/freezer/mps-test"


@pytest.fixture(scope="module")
def impatient_site() -> Iterator[Site]:
    """A cluster whose MessageTimeout is less than an epilog may take, and which has the health check."""
    with Site(nodes=1, extra_slurm_conf=IMPATIENT) as site:
        site.machine.write("/etc/slurm/health-check.sh", (SAMPLES / "health-check.sh").read_text(), mode=0o755)
        yield site


def test_an_epilog_may_take_longer_than_messagetimeout(impatient_site: Site) -> None:
    """The node stays in service, the next job on its GPUs waits for the end, and both end well."""
    site = impatient_site
    site.configure("[deadlines]\nquit = 2\nsignal = 2\n")
    script = f"srun simulated-gpus client; echo done; {waits_for()}"
    first = site.cluster.sbatch("--gres=gpu:4", "--mps", script=script, until="done")
    site.fault("n1", *STUBBORN)
    second = site.cluster.sbatch("--gres=gpu:4", "--mps-threads=25", script="exec simulated-gpus client")
    began = monotonic()
    site.cluster.let_go(first)
    seen = set()
    while site.cluster.job_info(second).state == "PENDING":
        assert monotonic() - began < 20
        seen.add(site.cluster.node_states()["n1"].state)
    took = monotonic() - began
    site.fault("n1")
    states = [site.cluster.wait(job).state for job in (first, second)]
    log = site.machine.read(SLURMD_LOG)
    assert took > 3
    assert states == ["COMPLETED", "COMPLETED"]
    assert "sms=32 " in site.cluster.output(second)
    assert not [state for state in seen if "DRAIN" in state or "DOWN" in state or "NO" in state or "*" in state], seen
    assert re.search(site.cluster.release.epilog_ran.format(job=first), log)
    assert "error: epilog failed" not in log


def frozen(site: Site) -> list[str]:
    """Have the node's MPS processes frozen: like those that wait in the driver, not even SIGKILL ends them."""
    pids = [str(process.pid) for process in site.machine.processes() if process.comm.startswith("nvidia-cuda-mps")]
    adding = "".join(f"echo {pid} >{FREEZER}/cgroup.procs; " for pid in pids)
    site.node("n1", "sh", "-ec", f"mkdir {FREEZER}; {adding} echo FROZEN >{FREEZER}/freezer.state").check()
    return pids


def test_what_cannot_be_killed_drains_the_node_with_a_reason(impatient_site: Site) -> None:
    """The epilog ends in its time and names what is left; no job is given the GPU until an admin has looked."""
    site = impatient_site
    if "freezer" not in site.machine.cgroups:
        pytest.skip("needs the freezer controller of cgroup v1")
    site.configure("[deadlines]\nquit = 0.3\nsignal = 0.3\n")
    script = f"srun simulated-gpus client; echo done; {waits_for()}"
    job = site.cluster.sbatch("--gres=gpu:1", "--mps", script=script, until="done")
    pids = frozen(site)
    site.cluster.let_go(job)
    state = site.cluster.wait(job, 20).state
    drained = site.cluster.node_states()["n1"].state
    words = f"MPS processes {', '.join(pids)} of {STATE_DIRECTORY}/jobs/{job}/pipe are still there"
    reason = site.cluster.until(
        "the health check", lambda: ("slurm-mps" in (r := site.cluster.node_states()["n1"].reason) and r) or None, 20
    )
    listed = site.machine.run(["sinfo", "-R", "-h", "-o", "%E"]).stdout
    site.node("n1", "sh", "-c", f"echo THAWED >{FREEZER}/freezer.state").check()
    site.cluster.until("their end", lambda: not site.mps_processes() or None, 10)
    site.node("n1", EPILOG, env=job_environment(job.id)).check()
    site.node("n1", "rmdir", FREEZER).check()
    site.cluster.resume("n1")
    works = site.cluster.srun("--gres=gpu:1", "--mps", "simulated-gpus", "client").check().stdout
    assert (state, drained) == ("COMPLETED", "IDLE+DRAIN")
    assert f"error: epilog failed: rc:1 output:slurm-mps: job {job}: {words}" in site.machine.read(SLURMD_LOG)
    assert reason.startswith(f"slurm-mps: job {job}: {words}")
    assert words in listed
    assert "mps=none" not in works


# --------------------------------------------------------------------------------------------------- room for logs


@pytest.mark.parametrize("room", ["size=4k", "size=4k,nr_inodes=2"], ids=["no space", "no inodes"])
def test_a_full_log_directory_costs_logs_and_nothing_else(site: Site, room: str) -> None:
    """The job has its MPS and the node stays in service, be there room for empty files only or not even for those.

    What the logs lack is not told as if nothing had happened.
    """
    logs = "/var/log/slurm-mps"
    mount = f"mkdir -p {logs}; mount -t tmpfs -o {room},mode=711 none {logs}"
    site.node("n1", "sh", "-ec", f"{mount}; cat /dev/zero >{logs}/fill 2>/dev/null || true").check()
    result = site.cluster.srun(*ASKED, "simulated-gpus", "client")
    site.cluster.wait_idle()
    state = site.cluster.node_states()["n1"].state
    (job_id,) = site.machine.run(["squeue", "-h", "-tall", "-o%A"]).stdout.split()[-1:]
    told = site.node("n1", "slurm-mps", "logs", job_id)
    site.node("n1", "umount", logs).check()
    assert (told.returncode, told.stdout) in ((1, ""), (3, "")), told
    assert " sms=32 free=8047 " in result.check().stdout
    assert state == "IDLE"


def size_of(node: GpuNode, directory: str) -> int:
    """Bytes of all files below."""
    found = node.run("find", directory, "-type", "f", "-printf", "%s\n").stdout.split()
    return sum(map(int, found))


def test_logs_and_verdicts_have_a_bound_in_total(gpu_node: GpuNode) -> None:
    """However many jobs there were, well or not: so many jobs, and of each so much for each of its daemons."""
    bound = '[logs]\nmax_kib = 1\nmax_jobs = 3\n[policy]\nnode_fault = "fail_job"\n'
    gpu_node.configure(bound)
    gpu_node.run("rm", "-rf", "/var/log/slurm-mps").check()  # other tests' jobs, whatever their ids
    for job in range(5001, 5006):
        gpu_node.prolog(job, SPANK_MPS="per-gpu").check()
        for gpu in (0, 1):
            pipe = {"CUDA_MPS_PIPE_DIRECTORY": f"{STATE_DIRECTORY}/jobs/{job}/gpu-{gpu}"}
            gpu_node.run("nvidia-cuda-mps-control", env=pipe, text="get_default_client_priority\n" * 100).check()
        gpu_node.epilog(job).check()
    logged = size_of(gpu_node, "/var/log/slurm-mps"), len(gpu_node.run("ls", "/var/log/slurm-mps").stdout.split())
    gpu_node.run("sh", "-ec", "; ".join(FULL)).check()
    for job in range(5006, 5012):
        gpu_node.prolog(job).check()
    gpu_node.run("umount", STATE_DIRECTORY).check()
    left = gpu_node.run("ls", "/var/log/slurm-mps").stdout.split()
    assert logged[0] <= 3 * 2 * 2 * 1024
    assert logged[1] == 3
    assert (len(left), left[-1]) == (4, "5011")
