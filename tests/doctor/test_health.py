"""Doctor on clusters as they should be: no false alarm, for nobody, anywhere, and within two seconds."""

from __future__ import annotations

import json
from time import monotonic
from typing import TYPE_CHECKING

import pytest

from slurm_mps.doctor.examine import all_checks
from tests.doctor.conftest import COMMAND
from tests.harness.release import chosen
from tests.harness.site import PLUGIN_DIRECTORY

if TYPE_CHECKING:
    from tests.doctor.conftest import Patient

ROOT_ONLY = {"control-program", "stale-state", "job-daemon", "other-daemon"}


@pytest.mark.alone  # doctor gives all of its questions 1.4 seconds
@pytest.mark.every_release
@pytest.mark.parametrize("user", ["root", "alice"])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["node", "login"])
def test_a_good_cluster_has_nothing(healthy: Patient, user: str, elsewhere: bool) -> None:
    """Not a warning, and everything was looked at that can be looked at there."""
    found = healthy.examine("--strict", user=None if user == "root" else user, elsewhere=elsewhere)
    assert (found.status, found.of("problem", "warning")) == (0, {})
    left_out = found.of("not checked").keys()
    if not elsewhere:
        assert left_out == (set() if user == "root" else ROOT_ONLY)
    else:
        elsewhere_too = {one.id for one in all_checks().values() if one.where == "anywhere"}
        assert not left_out & elsewhere_too


def test_a_job_with_mps_is_no_fault(healthy: Patient) -> None:
    """Its daemon, its server, its GPU in EXCLUSIVE_PROCESS and its ranks are as they should be."""
    cluster = healthy.site.cluster
    job = cluster.sbatch(
        "--gres=gpu:1",
        "--mps",
        "-wn1",
        script="simulated-gpus client --hold 0.1; echo ran; simulated-gpus client --hold 60",
    )
    cluster.until_output(job, "ran")
    assert any(gpu["compute_mode"] == 3 for gpu in healthy.site.gpus("n1"))
    for user in (None, "alice"):
        found = healthy.examine("--strict", user=user)
        assert (found.status, found.of("problem", "warning")) == (0, {})
    cluster.scancel(job)
    cluster.wait(job)


def seconds(patient: Patient, *argv: str) -> float:
    began = monotonic()
    patient.run("doctor", *argv)
    return monotonic() - began


@pytest.mark.alone
def test_all_of_it_takes_less_than_two_seconds(patient: Patient) -> None:
    """Also where slurmctld and the driver say nothing at all."""
    assert seconds(patient) < 2
    controller = " ".join(str(one.pid) for one in patient.site.machine.processes() if one.comm == "slurmctld")
    patient.shell(f"kill -STOP {controller}", undo=f"kill -CONT {controller}")
    assert patient.examine("gres-conf", "driver").faults == {}, "who answers is not blamed for who does not"
    patient.site.fault("n1", "nvml.init=hang")
    assert seconds(patient) < 2
    assert not [one for one in patient.site.machine.processes() if one.comm == "scontrol"]
    assert patient.examine().faults == {"slurmctld": "warning", "driver": "warning"}


# ------------------------------------------------------------------------------------------------ how it is asked


def test_one_check_by_its_id(patient: Patient) -> None:
    found = patient.examine("driver", "mig")
    assert [one["check"] for one in found.findings] == ["driver", "mig"]
    assert "driver 580.159.04, CUDA 13.0: 48 clients" in found.findings[0]["what"]


def test_parts_of_gpus_whose_jobs_take_turns_are_worth_a_word(patient: Patient) -> None:
    patient.append("/etc/slurm/slurm.conf", "GresTypes=gpu,mps\n")
    patient.write("/etc/slurm/mps.toml", '[gpus]\nsharing = "separate"\n')
    assert "large parts and few jobs waste least" in patient.examine("gres-types").of("fine")["gres-types"]


@pytest.mark.every_release
def test_whole_gpus_beside_slices_are_named_where_slurm_counts_them(patient: Patient) -> None:
    patient.shell("simulated-gpus mig 3 1g.10gb", "simulated-gpus mig 3")
    patient.write("/etc/slurm/gres.conf", "AutoDetect=nvml\n")
    found = [one["what"] for one in patient.examine("mig").findings]
    is_told = any(
        "names GPU 0, 1, 2 by number, and slurm-mps refuses that beside slices (GPU 3)" in one for one in found
    )
    assert is_told == (chosen().prolog_sees == "indices"), found


@pytest.mark.parametrize("branch", [535, 550])
def test_an_older_driver_that_works_is_healthy(patient: Patient, branch: int) -> None:
    """A daemon of its own is asked what it can do; the control program's -h lists nothing before driver 580."""
    again = "simulated-gpus create 4 --seed n1"
    patient.shell(f"{again} --driver {branch}", undo=again)
    found = patient.examine()
    assert found.faults == {}
    known = ", and has the state of a server" if branch == 550 else ""
    assert found.of("fine")["control-program"] == f"a daemon sets and reads back limits and priority{known}"
    assert patient.site.mps_processes() == []
    assert patient.shell("ls -d /run/slurm-mps-doctor-* 2>/dev/null || :") == ""


def test_a_server_program_in_another_directory_of_roots_path_is_found(patient: Patient) -> None:
    """As Debian's packages have it."""
    patient.shell("mkdir -p /usr/local/mps; cp /usr/bin/nvidia-cuda-mps-control /usr/local/mps", "rm -r /usr/local/mps")
    patient.write("/etc/slurm/mps.toml", '[paths]\ncontrol_program = "/usr/local/mps/nvidia-cuda-mps-control"\n')
    assert "control-program" not in patient.examine().faults


def test_an_unknown_check_is_wrong_usage(patient: Patient) -> None:
    status, out, errors = patient.run("doctor", "nonsense")
    assert (status, out) == (2, "")
    assert errors == "slurm-mps: there is no check 'nonsense'; see slurm-mps doctor --list\n"


def test_the_list_names_every_check(patient: Patient) -> None:
    _, out, _ = patient.run("doctor", "--list", "--noheader")
    assert [line.split()[0] for line in out.splitlines()] == list(all_checks())
    _, out, _ = patient.run("doctor", "--list", "--json")
    assert [one["check"] for one in json.loads(out)["checks"]] == list(all_checks())


def test_warnings_fail_only_when_strict(patient: Patient) -> None:
    patient.site.fault("n1", "nvml.GetPersistenceMode=off")
    assert patient.examine("persistence-mode").status == 0
    assert patient.examine("persistence-mode", "--strict").status == 1


def test_a_paragraph_says_what_why_and_what_to_do(patient: Patient) -> None:
    patient.site.fault("n1", "gpu.2=lost")
    status, out, errors = patient.run("doctor")
    lines = out.splitlines()
    assert (status, errors) == (1, "")
    assert lines[0].startswith("problem: driver: GPU 2: NVML: ")
    assert [line.split(":")[0].strip() for line in lines[1:4]] == ["why", "fix", "see"]
    assert lines[3] == "    see: slurm-mps doctor --explain driver"
    assert patient.run("doctor", "--explain", "driver", "mig")[1].startswith(
        "### driver\nthe NVIDIA driver and every GPU "
    )
    assert patient.run("doctor", "--explain") == (
        2,
        "",
        "slurm-mps: --explain takes the name of a check, and no --json\n",
    )
    assert lines[4].startswith(f"{len(all_checks())} checks: 1 problem, ")


@pytest.mark.parametrize(("env", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colour_is_for_terminals_that_want_it(patient: Patient, env: dict[str, str], coloured: bool) -> None:
    patient.site.fault("n1", "gpu.2=lost")
    command = ["script", "-qec", f"{' '.join(COMMAND)} doctor driver", "/dev/null"]
    shown = patient.site.machine.run(command, node="n1", env={"TERM": "xterm", **env}).stdout
    assert "problem: driver: GPU 2" in shown
    assert ("\x1b[31m" in shown, "\x1b[0m" in shown) == (coloured, coloured)
    assert "\x1b" not in patient.run("doctor", "driver")[1]


def test_a_table_has_the_fields_that_were_asked_for(patient: Patient) -> None:
    patient.site.fault("n1", "gpu.2=lost", "nvml.GetPersistenceMode=off")
    _, out, _ = patient.run("doctor", "-n", "-o", "severity,check")
    assert [line.split() for line in out.splitlines()] == [["problem", "driver"], ["warning", "persistence-mode"]]


def test_where_only_root_can_see_the_status_says_so(patient: Patient) -> None:
    assert patient.examine("stale-state", user="alice").status == 4
    assert patient.examine("gpu-count", elsewhere=True).status == 3


def test_a_slurm_conf_that_is_named_and_not_there_is_a_finding(patient: Patient) -> None:
    """Slurm's own commands end there. It is the one problem, as is a slurm.conf that is not where Slurm looks."""
    for elsewhere in (False, True):
        status, out, _ = patient.run("doctor", elsewhere=elsewhere, SLURM_CONF="/nowhere/slurm.conf")
        assert status == 1
        assert out.startswith("problem: slurm-conf: SLURM_CONF=/nowhere/slurm.conf names no file\n")
        assert out.count("problem: ") == 1
    patient.remove("/etc/slurm/slurm.conf")
    status, out, _ = patient.run("doctor")
    assert (status, out.count("problem: ")) == (1, 1)
    assert out.startswith("problem: slurm-conf: there is no slurm.conf: not in /etc/slurm, and SLURM_CONF is not set\n")


def test_a_host_without_slurm_has_nothing_to_look_at(patient: Patient) -> None:
    patient.remove("/etc/slurm/slurm.conf")
    hide = "for one in /usr/sbin/slurmd /usr/bin/srun /usr/bin/scontrol"
    patient.shell(f"{hide}; do mount --bind /dev/null $one; done", f"{hide}; do umount $one; done")
    assert patient.run("doctor")[0] == 3


@pytest.mark.parametrize(
    ("path", "check"),
    [
        ("/etc/slurm/plugstack.conf", "plugstack"),
        (f"{PLUGIN_DIRECTORY}/spank_mps.so", "plugin-file"),
        ("/etc/slurm/prolog.d/10-slurm-mps.sh", "prolog-wired"),
        ("/etc/slurm/epilog.d/95-slurm-mps.sh", "epilog-wired"),
    ],
)
def test_what_is_missing_is_what_install_puts_there(patient: Patient, path: str, check: str) -> None:
    """The fix names the command: of a login node the one that puts no more there than it needs."""
    patient.remove(path)
    (finding,) = (one for one in patient.examine(check).findings if one["check"] == check)
    assert finding["fix"].split(";")[0].split(",")[0] == "slurm-mps install"
    if check.startswith("plug"):
        (finding,) = patient.examine(check, elsewhere=True).findings
        assert finding["fix"].startswith("slurm-mps install --login-node; ")
