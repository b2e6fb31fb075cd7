"""What the hooks keep to whatever happens: Slurm's MessageTimeout, no network, no reader for their messages."""

from __future__ import annotations

import re
from time import monotonic
from typing import TYPE_CHECKING

import pytest

from tests.harness.gpunode import EPILOG, PROLOG, asked, job_environment
from tests.harness.site import STATE_DIRECTORY

if TYPE_CHECKING:
    from tests.harness.gpunode import GpuNode

PROLOG_SECONDS = 10.0 - 2.0  # slurm.conf's default MessageTimeout; "Prolog hung" comes two seconds before
HOLD_LOCK = f"""
import fcntl, os, sys, time
lock = os.open("{STATE_DIRECTORY}/lock", os.O_RDWR | os.O_CREAT, 0o600)
fcntl.lockf(lock, fcntl.LOCK_EX, 1, 4711)
print("held", flush=True)
time.sleep(3)
"""
MUTE = """
import fcntl, os, sys
read, write = os.pipe()
os.set_blocking(write, False)
try:
    while True:
        os.write(write, b"x" * 4096)
except BlockingIOError:
    os.set_blocking(write, True)
os.dup2(write, 2)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.alone
def test_waits_add_up_to_less_than_messagetimeout(gpu_node: GpuNode) -> None:
    """At the default deadlines: another hook keeps the job's lock for a while, and then the driver hangs."""
    gpu_node.run_job(1)
    holder = gpu_node.start("/usr/bin/python3", "-c", HOLD_LOCK)
    gpu_node.fault("nvml.init=hang")
    began = monotonic()
    result = gpu_node.prolog(4711)
    took = monotonic() - began
    gpu_node.fault()
    holder.wait(timeout=30)
    assert result.returncode == 1
    assert "the NVIDIA driver may hang" in result.stderr
    assert took < PROLOG_SECONDS


@pytest.mark.parametrize("hook", [PROLOG, EPILOG])
def test_hooks_use_no_network(gpu_node: GpuNode, hook: str) -> None:
    """So there is no RPC to slurmctld: they work where there is not even a loopback interface."""
    environment = job_environment(4711, **asked("25", "8G"))
    if hook == EPILOG:
        gpu_node.run(PROLOG, env=environment).check()
    gpu_node.run("unshare", "--net", hook, env=environment).check()
    if hook == PROLOG:
        assert gpu_node.verdict(4711)["status"] == "ready"
        gpu_node.epilog(4711).check()


@pytest.mark.alone
def test_a_stderr_that_nobody_reads_holds_nothing_up(gpu_node: GpuNode) -> None:
    """slurmd may be gone or stuck with the pipe full; the prolog says what it can and goes its way."""
    gpu_node.fault("daemon.start=exit:1")
    environment = job_environment(4711, **asked())
    began = monotonic()
    result = gpu_node.run("/usr/bin/python3", "-c", MUTE, PROLOG, env=environment)
    assert result.returncode == 1
    assert monotonic() - began < 3


def test_daemon_and_server_have_no_privilege_of_slurmds(gpu_node: GpuNode) -> None:
    """slurmd may dump cores without a limit and be exempt from the OOM killer."""
    as_slurmd = ("sh", "-c", "ulimit -c unlimited; echo -900 >/proc/self/oom_score_adj; exec $0")
    gpu_node.run(*as_slurmd, PROLOG, env=job_environment(4711, **asked())).check()
    gpu_node.client(4711).check()  # its server is up
    for process in gpu_node.mps_processes():
        here = f"/proc/{process.pid}"
        assert re.search(r"Max core file size +0 +0 ", gpu_node.machine.read(f"{here}/limits"))
        assert gpu_node.machine.read(f"{here}/oom_score_adj") == "0\n"
    assert {process.uid for process in gpu_node.mps_processes()} == {0, 20001}
    gpu_node.epilog(4711).check()
