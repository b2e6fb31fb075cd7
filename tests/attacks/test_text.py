"""What a user says, and what root's programs start from: values, environment, modules, descriptors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.attacks.weakened import WEAK_PACKAGE, attack
from tests.harness.gpunode import PROLOG, asked, job_environment
from tests.harness.site import STATE_DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.gpunode import GpuNode

TRAP = "import os\nopen('/tmp/trapped', 'w').close()\n"


def daemon_pid(node: GpuNode) -> int:
    return next(process.pid for process in node.mps_processes() if process.uid == 0)


@attack("a command is of plain characters", even_without="a priority is one of two words")
def test_a_second_command_in_a_value(node: GpuNode, works: bool) -> None:
    """Commands go to root's daemon one a line; a line end in a value would be one of the user's choice."""
    injected = "set_default_active_thread_percentage 3"
    node.prolog(4711, SPANK_MPS="1", SPANK_MPS_PRIORITY=f"0\n{injected}")
    node.epilog(4711)
    log = node.machine.path("/var/log/slurm-mps/4711/control.log")
    obeyed = log.exists() and f"Cmd:{injected}" in log.read_text()
    assert obeyed is works


@attack("what was set is read back", even_without="a size is a number")
def test_a_size_that_the_driver_misreads(node: GpuNode, works: bool) -> None:
    """The daemon takes -1G for seventeen million TiB (O3): past the site's limit, with a job that is ready."""
    node.configure('[limits.memory]\nmax = "8G"\n')
    node.prolog(4711, gpus="0", **asked(mem="-1G"))
    free = node.client(4711).stdout.partition(" free=")[2].partition(" ")[0]
    lifted = node.verdict(4711).get("status") == "ready" and int(free) > 8192
    node.epilog(4711)
    assert lifted is works


@attack("a verdict's value is one line", even_without="user's text is made printable")
def test_a_verdict_of_the_users_own(node: GpuNode, works: bool) -> None:
    """A refusal repeats what was asked; a line end in it would be a line of the verdict that the plugin obeys."""
    node.prolog(4711, **asked("25\nstatus ready\ndaemon /home/alice/pipe /home/alice/log -\nthread_percentage 100"))
    obeyed = node.verdict(4711).get("daemon", "").startswith("/home/alice/pipe ")
    node.epilog(4711)
    assert obeyed is works


@attack("a user's mistake is not the node's fault")
def test_a_mistake_that_drains_nodes(node: GpuNode, works: bool) -> None:
    """Slurm drains a node whose prolog fails: a user with one wrong option would take node after node."""
    drained = node.prolog(4711, **asked("0")).returncode != 0
    node.epilog(4711)
    assert drained is works


@attack("the hook's Python is isolated")
def test_a_users_module_through_the_environment(node: GpuNode, works: bool) -> None:
    """As in CVE-2017-15566 and CVE-2021-31215, when job variables reached the prolog under their own names."""
    node.machine.write("/home/alice/lib/ctypes.py", TRAP, user="alice")
    node.run(PROLOG, env={**job_environment(4711, **asked()), "PYTHONPATH": "/home/alice/lib"})
    trapped = node.machine.path("/tmp/trapped").exists()
    node.epilog(4711)
    assert trapped is works


@attack("the package comes last on the path")
def test_a_module_of_another_package(node: GpuNode, works: bool) -> None:
    """Anything that pip put beside slurm_mps under a standard module's name would run as root for each job."""
    place = f"{WEAK_PACKAGE.rpartition('/')[0]}/ctypes.py"
    installed = next(line for line in node.machine.read(PROLOG).splitlines() if line.startswith("package="))[8:]
    if not works:  # the product, too, is to lie in a directory that can be spoilt
        node.run("sh", "-ec", f"mkdir -p {WEAK_PACKAGE}; cp -r {installed}/. {WEAK_PACKAGE}").check()
        node.run("sed", "-i", f"s|^package=.*|package={WEAK_PACKAGE}|", PROLOG).check()
    node.machine.write(place, TRAP)
    node.prolog(4711)
    trapped = node.machine.path("/tmp/trapped").exists()
    if not works:
        node.run("sed", "-i", f"s|^package=.*|package={installed}|", PROLOG).check()
    node.epilog(4711)
    assert trapped is works


@attack("a child's environment is made from nothing")
def test_a_users_variable_in_the_daemon(node: GpuNode, works: bool) -> None:
    """CVE-2025-23266: a privileged program that ran with the environment of the one it served."""
    node.prolog(4711, SPANK_MPS="1", SPANK_LD_PRELOAD="/home/alice/evil.so").check()
    given = node.run("cat", f"/proc/{daemon_pid(node)}/environ").check().stdout
    node.epilog(4711)
    assert ("/home/alice/evil.so" in given) is works


@attack("a child has no other descriptor")
def test_a_descriptor_of_slurmds_in_the_daemon(node: GpuNode, works: bool) -> None:
    """CVE-2024-21626: what slurmd left open must not reach a program that talks to users."""
    node.machine.write("/root/secret", "secret", mode=0o600)
    leaky = f"exec 9</root/secret; exec {PROLOG}"
    node.run("sh", "-c", leaky, env=job_environment(4711, **asked())).check()
    held = node.run("readlink", f"/proc/{daemon_pid(node)}/fd/9").stdout
    node.epilog(4711)
    assert (held == "/root/secret\n") is works


VALUES = st.one_of(
    st.binary(max_size=200).map(lambda data: data.replace(b"\0", b"").decode("utf-8", "surrogateescape")),
    st.text(alphabet="0123456789.MGT-+ \n;$`\x1b", max_size=12),
    st.builds(lambda text, times: text * times, st.sampled_from(["9", "A", "\n", "é"]), st.integers(1, 60_000)),
    st.sampled_from(["25", "100", "8G", "600M", "low", "auto", "1", "per-node", "per-gpu", "0:8G", "0:8G,1:4G"]),
)
JOBS_OWN = (f"{STATE_DIRECTORY}/jobs/4711/pipe ", f"{STATE_DIRECTORY}/jobs/4711/gpu-0 ")
NAMES = st.sampled_from(["SPANK_MPS", "SPANK_MPS_THREADS", "SPANK_MPS_MEM", "SPANK_MPS_PRIORITY", "SPANK_MPS_MORE"])


@pytest.fixture
def asked_often(gpu_node: GpuNode) -> Iterator[GpuNode]:
    """A node whose last job is taken down when the test is over."""
    yield gpu_node
    gpu_node.epilog(4711).check()


@given(values=st.dictionaries(NAMES, VALUES, min_size=1))
@settings(max_examples=70, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_sent_the_node_is_well(asked_often: GpuNode, values: dict[str, str]) -> None:
    """Straight to the prolog, past Slurm and the plugin: exit 0, no message, and a verdict of whole printable lines.

    Each finds what the one before left, as after a requeue whose epilog never came.
    """
    result = asked_often.run(PROLOG, env={**job_environment(4711, gpus="0"), **values})
    verdict = asked_often.verdict(4711)
    assert (result.returncode, result.stderr) == (0, "")
    assert verdict["status"] in ("ready", "refused")
    assert verdict.keys() <= {"uid", "status", "message", "exit"} or verdict["daemon"].startswith(JOBS_OWN)
    assert all(value.isascii() and value.isprintable() and len(value) <= 480 for value in verdict.values())
    assert not asked_often.machine.path("/tmp/owned").exists()
