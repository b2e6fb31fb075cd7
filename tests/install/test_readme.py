"""Somebody who has only the README: its own commands, read from it, on a Debian with Slurm and without slurm-mps."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from typing import TYPE_CHECKING

import pytest

from tests.harness.cluster import REPOSITORY, Cluster
from tests.harness.machine import PATH, Machine
from tests.harness.release import chosen
from tests.harness.site import CACHE, SIMULATOR

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.harness.machine import Result

pytestmark = pytest.mark.skipif(bool(chosen().no_bare_debian), reason=chosen().no_bare_debian)
CHECKOUT = "/root/slurm-mps"
#: What a registry would give; the machine has no network.
WHEELS, MACHINES_WHEELS = CACHE / "wheels-readme", "/srv/wheels"
SECTION = re.search(r"^## Install\n(.*?)^## ", (REPOSITORY / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """The lines of the section's first code block, without their comments."""
    assert SECTION
    (block,) = re.findall(r"^```\n(.*?)^```", SECTION[1], re.MULTILINE | re.DOTALL)
    return [line.partition("  #")[0].strip() for line in block.splitlines()]


def packages() -> list[str]:
    """What it says is needed beside Slurm."""
    assert SECTION
    named = re.search(r"\(Debian: `([^`]*)`\)", SECTION[1])
    assert named
    return named[1].split()


@pytest.fixture(scope="module")
def wheels() -> Path:
    """What the package needs to be built and to run, from the registry and its cache."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    named = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    line = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download", "--only-binary=:all:"]
    subprocess.run([*line, f"--dest={WHEELS}", *named], check=True, timeout=300, stderr=subprocess.DEVNULL)
    return WHEELS


@pytest.fixture
def bare(wheels: Path) -> Iterator[Machine]:
    """A machine with simulated GPUs and, in root's home, what ``git clone`` gives."""
    overlays = {"/usr/lib/x86_64-linux-gnu": [SIMULATOR / "lib"], "/usr/bin": [SIMULATOR / "bin"]}
    with Machine(overlays=overlays, binds={wheels: MACHINES_WHEELS}) as machine:
        listed = ["git", "-c", f"safe.directory={REPOSITORY}", "ls-files", "-z", "-co", "--exclude-standard"]
        names = subprocess.run(listed, cwd=REPOSITORY, capture_output=True, check=True).stdout
        machine.make_directory(CHECKOUT)
        there = machine.path(CHECKOUT)
        packed = ["tar", "--null", "-T", "-", "-c"]
        archive = subprocess.run(packed, cwd=REPOSITORY, input=names, capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x", "-C", there], input=archive, check=True)
        yield machine


def typed(machine: Machine, line: str, **env: str) -> Result:
    """A line that root types in the checkout, on the node."""
    given = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": MACHINES_WHEELS, **env}
    return machine.run(["sh", "-c", line], cwd=CHECKOUT, node="n1", env=given, timeout=200)


def test_the_readme_alone_leads_to_a_verified_job(bare: Machine) -> None:
    """From no slurm-mps to `slurm-mps verify`: its commands, the lines that they leave to the admin, its sbatch."""
    machine = bare
    assert set(packages()) == {"python3-venv", "gcc", "make", "libc6-dev", "libslurm-dev"}
    machine.run(["dpkg-query", "-W", *packages()]).check()
    venv, dry_run, install = commands()
    assert "pip install ." in venv
    plugstack = "include /etc/slurm/plugstack.conf.d/*.conf\n"
    machine.add_node("n1")
    machine.run(["simulated-gpus", "create", "2", "--seed", "n1"], node="n1").check()
    with Cluster(machine, nodes=1, gpus_per_node=2, plugstack=plugstack, prolog_flags=None) as cluster:
        typed(machine, venv).check()
        shown = typed(machine, dry_run).check().stdout
        assert not machine.path("/etc/slurm/mps.toml").exists()
        told = typed(machine, install).check().stdout
        lines = re.findall(r"^ {6}(Prolog=.*|Epilog=.*|PrologFlags=.*|GresTypes=.*)$", told, re.MULTILINE)
        assert lines
        assert all(line in shown for line in lines)
        conf = machine.read("/etc/slurm/slurm.conf")
        machine.write("/etc/slurm/slurm.conf", "\n".join([conf, *lines, ""]))
        typed(machine, "scontrol reconfigure").check()
        for page in ("slurm-mps", "slurm-mps-doctor", "mps.toml"):  # while slurmd reads its configuration again
            typed(machine, f"man -w {page}", PATH=f"/opt/slurm-mps/bin:{PATH}").check()
        cluster.wait_idle()
        cluster.stop_daemon("slurmd-n1")
        cluster.start_node("n1")
        cluster.wait_idle()

        healthy = typed(machine, "slurm-mps doctor").check().stdout
        assert "problem:" not in healthy
        see = re.search(r"^ +see: (slurm-mps doctor --explain (\S+))$", told, re.MULTILINE)
        assert see, told
        entry = typed(machine, see[1]).check().stdout
        assert entry.startswith(f"### {see[2]}\n")
        assert entry.endswith("\n(/opt/slurm-mps/share/doc/slurm-mps/docs/doctor.md)\n")

        asked = ("--mps-threads=25", "--mps-mem=8G", "--gres=gpu:2", "-n4")
        job = cluster.sbatch(*asked, script="srun slurm-mps verify")
        info = cluster.wait(job)
        output = cluster.output(job)
        assert (info.state, output.count("32/132")) == ("COMPLETED", 4), output
        assert "4 ranks, all clients, each GPU's ranks share one server" in output
        cluster.wait_idle()
        assert not any(state.drained for state in cluster.node_states().values())
