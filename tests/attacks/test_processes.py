"""Whose process is it: forged pid files, forged processes, a daemon that its user keeps busy, stopped and dead ones."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from tests.attacks.processes import give, let_use_fuse, started, until
from tests.attacks.weakened import attack
from tests.harness.gpunode import asked
from tests.harness.machine import USERS
from tests.harness.site import STATE_DIRECTORY

if TYPE_CHECKING:
    from tests.harness.gpunode import GpuNode

SHORT = "[deadlines]\nquit = 0.3\nsignal = 0.6\n"  # forty processes have to end in it
BUSY = 'exec sh -c "sleep 60 | nvidia-cuda-mps-control"'
STORM = """
import os, sys
program, pipe, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
environment = {"LD_PRELOAD": "/home/alice/stay.so", "CUDA_MPS_PIPE_DIRECTORY": pipe}
while True:
    for _ in range(count):
        if os.fork() == 0:
            os.execve(program, [program], environment)
    count = 1
    os.wait()
"""
SILENT = """
import socket, sys, time
held = []
for _ in range(900):
    one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    one.setblocking(False)
    try:
        one.connect(sys.argv[1])
    except OSError:
        break
    held.append(one)
time.sleep(60)
"""
SERVER = "/usr/bin/nvidia-cuda-mps-server"


def programs(node: GpuNode, comm: str, user: str, count: int = 1) -> list[int]:
    """The pids of at least so many processes of this name that a user has made to stay."""

    def look() -> list[int] | None:
        found = []
        for process in node.machine.processes():
            if process.comm == comm[:15] and sleeps(node, process.pid):
                status = node.machine.read(f"/proc/{process.pid}/status")
                if f"\nUid:\t{USERS[user]}\t" in status:
                    found.append(process.pid)
        return found if len(found) >= count else None

    return until(f"{user} has {count} {comm}", look)


def sleeps(node: GpuNode, pid: int) -> bool:
    """Whether a process waits in pause(2) or nanosleep(2)."""
    try:
        return node.machine.read(f"/proc/{pid}/wchan") in ("do_sys_pause", "__do_sys_pause", "hrtimer_nanosleep")
    except OSError:
        return False


def wait_busy(node: GpuNode) -> None:
    """Wait until the daemon of job 4711 listens to somebody, and so to nobody else (O40)."""

    def look() -> bool:
        log = node.machine.read("/var/log/slurm-mps/4711/control.log")
        return log.count("NEW UI") > log.count("UI closed")

    until("the daemon is busy", lambda: look() or None)


@pytest.fixture
def forger(node: GpuNode, stay: bytes) -> GpuNode:
    """A node whose alice can have any program stay and do nothing."""
    return with_forger(node, stay)


def with_forger(node: GpuNode, stay: bytes) -> GpuNode:
    give(node, "alice", stay)
    node.configure(SHORT)
    return node


@attack("only what survives SIGKILL is a fault", even_without="a server has root's group")
def test_a_storm_of_forged_servers_does_not_drain_the_node(forger: GpuNode, works: bool) -> None:
    """A process outside the job keeps the daemon from hearing quit and starts a 'server' for each that is killed."""
    forger.prolog(4711, user="alice", **asked("25")).check()
    pipe = forger.pipe_directory(4711)
    with (
        started(forger, "sh", "-c", BUSY, user="alice", CUDA_MPS_PIPE_DIRECTORY=pipe),
        started(forger, "/usr/bin/python3", "-c", STORM, SERVER, pipe, "40", user="alice"),
    ):
        wait_busy(forger)
        programs(forger, "nvidia-cuda-mps-server", "alice", 40)
        drained = forger.epilog(4711).returncode != 0
    forger.epilog(4711)
    assert drained is works


@attack("a pid proves nothing", even_without="the pid file is root's alone to write")
def test_a_forged_pid_file_ends_nobody(node: GpuNode, works: bool) -> None:
    """The daemon leaves its pid file writable by all (O37); the job's user names a process of root's in it."""
    node.configure(SHORT)
    node.prolog(4711, user="alice").check()
    victim = node.start("sleep", "60")
    place = f"{node.pipe_directory(4711)}/nvidia-cuda-mps-control.pid"
    node.run("sh", "-c", f"echo {node.machine.pid_inside(victim)} >{place}", user="alice")
    node.fault("command.quit=hang")  # the daemon takes the file along
    node.epilog(4711)
    node.fault()
    ended = victim.poll() is not None
    node.machine.signal(victim, signal.SIGKILL)
    victim.wait(5)
    assert ended is works


DISTURB = {
    "busy": BUSY,
    "silent": f"exec python3 -c '{SILENT}' $CUDA_MPS_PIPE_DIRECTORY/control",
    "stopped": f"kill -STOP $SERVER; {BUSY}",
    "killed": f"kill -9 $SERVER; {BUSY}",
}


def drains(node: GpuNode, how: str) -> bool:
    """Whether the epilog fails after the job's user has disturbed daemon and server in one of these ways."""
    node.configure(SHORT)
    node.prolog(4711, user="alice").check()
    pipe = node.pipe_directory(4711)
    server = until("the server", lambda: next((p.pid for p in node.mps_processes() if p.uid), None))
    given = {"CUDA_MPS_PIPE_DIRECTORY": pipe, "SERVER": str(server)}
    with started(node, "sh", "-c", DISTURB[how], user="alice", **given) as child:
        if how == "silent":
            until("its connections", lambda: sleeps(node, node.machine.pid_inside(child)) or None)
            node.fault("command.quit=hang")  # a real daemon waits for the silent one to speak (O50)
        else:
            wait_busy(node)
        drained = node.epilog(4711).returncode != 0
    node.fault()
    node.epilog(4711)
    return drained


@attack("signals follow where asking fails")
def test_a_user_who_keeps_the_daemon_busy_does_not_drain_the_node(node: GpuNode, works: bool) -> None:
    """Whoever talks to the daemon first has it to themselves (O40); the epilog ends it in its time all the same."""
    assert drains(node, "busy") is works


@pytest.mark.parametrize("how", sorted(DISTURB.keys() - {"busy"}))
def test_a_user_who_disturbs_daemon_and_server_does_not_drain_the_node(gpu_node: GpuNode, how: str) -> None:
    """Whatever else the job's user does to the server and the sockets."""
    assert not drains(gpu_node, how)


#: As a server that is killed in the driver: its main thread is a zombie, and another holds the GPU (O78).
HALF_ENDED = """
#include <pthread.h>
#include <unistd.h>
static void *stay(void *with) { for (;;) pause(); return with; }
int main(void) { pthread_t other; pthread_create(&other, 0, stay, 0); pthread_exit(0); }
"""


@attack("a process is all of its threads")
def test_a_server_whose_main_thread_has_ended(node: GpuNode, works: bool) -> None:
    """The user kills the server while it waits in the driver, and keeps the daemon from hearing quit: is it left?"""
    build = "cat >/run/half.c; cc -pthread -o /run/half /run/half.c; mount --bind /run/half " + SERVER
    node.run("sh", "-ec", f"cat >/run/half.c <<'END'{HALF_ENDED}END\n{build.partition('; ')[2]}").check()
    node.configure(SHORT)
    node.prolog(4711, user="alice").check()

    def look() -> int | None:
        found = node.run("sh", "-c", "grep -l 'State:.Z' /proc/[0-9]*/status").stdout.split()
        return int(found[0].split("/")[2]) if found else None

    server = until("the server", look)
    node.fault("command.quit=hang")
    node.epilog(4711)
    left = node.run("kill", "-9", str(server)).returncode == 0
    node.fault()
    node.run("sh", "-ec", f"umount {SERVER}; rm /run/half /run/half.c").check()
    node.epilog(4711).check()
    assert left is works


#: Seventy forged servers, each with as long a pipe directory as root reads: more than a search may print.
LONG = """
import os, sys
for _ in range(70):
    if os.fork() == 0:
        pipe = sys.argv[2] + "/" + "a" * 60_000
        os.execve(sys.argv[1], [sys.argv[1]], {"LD_PRELOAD": "/home/alice/stay.so", "CUDA_MPS_PIPE_DIRECTORY": pipe})
os.wait()
"""
#: One whose memory is locked, so that whoever reads its environment waits (unreadable.c).
UNREADABLE = """
import os, sys
given = {"LD_PRELOAD": "/home/alice/unreadable.so", "CUDA_MPS_PIPE_DIRECTORY": sys.argv[2]}
os.execve(sys.argv[1], [sys.argv[1]], given)
"""


def with_stopped_server(node: GpuNode) -> None:
    """Bring a job up, and have its user stop its server: asking it to end is not enough, so the epilog searches."""
    node.configure("[deadlines]\nquit = 0.3\nsignal = 0.3\nepilog = 8\n")
    node.prolog(4711, user="alice").check()
    server = until("the server", lambda: next((p.pid for p in node.mps_processes() if p.uid), None))
    node.run("kill", "-STOP", str(server), user="alice").check()


@attack("a server has root's group")
def test_forged_servers_that_say_too_much_do_not_drain_the_node(node: GpuNode, stay: bytes, works: bool) -> None:
    with_forger(node, stay)
    with_stopped_server(node)
    with started(node, "/usr/bin/python3", "-c", LONG, SERVER, node.pipe_directory(4711), user="alice"):
        programs(node, "nvidia-cuda-mps-server", "alice", 70)
        drained = node.epilog(4711).returncode != 0
    node.epilog(4711)
    assert drained is works


@attack("a server has root's group")
def test_a_forged_server_that_cannot_be_read_does_not_drain_the_node(
    node: GpuNode, unreadable: bytes, works: bool
) -> None:
    """Nothing of the test's may read that process either, as Machine.processes() does."""
    give(node, "alice", unreadable, "unreadable.so")
    let_use_fuse(node)
    with_stopped_server(node)
    locked = node.machine.path("/home/alice/unreadable")
    with started(node, "/usr/bin/python3", "-c", UNREADABLE, SERVER, node.pipe_directory(4711), user="alice"):
        until("its memory is locked", lambda: locked.exists() or None)
        drained = node.epilog(4711).returncode != 0
    locked.unlink()
    node.epilog(4711)
    assert drained is works


FLOOD = """
import socket, sys
for _ in range(3000):
    one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    one.connect(sys.argv[1])
    one.close()
"""


@attack("logs are bounded while the job runs")
def test_a_flood_of_connections_does_not_fill_the_disk(node: GpuNode, works: bool) -> None:
    """Each connection is two lines of root's log; daemon and server go on when there is no more room for any.

    The state of all jobs lies on a file system of its own, and has as much room as before.
    """
    node.configure("[logs]\nmax_kib = 1\n")
    node.prolog(4711, user="alice", **asked("25")).check()
    before = node.run("du", "-sk", STATE_DIRECTORY).stdout
    node.run("/usr/bin/python3", "-c", FLOOD, f"{node.pipe_directory(4711)}/control", user="alice").check()
    assert node.run("du", "-sk", STATE_DIRECTORY).stdout == before
    size = node.machine.path("/var/log/slurm-mps/4711/control.log").stat().st_size
    served = node.client(4711).stdout
    node.epilog(4711).check()
    assert " sms=32 " in served
    assert (size > 16 * 1024) is works
