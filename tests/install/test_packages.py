"""The packages that are built here: the .deb installed, switched on, used, switched off and removed; the .rpm built."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import zipfile
from typing import TYPE_CHECKING

import pytest

from slurm_mps import __version__
from slurm_mps.cli.main import build_parser
from slurm_mps.slurm.plugin_file import read_plugin
from tests.harness.cluster import REPOSITORY, Cluster
from tests.harness.machine import Machine
from tests.harness.release import chosen
from tests.harness.reports import command_names
from tests.harness.site import PLUGIN_DIRECTORY, SIMULATOR, STATE_DIRECTORY
from tests.install.packages import package

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PLUGIN = f"{PLUGIN_DIRECTORY}/spank_mps.so"
LOGS = "/var/log/slurm-mps"
pytestmark = pytest.mark.skipif(bool(chosen().no_packages), reason=chosen().no_packages)
RELEASE = ".".join(read_plugin(REPOSITORY / "build/spank/spank_mps.so").slurm_release.split(".")[:2])


@pytest.fixture(scope="module")
def deb() -> Path:
    return package("deb")


@pytest.fixture
def machine(deb: Path) -> Iterator[Machine]:
    """A machine with Slurm and simulated GPUs, without Python packages of the project; the .deb lies in /opt."""
    machine = Machine(overlays={"/usr/lib/x86_64-linux-gnu": [SIMULATOR / "lib"], "/usr/bin": [SIMULATOR / "bin"]})
    with machine:
        machine.path("/opt/slurm-mps.deb").write_bytes(deb.read_bytes())
        yield machine


def files(machine: Machine) -> dict[str, bytes]:
    """What Slurm reads, and every name below the package's places."""
    found: dict[str, bytes] = {}
    for place in ("/etc/slurm", "/etc/systemd/system", "/usr/local/bin"):
        top = machine.path(place)
        found |= {f"{place}/{path.relative_to(top)}": path.read_bytes() for path in top.rglob("*") if path.is_file()}
    return found


def test_the_package_is_off_until_it_is_switched_on_and_goes_without_a_trace(machine: Machine) -> None:
    """Installed, it changes nothing in Slurm; removed, neither: and it is not removed under a job."""
    plugstack = "include /etc/slurm/plugstack.conf.d/*.conf\n"
    cluster = Cluster(machine, nodes=1, gpus_per_node=2, plugstack=plugstack, prolog_flags=None)
    machine.add_node("n1")
    machine.run(["simulated-gpus", "create", "2", "--seed", "n1"], node="n1").check()
    with cluster:
        conf = machine.read("/etc/slurm/slurm.conf")
        before = files(machine)
        told = machine.run(["dpkg", "--no-triggers", "-i", "/opt/slurm-mps.deb"], timeout=60).check()
        assert 'not switched on; "slurm-mps install --dry-run"' in told.stdout
        assert files(machine) == before
        assert "--mps" not in machine.run(["srun", "--help"], user="alice").stdout
        pages = ("man1/slurm-mps-install.1.gz", "man5/mps.toml.5.gz", "man7/slurm-mps.7.gz")
        for path in ("bash-completion/completions/slurm-mps", "slurm-mps/plugstack.conf", *(f"man/{p}" for p in pages)):
            assert machine.path(f"/usr/share/{path}").exists()
        packaged = machine.path(PLUGIN).read_bytes()

        machine.run(["slurm-mps", "install"], node="n1").check()
        entry = machine.run(["slurm-mps", "doctor", "--explain", "prolog-flags"], node="n1").check().stdout
        assert entry.startswith("### prolog-flags\n")
        assert "/share/doc/slurm-mps/docs/doctor.md)" in entry
        assert machine.path(PLUGIN).read_bytes() == packaged
        lines = ["Prolog=/etc/slurm/prolog.d/*", "Epilog=/etc/slurm/epilog.d/*", "PrologFlags=Alloc"]
        machine.write("/etc/slurm/slurm.conf", "\n".join([conf, *lines, ""]))
        machine.run(["scontrol", "reconfigure"]).check()
        asked = ("--mps-threads=25", "--mps-mem=8G", "--gres=gpu:1", "-n2")
        job = cluster.sbatch(*asked, script="PYTHONHOME=/apps srun slurm-mps verify && sleep 60")
        cluster.until("the ranks' report", lambda: "2 ranks, all clients" in cluster.output(job) or None, 30)
        assert cluster.output(job).count("32/132") == 2

        again = ["dpkg", "--no-triggers", "-i", "/opt/slurm-mps.deb"]
        upgraded = machine.run(again, node="n1", timeout=60).check()
        assert "systemctl restart slurmd" in upgraded.stdout
        assert '"slurm-mps install"' not in upgraded.stdout
        machine.path("/etc/slurm/mps.toml").unlink()
        upgraded = machine.run(again, node="n1", timeout=60).check()
        assert 'run "slurm-mps install"' in upgraded.stdout
        assert machine.run(["slurm-mps", "install", "--no-doctor"], node="n1").check().stdout.count("is there") == 4

        refused = machine.run(["dpkg", "--no-triggers", "-r", "slurm-mps"], node="n1")
        assert refused.returncode != 0
        assert f"job {job} has MPS on this node" in refused.stderr
        assert machine.path("/etc/slurm/prolog.d/10-slurm-mps.sh").exists()

        cluster.scancel(job)
        cluster.wait_idle()
        machine.write("/etc/slurm/slurm.conf", conf)
        machine.run(["scontrol", "reconfigure"]).check()
        machine.run(["dpkg", "--no-triggers", "-P", "slurm-mps"], node="n1", timeout=60).check()
        assert files(machine) == before
        ours = (PLUGIN, "/opt/slurm-mps", "/usr/bin/slurm-mps", "/var/lib/slurm-mps", STATE_DIRECTORY, LOGS)
        for path in ours:
            assert not machine.path(path, node="n1").exists(), path
        cluster.srun("-N1", "true").check()


def test_the_package_is_refused_by_a_machine_with_another_slurm(machine: Machine) -> None:
    """Its version and its dependency name the release; dpkg itself keeps it away from another."""
    status = machine.read("/var/lib/dpkg/status")
    package = f"\nVersion: {RELEASE}."
    assert package in status
    machine.write("/var/lib/dpkg/status", status.replace(package, "\nVersion: 99.11."))
    refused = machine.run(["dpkg", "--no-triggers", "-i", "/opt/slurm-mps.deb"], timeout=60)
    assert refused.returncode != 0
    assert "slurm-mps conflicts with slurm-wlm-basic-plugins" in refused.stderr
    assert f"(<< {RELEASE}.99)" in machine.run(["dpkg-deb", "-f", "/opt/slurm-mps.deb", "Depends"]).check().stdout
    shown = machine.run(["dpkg-deb", "-f", "/opt/slurm-mps.deb", "Version"]).check().stdout
    assert shown.strip().endswith(f"+slurm{RELEASE}")


def output_of(*line: object) -> str:
    """What a command prints; it ends with 0."""
    done = subprocess.run([str(word) for word in line], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout


def test_the_rpm_is_built_for_this_slurm_and_has_what_the_deb_has(deb: Path) -> None:
    """Both are the same tree, but for zsh's completion, which Red Hat has elsewhere, and files for Debian's tools."""
    rpm = package("rpm")
    requires = output_of("rpm", "-qp", "--requires", rpm).splitlines()
    assert {f"slurm >= {RELEASE}", f"slurm < {RELEASE}.99"} <= set(requires)
    assert output_of("rpm", "-qp", "--queryformat", "%{RELEASE}", rpm) == f"1.sl{RELEASE.replace('.', '')}"
    in_deb = {
        name.lstrip(".").replace("vendor-completions", "site-functions")
        for name in output_of("sh", "-c", f"dpkg-deb --fsys-tarfile {deb} | tar -t").splitlines()
        if not name.endswith("/")
    }
    in_rpm = set(output_of("rpm", "-qpl", rpm).splitlines())
    debians = {"doc/slurm-mps/changelog.Debian.gz", "doc/slurm-mps/copyright", "lintian/overrides/slurm-mps"}
    assert in_deb - in_rpm == {f"/usr/share/{name}" for name in debians}
    scripts = output_of("rpm", "-qp", "--scripts", rpm)
    for script in ("postinst", "prerm"):  # they switch slurm-mps off, and disable its units
        assert (REPOSITORY / "packaging/scripts" / script).read_text() in scripts


def test_lintian_and_rpmlint_find_nothing(deb: Path, tmp_path: Path) -> None:
    """No error and no warning, beside those that a file in packaging/ names with the reason."""
    for program in ("lintian", "rpmlint"):
        if not shutil.which(program):
            pytest.skip(f"no {program}")
    # lintian leaves a temporary file behind now and then
    output_of("env", f"TMPDIR={tmp_path}", "lintian", "--fail-on", "error,warning", deb)
    assert "0 errors, 0 warnings" in output_of("rpmlint", "-c", "packaging/rpmlint.toml", package("rpm"))


def test_a_release_has_all_that_the_repository_has(deb: Path) -> None:
    """The source archive has git's files. The wheel made from it has what works without a repository."""
    tracked = set(output_of("git", "-c", f"safe.directory={REPOSITORY}", "ls-files").splitlines())
    ((archive,), (wheel,)) = ((deb.parent / "root.dist").glob(pattern) for pattern in ("*.tar.gz", "*.whl"))
    with tarfile.open(archive) as opened:
        assert tracked - {name.partition("/")[2] for name in opened.getnames()} == {".ci/run", ".gitignore"}
    with zipfile.ZipFile(wheel) as opened:
        in_wheel = {name.partition(".data/data/")[2] or name for name in opened.namelist()}
    shared = ("spank/", "prolog/", "epilog/", "etc/")
    wanted = {name for name in tracked if name.startswith("slurm_mps/")}
    wanted |= {f"slurm_mps/share/{name}" for name in tracked if name.startswith(shared)}
    wanted |= {f"share/doc/slurm-mps/{name}" for name in ("README.md", "docs/doctor.md", "docs/reports.schema.json")}
    wanted |= {f"share/man/man1/slurm-mps-{name}.1" for name in command_names(build_parser())}
    wanted |= {f"share/man/man{page[-1]}/{page}" for page in ("slurm-mps.1", "slurm-mps.7", "mps.toml.5")}
    wanted.add(f"slurm_mps-{__version__}.dist-info/licenses/LICENSE")
    assert wanted - in_wheel == set()
