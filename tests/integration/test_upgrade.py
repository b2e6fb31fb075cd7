"""A job that began under another version of slurm-mps, or of Slurm, than it ends under.

data/slurm_mps-journal-1.tar.xz is what ran as prolog and epilog when journals had version 1: the package of commit
3fb0dc7 without the parts that only users run. It runs here as it is.
"""

from __future__ import annotations

import re
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from slurm_mps.state import JOURNAL_VERSION
from tests.harness.gpunode import EPILOG, PROLOG, GpuNode, asked, job_environment
from tests.harness.release import chosen
from tests.harness.site import STATE_DIRECTORY, Site

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.machine import Result

OLD = "/srv/old"
JOURNAL = f"{STATE_DIRECTORY}/jobs/4711/journal"


@pytest.fixture(scope="module")
def node_of_both() -> Iterator[GpuNode]:
    """A node with this version installed, and the old one below OLD with scripts of its own."""
    with GpuNode(gpus=2) as node:
        node.run("rm", "/etc/slurm/mps.toml").check()  # the old one would have it compiled by the new one
        node.machine.make_directory(OLD)
        with tarfile.open(Path(__file__).with_name("data") / "slurm_mps-journal-1.tar.xz") as archive:
            archive.extractall(node.machine.path(OLD))
        yield node


@pytest.fixture
def node(node_of_both: GpuNode) -> Iterator[GpuNode]:
    before = node_of_both.snapshot()
    yield node_of_both
    after = node_of_both.snapshot()
    node_of_both.clean()
    assert after == before


def old(node: GpuNode, hook: str, **spank: str) -> Result:
    """Run the old version's prolog or epilog."""
    script = {"prolog": PROLOG, "epilog": EPILOG}[hook]
    changed = node.machine.read(script).replace(f"package={node.package}", f"package={OLD}/slurm_mps")
    node.machine.write(f"{OLD}/{hook}", changed, mode=0o755)
    return node.run(f"{OLD}/{hook}", env=job_environment(4711, **spank))


def version(node: GpuNode) -> str:
    return node.machine.read(JOURNAL).splitlines()[0].split()[2]


def test_a_job_of_the_old_version_ends_under_the_new_one(node: GpuNode) -> None:
    node.set_compute_modes(2, 0)
    old(node, "prolog", **asked("25", "8G")).check()
    assert version(node) == "1"
    assert "sms=32 " in node.client(4711).check().stdout
    assert node.epilog(4711).stderr == ""
    assert node.files() == []
    assert node.mps_processes() == []
    assert node.compute_modes() == [2, 0]
    node.set_compute_modes(0)


def test_a_second_run_of_a_job_is_brought_up_by_the_new_version(node: GpuNode) -> None:
    """Requeued onto the same node, its second prolog is of the new version, and starts anew."""
    old(node, "prolog", **asked("25")).check()
    environment = job_environment(4711, SLURM_JOB_RESTART_COUNT="1", **asked("50"))
    node.run(PROLOG, env=environment).check()
    assert version(node) == str(JOURNAL_VERSION)
    assert "sms=66 " in node.client(4711).check().stdout
    node.epilog(4711).check()


def test_a_job_of_the_new_version_is_kept_by_the_old_one(node: GpuNode) -> None:
    """After a downgrade: said what is in the way, nothing is touched, and the new version can still end it."""
    node.prolog(4711, **asked("25", "8G")).check()
    whole = node.machine.path(JOURNAL).read_bytes()
    for hook in ("epilog", "prolog"):
        result = old(node, hook, SLURM_JOB_RESTART_COUNT="1", **asked())
        assert result.returncode == 1
        assert f"journal version {JOURNAL_VERSION} is newer than version 1" in result.stderr
        assert node.machine.path(JOURNAL).read_bytes() == whole
    assert "sms=32 " in node.client(4711).check().stdout
    assert node.compute_modes() == [3, 3]
    node.epilog(4711).check()


def test_a_gpu_that_a_job_of_each_version_holds_gets_back_its_mode(node: GpuNode) -> None:
    """Ledgers are read by both: the last to leave puts back what the first one found."""
    old(node, "prolog", **asked("25")).check()
    assert node.prolog(4712, gpus="0").returncode == 0
    refused = node.verdict(4712)
    node.epilog(4712).check()
    assert "is held by MPS job 4711" in refused["message"]
    node.epilog(4711).check()
    assert node.compute_modes() == [0, 0]


@pytest.mark.skipif(not chosen().upgrades_from, reason="no other release here can be upgraded to this one")
@pytest.mark.parametrize(
    "autodetect",
    [pytest.param(True, id="by UUID, confined", marks=pytest.mark.every_release), pytest.param(False, id="by index")],
)
def test_a_job_goes_on_and_ends_while_slurm_is_upgraded(autodetect: bool) -> None:
    """Its daemon serves on, a step of the new Slurm has its limits, and the new epilog leaves nothing.

    With AutoDetect the old prolog was told indices, and the new Slurm speaks of UUIDs; devices are confined then.
    """
    found = chosen().autodetect if autodetect else ""
    with Site(nodes=1, upgraded_from=chosen().upgrades_from, autodetect=found, constrain_devices=bool(found)) as site:
        before = site.snapshot()
        version = site.machine.run(["srun", "--version"]).stdout
        script = "simulated-gpus client; while [ ! -e go ]; do sleep 0.1; done; srun simulated-gpus client"
        job = site.cluster.sbatch("--gres=gpu:2", "--mps-threads=25", script=script)
        site.cluster.until_output(job, "uuid=")
        site.upgrade()
        assert site.machine.run(["srun", "--version"]).stdout != version
        site.machine.write("/home/alice/go", "")
        state = site.cluster.wait(job).state
        output = site.machine.read(f"/home/alice/slurm-{job}.out")  # slurmctld has forgotten where it is
        after = site.cluster.srun("--gres=gpu:2", "--mps-threads=50", "simulated-gpus", "client")
        site.cluster.wait_idle()
        drained = site.cluster.node_states()["n1"].drained
        left = site.snapshot()
    assert (state, output.count(" sms=32 ")) == ("COMPLETED", 2), output
    assert len(set(re.findall(r"uuid=\S+", output))) == 1, output
    assert " sms=66 " in after.stdout, after
    assert not drained
    assert left == before
