"""A job that begins under one version of Slurm, or of slurm-mps, and ends under another."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from slurm_mps.job.verdict import VERDICT_VERSION
from tests.harness.cluster import waits_for
from tests.harness.release import chosen
from tests.harness.site import Site

if TYPE_CHECKING:
    from tests.harness.cluster import Job


@pytest.mark.skipif(not chosen().upgrades_from, reason="no other release here can be upgraded to this one")
@pytest.mark.parametrize(
    "autodetect",
    [pytest.param(True, id="by UUID, confined", marks=pytest.mark.every_release), pytest.param(False, id="by index")],
)
def test_a_job_goes_on_and_ends_while_slurm_is_upgraded(autodetect: bool) -> None:
    """Its daemon serves on, a step of the new Slurm has its limits, and the new epilog leaves nothing.

    With AutoDetect the old prolog was told indices, and the new Slurm speaks of UUIDs; devices are confined then. The
    job's verdict names the package of the old Debian's Python: after a step that ended badly the server is tried when
    the link of docs/admins.md is there.
    """
    found = chosen().autodetect if autodetect else ""
    with Site(nodes=1, upgraded_from=chosen().upgrades_from, autodetect=found, constrain_devices=bool(found)) as site:
        before = site.snapshot()
        version = site.machine.run(["srun", "--version"]).stdout
        client = "simulated-gpus client"
        back = "until timeout 10 srun true; do sleep 1; done"  # now and then the first srun after it waits for ever
        bad = f"{back}; srun {client}; srun false; srun {client}"
        steps = [client, waits_for(), bad, waits_for("linked"), f"srun {client}"]
        job = site.cluster.sbatch("--gres=gpu:2", "--mps-threads=25", script="; ".join(steps), until="uuid=")
        old_package = package_of(site, job)
        site.upgrade()
        assert site.machine.run(["srun", "--version"]).stdout != version
        site.cluster.let_go(job)
        path = f"/home/alice/slurm-{job}.out"  # slurmctld has forgotten where it is
        refusal = "was slurm-mps moved or removed?"  # an srun that found slurmd not back yet tries again after 30 s
        site.cluster.until("a refusal", lambda: refusal in site.machine.read(path) or None, 90)
        new_python = site.node("n1", "sh", "-c", "cd /opt/slurm-mps/lib && ls -d python3.*").check().stdout.strip()
        assert new_python not in old_package
        old_python = f"/opt/slurm-mps/lib/{old_package.split('/')[4]}"
        site.node("n1", "ln", "-s", new_python, old_python).check()
        site.cluster.let_go(job, "linked")
        state = site.cluster.wait(job).state
        output = site.machine.read(path)
        site.node("n1", "rm", old_python).check()
        after = site.cluster.srun("--gres=gpu:2", "--mps-threads=50", "simulated-gpus", "client")
        site.cluster.wait_idle()
        drained = site.cluster.node_states()["n1"].drained
        left = site.snapshot()
    assert (state, output.count(" sms=32 ")) == ("COMPLETED", 3), output
    assert len(set(re.findall(r"uuid=\S+", output))) == 1, output
    assert " sms=66 " in after.stdout, after
    assert not drained
    assert left == before


def package_of(site: Site, job: Job) -> str:
    """The program that tries a job's server, as its verdict names it."""
    (words,) = re.findall("^probe (.*)", site.verdict(job), re.MULTILINE)
    return str(words.split()[1])


def test_a_step_that_meets_a_newer_verdict_is_refused_by_its_number(site: Site) -> None:
    """A newer prolog beside an older plugin: an upgrade that forgot the plugin, or a downgrade of it."""
    wait = f"echo waits; {waits_for()}; srun echo ran"
    job = site.cluster.sbatch("-wn1", "--gres=gpu:1", "--mps", script=wait, until="waits")
    site.change_verdict(job, f"verdict {VERDICT_VERSION}", f"verdict {VERDICT_VERSION + 1}")
    site.cluster.let_go(job)
    site.cluster.wait(job)
    output = site.cluster.output(job)
    newer = f"verdict version {VERDICT_VERSION + 1}, and the plugin reads up to {VERDICT_VERSION}"
    assert len(re.findall(r"error: mps: job .*newer slurm-mps than spank_mps\.so", output)) == 1, output
    assert newer in output
    assert "ran" not in output.split()
