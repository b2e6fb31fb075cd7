"""Jobs that share a daemon: what one of them, or another user, may not do to the others."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

import pytest

from tests.attacks.weakened import attack
from tests.harness.gpunode import asked
from tests.harness.site import STATE_DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.gpunode import GpuNode


@pytest.fixture
def joined(node: GpuNode) -> Iterator[GpuNode]:
    """A node whose jobs are joined, and one of alice's on GPU 0."""
    node.confine_devices()
    node.configure('[gpus]\nsharing = "joined"\n')
    node.prolog(1, gpus="0", **asked()).check()
    yield node
    node.end_jobs()
    node.run("rmdir", f"{STATE_DIRECTORY}/daemons")


def has_a_server(node: GpuNode, job_id: int) -> bool:
    """Whether a program of the job's finds its server, by whatever name the job has its way to it."""
    place = node.run("sh", "-c", f"dirname {STATE_DIRECTORY}/jobs/{job_id}/*/control").stdout.strip()
    said = node.client(None, CUDA_MPS_PIPE_DIRECTORY=place).stdout
    return "mps=" in said and "mps=none" not in said


@attack("joined jobs are one user's")
def test_another_user_on_a_shared_daemon(joined: GpuNode, works: bool) -> None:
    """Bob's job comes to the GPU where alice's programs run: with her server he would have her faults, and she his."""
    joined.prolog(2, gpus="0", user="bob", **asked()).check()
    assert (joined.verdict(2)["status"] == "ready") is works
    assert ("alice" in joined.verdict(2).get("message", "") or " 1" in joined.verdict(2).get("message", "")) is False


@pytest.fixture
def joined_by_all(joined: GpuNode) -> GpuNode:
    """The same where jobs of all users are joined."""
    joined.end_jobs()
    joined.configure('[gpus]\nsharing = "joined"\njoined_users = "all"\n[limits.memory]\nmax = "40G"\n')
    joined.prolog(1, gpus="0", **asked()).check()
    return joined


@attack("a daemon of all users is root's to enter")
def test_who_has_no_job_at_the_daemon_of_all_users(joined_by_all: GpuNode, works: bool) -> None:
    """Bob has no job on the node. He knows the GPU's name and the job's, and so where the daemon lies."""
    pipe = joined_by_all.run("sh", "-c", f"echo {STATE_DIRECTORY}/daemons/*/*").stdout.strip()
    said = joined_by_all.client(None, user="bob", CUDA_MPS_PIPE_DIRECTORY=pipe).stdout
    assert ("mps=" in said) is works


@attack("the logs of all users are root's")
def test_a_user_reads_what_others_do_on_the_server_of_all_users(joined_by_all: GpuNode, works: bool) -> None:
    """The logs name everybody's programs: while a job runs, and what is kept of them when it is over."""
    joined_by_all.prolog(2, gpus="0", user="bob", **asked()).check()
    joined_by_all.epilog(1).check()
    logs = joined_by_all.run("sh", "-c", "echo /var/log/slurm-mps/GPU-*/control.log").stdout.strip()
    for log in (logs, "/var/log/slurm-mps/1/gpu-0/control.log"):
        assert (joined_by_all.run("cat", log, user="alice").returncode == 0) is works


@attack("no script takes a link for a daemon's own")
def test_a_jobs_end_does_not_reach_the_daemon_of_others(joined: GpuNode, works: bool) -> None:
    """The epilog script tells each daemon in the job's directory to quit, and a shared one would hear it."""
    joined.prolog(2, gpus="0", **asked()).check()
    joined.epilog(2)
    end = monotonic() + 5
    while (there := has_a_server(joined, 1)) and works and monotonic() < end:
        pass  # nobody waits for what the script told the daemons
    assert there is not works


@attack("a joined daemon is known by its process")
def test_connections_that_fill_the_daemons_queue_do_not_end_it(joined: GpuNode, works: bool) -> None:
    """Alice's program of one job stops the world: it connects until nobody else can, and the next job must not take
    the daemon for dead, end it under her other jobs, and start another.
    """
    (ledger,) = joined.run("sh", "-c", f"cat {STATE_DIRECTORY}/gpus/*").check().stdout.split("daemon ")[1:]
    daemon = int(ledger.partition("pid=")[2].split()[0])
    joined.run("kill", "-STOP", str(daemon)).check()  # as deaf as the real one is to a silent connection (O50)
    fill = (
        "import socket,time\nall=[]\n"
        "while True:\n"
        " one=socket.socket(socket.AF_UNIX,socket.SOCK_SEQPACKET|socket.SOCK_NONBLOCK)\n"
        f" all.append(one)\n if one.connect_ex('{STATE_DIRECTORY}/jobs/1/joined-0/control'): break\n"
        "open('/tmp/full','w').close()\ntime.sleep(30)\n"
    )
    filler = joined.start("/usr/bin/python3", "-c", fill, user="alice")
    joined.run("timeout", "10", "sh", "-c", "until [ -e /tmp/full ]; do sleep 0.05; done").check()
    joined.prolog(2, gpus="0", **asked())
    there = {one.pid for one in joined.mps_processes()}
    joined.machine.signal(filler, 9)
    filler.wait(5)
    joined.run("rm", "/tmp/full").check()
    joined.run("kill", "-CONT", str(daemon))
    assert (daemon in there) is not works


@attack("joining needs devices that are confined")
def test_a_site_that_does_not_confine_devices(joined: GpuNode, works: bool) -> None:
    """Who keeps a handle on the socket could come back when the job is over, and would find the GPU open (O88)."""
    joined.confine_devices("ConstrainDevices=no\n")
    joined.prolog(2, gpus="1", **asked()).check()
    assert (joined.verdict(2)["status"] == "ready") is works
