"""The plugin and the Slurm release that loads it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from slurm_mps.config import DEFAULTS
from slurm_mps.deadlines import check_deadlines
from slurm_mps.plugin_file import read_plugin
from tests.harness.site import PLUGIN_DIRECTORY

if TYPE_CHECKING:
    from tests.harness.site import Site

# By how much the number of the release in the plugin differs from Slurm's own.
OTHER_RELEASES = {"next-patch": 1, "next-month": 1 << 8, "last-month": -(1 << 8), "next-year": 1 << 16}


def _number(release: str) -> int:
    year, month, patch = map(int, release.split("."))
    return year << 16 | month << 8 | patch


def test_the_installed_plugin_is_for_the_slurm_that_runs(site: Site) -> None:
    plugin = read_plugin(site.machine.path(f"{PLUGIN_DIRECTORY}/spank_mps.so"))
    runs = site.machine.run(["srun", "--version"]).check().stdout.split()[-1]
    assert plugin.slurm_release == runs


@pytest.mark.parametrize("name", sorted(OTHER_RELEASES))
def test_slurm_takes_the_plugins_that_we_say_it_takes(site: Site, name: str) -> None:
    """`loads_in` is what keeps an installer from breaking every srun; here Slurm itself is asked."""
    machine = site.machine
    installed = machine.path(f"{PLUGIN_DIRECTORY}/spank_mps.so")
    runs = read_plugin(installed).slurm_release
    number = _number(runs).to_bytes(4, "little")
    data = installed.read_bytes()
    assert data.count(number) == 1
    other = machine.path(f"/tmp/{name}.so")
    other.write_bytes(data.replace(number, (_number(runs) + OTHER_RELEASES[name]).to_bytes(4, "little")))
    plugstack, config = f"/tmp/{name}.plugstack", f"/tmp/{name}.conf"
    machine.write(plugstack, f"required /tmp/{name}.so\n")
    machine.write(config, f"ClusterName=c\nSlurmctldHost=localhost\nPlugStackConfig={plugstack}\n")
    shown = machine.run(["srun", "--help"], env={"SLURM_CONF": config})
    assert ("--mps-threads" in shown.stdout) is read_plugin(other).loads_in(runs), shown
    machine.run(["rm", f"/tmp/{name}.so", plugstack, config]).check()


def test_slurm_shows_the_timeouts_that_are_checked(site: Site) -> None:
    """The sample's fit our deadlines; a longer one of ours is seen to be killed, and to look hung."""
    shown = site.machine.run(["scontrol", "show", "config"]).check().stdout
    config = dict(re.findall(r"^(\S+)\s*= (.*)$", shown, re.MULTILINE))
    assert check_deadlines(config, DEFAULTS.deadlines_prolog, DEFAULTS.deadlines_epilog) == []
    found = check_deadlines(config, 1000, 1000)
    assert [problem.serious for problem in found] == [True, True, False], shown
