"""What root makes and starts for the step after one that ended badly: the mark, and the probe (docs/decisions/0007)."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.attacks.processes import until
from tests.attacks.weakened import attack, changes, lay_sources
from tests.harness.site import STATE_DIRECTORY, Site

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.gpunode import GpuNode

HERE = Path(__file__).parent
JOBS = f"{STATE_DIRECTORY}/jobs"
MARKS = "suspect suspect-0"  # of the whole job, or of a GPU
LED_TO = "/run/made-by-root"  # a node's own
TOLD, LIB = "/home/alice/told", "/home/alice/lib"
#: A user's module that every Python imports which does not refuse to: it tries to become root and tells what it has.
SITECUSTOMIZE = f"""
import json, os
if b"probe.py" in open("/proc/self/cmdline", "rb").read():
    held = [os.readlink(f"/proc/self/fd/{{fd}}") for fd in os.listdir("/proc/self/fd") if fd != "3"]
    groups = os.getgroups()
    try:
        os.setresuid(0, 0, 0)
    except OSError:
        pass
    told = dict(uids=os.getresuid(), gids=os.getresgid(), groups=groups, held=[h for h in held if h != "/dev/null"])
    told["preloaded"] = "users-own.so" in open("/proc/self/maps").read()
    with open("{TOLD}.new", "w") as file:
        json.dump(told, file)
    os.rename("{TOLD}.new", "{TOLD}")
"""
ALICE = 20001
NOBODYS = 4294901760  # a gid that no user has, so that none can trace it


@attack("the mark is no link", even_without="the user may only read")
def test_a_link_where_the_mark_is_to_go(cluster: Site, works: bool) -> None:
    """A task plants a link and fails on purpose: slurmstepd, as root, makes a file where the link leads."""
    plant = f"cd {JOBS}/$SLURM_JOB_ID; for mark in {MARKS}; do ln -s {LED_TO} $mark; done; false"
    job = cluster.cluster.sbatch("-wn1", "--gres=gpu:1", "--mps", script=f"srun sh -c '{plant}'\n")
    cluster.cluster.wait(job)
    made = cluster.node("n1", "test", "-e", LED_TO).returncode == 0
    cluster.node("n1", "rm", "-f", LED_TO)
    assert made is works


@attack("the user may only read")
def test_a_mark_of_the_users_own(node: GpuNode, works: bool) -> None:
    """What a user can make there first, as a file, a directory or a fifo, root would open, clear or wait for."""
    node.prolog(4711, user="alice").check()
    made = []
    for make in ("touch", "mkdir", "mkfifo"):
        result = node.run("sh", "-c", f"cd {JOBS}/4711 && {make} suspect && rm -r suspect", user="alice")
        made.append(result.returncode == 0)
    node.epilog(4711)
    assert made == [works] * 3


@pytest.fixture
def sprung(cluster: Site) -> Iterator[Site]:
    """A site on which alice has a module and a library to spring on the probe, and slurmstepd a file of root's."""
    machine = cluster.machine
    machine.make_directory(LIB, user="alice")
    machine.write(f"{LIB}/own.c", "int users_own;\n")
    for source, target in ((f"{LIB}/own.c", f"{LIB}/users-own.so"), (HERE / "leaky_spank.c", "/opt/leaky.so")):
        machine.run(["cc", "-shared", "-fPIC", "-o", target, source]).check()
    machine.write(f"{LIB}/sitecustomize.py", SITECUSTOMIZE, user="alice")
    machine.write("/root/secret", "secret", mode=0o600)
    plugstack = machine.read("/etc/slurm/plugstack.conf")
    machine.write("/etc/slurm/plugstack.conf", f"optional /opt/leaky.so\n{plugstack}")
    yield cluster
    machine.write("/etc/slurm/plugstack.conf", plugstack)
    machine.run(["rm", "-r", LIB, "/opt/leaky.so", "/root/secret"]).check()


def told_by_the_probe(site: Site) -> dict[str, Any]:
    """What a user's code had in the probe; empty when it did not come to run there."""
    own = f"PYTHONPATH={LIB},LD_PRELOAD={LIB}/users-own.so"
    script = f"srun false\nsrun --export=ALL,{own} true\n"
    job = site.cluster.sbatch("-wn1", "--gres=gpu:1", "--mps", script=script)
    site.cluster.wait(job)
    told = site.machine.path(TOLD)
    found: dict[str, Any] = json.loads(told.read_text()) if told.exists() else {}
    told.unlink(missing_ok=True)
    return found


@attack("the probe keeps nothing of slurmstepd's", even_without="the probe starts from nothing")
def test_a_users_code_in_the_probe(sprung: Site, walls_down: tuple[str, ...], works: bool) -> None:
    """As in CVE-2025-23266: root starts a program for a user, and the user's variables bring code into it.

    With the outer wall down it does come in, and finds itself to be nobody but the user; with both it is root, and
    reads what slurmstepd had open.
    """
    told = told_by_the_probe(sprung)
    assert bool(told) is bool(walls_down)
    assert (told.get("uids") == [0, 0, 0]) is works
    assert ("/root/secret" in told.get("held", [])) is works
    if told and not works:
        assert told["preloaded"]
        assert (told["uids"], told["gids"], told["groups"]) == ([ALICE] * 3, [NOBODYS] * 3, [ALICE])
        assert told["held"] == []


TRACER = """
import ctypes, os, time
PTRACE_SEIZE = 0x4206
libc, end, found = ctypes.CDLL(None), time.time() + 60, False
while time.time() < end and not (found and os.path.exists("over")):
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = open(f"/proc/{pid}/cmdline", "rb").read()
        except OSError:
            continue
        if b"probe.py" in line:
            found = True
            open("seen", "w").close()
            if libc.ptrace(PTRACE_SEIZE, int(pid), 0, 0) == 0:
                raise SystemExit("mine")
print("found" if found else "none")
"""


@pytest.mark.alone  # the user's program has to meet the probe while it lives
@attack("the probe has a group of its own")
def test_a_user_takes_the_probe_over(cluster: Site, works: bool) -> None:
    """It is not among the step's processes, which Slurm ends: whoever can trace it has one that outlives the job."""
    cluster.machine.write("/home/alice/tracer.py", TRACER, user="alice")
    script = (
        "rm -f over seen; python3 tracer.py 2>&1 & sleep 0.5\n"
        "for n in 1 2 3 4 5 6 7 8 9; do srun --overlap false; srun --overlap true; [ ! -e seen ] || break; done\n"
        "touch over; wait\n"
    )
    job = cluster.cluster.sbatch("-wn1", "-n2", "--gres=gpu:1", "--mps", script=script)
    cluster.cluster.wait(job)
    said = cluster.cluster.output(job)
    cluster.machine.run(["rm", "-f", *(f"/home/alice/{name}" for name in ("tracer.py", "over", "seen"))])
    assert ("mine" in said) is works
    assert works or "found" in said


class Helper:
    """The plugin's own code that starts a program as alice, without Slurm."""

    def __init__(self, build: Path, walls_down: tuple[str, ...]) -> None:
        source = lay_sources(build, changes(walls_down)) / "helper.c"
        flags = ["-std=c11", "-D_GNU_SOURCE", "-shared", "-fPIC"]
        subprocess.run(["cc", *flags, "-o", build / "helper.so", source], check=True)
        self._library = ctypes.CDLL(str(build / "helper.so"))

    def start(self, script: str) -> int:
        arguments = (ctypes.c_char_p * 4)(b"/bin/sh", b"-c", script.encode(), None)
        environment = (ctypes.c_char_p * 2)(b"PATH=/usr/bin:/bin", None)
        pid: int = self._library.helper_start(ALICE, arguments, environment, -1)
        return pid

    def end(self, pid: int, tries: int) -> int:
        status: int = self._library.helper_end(pid, ctypes.byref(ctypes.c_int(tries)))
        return status


@pytest.fixture
def helper(tmp_path: Path, walls_down: tuple[str, ...]) -> Helper:
    return Helper(tmp_path, walls_down)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_in(pid: int, state: str) -> bool:
    """Whether a process is there, in this state."""
    try:
        return f"\nState:\t{state}" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@attack("what the probe started ends with it")
def test_what_the_probe_leaves_outlives_the_step(helper: Helper, works: bool) -> None:
    """Its user kills the probe and stops its child: that is in no job's account, and nobody ends it."""
    pid = helper.start("sleep 60; true")
    (child,) = until("its child", lambda: children(pid))
    os.kill(pid, signal.SIGKILL)
    until("it has ended", lambda: is_in(pid, "Z") or None)
    os.kill(child, signal.SIGSTOP)  # only now: a group that loses its leader while one is stopped gets SIGHUP
    until("it is stopped", lambda: is_in(child, "T") or None)
    assert helper.end(pid, 1000) == -2
    lives = is_in(child, "T")
    if lives:
        os.kill(child, signal.SIGKILL)
    assert lives is works


SEIZE = """
import ctypes, sys
sys.exit(ctypes.CDLL(None).ptrace(0x4206, int(sys.argv[1]), 0, 0) != 0)
"""


@attack("the probe's group is nobody's")
def test_a_user_of_group_nogroup_takes_the_probe_over(helper: Helper, works: bool) -> None:
    """Where a site has given 65534 to users, as with squashed ids, a user had the same ids as the probe."""
    pid = helper.start("sleep 60")
    until("it is alice's", lambda: os.stat(f"/proc/{pid}").st_uid == ALICE or None)
    ids = [f"--reuid={ALICE}", "--regid=65534", "--clear-groups"]
    traced = subprocess.run(["setpriv", *ids, sys.executable, "-c", SEIZE, str(pid)], check=False, stderr=-3)
    assert helper.end(pid, 0) == -1
    assert (traced.returncode == 0) is works
