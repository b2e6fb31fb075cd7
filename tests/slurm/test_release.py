"""The plugin and the Slurm release that loads it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from slurm_mps.config.settings import DEFAULTS
from slurm_mps.doctor.timeouts import check_deadlines
from slurm_mps.slurm.plugin_file import read_plugin
from tests.harness.plugin import built_for
from tests.harness.release import chosen
from tests.harness.site import PLUGIN_DIRECTORY

if TYPE_CHECKING:
    from tests.harness.site import Site

# By how much the number of the release in the plugin differs from Slurm's own.
OTHER_RELEASES = {"next-patch": 1, "next-month": 1 << 8, "last-month": -(1 << 8), "next-year": 1 << 16}


def _number(release: str) -> int:
    year, month, patch = map(int, release.split("."))
    return year << 16 | month << 8 | patch


@pytest.mark.every_release
def test_the_installed_plugin_is_for_the_slurm_that_runs(site: Site) -> None:
    plugin = read_plugin(site.machine.path(f"{PLUGIN_DIRECTORY}/spank_mps.so"))
    runs = site.machine.run(["srun", "--version"]).check().stdout.split()[-1]
    assert plugin.slurm_release == runs


@pytest.mark.every_release
@pytest.mark.parametrize("name", sorted(OTHER_RELEASES))
def test_slurm_takes_the_plugins_that_we_say_it_takes(site: Site, name: str) -> None:
    """`loads_in` is what keeps an installer from breaking every srun; here Slurm itself is asked."""
    machine = site.machine
    installed = machine.path(f"{PLUGIN_DIRECTORY}/spank_mps.so")
    runs = read_plugin(installed).slurm_release
    other = machine.path(f"/tmp/{name}.so")
    other.write_bytes(built_for(_number(runs) + OTHER_RELEASES[name], installed.read_bytes()))
    plugstack, config = f"/tmp/{name}.plugstack", f"/tmp/{name}.conf"
    machine.write(plugstack, f"required /tmp/{name}.so\n")
    machine.write(config, f"ClusterName=c\nSlurmctldHost=localhost\nPlugStackConfig={plugstack}\n")
    shown = machine.run(["srun", "--help"], env={"SLURM_CONF": config})
    assert ("--mps-threads" in shown.stdout) is read_plugin(other).loads_in(runs), shown
    machine.run(["rm", f"/tmp/{name}.so", plugstack, config]).check()


@pytest.mark.every_release
def test_slurm_shows_the_timeouts_that_are_checked(site: Site) -> None:
    """The sample's fit our deadlines; a longer one of ours is seen to be killed, and to look hung."""
    shown = site.machine.run(["scontrol", "show", "config"]).check().stdout
    config = dict(re.findall(r"^(\S+)\s*= (.*)$", shown, re.MULTILINE))
    assert list(check_deadlines(config, DEFAULTS.deadlines_prolog, DEFAULTS.deadlines_epilog)) == []
    found = check_deadlines(config, 1000, 1000)
    assert [one.severity for one in found] == ["problem", "problem", "warning"], shown


# --------------------------------------------------------------------------------------- beside other SPANK plugins

PLUGSTACK, OTHER = "/etc/slurm/plugstack.conf", "/etc/slurm/other.so"


@pytest.mark.parametrize("mode", ["", "ESPANK_NODE_FAILURE", "ESPANK_JOB_FAILURE"])
@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
def test_a_step_that_another_plugin_fails_leaves_nothing_of_ours(site: Site, mode: str, first: bool) -> None:
    """The prolog has brought MPS up by then. What becomes of the node is that plugin's to say."""
    if mode and chosen().no_init_failure_mode:
        pytest.skip(f"slurm_spank_init_failure_mode: {chosen().no_init_failure_mode}")
    ours, source = site.machine.read(PLUGSTACK), Path(__file__).with_name("failing_spank.c")
    site.machine.run(["cc", "-shared", "-fPIC", *([f"-DMODE={mode}"] if mode else []), "-o", OTHER, source]).check()
    theirs = f"required {OTHER}\n"
    site.machine.write(PLUGSTACK, theirs + ours if first else ours + theirs)
    try:
        job = site.cluster.sbatch("--gres=gpu:1", "--mps", "--no-requeue", "-wn1", script="echo ran")
        site.cluster.wait(job)
        site.cluster.wait_idle()
    finally:
        site.machine.write(PLUGSTACK, ours)
        site.machine.path(OTHER).unlink()
    state = site.cluster.node_states()["n1"]
    if state.drained:
        site.cluster.resume("n1")
    assert state.reason.partition(" [")[0] == ("" if mode == "ESPANK_JOB_FAILURE" else "batch job complete failure")
