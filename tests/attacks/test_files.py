"""What root makes, opens and removes: links, races, second names, fifos, forged files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.attacks.processes import started, until
from tests.attacks.weakened import attack
from tests.harness.site import STATE_DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.gpunode import GpuNode

JOB, LOGS = f"{STATE_DIRECTORY}/jobs/4711", "/var/log/slurm-mps/4711"
PRECIOUS = "/run/precious"  # on the file system of the state: removal leaves others alone in any case
SECRET = "the secret\n"
DAEMONS = {"per-node": "pipe", "per-gpu": "gpu-1"}  # where a control daemon has its sockets
IN_TMP = '[paths]\nlogs = "/tmp/mps-logs"\n'
SWAP = """
import ctypes, os
os.mkdir("/tmp/mps-logs", 0o755)
os.symlink("/run/precious", "/tmp/other")
libc = ctypes.CDLL(None)
exchange = 316, -100, b"/tmp/mps-logs", -100, b"/tmp/other", 2
while True:
    libc.syscall(*exchange)
"""


def shell(node: GpuNode, command: str, user: str = "alice") -> bool:
    """Whether a user's shell command succeeded."""
    return node.run("sh", "-ec", command, user=user).returncode == 0


@pytest.fixture
def precious(node: GpuNode) -> Iterator[GpuNode]:
    """A node with something of root's to lose, at a place that has a job's name."""
    node.run("sh", "-ec", f"mkdir -p {PRECIOUS}/4711; touch {PRECIOUS}/4711/kept").check()
    yield node
    node.run("rm", "-r", PRECIOUS).check()


def is_lost(node: GpuNode) -> bool:
    return not node.machine.path(f"{PRECIOUS}/4711/kept").exists()


@attack("links are not followed")
def test_a_link_where_the_logs_are_to_go(precious: GpuNode, works: bool) -> None:
    """A site keeps logs in a directory that all may write; a user is there first and leads root elsewhere."""
    precious.configure(IN_TMP)
    assert shell(precious, f"ln -s {PRECIOUS} /tmp/mps-logs")
    precious.prolog(4711).check()
    precious.epilog(4711).check()
    precious.run("rm", "/tmp/mps-logs").check()
    assert is_lost(precious) is works


@attack("what was checked is what is used")
def test_a_link_that_comes_and_goes_where_the_logs_are_to_go(precious: GpuNode, works: bool) -> None:
    """The same, but the link is exchanged with a directory as fast as it goes, also between look and use."""
    precious.configure(IN_TMP)
    with started(precious, "/usr/bin/python3", "-c", SWAP, user="alice"):
        for _ in range(100 if works else 8):
            precious.prolog(4711).check()
            precious.epilog(4711).check()
            if is_lost(precious):
                break
    precious.run("rm", "-r", "/tmp/mps-logs", "/tmp/other").check()
    assert is_lost(precious) is works


@pytest.mark.parametrize("daemons", DAEMONS)
@attack("removal follows nothing", even_without="the pipe directory is root's alone to write")
def test_a_link_in_what_root_removes(precious: GpuNode, daemons: str, works: bool) -> None:
    """A user plants a link in the job's directory and waits for the epilog to remove what it leads to."""
    precious.prolog(4711, SPANK_MPS=daemons).check()
    shell(precious, f"ln -s {PRECIOUS}/4711 {JOB}/{DAEMONS[daemons]}/planted")
    precious.epilog(4711)
    assert is_lost(precious) is works


@attack("removal is bounded", even_without="the pipe directory is root's alone to write")
def test_a_tree_of_any_size_in_what_root_removes(node: GpuNode, works: bool) -> None:
    """A user plants a tree that takes root more time to remove than a hook has; root does not begin to."""
    node.prolog(4711).check()
    shell(node, f"cd {JOB}/pipe; mkdir deep; cd deep; for n in 1 2 3 4 5 6 7 8 9 10; do mkdir d; cd d; done")
    planted = node.run("find", f"{JOB}/pipe/deep", "-type", "d").stdout.count("\n")
    walked = node.epilog(4711).returncode == 0 and planted > 10
    assert walked is works


def test_a_mount_in_what_root_removes(gpu_node: GpuNode) -> None:
    """A user mounts something over the pipe directory in a namespace of their own; root's is another, and goes."""
    gpu_node.prolog(4711).check()
    mount = f"mount --bind /home/alice {JOB}/pipe && touch /home/alice/mounted && exec sleep 60"
    with started(gpu_node, "unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, user="alice"):
        mounted = gpu_node.machine.path("/home/alice/mounted")
        until("the mount", lambda: mounted.exists() or None)
        result = gpu_node.epilog(4711)
    mounted.unlink()
    assert (result.returncode, result.stderr) == (0, "")


@attack("only root's plain file is read", even_without="the user may only read")
def test_a_secret_in_a_logs_place(node: GpuNode, works: bool) -> None:
    """A user puts a link to root's file where root cuts and keeps a log for that user to read (CVE-2016-10030)."""
    node.configure("[logs]\nmax_kib = 1\n")
    node.machine.write("/root/secret", SECRET * 200, mode=0o600)
    node.prolog(4711).check()
    shell(node, f"cd {LOGS}; mv server.log away; ln -s /root/secret server.log")
    node.epilog(4711)
    read = SECRET in node.run("cat", f"{LOGS}/server.log", user="alice").stdout
    assert read is works


@attack("links are not followed", even_without="the user may only read")
def test_a_link_in_a_gpus_logs_place(node: GpuNode, works: bool) -> None:
    """Each GPU's daemon has logs of its own, which root cuts; a user leads root to another directory's."""
    node.configure("[logs]\nmax_kib = 1\n")
    node.machine.write("/root/logs/server.log", SECRET * 200, mode=0o600)
    node.prolog(4711, SPANK_MPS="per-gpu").check()
    shell(node, f"ln -s /root/logs {LOGS}/gpu-7")
    node.epilog(4711)
    cut = node.machine.path("/root/logs/server.log").stat().st_size < len(SECRET * 200)
    assert cut is works


@attack("only root's plain file is read", even_without="the user may only read")
def test_a_fifo_in_a_logs_place(node: GpuNode, works: bool) -> None:
    """Opening a fifo that nobody writes waits for ever; an epilog that is ended by its watch drains the node."""
    node.configure("[deadlines]\nepilog = 2\n")
    node.prolog(4711).check()
    shell(node, f"cd {LOGS}; mv server.log away; mkfifo server.log")
    drained = node.epilog(4711).returncode != 0
    node.run("rm", "-f", f"{LOGS}/server.log").check()
    node.epilog(4711)
    assert drained is works


FORGE = """
import os, sys
from binascii import crc32
job, gpu = sys.argv[1:]
boot = open("/proc/sys/kernel/random/boot_id").read().strip()
text = f"slurm-mps journal 1\\njob id=4712 uid=20002 run=0 boot={boot} node=n1 ready=yes\\n"
text += f"undo release_gpu gpu={gpu}\\n"
os.rename(f"{job}/journal", f"{job}/away")
with open(f"{job}/journal", "w") as file:
    file.write(text + f"end {crc32(text.encode()):08x}\\n")
os.chmod(f"{job}/journal", 0o600)
"""


@attack("a journal is its own job's", even_without=("the user may only read", "only root's plain file is read"))
def test_a_forged_journal(node: GpuNode, works: bool) -> None:
    """A user writes a whole journal that says: undo what bob's job has done to bob's GPU."""
    node.prolog(4711, user="alice", gpus="0").check()
    node.prolog(4712, user="bob", gpus="2").check()
    (gpu,) = node.run("grep", "-l", "holder 4712", "-r", f"{STATE_DIRECTORY}/gpus").check().stdout.split()
    node.run("/usr/bin/python3", "-c", FORGE, JOB, gpu.rpartition("/")[2], user="alice")
    node.epilog(4711)
    opened = node.compute_modes()[2] == 0
    node.epilog(4712)
    assert opened is works


@pytest.mark.parametrize("daemons", DAEMONS)
@attack("nobody else may enter")
def test_another_user_as_a_client(node: GpuNode, daemons: str, works: bool) -> None:
    """A foreign client has an idle server replaced by one of its own (O22): bob's gets in, or not."""
    node.prolog(4711, user="alice", SPANK_MPS=daemons, SPANK_MPS_THREADS="25").check()
    said = node.client(None, user="bob", CUDA_MPS_PIPE_DIRECTORY=f"{JOB}/{DAEMONS[daemons]}").stdout
    node.epilog(4711)
    assert (" sms=32 " in said) is works


@attack("nobody else may enter")
def test_another_user_reads_verdict_and_logs(node: GpuNode, works: bool) -> None:
    """What alice's job has, who its clients are and what they did wrong is no business of bob's."""
    node.prolog(4711, user="alice", SPANK_MPS="per-gpu").check()
    read = shell(node, f"cat {JOB}/verdict", "bob") or shell(node, f"cat {LOGS}/gpu-1/control.log", "bob")
    node.epilog(4711)
    assert read is works


@attack("jobs cannot be listed")
def test_a_user_lists_the_jobs_of_others(node: GpuNode, works: bool) -> None:
    """Slurm has PrivateData; a directory of job ids would undo it."""
    node.prolog(4711, user="alice").check()
    listed = node.run("ls", f"{STATE_DIRECTORY}/jobs", user="bob").stdout.split()
    node.epilog(4711)
    assert (listed == ["4711"]) is works
