"""`slurm-mps install` and `uninstall` on a machine with a real Slurm: the node is used, and then it is as it was."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from slurm_mps.slurm.plugin_file import read_plugin
from tests.harness.cluster import REPOSITORY
from tests.harness.plugin import built_for
from tests.harness.release import RELEASES, chosen
from tests.harness.runtime import MOUNT_POINT
from tests.harness.site import PLUGIN_DIRECTORY, PYTHON, gpu_machine
from tests.install.places import PROGRAM, report, snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.harness.machine import Machine, Result

BUILT = str(REPOSITORY / "build/spank/spank_mps.so")  # within a machine, where it is of the machine's release
PROLOG, EPILOG = "/etc/slurm/prolog.d/10-slurm-mps.sh", "/etc/slurm/epilog.d/95-slurm-mps.sh"
PLUGIN = f"{PLUGIN_DIRECTORY}/spank_mps.so"
PLUGSTACK = "/etc/slurm/plugstack.conf"
#: Two kinds of place at once: a single script, and a pattern.
SLURM_CONF = """ClusterName=c
SlurmctldHost=localhost
Prolog=/etc/slurm/prolog.sh
Epilog=/etc/slurm/tidy/*.sh
"""


def slurm_mps(machine: Machine, *argv: str, env: Mapping[str, str] | None = None, user: str | None = None) -> Result:
    return machine.run([PROGRAM, *argv], env=env, user=user, timeout=60)


def lay_plugin(machine: Machine) -> bytes:
    data = machine.path(BUILT).read_bytes()
    machine.path("/opt/spank_mps.so").write_bytes(data)
    return data


def install(machine: Machine, *argv: str, env: Mapping[str, str] | None = None) -> Result:
    """With the plugin that the tests were built with: compiling takes longer than all the rest."""
    lay_plugin(machine)
    return slurm_mps(machine, "install", "--no-doctor", "--plugin", "/opt/spank_mps.so", *argv, env=env)


@pytest.fixture(scope="module")
def shared_machine() -> Iterator[Machine]:
    with gpu_machine() as machine:
        yield machine


@pytest.fixture
def machine(shared_machine: Machine) -> Machine:
    """A machine with Slurm's programs and slurm-mps in /opt, and nothing of it in Slurm; it must be so again."""
    shared_machine.run(
        ["sh", "-c", f"rm -rf /etc/slurm/* /var/lib/slurm-mps /run/slurm-mps /usr/local/bin/slurm-mps {PLUGIN}"]
    ).check()
    return shared_machine


def a_site_of_its_own(machine: Machine) -> None:
    """A site whose files are all unusual."""
    machine.write("/etc/slurm/slurm.conf", SLURM_CONF)
    machine.write("/etc/slurm/prolog.sh", "#!/bin/sh\nexit 0\n", mode=0o755)
    machine.write("/etc/slurm/tidy/50-gpus.sh", "#!/bin/sh\n", mode=0o755)
    machine.write(PLUGSTACK, "# ours\ninclude /etc/slurm/other.d/*.conf\n# no newline at the end", mode=0o640)
    machine.write("/etc/slurm/mps.toml", "# the site's\n")


# ------------------------------------------------------------------------------------------------ a whole installation


def test_dry_run_shows_every_file_and_line_and_changes_nothing(machine: Machine) -> None:
    before = snapshot(machine)
    told = slurm_mps(machine, "install", "--dry-run").check().stdout
    assert snapshot(machine) == before
    for line in ("+required spank_mps.so", f"+python={MOUNT_POINT}/bin/python3", '+compute_mode = "exclusive_process"'):
        assert line in told.splitlines()
    for path in (PROLOG, EPILOG, PLUGIN, PLUGSTACK, "/etc/slurm/mps.toml"):
        assert any(line.endswith(f"  {path}") for line in told.splitlines())
    assert "Prolog=/etc/slurm/prolog.d/*" in told


@pytest.mark.every_release
def test_uninstall_leaves_exactly_what_was(machine: Machine) -> None:
    """Contents, modes, groups, and no directory more; first on a bare machine, then on a site with files of its own."""
    before = snapshot(machine)
    install(machine).check()
    assert snapshot(machine) != before
    slurm_mps(machine, "uninstall").check()
    assert snapshot(machine) == before

    a_site_of_its_own(machine)
    before = snapshot(machine)
    done = report(install(machine, "--json"))
    written = {change["path"]: change["what"] for change in done["changes"]}
    assert written["/etc/slurm/prolog.d/10-slurm-mps.sh"] == "wrote"
    assert written["/etc/slurm/tidy/95-slurm-mps.sh"] == "wrote"
    assert written["/etc/slurm/other.d/slurm-mps.conf"] == "wrote"
    assert not {"/etc/slurm/mps.toml", PLUGSTACK} & written.keys()
    by_hand = {line: todo["where"] for todo in done["by_hand"] for line in todo["lines"]}
    assert by_hand["/etc/slurm/prolog.d/10-slurm-mps.sh || exit 1"] == "/etc/slurm/prolog.sh, as its last line"
    assert not any(line.startswith(("Prolog=", "Epilog=")) for line in by_hand)
    slurm_mps(machine, "uninstall").check()
    assert snapshot(machine) == before


def test_container_engines_get_a_file_of_ours_or_a_line_to_add(machine: Machine) -> None:
    """enroot reads all files of a directory; Apptainer has one file, the site's."""
    mounts, apptainer = "/etc/enroot/mounts.d", "/etc/apptainer/apptainer.conf"
    machine.run(["mkdir", "-p", mounts]).check()
    machine.write(apptainer, "bind path = /etc/hosts\n")
    done = report(install(machine, "--json"))
    fstab = machine.read(f"{mounts}/50-slurm-mps.fstab")
    machine.write(apptainer, "bind path = /run/slurm-mps\n")
    again = report(install(machine, "--json"))
    undone = slurm_mps(machine, "uninstall").check()
    left = machine.run(["ls", mounts]).stdout
    machine.run(["rm", "-r", "/etc/enroot", "/etc/apptainer"]).check()
    assert fstab.startswith("/run/slurm-mps /run/slurm-mps none x-create=dir,bind,ro,")
    (todo,) = [one for one in done["by_hand"] if one["lines"] == ["bind path = /run/slurm-mps"]]
    assert todo["why"].endswith("starts none where the directory is missing; first run systemd-tmpfiles --create")
    assert ({change["what"] for change in again["changes"]}, left) == ({"is there"}, "")
    assert not any("apptainer" in one["where"] for one in again["by_hand"])
    assert f"{apptainer}: take 'bind path = /run/slurm-mps' out, since Apptainer starts no container" in undone.stderr


def test_after_a_boot_the_state_directory_is_there_before_a_job(machine: Machine) -> None:
    """As a job makes it: an engine that binds it into each container may start none without it."""
    look = ["find", "/run/slurm-mps", "-printf", "%p %M %u\n"]
    machine.run(["mkdir", "-p", "/etc/tmpfiles.d"]).check()
    install(machine).check()
    machine.run(["systemd-tmpfiles", "--create", "/etc/tmpfiles.d/slurm-mps.conf"]).check()
    at_boot, status = machine.run(look).stdout, slurm_mps(machine, "status")
    machine.run(["rm", "-r", "/run/slurm-mps"]).check()
    machine.run([PYTHON, "-I", "-c", "from slurm_mps.job.state import NodeState; NodeState()"]).check()
    by_a_job = machine.run(look).stdout
    slurm_mps(machine, "uninstall").check()
    machine.run(["rm", "-r", "/run/slurm-mps"]).check()
    assert sorted(at_boot.split()) == sorted(by_a_job.split())
    assert (status.returncode, status.stderr) == (0, "slurm-mps: no job has MPS on this node\n")
    assert machine.run(["ls", "/etc/tmpfiles.d"]).stdout == ""


def test_a_second_install_changes_nothing_and_a_newer_one_replaces_its_own(machine: Machine) -> None:
    before = snapshot(machine)
    install(machine).check()
    once = snapshot(machine)
    assert {change["what"] for change in report(install(machine, "--json"))["changes"]} == {"is there"}
    assert snapshot(machine) == once

    other = lay_plugin(machine) + b"of another version"
    machine.path("/opt/other.so").write_bytes(other)
    done = slurm_mps(machine, "install", "--no-doctor", "--json", "--plugin", "/opt/other.so")
    assert [c["path"] for c in report(done)["changes"] if c["what"] == "replaced"] == [PLUGIN]
    assert machine.path(PLUGIN).read_bytes() == other
    slurm_mps(machine, "uninstall").check()
    assert snapshot(machine) == before


def test_the_plugins_line_goes_into_a_file_of_ours_or_is_left_to_the_admin(machine: Machine) -> None:
    """Where plugstack.conf includes no file of ours, as by an Include that Slurm ignores, it stays as it is."""
    for text in ("# the site's\n", "Include /etc/slurm/plugstack.conf.d/*.conf\n"):
        machine.write(PLUGSTACK, text)
        done = report(install(machine, "--json"))
        assert {"where": PLUGSTACK, "lines": ["required spank_mps.so"]}.items() <= done["by_hand"][1].items()
        assert (done["status"], machine.read(PLUGSTACK)) == (0, text)
        slurm_mps(machine, "uninstall").check()
    machine.write("/etc/slurm/slurm.conf", "ClusterName=c\nSlurmctldHost=localhost\n")
    machine.write(PLUGSTACK, "include\t/etc/slurm/plugstack.conf.d/*.conf\n")
    install(machine).check()
    assert "required spank_mps.so" in machine.read("/etc/slurm/plugstack.conf.d/slurm-mps.conf")
    assert "--mps-threads" in machine.run(["srun", "--help"]).stdout
    slurm_mps(machine, "uninstall").check()
    assert not machine.path("/etc/slurm/plugstack.conf.d").exists()


def test_a_line_of_the_sites_own_is_enough_and_keeps_the_plugin(machine: Machine) -> None:
    machine.write(PLUGSTACK, "required spank_mps.so\n")
    done = report(install(machine, "--json"))
    assert not any(PLUGSTACK in str(one) for one in (*done["changes"], *done["by_hand"]))
    machine.write(PLUGSTACK, "optional spank_mps.so\n")
    assert any(
        "optional plugin says is ignored" in todo["why"] for todo in report(install(machine, "--json"))["by_hand"]
    )
    refused = slurm_mps(machine, "uninstall", "--force")
    assert (refused.returncode, machine.path(PLUGIN).exists(), machine.path(PROLOG).exists()) == (1, True, True)
    assert f"{PLUGSTACK}: optional spank_mps.so: without the plugin" in refused.stderr
    machine.path(PLUGSTACK).unlink()
    slurm_mps(machine, "uninstall").check()


def test_a_script_moves_with_the_sites_pattern(machine: Machine) -> None:
    """After slurm.conf looks elsewhere, the next install leaves nothing where it looked before."""
    machine.write("/etc/slurm/slurm.conf", "Prolog=/etc/slurm/a/*\nEpilog=/etc/slurm/b/*\n")
    install(machine).check()
    assert machine.path("/etc/slurm/a/10-slurm-mps.sh").exists()
    machine.write("/etc/slurm/slurm.conf", "Prolog=/etc/slurm/c/*\nEpilog=/etc/slurm/b/*\n")
    install(machine).check()
    assert not machine.path("/etc/slurm/a/10-slurm-mps.sh").exists()
    assert machine.path("/etc/slurm/c/10-slurm-mps.sh").exists()


# ------------------------------------------------------------------------------------------------------------ refusals


def test_a_plugin_for_another_slurm_is_refused_and_nothing_changes(machine: Machine) -> None:
    """With it in plugstack.conf no srun would start, nor slurmd."""
    before = snapshot(machine)
    data = lay_plugin(machine)
    runs = read_plugin(machine.path(BUILT)).slurm_release
    year, month, patch = map(int, runs.split("."))
    machine.path("/opt/other.so").write_bytes(built_for(year << 16 | (month + 1) << 8 | patch, data))
    refused = slurm_mps(machine, "install", "--plugin", "/opt/other.so")
    assert refused.returncode == 1
    assert f"the plugin is for Slurm {year}.{month + 1:02d}.{patch}, and {runs} runs here" in refused.stderr

    foreign = next(name for name in RELEASES if name != chosen().name)
    year, month = map(int, foreign.split("."))
    headers = "/opt/headers"
    machine.run(["sh", "-c", f"mkdir {headers} && cp -r /usr/include/slurm {headers}/"]).check()
    machine.run(
        [
            "sed",
            "-i",
            f"s/^#define SLURM_VERSION_NUMBER .*/#define SLURM_VERSION_NUMBER {year << 16 | month << 8 | 5:#x}/",
            f"{headers}/slurm/slurm_version.h",
        ]
    ).check()
    refused = slurm_mps(machine, "install", "--slurm-include", headers)
    assert refused.returncode == 1
    assert f"the plugin is for Slurm {foreign}.5, and {runs} runs here; install the headers" in refused.stderr
    assert snapshot(machine) == before


def test_without_compiler_headers_slurm_or_root_it_says_what_is_missing() -> None:
    with gpu_machine() as machine:
        before = snapshot(machine)
        machine.run(["rm", "-r", "/usr/include/slurm"]).check()
        refused = slurm_mps(machine, "install")
        assert refused.returncode == 1
        assert "slurm/spank.h: No such file or directory; gcc, make" in refused.stderr
        machine.run(["rm", "/usr/bin/make"]).check()
        refused = slurm_mps(machine, "install")
        assert "the plugin cannot be built: make: No such file or directory; gcc, make" in refused.stderr
        assert slurm_mps(machine, "install", user="alice").returncode == 4
        assert slurm_mps(machine, "uninstall", user="alice").returncode == 4
        machine.run(["rm", "/usr/sbin/slurmd", "/usr/bin/srun", "/usr/bin/scontrol"]).check()
        refused = slurm_mps(machine, "install")
        assert (refused.returncode, "there is no Slurm on this machine" in refused.stderr) == (3, True)
        told = slurm_mps(machine, "uninstall")
        assert (told.returncode, told.stdout) == (0, "slurm-mps install has changed nothing on this node\n")
        assert snapshot(machine).keys() - before.keys() == set()


def test_a_directory_that_cannot_be_meant_is_wrong_usage(machine: Machine) -> None:
    """A typo is no directory to make, and Slurm, make and its shell would take a name with a blank apart."""
    before = snapshot(machine)
    machine.write("/opt/file", "")
    machine.make_directory("/opt/with blank")
    for option, directory, why in (
        ("--plugin-dir", "/opt/typo", "there is no such directory"),
        ("--plugin-dir", "/opt/file", "there is no such directory"),
        ("--plugin-dir", "opt", "expected an absolute path"),
        ("--plugin-dir", "", "expected an absolute path"),
        ("--plugin-dir", "/opt/with blank", "expected an absolute path"),
        ("--slurm-include", "/opt", "there is no slurm/spank.h in it"),
        ("--slurm-include", "/opt;touch /etc/slurm/x", "expected an absolute path"),
        ("--plugin", "/opt/none.so", "there is no such file"),
        ("--slurm-conf", "/opt/none.conf", "there is no such file"),
    ):
        refused = slurm_mps(machine, "install", option, directory)
        assert (refused.returncode, f"{option}: " in refused.stderr, why in refused.stderr) == (2, True, True), refused
    assert snapshot(machine) == before
    assert not machine.path("/opt/typo").exists()


def test_a_configuration_that_is_not_there_is_named_at_once(machine: Machine) -> None:
    """Slurm's own commands would look for it for a minute."""
    refused = machine.run([PROGRAM, "install", "--dry-run"], env={"SLURM_CONF": "/nosuch"})
    said = "slurm-mps: SLURM_CONF=/nosuch names no file; unset it, or give it the right path\n"
    assert (refused.returncode, refused.stderr) == (1, said)


def test_a_plugin_directory_of_the_sites_own(machine: Machine) -> None:
    """plugstack.conf names the plugin by its path where Slurm does not search, and by its name where PluginDir says."""
    conf = "ClusterName=c\nSlurmctldHost=localhost\n"
    machine.write("/etc/slurm/slurm.conf", conf)
    machine.make_directory("/opt/plugins")
    install(machine, "--plugin-dir", "/opt/plugins/").check()
    assert machine.path("/opt/plugins/spank_mps.so").exists()
    assert not machine.path(PLUGIN).exists()
    assert "\nrequired /opt/plugins/spank_mps.so\n" in machine.read(PLUGSTACK)
    assert "--mps-threads" in machine.run(["srun", "--help"]).stdout
    machine.write("/etc/slurm/slurm.conf", f"{conf}PluginDir={PLUGIN_DIRECTORY}:/opt/plugins\n")
    install(machine, "--plugin-dir", "/opt/plugins").check()
    assert "\nrequired spank_mps.so\n" in machine.read(PLUGSTACK)
    slurm_mps(machine, "uninstall").check()

    machine.write(PLUGSTACK, "required /opt/elsewhere/spank_mps.so\n")
    told = report(install(machine, "--json"))["by_hand"]
    assert any(todo["why"].startswith("Slurm would look for another file") for todo in told)


def test_a_place_that_others_can_write_is_refused(machine: Machine) -> None:
    """Root would run what somebody else put there."""
    machine.make_directory("/etc/slurm/prolog.d", user="alice")
    before = snapshot(machine)
    refused = install(machine)
    assert refused.returncode == 1
    assert "/etc/slurm/prolog.d can be written by others than root" in refused.stderr
    assert snapshot(machine) == before
    there = f"{MOUNT_POINT}/bin"
    laid = f"cp -a {there} /tmp/bin && chmod 777 /tmp/bin && mount --bind /tmp/bin {there}"
    machine.run(["sh", "-c", laid]).check()
    try:
        refused = install(machine)
    finally:
        machine.run(["umount", there]).check()
    assert f"{MOUNT_POINT}/bin can be written by others than root, and root's prolog would run" in refused.stderr


def test_a_place_with_a_blank_is_refused(machine: Machine) -> None:
    """The plugin could not read the verdict of any job."""
    before = snapshot(machine)
    there = f"$({MOUNT_POINT}/bin/python3 -c 'import sysconfig; print(sysconfig.get_path(\"purelib\"))')"
    make = f"python3 -m venv --without-pip '/opt/a b'; cd '/opt/a b'/lib/*/site-packages; echo {there} >it.pth"
    machine.run(["sh", "-ec", make]).check()
    refused = machine.run(["/opt/a b/bin/python3", "-I", "-m", "slurm_mps.cli.main", "install"])
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "/opt/a b/bin/python3: the plugin takes no path with a blank" in refused.stderr
    machine.run(["rm", "-r", "/opt/a b"]).check()
    assert snapshot(machine) == before


def test_a_place_that_users_cannot_reach_is_refused(machine: Machine) -> None:
    """As pipx and uv make one for root; nothing is written, and no home is opened."""
    before = snapshot(machine)
    there = f"$({MOUNT_POINT}/bin/python3 -c 'import sysconfig; print(sysconfig.get_path(\"purelib\"))')"
    fixes = {
        "/root/.local/venv": "install slurm-mps where everybody can read it",
        "/opt/mine": "chmod -R go+rX /opt/mine",
    }
    for place, fix in fixes.items():
        make = f"umask 077; python3 -m venv --without-pip {place}; cd {place}/lib/*/site-packages; echo {there} >it.pth"
        machine.run(["sh", "-ec", make]).check()
        refused = machine.run([f"{place}/bin/python3", "-I", "-m", "slurm_mps.cli.main", "install"])
        assert (refused.returncode, refused.stdout) == (1, "")
        assert f"users cannot reach {place}/bin/python3: {'/root' if 'root' in place else place}" in refused.stderr
        assert fix in refused.stderr
    assert snapshot(machine) == before


def test_a_login_node_gets_what_submitting_needs(machine: Machine) -> None:
    """And `slurm-mps` where users' PATH has it, for completion and status --cluster."""
    done = report(install(machine, "--login-node", "--json"))
    assert [change["path"] for change in done["changes"]] == [PLUGIN, "/usr/local/bin/slurm-mps", PLUGSTACK]
    assert done["by_hand"] == []
    assert machine.run(["slurm-mps", "completion", "bash"], user="alice").check().stdout
    slurm_mps(machine, "uninstall").check()


def test_uninstall_refuses_what_would_drain_the_node(machine: Machine) -> None:
    """A job with MPS, and a pattern of slurm.conf that would match no file, which Slurm takes for a failed prolog."""
    install(machine).check()
    installed = snapshot(machine)
    machine.make_directory("/run/slurm-mps/jobs/4711", mode=0o711)
    machine.write("/etc/slurm/slurm.conf", "Prolog=/etc/slurm/prolog.d/*\nEpilog=/etc/slurm/epilog.d/*\n")
    machine.write("/etc/slurm/epilog.d/50-other", "#!/bin/sh\n", mode=0o755)
    refused = slurm_mps(machine, "uninstall")
    assert refused.returncode == 1
    assert "job 4711 has MPS on this node" in refused.stderr
    assert "Prolog=/etc/slurm/prolog.d/* would match no file" in refused.stderr
    first = "end these jobs; take Prolog= and Epilog= out of slurm.conf, and run scontrol reconfigure"
    assert f"not uninstalled. First {first}. Then try again (--force goes past jobs and slurm.conf)" in refused.stderr
    assert "Epilog=/" not in refused.stderr
    assert snapshot(machine).items() >= installed.items()
    machine.path("/run/slurm-mps/jobs/4711").rmdir()
    assert slurm_mps(machine, "uninstall").returncode == 1
    done = slurm_mps(machine, "uninstall", "--force").check()
    assert f"Left, until you remove it: {MOUNT_POINT} /run/slurm-mps" in done.stdout
    assert not machine.path(PROLOG).exists()


def test_root_runs_no_module_that_lies_where_it_stands(machine: Machine) -> None:
    """A user's argparse.py in the directory that root happens to be in is not for root."""
    machine.make_directory("/tmp/checkout", user="alice")
    machine.write("/tmp/checkout/argparse.py", "open('/tmp/caught', 'w')\nraise SystemExit(9)\n", user="alice")
    lay_plugin(machine)
    told = machine.run([PROGRAM, "install", "--plugin", "/opt/spank_mps.so"], cwd="/tmp/checkout", timeout=60)
    assert "slurm-mps doctor:" in told.stdout
    assert not machine.path("/tmp/caught").exists()


# ---------------------------------------------------------------------------------------------- what the admin changed


def test_what_the_admin_changed_stays_and_is_named(machine: Machine) -> None:
    install(machine).check()
    machine.write("/etc/slurm/mps.toml", '[gpus]\ncompute_mode = "unchanged"\n')
    machine.write(PLUGSTACK, f"{machine.read(PLUGSTACK)}# mine\n")
    machine.write(PROLOG, "#!/bin/sh\n# mine\n", mode=0o755)
    again = install(machine)
    assert again.returncode == 1
    assert "is there  /etc/slurm/mps.toml" in again.stdout
    assert f"{PROLOG} stays: it was changed since it was installed; move it away" in again.stderr
    refused = slurm_mps(machine, "uninstall")
    assert f"{PLUGSTACK}: required spank_mps.so: without the plugin this line stops every srun" in refused.stderr
    assert (refused.returncode, machine.path(EPILOG).exists()) == (1, True)
    machine.write(PLUGSTACK, "# mine\n")
    done = slurm_mps(machine, "uninstall")
    assert done.returncode == 1
    assert f"{PROLOG} stays: it was changed since it was installed" in done.stderr
    assert machine.read(PROLOG) == "#!/bin/sh\n# mine\n"
    assert machine.read(PLUGSTACK) == "# mine\n"
    assert "unchanged" in machine.read("/etc/slurm/mps.toml")
    assert not machine.path(PLUGIN).exists()
    assert not machine.path("/var/lib/slurm-mps").exists()


def test_what_install_did_not_write_is_not_written_over(machine: Machine) -> None:
    """A script of our name stays and is named; of a plugin that Slurm would not load nothing at all is written."""
    machine.write(PROLOG, "#!/bin/sh\n", mode=0o755)
    refused = install(machine)
    assert (refused.returncode, machine.read(PROLOG)) == (1, "#!/bin/sh\n")
    assert f"{PROLOG} stays: slurm-mps install on this node did not write it; move it away" in refused.stderr
    slurm_mps(machine, "uninstall").check()
    assert machine.read(PROLOG) == "#!/bin/sh\n"
    machine.write(PLUGIN, "an old one")
    before = snapshot(machine)
    refused = install(machine)
    assert refused.returncode == 1
    assert f"{PLUGIN} is not the plugin of slurm-mps, and slurm-mps install did not put it there" in refused.stderr
    assert snapshot(machine) == before


# ------------------------------------------------------------------------------------------------- killed on the way


def killed(machine: Machine, call: str, number: int, *argv: str) -> bool:
    """Run a command that dies of SIGKILL at its `number`-th system call of a kind; False when it came to its end."""
    lay_plugin(machine)
    inject = ["-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}"]
    return machine.run(["strace", "-f", "-qq", "-o", "/dev/null", *inject, PROGRAM, *argv], timeout=60).returncode != 0


def test_wherever_an_installation_is_killed_it_can_be_undone_or_finished(machine: Machine) -> None:
    """At each change of install, and of the uninstall after it; on a site where much was there before."""
    a_site_of_its_own(machine)
    before = snapshot(machine)
    install(machine).check()
    after = snapshot(machine)
    slurm_mps(machine, "uninstall").check()
    stops = 0
    for call in ("mkdirat", "renameat"):
        number = 1
        while killed(machine, call, number, "install", "--no-doctor", "--plugin", "/opt/spank_mps.so"):
            if number % 2:  # half of the points each way
                install(machine).check()
                assert snapshot(machine) == after, f"after {call} {number}"
            slurm_mps(machine, "uninstall").check()
            assert snapshot(machine) == before, f"after {call} {number}"
            number, stops = number + 1, stops + 1
        slurm_mps(machine, "uninstall").check()
    assert stops >= 9
    for call in ("unlinkat", "renameat"):
        number = 1
        install(machine).check()
        while killed(machine, call, number, "uninstall"):
            slurm_mps(machine, "uninstall").check()
            assert snapshot(machine) == before, f"after {call} {number} of uninstall"
            install(machine).check()
            number, stops = number + 2, stops + 1  # every second: most of unlinkat's look for what is not there
        assert snapshot(machine) == before
    assert stops >= 15


def test_the_runtime_has_the_sources_from_its_wheel(machine: Machine) -> None:
    """`pip install` alone must do: what is compiled and copied comes with the package, whole."""
    share = next(machine.path(f"{MOUNT_POINT}/lib").glob("python*/site-packages/slurm_mps/share"))
    for name in ("spank", "prolog", "epilog", "etc"):
        there = {path.name: path.read_bytes() for path in (share / name).iterdir()}
        assert there == {path.name: path.read_bytes() for path in Path(REPOSITORY, name).iterdir() if path.is_file()}
