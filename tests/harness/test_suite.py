"""``make test`` says what the tests left on the machine, and fails."""

from __future__ import annotations

import re
import sys

from .cluster import REPOSITORY
from .machine import Machine

LEAVES = """
import subprocess
def test_leaves():
    line = "sleep 1000 & umount /srv 2>/dev/null; mount -t tmpfs none /srv; echo >/etc/left; echo >/run/munge-left"
    subprocess.run(["setsid", "sh", "-c", line + "; echo >>/etc/hostname"], check=True)
"""


def test_what_a_run_leaves_is_named_and_fails_it() -> None:
    with Machine(shown=[REPOSITORY]) as machine:
        machine.write("/var/tests/test_it.py", LEAVES)
        line = [sys.executable, "-m", "tests.harness.suite", "--jobs", "1", "-p", "no:cacheprovider"]
        done = machine.run([*line, "/var/tests/test_it.py"], cwd=str(REPOSITORY), timeout=90)
        found = re.findall(r"^make: left on this machine, or changed: (.*)", done.stdout, re.MULTILINE)
        assert [re.sub(r"\d+", "N", one) for one in found] == [
            *("process N (sleep N)", "mount /srv (tmpfs)"),
            *("file /etc/hostname", "file /etc/left", "file /run/munge-left"),
        ]
        assert not [one for one in machine.processes() if one.comm == "sleep"]
        assert (done.returncode, " passed" in done.stdout) == (1, True)
