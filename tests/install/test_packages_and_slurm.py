"""The packages beside those of Slurm: what dpkg, apt and rpm do about another release; and the .rpm installed."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.harness.machine import Machine
from tests.harness.release import chosen
from tests.harness.site import PLUGIN_DIRECTORY, SIMULATOR
from tests.install.packages import package
from tests.install.places import snapshot
from tests.install.test_packages import RELEASE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.machine import Result

pytestmark = pytest.mark.skipif(bool(chosen().no_packages), reason=chosen().no_packages)
PLUGIN = f"{PLUGIN_DIRECTORY}/spank_mps.so"
CONF = "ClusterName=c\nSlurmctldHost=localhost\n"
WIRED = f"{CONF}Prolog=/etc/slurm/prolog.d/*\nEpilog=/etc/slurm/epilog.d/*\n"
#: Every installed package of Slurm's as one of version $1, with nothing in it.
NEWER_DEBS = """set -eu
mkdir /opt/newer
installed=$(dpkg-query -W -f '${Package} ${source:Package}\n' | sed -n 's/ slurm-wlm$//p' | grep -v '^libslurm[0-9]')
for one in $installed; do
	mkdir -p "/opt/$one/DEBIAN"
	{
		printf 'Package: %s\nVersion: %s\nArchitecture: amd64\n' "$one" "$1"
		printf 'Maintainer: nobody <nobody@localhost>\nDescription: newer\n'
		[ "$one" = slurm-wlm-basic-plugins ] || echo "Depends: slurm-wlm-basic-plugins (= $1)"
	} >"/opt/$one/DEBIAN/control"
	dpkg-deb --build "/opt/$one" /opt/newer >/dev/null
done
"""
#: A slurm-mps for that Slurm, of the next version, with nothing in it either.
NEWER_OURS = """set -eu
mkdir -p /opt/ours/DEBIAN
dpkg-deb -f /opt/slurm-mps.deb | sed "s/^Version: .*/Version: 9-1+slurm24.11/
	s/^Depends: .*/Depends: slurmd (>= 24.11)/
	s/^Conflicts: .*/Conflicts: slurmd (>= 24.11.99)/" >/opt/ours/DEBIAN/control
dpkg-deb --build /opt/ours /opt/newer >/dev/null
"""
#: A package `slurm` of version $1, which also provides all that is in the file $2, one a line.
SLURM_RPM = """set -eu
mkdir -p /opt/specs
{
	printf 'Name: slurm\nVersion: %s\nRelease: 1\nSummary: slurm\nLicense: none\nBuildArch: noarch\n' "$1"
	sed 's/^/Provides: /' "$2"
	printf '%%description\nslurm\n%%files\n'
} >/opt/specs/slurm.spec
rpmbuild -bb --quiet --define '_topdir /opt/rpm' --define '_rpmdir /opt' /opt/specs/slurm.spec
"""


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine(
        overlays={"/usr/lib/x86_64-linux-gnu": [SIMULATOR / "lib"], "/usr/bin": [SIMULATOR / "bin"]}
    ) as machine:
        for kind in ("deb", "rpm"):
            machine.path(f"/opt/slurm-mps.{kind}").write_bytes(package(kind).read_bytes())
        yield machine


def slurms_version(machine: Machine) -> str:
    return machine.run(["dpkg-query", "-W", "-f", "${Version}", "slurm-wlm-basic-plugins"]).check().stdout


@pytest.fixture
def installed(machine: Machine) -> Machine:
    """With the .deb switched on, and a newer Slurm's packages in /opt/newer."""
    machine.run(["dpkg", "--no-triggers", "-i", "/opt/slurm-mps.deb"], timeout=60).check()
    machine.write("/etc/slurm/slurm.conf", CONF)
    machine.run(["slurm-mps", "install", "--no-doctor"]).check()
    machine.run(["sh", "-c", NEWER_DEBS, "sh", "24.11.5-4"], timeout=60).check()
    return machine


def upgrade(machine: Machine, with_what: str) -> Result:
    return machine.run(["sh", "-c", f"exec {with_what} /opt/newer/*.deb"], timeout=60)


def test_dpkg_puts_no_newer_slurm_beside_a_plugin_that_would_stop_it(installed: Machine) -> None:
    """With it in plugstack.conf the new slurmd would not start and no srun run; the old ones go on."""
    machine = installed
    refused = upgrade(machine, "dpkg --no-triggers -i")
    assert refused.returncode != 0
    assert "slurm-mps conflicts with slurm-wlm-basic-plugins" in refused.stderr
    assert slurms_version(machine).startswith(RELEASE)
    assert "--mps-threads" in machine.run(["srun", "--help"]).check().stdout


def test_apt_switches_it_off_before_a_newer_slurm_comes(installed: Machine) -> None:
    """Where slurm.conf does not need it: the new Slurm finds no plugin of the old one."""
    machine = installed
    upgrade(machine, "apt-get -y install").check()
    assert slurms_version(machine) == "24.11.5-4"
    left = [path for path in snapshot(machine) if path.startswith("/etc/slurm/")]
    assert left == ["/etc/slurm/.", "/etc/slurm/slurm.conf"]


def test_a_node_that_is_wired_is_upgraded_with_a_slurm_mps_for_the_new_slurm_only(installed: Machine) -> None:
    """Without its Prolog it would drain: nothing is taken out. Both at once go through, and the scripts stay."""
    machine = installed
    machine.write("/etc/slurm/slurm.conf", WIRED)
    refused = upgrade(machine, "apt-get -y install")
    assert refused.returncode != 0
    assert "Prolog=/etc/slurm/prolog.d/* would match no file" in refused.stdout + refused.stderr
    assert slurms_version(machine).startswith(RELEASE)
    assert machine.path(PLUGIN).exists()

    machine.run(["sh", "-c", NEWER_OURS]).check()
    upgrade(machine, "apt-get -y install").check()
    assert slurms_version(machine) == "24.11.5-4"
    assert machine.path("/etc/slurm/prolog.d/10-slurm-mps.sh").exists()


def test_the_rpm_installs_is_kept_under_a_job_and_goes_without_a_trace(machine: Machine) -> None:
    """By rpm itself with its dependencies, on a Slurm whose files are where this machine has them."""

    def rpm(*argv: str) -> subprocess.CompletedProcess[str]:
        done = machine.run(["rpm", "--force-debian", *argv], timeout=60)
        return subprocess.CompletedProcess(argv, done.returncode, done.stdout, done.stderr)

    needs = rpm("-qp", "--requires", "/opt/slurm-mps.rpm").stdout.splitlines()
    others = [line for line in needs if not line.startswith(("slurm ", "rpmlib("))]
    assert any(line.startswith("python(abi) = ") for line in others)
    machine.write("/opt/others", "".join(f"{line}\n" for line in others))
    for version in (f"{RELEASE}.77", "99.11.1"):
        machine.run(["sh", "-c", SLURM_RPM, "sh", version, "/opt/others"], timeout=60).check()
    before = snapshot(machine)
    assert f"slurm < {RELEASE}.99 is needed" in rpm("-i", "/opt/slurm-mps.rpm").stderr
    assert rpm("-i", f"/opt/noarch/slurm-{RELEASE}.77-1.noarch.rpm").returncode == 0
    installed = rpm("-i", "/opt/slurm-mps.rpm")
    assert (installed.returncode, 'not switched on; "slurm-mps install --dry-run"' in installed.stdout) == (0, True)
    assert {path for path in snapshot(machine) if path not in before} == {PLUGIN}
    assert rpm("-V", "slurm-mps").returncode == 0

    machine.run(["slurm-mps", "install", "--no-doctor"]).check()
    assert (
        f"slurm < {RELEASE}.99 is needed by (installed)" in rpm("-U", "/opt/noarch/slurm-99.11.1-1.noarch.rpm").stderr
    )
    machine.make_directory("/run/slurm-mps/jobs/4711", mode=0o711)
    refused = rpm("-e", "slurm-mps")
    assert (refused.returncode, "job 4711 has MPS on this node" in refused.stderr) == (1, True)
    assert machine.path("/opt/slurm-mps/bin/slurm-mps").exists()
    upgraded = rpm("-U", "--force", "/opt/slurm-mps.rpm")
    assert (upgraded.returncode, "systemctl restart slurmd" in upgraded.stdout) == (0, True)
    assert machine.path("/etc/slurm/prolog.d/10-slurm-mps.sh").exists()

    machine.path("/run/slurm-mps/jobs/4711").rmdir()
    assert rpm("-e", "slurm-mps").returncode == 0
    assert snapshot(machine) == before
    for path in ("/opt/slurm-mps", "/usr/bin/slurm-mps", "/usr/share/doc/slurm-mps"):
        assert machine.run(["test", "-e", path]).returncode == 1, path
