"""The site configuration on its way to a job: checked once, refused whole, and applied."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.harness.gpunode import EPILOG, PROLOG, GpuNode, asked, job_environment
from tests.harness.site import PARTITIONS, STATE_DIRECTORY

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = "/etc/slurm/mps.toml"
BROKEN = """
[gpus]
sharing = "perhaps"
[limits.thread_percentage]
max = 150
[limits.memory]
default = "8"
[deadline]
prolog = 8
"""


def stamp(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_ino, status.st_mtime_ns


def test_a_broken_configuration_is_said_whole_and_costs_only_mps_jobs(gpu_node: GpuNode) -> None:
    """Every problem of the file is in slurmd's log, each with its path; a job without MPS does not notice."""
    gpu_node.configure(BROKEN)
    result = gpu_node.prolog(4711)
    assert result.returncode == 1
    for problem in (
        'gpus.sharing: expected one of "refuse", "separate", "joined"',
        "limits.thread_percentage.max: 150 is greater than 100",
        'limits.memory.default: expected a size such as "8G" or "512M" or "none"',
        "deadline: unknown; expected one of ",
    ):
        assert f"{CONFIG}: {problem}" in result.stderr
    assert (gpu_node.files(), gpu_node.mps_processes()) == ([], [])
    plain = job_environment(4712)
    assert gpu_node.run(PROLOG, env=plain).check().stderr == ""
    assert gpu_node.run(EPILOG, env=plain).check().stderr == ""


@pytest.mark.parametrize("text", ["[gpus", "\x00", "a = 1" * 40_000], ids=["no TOML", "NUL", "long"])
def test_a_file_that_is_no_configuration_is_refused(gpu_node: GpuNode, text: str) -> None:
    """What cannot be read as TOML fails the prolog with the file's name, and is no bug of slurm-mps."""
    gpu_node.configure(text)
    result = gpu_node.prolog(4711)
    assert result.returncode == 1
    assert CONFIG in result.stderr
    assert "a bug" not in result.stderr
    assert gpu_node.files() == []


@pytest.mark.parametrize("comment", ["# Größe und Länge: 設定\n", "# a site with much to say\n" * 8000])
def test_a_comment_may_be_in_any_language_and_long(gpu_node: GpuNode, comment: str) -> None:
    """The file is UTF-8, as TOML is; one that is longer than a pipe holds is applied whole."""
    gpu_node.configure(f'{comment}[limits.memory]\ndefault = "4G"\n')
    gpu_node.prolog(4711).check()
    assert gpu_node.verdict(4711)["daemon"].split()[2] == "4G"


def test_a_default_limit_that_cannot_be_had_is_called_the_sites(gpu_node: GpuNode) -> None:
    """The node stays in service, and who gives a limit has it."""
    gpu_node.configure('[limits.memory]\ndefault = "500G"\n')
    gpu_node.prolog(4711).check()
    said = gpu_node.verdict(4711)["message"]
    assert "the site's default limit (limits.memory.default in mps.toml), 500G, is more than GPU-" in said
    assert said.endswith("; give --mps-mem=143771M or less")
    gpu_node.epilog(4711).check()
    gpu_node.prolog(4711, **asked(mem="143771M")).check()
    assert gpu_node.verdict(4711)["status"] == "ready"


def test_the_file_is_checked_once_and_not_for_every_job(gpu_node: GpuNode) -> None:
    """The compiled configuration stays as long as the file does, and follows it when it changes."""
    compiled = gpu_node.machine.path(f"{STATE_DIRECTORY}/config")
    gpu_node.configure("[limits.thread_percentage]\ndefault = 50\n")
    stamps = []
    for job in (4711, 4712, 4713):
        if job == 4713:
            gpu_node.configure("[limits.thread_percentage]\ndefault = 20\n")
        gpu_node.prolog(job).check()
        stamps.append((stamp(compiled), gpu_node.verdict(job)["thread_percentage"]))
        gpu_node.epilog(job).check()
    assert stamps[0] == stamps[1]
    assert stamps[1][0] != stamps[2][0]
    assert (stamps[0][1], stamps[2][1]) == ("50", "20")


def test_a_configuration_that_others_may_write_is_refused(gpu_node: GpuNode) -> None:
    """Whoever can write the configuration decides what root runs: file and directory must be root's alone."""
    not_roots, writable = "mps.toml is not a ", "/etc/slurm can be written by others than root"
    results = {}
    for change, message in (
        (f"chmod 666 {CONFIG}", not_roots),
        (f"chmod 664 {CONFIG}", not_roots),
        (f"chown alice {CONFIG}", not_roots),
        (f"ln {CONFIG} /etc/slurm/other", not_roots),
        (f"mv {CONFIG} /etc/slurm/other; ln -s other {CONFIG}", "mps.toml: "),
        (f"rm {CONFIG}; mkdir {CONFIG}", not_roots),
        ("chmod 777 /etc/slurm", writable),
        ("chown alice /etc/slurm", writable),
    ):
        gpu_node.configure("[limits.thread_percentage]\ndefault = 50\n")
        gpu_node.run("sh", "-ec", change).check()
        results[change] = gpu_node.prolog(4711), message
        restore = f"chown root /etc/slurm; chmod 755 /etc/slurm; rm -rf /etc/slurm/other {CONFIG}; touch {CONFIG}"
        gpu_node.run("sh", "-ec", restore).check()
        assert (gpu_node.files(), gpu_node.mps_processes()) == ([], []), change
    for change, (result, message) in results.items():
        assert result.returncode == 1, change
        assert message in result.stderr, change
        assert "a bug" not in result.stderr, change


def test_a_configuration_that_becomes_writable_is_refused_though_it_was_compiled(gpu_node: GpuNode) -> None:
    """The look at the file's owner and mode is not saved along with its check."""
    gpu_node.configure("[limits.thread_percentage]\ndefault = 50\n")
    gpu_node.run_job(4711)
    gpu_node.machine.path(CONFIG).chmod(0o666)
    assert gpu_node.prolog(4711).returncode == 1


def test_defaults_of_the_site_reach_the_daemon(gpu_node: GpuNode) -> None:
    """A job that names no limit gets the site's, a job that does gets its own, and nobody more than the maximum."""
    gpu_node.configure(
        '[limits.thread_percentage]\ndefault = 50\nmax = 75\n[limits.memory]\ndefault = "4G"\nmax = "8G"\n'
    )
    for spank, threads, memory in ((asked(), "50.0\n", "4G\n"), (asked("75", "8G"), "75.0\n", "8G\n")):
        gpu_node.prolog(4711, **spank).check()
        assert gpu_node.control(4711, "get_default_active_thread_percentage").stdout == threads
        assert gpu_node.control(4711, "get_default_device_pinned_mem_limit 1").stdout == memory
        gpu_node.epilog(4711).check()
    for spank, message in (
        (asked("76"), "this site allows 0.1 to 75"),
        (asked(mem="9G"), "this site allows at most 8G"),
    ):
        gpu_node.prolog(4711, **spank).check()
        assert message in gpu_node.verdict(4711)["message"]


def test_a_job_has_the_defaults_of_its_partition(gpu_node: GpuNode) -> None:
    """Prologs of two partitions use one compiled file; a partition without a table has what all jobs have."""
    gpu_node.configure(
        "[limits.thread_percentage]\ndefault = 50\n[partition.shared.limits]\nthread_percentage = { default = 25 }\n"
    )
    for partition, threads in (("shared", "25"), ("gpu", "50"), ("shared", "25")):
        gpu_node.prolog(4711, **asked(), SLURM_JOB_PARTITION=partition).check()
        assert gpu_node.verdict(4711)["thread_percentage"] == threads
        gpu_node.epilog(4711).check()
    plan = ["slurm-mps", "plan", "--gres=gpu:1", "--mps"]
    shared, other = (gpu_node.run(*plan, f"--partition={name}").check().stdout for name in ("shared", "gpu"))
    assert "set_default_active_thread_percentage 25" in shared
    assert shared.endswith("from [partition.shared] of mps.toml: limits.thread_percentage.default 25\n")
    assert "set_default_active_thread_percentage 50" in other
    assert other.endswith("from [partition.gpu] of mps.toml: nothing\n")


@pytest.mark.parametrize(
    ("partition", "job", "has_mps"),
    [
        ("shared", {}, True),
        ("gpu", {}, False),
        ("shared", {"SPANK_NO_MPS": "1"}, False),
        ("shared", {"CUDA_VISIBLE_DEVICES": "MIG-0b8a1c5e-7d7b-5b4c-9a53-b2c1b9f0aabb"}, False),
        ("shared", {"SLURM_JOB_GPUS": ""}, False),
        ("shared", {"SLURM_JOB_PARTITION": ""}, False),
    ],
)
def test_a_job_that_does_not_ask_has_what_its_partition_wants(
    gpu_node: GpuNode, partition: str, job: dict[str, str], *, has_mps: bool
) -> None:
    """`plan` says the same of such a job."""
    gpu_node.machine.write(f"{PARTITIONS}/{partition}", "per-gpu\n")
    environment = job_environment(4711, SLURM_JOB_PARTITION="shared") | job
    gpu_node.run(PROLOG, env=environment).check()
    assert bool(gpu_node.mps_processes()) == has_mps
    gpu_node.epilog(4711).check()
    words = [f"--devices={job.get('CUDA_VISIBLE_DEVICES', environment['SLURM_JOB_GPUS'])}"]
    words += [f"--partition={environment['SLURM_JOB_PARTITION']}", *(["--mps=off"] if "SPANK_NO_MPS" in job else [])]
    plan = gpu_node.run("slurm-mps", "plan", *words)
    assert plan.returncode == (0 if has_mps else 2), plan
    gpu_node.run("rm", "-r", PARTITIONS).check()


def test_a_node_fault_ends_as_the_partition_wants(gpu_node: GpuNode) -> None:
    """The policy of the job's partition holds, not that of all jobs."""
    gpu_node.configure(
        '[paths]\ncontrol_program = "/usr/bin/none"\n[partition.shared.policy]\nnode_fault = "fail_job"\n'
    )
    assert gpu_node.prolog(4711, **asked(), SLURM_JOB_PARTITION="gpu").returncode == 1
    assert gpu_node.prolog(4712, **asked(), SLURM_JOB_PARTITION="shared").returncode == 0


def test_without_a_file_all_defaults_hold(gpu_node: GpuNode) -> None:
    """The configuration file is optional."""
    gpu_node.machine.path(CONFIG).unlink()
    gpu_node.prolog(4711).check()
    assert gpu_node.verdict(4711)["thread_percentage"] == "100"
