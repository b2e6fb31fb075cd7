"""The job's directory is the gate to its control daemon: who gets in, and what they can do there (O22-O24)."""

from __future__ import annotations

import shlex

import pytest

from tests.harness.gpunode import GpuNode, asked
from tests.harness.site import STATE_DIRECTORY

JOB = f"{STATE_DIRECTORY}/jobs/4711"
LOGS = "/var/log/slurm-mps/4711"


@pytest.fixture
def alices_job(gpu_node: GpuNode) -> GpuNode:
    """A node with a running job of alice's, whose compute mode would let other programs in."""
    gpu_node.configure('[gpus]\ncompute_mode = "unchanged"\n')
    gpu_node.prolog(4711, user="alice", **asked("25", "8G")).check()
    server = gpu_node.control(4711, "get_server_list").stdout.strip()
    assert gpu_node.control(4711, f"get_server_status {server}").stdout == "ACTIVE\n"
    return gpu_node


def succeed(node: GpuNode, user: str, *commands: str) -> list[str]:
    """Which of these a user's shell can do."""
    each = "".join(
        f"(eval {shlex.quote(one)}) >/dev/null 2>&1 && echo {number}\n" for number, one in enumerate(commands)
    )
    return [commands[int(number)] for number in node.run("sh", "-c", f"{each}true", user=user).check().stdout.split()]


def test_the_jobs_user_reads_the_verdict_and_connects(alices_job: GpuNode) -> None:
    """The job's user may list the directory, read the verdict and the logs, query the daemon, and be its client."""
    assert len(succeed(alices_job, "alice", f"ls {JOB}", f"cat {JOB}/verdict {LOGS}/control.log")) == 2
    assert alices_job.control(4711, "get_default_active_thread_percentage", user="alice").stdout == "25.0\n"
    assert " sms=32 free=8047 " in alices_job.client(4711, user="alice").check().stdout


@pytest.mark.parametrize("user", ["alice", "bob"])
def test_no_user_learns_more_of_the_node(alices_job: GpuNode, user: str) -> None:
    """Journal, ledgers and configuration, and the names of other jobs, are root's alone."""
    gpu = next(path for path in alices_job.files() if "/gpus/" in path)
    secrets = [f"{JOB}/journal", f"{JOB}/config", gpu, f"{STATE_DIRECTORY}/config", f"{STATE_DIRECTORY}/lock"]
    commands = [f"cat {path}" for path in secrets]
    commands += [f"ls {path}" for path in (STATE_DIRECTORY, f"{STATE_DIRECTORY}/jobs", f"{STATE_DIRECTORY}/gpus")]
    commands += [f": >>{path}" for path in secrets]
    assert succeed(alices_job, user, *commands) == []


def test_the_jobs_user_cannot_change_the_directory(alices_job: GpuNode) -> None:
    """Nobody but root makes, removes, renames, links or opens anything up in a job's directory or below."""
    before = alices_job.run("find", JOB, "-printf", "%P %M %u %n %i\n").stdout
    commands = [f"touch {place}/new" for place in (JOB, f"{JOB}/pipe", f"{JOB}/log")]
    commands += [f"mkdir {place}/new" for place in (JOB, f"{JOB}/pipe", f"{JOB}/log")]
    commands += [f"ln -s /tmp {place}/new" for place in (JOB, f"{JOB}/pipe", f"{JOB}/log")]
    commands += [f"mkfifo {JOB}/new", f"ln {JOB}/verdict {JOB}/new", f"mv {JOB}/verdict {JOB}/new"]
    commands += [f"mv {JOB}/pipe {JOB}/new", f"mv {JOB} {STATE_DIRECTORY}/jobs/4712"]
    commands += [f"unlink {JOB}/{name}" for name in ("verdict", "journal", "pipe/control", "log/control.log")]
    commands += [f"rm {LOGS}/server.log", f": >{JOB}/verdict", f": >{LOGS}/server.log", f": >{JOB}/pipe/control_lock"]
    commands += [f"echo 1 >{JOB}/pipe/nvidia-cuda-mps-control.pid", f"chmod 777 {JOB}", f"chmod 666 {JOB}/verdict"]
    assert succeed(alices_job, "alice", *commands) == []
    assert alices_job.run("find", JOB, "-printf", "%P %M %u %n %i\n").stdout == before


def test_the_jobs_user_cannot_command_the_daemon(alices_job: GpuNode) -> None:
    """Queries are open to the job's user, settings and quit are not: the daemon is root's (O8, O23)."""
    server = alices_job.control(4711, "get_server_list").stdout.strip()
    for command in (
        "set_default_active_thread_percentage 100",
        "set_default_device_pinned_mem_limit 0 100G",
        f"set_active_thread_percentage {server} 100",
        f"set_device_pinned_mem_limit {server} 0 100G",
        "start_server -uid 0",
    ):
        assert "Insufficient privileges for UID 20001" in alices_job.control(4711, command, user="alice").stdout
    assert "Not enough privilege" in alices_job.control(4711, "quit", user="alice").stdout
    daemons = [process.pid for process in alices_job.mps_processes() if process.uid == 0]
    assert succeed(alices_job, "alice", *(f"kill -9 {pid}" for pid in daemons)) == []
    assert " sms=32 free=8047 " in alices_job.client(4711).check().stdout
