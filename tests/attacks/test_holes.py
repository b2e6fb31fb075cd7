"""What a process of a user's can do to those who look for it: hang them, deceive them, keep them busy."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from tests.attacks.processes import give, let_use_fuse, started, until
from tests.attacks.weakened import attack
from tests.harness.gpunode import EPILOG, job_environment

if TYPE_CHECKING:
    from tests.harness.gpunode import GpuNode
    from tests.harness.machine import Result

COMMAND = """
import sys
sys.path.insert(0, sys.argv[1].rpartition("/")[0])
from slurm_mps.cli.main import main
sys.argv[:] = ["slurm-mps", *sys.argv[2:]]
sys.exit(main())
"""
SERVER = "/usr/bin/nvidia-cuda-mps-server"


def reconcile(node: GpuNode, said: str = "") -> Result:
    """Of the package that the hooks run, with a squeue that says this."""
    node.machine.write("/usr/local/bin/squeue", f"#!/bin/sh\nprintf '%s' '{said}'\n", mode=0o755)
    result = node.run("/opt/slurm-mps/bin/python3", "-c", COMMAND, node.package, "reconcile")
    node.run("rm", "/usr/local/bin/squeue").check()
    return result


@attack("a search can be abandoned", even_without=("a server has root's group", "no file system of a user's is asked"))
def test_a_file_system_that_does_not_answer(
    node: GpuNode, silent_fs: bytes, walls_down: tuple[str, ...], works: bool
) -> None:
    """alice runs a program from a file system of her own, stops her server and lets the job end.

    Who asks that file system waits beyond SIGKILL, and slurmd with it. Whoever is not waited for costs the node all the
    same: the epilog cannot say that nothing is left.
    """
    give(node, "alice", silent_fs, "silent_fs")
    let_use_fuse(node)
    node.configure("[deadlines]\nquit = 0.5\nsignal = 0.6\nepilog = 4\n")
    node.prolog(4711, user="alice").check()
    server = until("the server", lambda: next((p.pid for p in node.mps_processes() if p.uid), None))
    silent = node.machine.path("/home/alice/silent")
    with started(node, "/home/alice/silent_fs", "/usr/bin/sleep", "/home/alice/silent", user="alice"):
        until("it is silent", lambda: silent.exists() or None)
        node.run("kill", "-STOP", str(server), user="alice").check()
        epilog = node.start(EPILOG, env=job_environment(4711))
        end = time.monotonic() + 6
        while epilog.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        hangs = epilog.poll() is None
        status = epilog.poll()
    silent.unlink()
    epilog.wait(10)
    node.epilog(4711).check()
    assert hangs is works
    assert works or bool(status) is bool(walls_down)


@attack("a title is not the kernel's word")
def test_a_setuid_program_with_the_title_of_slurmstepd(node: GpuNode, works: bool) -> None:
    """bob has root's su call itself the slurmstepd of alice's job, whose hooks were killed: reconcile leaves it?"""
    node.prolog(4711, user="alice").check()
    title = 'exec -a "slurmstepd: [4711.0]" su root < <(sleep 60)'
    with started(node, "bash", "-c", title, user="bob"):
        until("su", lambda: any(process.comm == "su" for process in node.machine.processes()) or None)
        reconcile(node, f"4711|COMPLETED|{int(time.time())}|n1\n")
        kept = node.files() != []
    node.epilog(4711).check()
    assert kept is works


SLURMSTEPD = """
import os
given = {"LD_PRELOAD": "/home/bob/stay.so", "STAY_NAME": "\\rUid:\\t0\\t0\\t0\\t0"}
os.execve("/usr/sbin/slurmstepd", ["slurmstepd: [4711.0]"], given)
"""


@attack("a process's name is one word")
def test_a_name_that_reads_like_a_line_of_the_kernels(node: GpuNode, stay: bytes, works: bool) -> None:
    """bob's slurmstepd bears root's id in its name, which /proc/PID/status shows above its ids."""
    give(node, "bob", stay)
    node.prolog(4711, user="alice").check()
    with started(node, "/usr/bin/python3", "-c", SLURMSTEPD, user="bob"):
        until("it is there", lambda: any("Uid:" in p.comm for p in node.machine.processes()) or None)
        reconcile(node, f"4711|COMPLETED|{int(time.time())}|n1\n")
        kept = node.files() != []
    node.epilog(4711).check()
    assert kept is works


FORGED = """
import os, sys
given = {"LD_PRELOAD": "/home/alice/stay.so", "CUDA_MPS_PIPE_DIRECTORY": "/run/slurm-mps/jobs/9000/pipe"}
os.execve(sys.argv[1], [sys.argv[1]], given)
"""


@attack("a server has root's group")
def test_a_forged_server_turns_no_reconcile_red(node: GpuNode, stay: bytes, works: bool) -> None:
    """It names a job that runs elsewhere: nothing of this node's is wrong, and one of many would cost 4 s each."""
    give(node, "alice", stay)
    with started(node, "/usr/bin/python3", "-c", FORGED, SERVER, user="alice"):
        until("it is there", lambda: any(p.comm == "nvidia-cuda-mps" for p in node.machine.processes()) or None)
        result = reconcile(node, "9000|RUNNING|N/A|n1\n")
    assert (result.returncode == 1) is works


@attack("a reader can be left behind")
def test_a_client_that_cannot_be_read_holds_up_no_status(node: GpuNode, unreadable: bytes, works: bool) -> None:
    """alice locks the memory of a client of hers: `slurm-mps status` of root's, which says its rank, waits for ever."""
    give(node, "alice", unreadable, "unreadable.so")
    let_use_fuse(node)
    node.prolog(4711, user="alice").check()
    given = {"CUDA_MPS_PIPE_DIRECTORY": node.pipe_directory(4711)}
    given |= {"LD_PRELOAD": "/home/alice/unreadable.so", "UNREADABLE_LATER": "/home/alice/now"}
    words = [f"{name}={value}" for name, value in given.items()]
    locked = node.machine.path("/home/alice/unreadable")
    with started(node, "env", *words, "simulated-gpus", "client", "--hold", "60", user="alice"):
        until("it is a client", lambda: "simulated-gpus" in node.control(4711, "ps").stdout or None)
        node.machine.write("/home/alice/now", "")
        until("its memory is locked", lambda: locked.exists() or None)
        line = ["/opt/slurm-mps/bin/python3", "-c", COMMAND, node.package, "status"]
        status = node.run("timeout", "-s", "KILL", "10", *line)
    for name in ("unreadable", "now"):
        node.run("rm", f"/home/alice/{name}").check()
    node.epilog(4711).check()
    assert (status.returncode not in (0, 1)) is works, status


def log_of_clients_that_wait(kib: int) -> str:
    """A server's log of clients whose contexts are connected and never active, and of devices that may be any's."""
    head = "[2026-11-23 02:13:44.000 Server   700] "
    device = f"{head}Device NVIDIA H100 (uuid GPU-51000000-99a9-0495-d04f-b3afe1238f4c) is associated\n"
    connected = [f"{head}Client {{PID: {pid}, Context ID: 1}} connected\n" for pid in range(kib * 1024 // 200)]
    return connected.pop() + device.join(connected)  # a device is never the one client's that waits


@attack("no line costs more for those before it")
def test_a_log_that_takes_long_to_read(node: GpuNode, works: bool) -> None:
    """alice's clients leave their contexts half made: root reads 4 MiB of it within 1 s of processor time, or not."""
    node.prolog(4711, user="alice").check()
    node.epilog(4711).check()
    node.machine.write("/var/log/slurm-mps/4711/server.log", log_of_clients_that_wait(4096))
    line = f"ulimit -t 1; exec /opt/slurm-mps/bin/python3 -c '{COMMAND}' {node.package} logs -t 4711"
    cut_off = node.run("sh", "-c", line).returncode not in (0, 1)
    assert cut_off is works


OPEN = """
import socket, sys, time
held = open("/var/log/slurm-mps/4711/control.log")
try:
    for _ in range(30_000):
        one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        one.connect(sys.argv[1])
        one.close()
finally:
    open("/home/alice/ready", "w").close()
    time.sleep(60)
"""


def used_kib(node: GpuNode) -> int:
    return int(node.run("df", "--output=used", "-k", "/var/log").check().stdout.split()[-1])


@attack("what is removed gives its space back")
@pytest.mark.parametrize("keep", ["always", "never"])
def test_a_log_that_is_held_open(node: GpuNode, keep: str, works: bool) -> None:
    """A process of alice's outside the job has the log open when it is cut or removed: its space is nobody's."""
    node.run("mount", "-t", "tmpfs", "none", "/var/log").check()
    node.configure(f'[logs]\nkeep = "{keep}"\nmax_kib = 128\n')
    node.prolog(4711, user="alice").check()
    ready = node.machine.path("/home/alice/ready")
    with started(node, "/usr/bin/python3", "-c", OPEN, f"{node.pipe_directory(4711)}/control", user="alice"):
        until("the log is long", lambda: ready.exists() or None)
        ready.unlink()
        node.epilog(4711).check()
        left = used_kib(node)
    node.run("umount", "/var/log").check()
    assert (left > 1024) is works


@attack("a user's logs push out nobody else's")
def test_a_user_who_has_many_jobs_to_erase_anothers_logs(node: GpuNode, works: bool) -> None:
    node.configure('[paths]\nlogs = "/var/log/fair"\n[logs]\nmax_jobs = 2\n')
    for job, user in ((4711, "bob"), (4712, "alice"), (4713, "alice")):
        node.prolog(job, user=user).check()
        node.epilog(job).check()
    logs = node.run("ls", "/var/log/fair").stdout.split()
    assert ("4711" not in logs) is works
