"""What is refused where the user types it, and what is refused on the node when somebody gets past that."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness.site import PARTITIONS

if TYPE_CHECKING:
    from tests.harness.site import Site

REFUSED = [
    ("--mps-threads", "25\n", "a percentage above 0 and up to 100"),
    ("--mps-threads", "", "a percentage above 0 and up to 100"),
    ("--mps-mem", "8GB", "a whole number above 0 with M, G or T"),
    ("--mps-priority", "high", "normal or low"),
]
HERE = Path(__file__).parent


def _jobs_queued(site: Site) -> str:
    return site.machine.run(["squeue", "--noheader", "--states=all"]).check().stdout


@pytest.mark.parametrize(("option", "value", "expected"), REFUSED)
def test_a_bad_value_is_refused_where_it_was_typed_and_no_job_is_queued(
    site: Site, option: str, value: str, expected: str
) -> None:
    before = _jobs_queued(site)
    result = site.cluster.try_sbatch(f"{option}={value}", "--gres=gpu:1", script="true")
    assert result.returncode != 0
    shown = value.replace("\n", "?")
    assert f"sbatch: error: mps: {option}={shown}: expected {expected}" in result.stderr
    assert _jobs_queued(site) == before


@pytest.mark.every_release
@pytest.mark.parametrize("command", ["srun", "salloc"])
def test_srun_and_salloc_refuse_as_sbatch_does(site: Site, command: str) -> None:
    before = _jobs_queued(site)
    result = site.machine.run([command, "-N1", "--mps-threads=150", "true"], user="alice")
    assert f"{command}: error: mps: --mps-threads=150: expected a percentage" in result.stderr
    assert result.returncode != 0
    assert _jobs_queued(site) == before


@pytest.mark.every_release
def test_the_options_are_in_the_help_of_each_command(site: Site) -> None:
    for command in ("sbatch", "srun", "salloc"):
        shown = site.machine.run([command, "--help"], user="alice").stdout
        assert {"--mps=per-node|per-gpu|off", "--mps-threads=PCT|auto", "--mps-mem=SIZE|auto"} <= set(shown.split())


def _has_daemon(site: Site, *options: str, script: str) -> list[bool]:
    """Whether the script and each step of a job have a control daemon's address."""
    show = "echo daemon=$CUDA_MPS_PIPE_DIRECTORY"
    output = site.cluster.run_batch(*options, "--gres=gpu:1", script=script.replace("SHOW", f"sh -c '{show}'"))
    return [line != "daemon=" for line in output.splitlines() if line.startswith("daemon=")]


@pytest.mark.every_release
@pytest.mark.parametrize(
    "lines", [["--mps"], ["--mps=per-gpu", "--mps-mem=0:8G"], ["--mps-threads=25", "--mps-priority=low"]]
)
def test_off_takes_back_what_the_script_asks(site: Site, lines: list[str]) -> None:
    script = "".join(f"#SBATCH {line}\n" for line in lines) + "SHOW; srun SHOW"
    assert _has_daemon(site, script=script) == [True, True]
    assert _has_daemon(site, "--mps=off", script=script) == [False, False]


def test_off_wins_in_any_order_and_is_off_for_what_is_given_with_it_alone(site: Site) -> None:
    assert _has_daemon(site, "--mps=off", "--mps-threads=25", script="srun SHOW") == [False]
    assert _has_daemon(site, "--mps-mem=8G", "--mps=off", script="srun SHOW") == [False]
    assert _has_daemon(site, "--mps=off", "--mps", script="srun SHOW") == [True]
    inner = "sbatch -Q --wait --mps --gres=gpu:1 -o inner --wrap 'echo daemon=$CUDA_MPS_PIPE_DIRECTORY'; cat inner"
    assert _has_daemon(site, "--mps=off", "--mps-threads=25", script=f"SHOW; {inner}") == [False, True]


def test_a_step_of_a_job_with_mps_cannot_be_without(site: Site) -> None:
    output = site.cluster.run_batch("--mps", "--gres=gpu:1", script="srun --mps=off true", state="FAILED")
    assert "--mps=off: this job has MPS, and a step cannot be without" in output


@pytest.mark.every_release
def test_a_partition_gives_mps_to_jobs_that_do_not_ask(site: Site) -> None:
    """And not to one that gives --mps=off; a job from that job is asked anew."""
    site.machine.write(f"{PARTITIONS}/gpu", "per-node\n")
    inner = "sbatch -Q --wait --gres=gpu:1 -o inner --wrap 'echo daemon=$CUDA_MPS_PIPE_DIRECTORY'; cat inner"
    seen = [_has_daemon(site, script="SHOW; srun SHOW"), _has_daemon(site, "--mps=off", script=f"srun SHOW; {inner}")]
    without_gpu = site.cluster.run_batch(script="srun true")
    site.machine.run(["rm", "-r", PARTITIONS]).check()
    assert seen == [[True, True], [False, True]]
    assert without_gpu == ""


def _submit_past_the_plugin(site: Site, values: dict[str, str]) -> tuple[str, str]:
    """As alice, with a slurm.conf and a plugin of her own. Returns the job's state and output."""
    machine = site.machine
    if not machine.path("/home/alice/free.so").exists():
        machine.run(["cc", "-shared", "-fPIC", "-o", "/home/alice/free.so", HERE / "free_spank.c"]).check()
    machine.write("/home/alice/plugstack.conf", "required /home/alice/free.so\n")
    conf = machine.read("/etc/slurm/slurm.conf")
    machine.write("/home/alice/slurm.conf", conf.replace("/etc/slurm/plugstack.conf", "/home/alice/plugstack.conf"))
    env = {"SLURM_CONF": "/home/alice/slurm.conf", **{f"FREE_{name}": value for name, value in values.items()}}
    job = site.cluster.sbatch("--gres=gpu:1", "--export=NONE", script="echo it ran", env=env)
    info = site.cluster.wait(job)
    return info.state, site.cluster.output(job)


HOSTILE = [
    {"MPS": "1", "MPS_THREADS": "25\nquit"},
    {"MPS": "1", "MPS_MEM": "8G\nset_default_client_priority 1"},
    {"MPS_THREADS": "`touch /tmp/owned`"},
    {"MPS": "1", "MPS_SECRET": "x"},
    {"MPS": "1", "MPS_THREADS": "9" * 100_000},
]


@pytest.mark.parametrize("values", HOSTILE, ids=[repr(v)[:60] for v in HOSTILE])
def test_the_same_past_the_plugin_fails_the_job_and_not_the_node(site: Site, values: dict[str, str]) -> None:
    """The fixture sees that no node was drained, no daemon runs and nothing was left, /tmp/owned included."""
    state, output = _submit_past_the_plugin(site, values)
    assert state == "FAILED"
    assert "it ran" not in output
    assert "error: mps: job " in output
    assert any(said in output for said in ("--mps-threads=", "--mps-mem=", "SPANK_MPS_SECRET"))
    assert len(output.splitlines()) == 1


@pytest.mark.every_release
def test_a_good_request_past_the_plugin_is_as_good_as_any(site: Site) -> None:
    """The way in does not matter: the test above refuses for the values, not for the plugin."""
    state, output = _submit_past_the_plugin(site, {"MPS": "1", "MPS_THREADS": "25"})
    assert (state, output) == ("COMPLETED", "it ran\n")


@pytest.mark.every_release
def test_a_job_has_the_limits_of_the_partition_that_slurm_gave_it(site: Site) -> None:
    """slurmd tells the prolog the partition, of which the job's options say nothing."""
    site.configure("[partition.gpu.limits]\nthread_percentage = { default = 25 }\n")
    shown = site.cluster.run_batch(
        "--gres=gpu:1", "--mps", script="srun cat /run/slurm-mps/jobs/$SLURM_JOB_ID/verdict\n"
    )
    site.configure("")
    assert "\nthread_percentage 25\n" in shown
