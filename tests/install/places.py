"""What an installation may touch, and what it says, for the tests of it."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, Any

from tests.harness.reports import report as checked
from tests.harness.runtime import MOUNT_POINT
from tests.harness.site import PLUGIN_DIRECTORY

if TYPE_CHECKING:
    from tests.harness.machine import Machine, Result

PROGRAM = f"{MOUNT_POINT}/bin/slurm-mps"
PLACES = ("/etc/slurm", "/usr/local/bin", "/etc/systemd/system", PLUGIN_DIRECTORY, "/var/lib/slurm-mps")

Snapshot = dict[str, tuple[int, int, int, bytes]]


def snapshot(machine: Machine) -> Snapshot:
    """Mode, owner, group and content of everything there."""
    found = {}
    for place in PLACES:
        top = machine.path(place)
        for path in sorted((top, *top.rglob("*"))) if top.exists() else ():
            status = path.lstat()
            ours = stat.S_ISREG(status.st_mode) and (place != PLUGIN_DIRECTORY or "mps" in path.name)
            content = path.read_bytes() if ours else b""
            found[f"{place}/{path.relative_to(top)}"] = (status.st_mode, status.st_uid, status.st_gid, content)
    return found


def report(result: Result) -> dict[str, Any]:
    return checked(result.stdout, result.returncode)
