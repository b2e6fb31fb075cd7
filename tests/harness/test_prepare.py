"""``make demo`` on a machine that is somebody's: it installs what is missing, and harms nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from .cluster import REPOSITORY
from .machine import Machine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .machine import Result

OURS = ("slurmd", "slurm-client")
# A machine without Slurm, whose apt knows a registry of two of Debian's packages by name, and has beside it one of
# SchedMD's with the very Conflicts of theirs. Each has a service that it enables and starts.
MAKE_PACKAGES = r"""set -eu
package() {
	top=/opt/made/$1
	mkdir -p $top/DEBIAN $top/lib/systemd/system $top/etc/init.d $2
	cat >$top/DEBIAN/control <<-END
		Package: $1
		Version: 1
		Architecture: all
		Maintainer: nobody <nobody@localhost>
		Description: nothing
		Conflicts: $3
	END
	printf '[Service]\nExecStart=true\n[Install]\nWantedBy=multi-user.target\n' >$top/lib/systemd/system/$1.service
	cat >$top/etc/init.d/$1 <<-END
		#!/bin/sh
		### BEGIN INIT INFO
		# Provides: $1
		# Default-Start: 2 3 4 5
		### END INIT INFO
		touch /started
	END
	cat >$top/DEBIAN/postinst <<-END
		#!/bin/sh
		update-rc.d $1 defaults
		! deb-systemd-helper -q was-enabled $1.service || deb-systemd-helper enable $1.service
		invoke-rc.d $1 start
	END
	chmod 755 $top/DEBIAN/postinst $top/etc/init.d/$1
	dpkg-deb --build $top $2/$1.deb >/dev/null
}
package slurmd /opt/debian nothing
package slurm-client /opt/debian nothing
package slurm-smd-slurmd /opt slurmd
cd /opt/debian
for deb in *.deb; do
	dpkg-deb -f $deb
	printf 'Filename: ./%s\nSize: %s\nSHA256: %s\n\n' $deb $(stat -c %s $deb) $(sha256sum $deb | cut -c-64)
done >Packages
dpkg --remove $(dpkg-query -W -f '${Package} ${source:Package} ${db:Status-Status}\n' |
	sed -n 's/ slurm-wlm installed$//p') >/dev/null 2>&1
rm -rf /etc/apt/sources.list.d/* /var/lib/apt/lists/* /usr/sbin/policy-rc.d
rm -f /etc/systemd/system/*.wants/slurm* /etc/rc?.d/*slurm*
echo 'deb [trusted=yes] file:/opt/debian ./' >/etc/apt/sources.list
"""
ENABLED = "find /etc/systemd/system /etc/rc?.d -path '*wants/slurm*' -o -name 'S*slurm*'"


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine(shown=[REPOSITORY]) as machine:
        machine.run(["sh", "-c", MAKE_PACKAGES], timeout=60).check()
        yield machine


SCRIPT = REPOSITORY / "tests/harness/prepare.sh"


def prepare(machine: Machine) -> Result:
    return machine.run([SCRIPT, *OURS], cwd=str(REPOSITORY), timeout=60)


def packages(machine: Machine) -> list[str]:
    return machine.run(["dpkg-query", "-W", "-f", "${Package} ${db:Status-Abbrev}\n"]).check().stdout.splitlines()


def test_a_slurm_that_conflicts_is_named_and_kept(machine: Machine) -> None:
    """Apt by itself would remove it: a node of somebody's cluster would have lost its slurmd."""
    machine.run(["dpkg", "-i", "/opt/slurm-smd-slurmd.deb"]).check()
    before = packages(machine)
    refused = prepare(machine)
    assert (refused.returncode, packages(machine)) == (1, before)
    assert "this machine has what conflicts with it: slurm-smd-slurmd 1." in refused.stderr
    assert "make demo SLURM_MPS_RELEASE=" in refused.stderr


def test_a_slurm_without_a_package_is_named(machine: Machine) -> None:
    machine.write("/usr/local/sbin/slurmd", "#!/bin/sh\n", mode=0o755)
    refused = prepare(machine)
    assert "This machine has a Slurm of its own, /usr/local/sbin/slurmd" in refused.stderr
    assert "slurmd ii " not in packages(machine)


def test_what_is_installed_does_not_start_now_nor_at_boot(machine: Machine) -> None:
    """Nor after its next upgrade; and the policy that keeps it from starting is gone."""
    prepare(machine).check()
    assert {"slurmd ii ", "slurm-client ii "} <= set(packages(machine))
    for path in ("/started", "/usr/sbin/policy-rc.d"):
        assert not machine.path(path).exists()
    assert machine.run(["sh", "-c", ENABLED]).stdout == ""
    machine.run(["dpkg", "-i", "/opt/debian/slurmd.deb"])
    assert machine.run(["sh", "-c", ENABLED]).stdout == ""
    assert prepare(machine).check().stdout == ""


def without(capability: str) -> tuple[str, ...]:
    return ("setpriv", f"--bounding-set=-{capability}")


MOUNTS = "This needs to make namespaces, mounts and devices, and may not: "


@pytest.mark.parametrize(
    ("within", "user", "cwd", "needed"),
    [
        ((), "alice", "/", "This needs root: "),
        (without("sys_admin"), None, "/", MOUNTS),
        (without("mknod"), None, "/", MOUNTS),
        ((), None, "/opt/slurm-mps/src", "move this checkout"),
        ((), None, "/media/src", "move this checkout"),
        (("sh", "-c", 'echo ID=other >/etc/os-release; exec "$@"', "sh"), None, "/", "This needs Debian 12 or 13, "),
    ],
)
def test_what_is_needed_is_said_in_a_line(within: tuple[str, ...], user: str | None, cwd: str, needed: str) -> None:
    """Before anything is installed or compiled, and not by a traceback."""
    with Machine() as machine:
        machine.make_directory(cwd)
        machine.write("/prepare.sh", SCRIPT.read_text(), mode=0o755)
        refused = machine.run([*within, "/prepare.sh", "no-such-package"], user=user, cwd=cwd)
    first, *others = refused.stderr.splitlines()
    assert (refused.returncode, needed in first, refused.stdout) == (1, True, "")
    assert all("podman run" in line for line in others)
