"""Another user between the ranks of a step that run ``slurm-mps verify``: bob against alice."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.attacks.processes import started, until
from tests.attacks.weakened import WEAK_PACKAGE, attack
from tests.harness.machine import USERS
from tests.harness.site import PYTHON

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.gpunode import GpuNode
    from tests.harness.site import Site

PLACES = "/dev/shm", "/tmp"
VERIFY = f"env PYTHONPATH={WEAK_PACKAGE}/.. {PYTHON} -m slurm_mps.cli.main verify --timeout 4"
#: Bob has what the ranks look for, under every kind of name that he can guess, open to all, and holds it.
TRAPS = """
import fcntl, os, sys, time
for place in ("/dev/shm", "/tmp"):
    trap = f"{place}/{sys.argv[1]}trap"
    os.mkdir(trap)
    os.chmod(trap, 0o777)
    fcntl.flock(os.open(trap, os.O_RDONLY), fcntl.LOCK_EX)
    os.symlink(trap, f"{place}/{sys.argv[1]}link")
    os.mkfifo(f"{place}/{sys.argv[1]}fifo")
time.sleep(60)
"""
#: Prints what the processes of a user listen on: TCP ports and sockets with a name, abstract ones as well.
LISTENING = """
import os, sys
listening = {}
for name, state, inode in (("tcp", 3, 9), ("tcp6", 3, 9), ("unix", 3, 6)):
    for words in (line.split() for line in open(f"/proc/net/{name}").read().splitlines()[1:]):
        if words[state] in ("0A", "00010000"):
            listening[words[inode]] = " ".join([name, words[1], *words[7:8]])
for pid in filter(str.isdigit, os.listdir("/proc")):
    if os.stat(f"/proc/{pid}").st_uid == int(sys.argv[1]):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            inode = os.readlink(f"/proc/{pid}/fd/{fd}").removeprefix("socket:[").rstrip("]")
            if inode in listening:
                print(open(f"/proc/{pid}/cmdline").read().split("\\0")[:4], listening[inode])
"""


@contextmanager
def traps(site: Site, prefix: str) -> Iterator[None]:
    """Bob's, set on n1."""
    bob = site.machine.popen([PYTHON, "-c", TRAPS, prefix], node="n1", user="bob")
    try:
        until("bob's traps", site.machine.path(f"/tmp/{prefix}fifo", node="n1").exists)
        yield
    finally:
        site.machine.signal(bob, signal.SIGKILL)
        bob.wait(5)
        site.node("n1", "sh", "-c", f"rm -r /dev/shm/{prefix}* /tmp/{prefix}*").check()


def go_on(site: Site, name: str) -> None:
    """Let a script of alice's pass the point where it waits for a file."""
    site.machine.write(f"/home/alice/{name}", "", user="alice")


def wait_for(name: str) -> str:
    return f"until test -e {name}; do sleep 0.05; done"


@attack("ranks meet in their own user's directory")
def test_another_user_where_the_ranks_meet(cluster: Site, works: bool) -> None:
    """The name of the step is no secret. The first rank comes last, so that the others find bob's traps alone."""
    task = f"test $SLURM_PROCID = 0 && sleep 1; exec {VERIFY}"
    script = f"{wait_for('set')}; rm set; srun sh -c '{task}'"
    job = cluster.cluster.sbatch("-wn1", "-n3", "--gres=gpu:1", "--mps", script=script)
    prefix = f"slurm-mps-verify-{job}.0.0-"
    with traps(cluster, prefix):
        go_on(cluster, "set")
        failed = cluster.cluster.wait(job).exit_code != 0
        fallen = [cluster.node("n1", "ls", "-A", f"{place}/{prefix}trap").check().stdout for place in PLACES]
    assert (failed, any(fallen)) == (works, works), cluster.cluster.output(job)


HOLD = "import fcntl, os, sys, time; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); time.sleep(60)"
FIND = """
import sys, time
sys.path.insert(0, sys.argv[1].rpartition("/")[0])
from slurm_mps.verify.meeting import find_meeting
from slurm_mps.verify.step import Step
step = Step("4711.0.0", 1, 1, (0, 1), "n1", ("n1",), frozenset({"4711"}))
print(find_meeting(step, time.monotonic() + 0.5).path)
"""


@attack("ranks meet on the node's own file system")
def test_a_file_system_of_another_users_where_the_ranks_meet(node: GpuNode, works: bool) -> None:
    """bob mounts one that calls him alice. Where the site lets users share theirs, fusermount does it; here root."""
    trap = "/dev/shm/slurm-mps-verify-4711.0.0-trap"
    mount = f"mkdir {trap}; mount -t tmpfs -o uid={USERS['alice']},mode=777 bobs {trap}"
    node.run("sh", "-ec", mount).check()
    with started(node, PYTHON, "-c", HOLD, trap, user="bob"):
        held = f"until ! flock -n {trap} true; do sleep 0.01; done"
        node.run("timeout", "5", "sh", "-c", held).check()
        found = node.run(PYTHON, "-c", FIND, node.package, user="alice")
    node.run("sh", "-ec", f"umount {trap}; rmdir {trap}").check()
    assert (found.stdout.strip() == trap) is works, found


def test_nobody_else_sees_or_reaches_the_ranks(site: Site) -> None:
    """While they wait for one of them nothing of theirs listens; what srun listens on shows that it would be seen."""
    task = f"test $SLURM_PROCID = 1 && {wait_for('late')}; exec {VERIFY}"
    layout = ("-N2", "-n4", "--ntasks-per-node=2")
    job = site.cluster.sbatch(
        *layout, "--gres=gpu:1", "--mps", script=f"srun sh -c '{task}'; code=$?; rm late; exit $code"
    )
    place = site.machine.path("/dev/shm", node="n1")
    (meeting,) = until("a directory of verify's", lambda: list(place.glob("slurm-mps-verify-*")))
    listens = site.node("n1", PYTHON, "-c", LISTENING, str(USERS["alice"])).check().stdout.splitlines()
    seen = site.node("n1", "ls", f"/dev/shm/{meeting.name}", user="bob")
    removed = site.node("n1", "mv", f"/dev/shm/{meeting.name}", "/dev/shm/bobs", user="bob")
    go_on(site, "late")
    assert site.cluster.wait(job).exit_code == 0, site.cluster.output(job)
    assert listens
    assert [line for line in listens if "'srun'" not in line] == []
    assert ("Permission denied" in seen.stderr, removed.returncode) == (True, 1)
