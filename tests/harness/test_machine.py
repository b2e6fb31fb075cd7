"""The throw-away machine keeps its promises wherever it is made."""

from __future__ import annotations

import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from .cluster import REPOSITORY
from .machine import Machine

# Runs "$@" in a chroot at $1, with the host's programs and the checkout $2 in it.
IN_A_CHROOT = """set -eu
root=$1 checkout=$2; shift 2
mount -t tmpfs none "$root"
mkdir -p "$root/tmp" "$root/media" "$root$checkout"
for top in usr etc bin sbin lib lib64 dev; do
	[ ! -e "/$top" ] || { mkdir -p "$root/$top" && mount --rbind "/$top" "$root/$top"; }
done
mkdir "$root/proc" "$root/sys"
mount -t proc proc "$root/proc"
mount --rbind "$checkout" "$root$checkout"
exec chroot "$root" "$@"
"""
WRITE_IN_A_MACHINE = """import sys
sys.path.insert(0, sys.argv[1])
from tests.harness.machine import Machine
with Machine() as machine:
    for node in (None, "n1"):
        print(machine.run(["touch", f"{sys.argv[2]}/written"], node=node).stderr, end="")
        machine.add_node("n1")
"""


@pytest.mark.parametrize("place", ["/tmp", "/run", "/var/log", "/dev/shm", "/var/lib"])
def test_a_checkout_is_seen_wherever_it_is(place: str) -> None:
    """Also where the machine or a node has a directory of its own."""
    with tempfile.TemporaryDirectory(dir=place) as checkout:
        Path(checkout, "Makefile").write_text("")
        with Machine(shown=[checkout]) as machine:
            machine.add_node("n1")
            for node in (None, "n1"):
                assert machine.run(["ls", checkout], node=node).stdout == "Makefile\n"
                assert machine.run(["touch", f"{checkout}/new"], node=node).returncode == 1


def test_a_machine_made_in_a_chroot_leaves_the_host_alone(tmp_path: Path) -> None:
    """Commands in it see the chroot's files, and not those of the host around the chroot."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    for directory in (root, outside):
        directory.mkdir()
    line = ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-c", IN_A_CHROOT, "sh"]
    line += [str(root), str(REPOSITORY), "/usr/bin/python3", "-c", WRITE_IN_A_MACHINE, str(REPOSITORY), str(outside)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert list(outside.iterdir()) == []
    assert (done.returncode, done.stderr, done.stdout.count("No such file or directory")) == (0, "", 2)


def test_a_program_that_was_stopped_ends_and_leaves_no_nsenter() -> None:
    """Nsenter stops itself with its program, and would wait for ever when somebody else continues the program alone."""
    with Machine() as machine:
        signalled, stopped = (machine.popen(["sleep", "60"]) for _ in range(2))
        for child in (signalled, stopped):
            machine.signal(child, signal.SIGSTOP)
            deadline = time.monotonic() + 5
            while ") T " not in Path(f"/proc/{child.pid}/stat").read_text() and time.monotonic() < deadline:
                time.sleep(0.01)
        machine.signal(signalled, signal.SIGKILL)
        signalled.wait(5)
        for name in ("CONT", "KILL"):
            machine.run(["kill", f"-{name}", str(machine.pid_inside(stopped))]).check()
        assert stopped.poll() is None
    assert not Path(f"/proc/{stopped.pid}").exists()
