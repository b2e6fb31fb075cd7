"""Jobs on a real Slurm: what a job that asked for MPS gets, and what it is told when it cannot have it."""

from __future__ import annotations

import json
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from slurm_mps.job.verdict import WITHOUT, Verdict
from tests.harness.cluster import waits_for
from tests.harness.machine import USERS
from tests.harness.site import PYTHON, STATE_DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.cluster import Job
    from tests.harness.machine import Result
    from tests.harness.site import Site

ENVIRONMENT = 'import json, os; print(json.dumps({k: v for k, v in os.environ.items() if "CUDA" in k}))'
CLIENT = "simulated-gpus client"


def show_environment(site: Site, *options: str) -> dict[str, str]:
    """The CUDA variables of a job's one task."""
    result = site.cluster.srun("-N1", "-n1", *options, PYTHON, "-c", ENVIRONMENT).check()
    found: dict[str, str] = json.loads(result.stdout)
    return found


def hold(site: Site, *options: str, user: str = "alice") -> Job:
    """Start a job whose one client stays until it is cancelled; on return the client has its GPU."""
    return site.cluster.sbatch("-wn1", *options, script=f"exec {CLIENT} --hold 60", user=user, until="uuid=")


def start_waiting(site: Site) -> Job:
    """Start a job that runs one step, ``echo ran``, once let_go() is called."""
    script = f"echo started; {waits_for()}; srun echo ran"
    return site.cluster.sbatch("-wn1", "--gres=gpu:1", "--mps", script=script, until="started")


def let_go(site: Site, job: Job) -> tuple[str, list[str]]:
    """Let start_waiting()'s job run its step. Returns its end state and its output."""
    site.cluster.let_go(job)
    return site.cluster.wait(job).state, site.cluster.output(job).splitlines()


@contextmanager
def without_a_prolog(site: Site) -> Iterator[None]:
    """An admin installed the plugin and forgot the prolog."""
    prolog = "/etc/slurm/prolog.d/10-slurm-mps.sh"
    text = site.machine.read(prolog)
    site.machine.write(prolog, "#!/bin/sh\nexit 0\n", mode=0o755)
    yield
    site.machine.write(prolog, text, mode=0o755)


def message(result: Result) -> str:
    """What the plugin said; fails unless it said exactly one thing."""
    lines = [line for line in result.stderr.splitlines() if "error: mps: " in line]
    assert len(lines) == 1, result.stderr
    return lines[0].partition("error: mps: ")[2]


@pytest.mark.every_release
def test_a_task_has_its_daemons_address_in_place(site: Site) -> None:
    """And no limit that its daemon gives it anyway. What was set is noted."""
    uuids = ",".join(gpu["uuid"] for gpu in site.gpus("n1")[:2])
    found = show_environment(site, "-wn1", "--gres=gpu:2", "--mps-threads=12.5", "--mps-mem=8G", "--mps-priority=low")
    noted = dict(word.split("=") for word in found.pop("CUDA_MPS_SET_BY_SLURM").split(" "))
    assert noted == found
    pipe = found.pop("CUDA_MPS_PIPE_DIRECTORY")
    assert found == {
        "CUDA_MPS_LOG_DIRECTORY": f"/var/log/slurm-mps/{pipe.split('/')[4]}",
        "CUDA_VISIBLE_DEVICES": uuids,
    }


@pytest.mark.every_release
def test_a_step_that_lowers_limits_has_them_in_variables_for_itself_only(site: Site) -> None:
    lower = "srun --mps-threads=10 --mps-mem=2G --mps-priority=low"
    script = f"{lower} env | grep -E '^CUDA_MPS_(ACT|PIN|CLI)' | sort\n{lower} {CLIENT}\nsrun {CLIENT}\n"
    output = site.cluster.run_batch("-wn1", "--gres=gpu:1", "--mps-threads=25", "--mps-mem=8G", script=script)
    # srun says so when it tries again, as the step before has not gone yet.
    *limits, client, untouched = (line for line in output.splitlines() if not line.startswith("srun: "))
    assert limits == [
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=10",
        "CUDA_MPS_CLIENT_PRIORITY=1",
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT=0=2048M",
    ]
    assert " sms=12 free=1977 " in client
    assert " sms=32 free=8047 " in untouched


@pytest.mark.every_release
def test_a_job_that_did_not_ask_is_untouched(site: Site) -> None:
    assert show_environment(site, "--gres=gpu:2") == {"CUDA_VISIBLE_DEVICES": "0,1"}


@pytest.mark.parametrize("options", [["--mps"], ["--mps-threads=50"], ["--mps-mem=4G"]])
def test_each_option_alone_means_mps(site: Site, options: list[str]) -> None:
    result = site.cluster.srun("-N1", "--gres=gpu:1", *options, *CLIENT.split()).check()
    assert "mps=none" not in result.stdout
    assert "mps=" in result.stdout


@pytest.mark.every_release
def test_batch_script_and_nested_srun_share_one_daemon(site: Site) -> None:
    output = site.cluster.run_batch("--gres=gpu:1", "--mps-threads=25", script=f"{CLIENT}\nsrun {CLIENT}\n")
    script, step = output.splitlines()
    assert script == step
    assert "sms=32 " in script


@pytest.mark.parametrize(
    ("threads", "memory", "found"),
    [("90", "junk", "sms=32 free=8047 "), ("10", "0=2G", "sms=12 free=1977 ")],
    ids=["higher", "lower"],
)
def test_a_limit_of_the_users_own_cannot_lift_the_jobs_and_can_lower_it(
    site: Site, threads: str, memory: str, found: str
) -> None:
    """A value that the driver cannot use would remove the limit altogether (O12).

    The script has the variables from the submission, its sruns have them from the script.
    """
    own = {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": threads, "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": memory}
    options = ["-N1", "--gres=gpu:1", "--mps-threads=25", "--mps-mem=8G"]
    assert found in site.cluster.srun(*options, *CLIENT.split(), env=own).check().stdout
    output = site.cluster.run_batch(*options, script=f"{CLIENT}\nsrun {CLIENT}\n", env=own)
    assert output.count(found) == 2


def test_a_program_that_narrows_its_devices_keeps_its_limit(site: Site) -> None:
    """Many a wrapper gives each rank one GPU; a limit that named the other would be lost with it (O12)."""
    uuid = site.gpus("n1")[1]["uuid"]
    narrowed = f"CUDA_VISIBLE_DEVICES={uuid} {CLIENT}"
    result = site.cluster.srun("-wn1", "--gres=gpu:2", "--mps-threads=25", "--mps-mem=8G", "sh", "-c", narrowed).check()
    assert f"uuid={uuid} sms=32 free=8047 " in result.stdout


@pytest.mark.every_release
def test_compute_modes_are_exclusive_during_the_job_on_its_gpus_only_and_put_back_as_found(site: Site) -> None:
    site.set_compute_mode("n1", 1, 3)
    site.set_compute_mode("n1", 2, 2)
    job = hold(site, "--gres=gpu:2", "--mps")
    during = site.compute_modes("n1")
    site.cluster.scancel(job)
    site.cluster.wait(job)
    site.cluster.wait_idle()
    after = site.compute_modes("n1")
    site.set_compute_mode("n1", 1, 0)
    site.set_compute_mode("n1", 2, 0)
    assert during == ["Exclusive_Process", "Exclusive_Process", "Prohibited", "Default"]
    assert after == ["Default", "Exclusive_Process", "Prohibited", "Default"]


def test_two_users_jobs_on_one_node_have_a_daemon_each_and_cannot_reach_the_others(site: Site) -> None:
    jobs = {user: hold(site, "--gres=gpu:2", "--mps", user=user) for user in ("alice", "bob")}
    assert len(site.mps_processes()) == 4
    pipe = f"{STATE_DIRECTORY}/jobs/{jobs['alice'].id}/pipe"
    query = ["sh", "-c", "echo get_server_list | nvidia-cuda-mps-control"]
    own = site.node("n1", *query, user="alice", env={"CUDA_MPS_PIPE_DIRECTORY": pipe})
    others = site.node("n1", *query, user="bob", env={"CUDA_MPS_PIPE_DIRECTORY": pipe})
    for job in jobs.values():
        site.cluster.scancel(job)
        site.cluster.wait(job)
    assert own.stdout.strip().isdigit()
    assert others.stdout == ""
    assert "Cannot find MPS control daemon process" in others.stderr


def test_a_step_that_asks_for_more_than_the_job_has_is_told_both_numbers(site: Site) -> None:
    script = "srun --mps-threads=50 echo ran"
    output = site.cluster.run_batch("--gres=gpu:1", "--mps-threads=25", script=script, state="FAILED")
    assert "--mps-threads=50 is more than the job has (25); a step can only lower it" in output
    assert "ran" not in output.splitlines()


def test_a_low_client_priority_reaches_the_daemon(site: Site) -> None:
    """And through it each client: no variable is needed."""
    query = "echo get_default_client_priority | nvidia-cuda-mps-control; echo $CUDA_MPS_CLIENT_PRIORITY"
    result = site.cluster.srun("-N1", "--gres=gpu:1", "--mps-priority=low", "sh", "-c", query).check()
    assert result.stdout.split() == ["1"]


def test_each_task_of_an_array_has_a_daemon_of_its_own(site: Site) -> None:
    script = f"echo $CUDA_MPS_PIPE_DIRECTORY >> pipes; {CLIENT}"
    job = site.cluster.sbatch("--array=1-3", "--gres=gpu:1", "--mps-threads=25", "--output=array.%a", script=script)
    site.cluster.until("the array's end", lambda: str(job) not in _queue(site) or None, 60)
    home = site.machine.path("/home/alice")
    outputs = [(home / f"array.{n}").read_text() for n in (1, 2, 3)]
    pipes = set((home / "pipes").read_text().split())
    for name in ("pipes", "array.1", "array.2", "array.3"):
        (home / name).unlink()
    assert all("sms=32 " in output for output in outputs)
    assert len(pipes) == 3


def _queue(site: Site) -> str:
    return site.machine.run(["squeue", "--noheader", "--format=%A %F"]).check().stdout


# ------------------------------------------------------------------------------------------------ fails closed


@pytest.mark.every_release
def test_a_job_without_a_gpu_is_told_so(site: Site) -> None:
    result = site.cluster.srun("-N1", "--mps", "true")
    assert result.returncode != 0
    assert message(result).endswith("this job has no GPU on this node; ask for one, such as --gres=gpu:1")


@pytest.mark.every_release
def test_every_node_of_the_job_says_it_once_whatever_the_number_of_tasks(site: Site) -> None:
    result = site.cluster.srun("-N2", "-n8", "--mps", "true")
    assert result.returncode != 0
    assert result.stderr.count("error: mps: ") == 2
    assert sorted(node for node, _ in site.cluster.said(result.stderr)) == ["n1", "n2"]


def test_a_step_that_asks_in_a_job_that_did_not_is_told_how_to(site: Site) -> None:
    job = site.cluster.sbatch("--gres=gpu:1", script="srun --mps echo ran")
    assert site.cluster.wait(job).state == "FAILED"
    output = site.cluster.output(job)
    assert "give --mps to sbatch, salloc or the srun that makes the job" in output
    assert "ran" not in output.splitlines()


def test_without_a_prolog_tasks_and_scripts_fail_and_the_node_stays(site: Site) -> None:
    with without_a_prolog(site):
        result = site.cluster.srun("-N1", "--gres=gpu:1", "--mps", "echo", "ran")
        output = site.cluster.run_batch("--gres=gpu:1", "--mps", "--export=NONE", script="echo ran", state="FAILED")
    assert result.returncode != 0
    assert "ran" not in result.stdout
    assert "no prolog set it up on this node" in message(result)
    assert "ran" not in output.splitlines()


def test_what_another_users_job_left_under_the_same_id_is_not_this_jobs(site: Site) -> None:
    """Job ids began anew, and this job's own prolog said nothing: bob's job was to run without MPS."""
    prolog = "/etc/slurm/prolog.d/10-slurm-mps.sh"
    text = site.machine.read(prolog)
    job = site.cluster.sbatch("-wn1", "--hold", "--gres=gpu:1", "--mps", script="echo ran")
    left = Verdict(WITHOUT, "no daemon", uid=USERS["bob"]).encode().decode()
    site.machine.write(f"/var/log/slurm-mps/{job}/verdict", left, node="n1")
    site.machine.write(prolog, "#!/bin/sh\nexit 0\n", mode=0o755)
    try:
        site.machine.run(["scontrol", "release", str(job)]).check()
        state = site.cluster.wait(job).state
    finally:
        site.machine.write(prolog, text, mode=0o755)
    assert state == "FAILED"
    assert "another user's job with this id left its state on this node" in site.cluster.output(job)
    site.node("n1", "rm", "-r", f"/var/log/slurm-mps/{job}").check()


def test_a_step_of_a_healthy_job_runs(site: Site) -> None:
    """What the two tests below break is what lets this one through."""
    assert let_go(site, start_waiting(site)) == ("COMPLETED", ["started", "ran"])


def test_a_job_submitted_from_inside_an_mps_job_has_mps_only_if_it_asks(site: Site) -> None:
    """The follow-up job of a chain, often without a GPU, is a job that did not ask."""
    script = "sbatch --wait --output=inner.out --wrap='echo ran; env | grep CUDA_MPS'"
    job = site.cluster.sbatch("-n1", "--gres=gpu:1", "--mps-threads=25", "--mps-mem=8G", script=f"{script} >/dev/null")
    site.cluster.wait(job)
    site.cluster.wait_idle()
    output = site.machine.read("/home/alice/inner.out")
    site.machine.path("/home/alice/inner.out").unlink()
    assert "ran" in output.splitlines()
    assert "error: mps" not in output


def test_a_bare_variable_asks_for_nothing(site: Site) -> None:
    env = {"SLURM_SPANK_MPS": "1"}
    assert site.cluster.srun("-N1", "echo", "ran", env=env).check().stdout == "ran\n"


@pytest.mark.every_release
@pytest.mark.parametrize("policy", ["drain", "run_without_mps"])
def test_a_dead_control_daemon_fails_the_next_step(site: Site, policy: str) -> None:
    """A client that finds no daemon runs without MPS, without a word (O21).

    The job was promised MPS: it does not go on without, whatever the site wants of faults of the node.
    """
    site.configure(f'[policy]\nnode_fault = "{policy}"\n')
    job = start_waiting(site)
    pid = site.node("n1", "cat", f"{STATE_DIRECTORY}/jobs/{job.id}/pipe/nvidia-cuda-mps-control.pid").check().stdout
    site.node("n1", "kill", "-9", pid.strip()).check()
    state, output = let_go(site, job)
    assert state == "FAILED"
    assert "ran" not in output
    assert any("its MPS control daemon on this node does not answer" in line for line in output)


FILL = """
import errno, socket, sys
ends = []
while not ends or not ends[-1][1]:
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    ends.append((end, end.connect_ex(sys.argv[1])))
print("full" if ends[-1][1] == errno.EAGAIN else ends[-1], len(ends), flush=True)
sys.stdin.read()
"""


def test_a_step_does_not_wait_for_a_daemon_that_is_busy_and_whose_queue_is_full(site: Site) -> None:
    """It accepts nobody while it starts a server; waiting for that is the program's."""
    job = start_waiting(site)
    pipe = f"{STATE_DIRECTORY}/jobs/{job.id}/pipe"
    pid = site.node("n1", "cat", f"{pipe}/nvidia-cuda-mps-control.pid").check().stdout.strip()
    site.node("n1", "kill", "-STOP", pid).check()
    filler = site.machine.popen(
        [PYTHON, "-c", FILL, f"{pipe}/control"], node="n1", stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert filler.stdout
    filled = filler.stdout.readline()
    began = time.monotonic()
    result = site.cluster.srun(f"--jobid={job}", "--overlap", "echo", "ran")
    took = time.monotonic() - began
    filler.communicate()
    site.node("n1", "kill", "-CONT", pid).check()
    let_go(site, job)
    assert filled.startswith(b"full")
    assert (result.returncode, result.stdout) == (0, "ran\n")
    assert took < 0.9


def test_a_plugin_that_is_only_optional_still_fails_closed(site: Site) -> None:
    """What an optional plugin returns is ignored; the task ends all the same."""
    plugstack = site.machine.read("/etc/slurm/plugstack.conf")
    site.machine.write("/etc/slurm/plugstack.conf", plugstack.replace("required spank_mps", "optional spank_mps"))
    try:
        result = site.cluster.srun("-N1", "--mps", "echo", "ran")
    finally:
        site.machine.write("/etc/slurm/plugstack.conf", plugstack)
    assert result.returncode != 0
    assert "ran" not in result.stdout


def test_a_damaged_verdict_is_a_refusal(site: Site) -> None:
    job = start_waiting(site)
    site.change_verdict(job, "(?s)^daemon .*", "")
    state, output = let_go(site, job)
    assert state == "FAILED"
    assert "ran" not in output
    assert any("the prolog's verdict on this node cannot be understood" in line for line in output)


# --------------------------------------------------------------------------------------------- faults of the node


def test_a_broken_configuration_is_no_concern_of_jobs_without_mps(site: Site) -> None:
    site.configure("this is not TOML")
    assert show_environment(site, "--gres=gpu:1") == {"CUDA_VISIBLE_DEVICES": "0"}


def test_an_epilog_that_cannot_end_everything_drains_the_node(site: Site) -> None:
    """A dirty GPU must not be given to the next job."""
    job = hold(site, "--gres=gpu:1", "--mps")
    site.fault("n1", "nvml.SetComputeMode=999")
    site.cluster.scancel(job)
    site.cluster.until("n1 drained", lambda: site.cluster.node_states()["n1"].drained or None, 20)
    site.fault("n1")
    left = [path for path in site.state_files("n1") if path.endswith("/journal")]
    again = site.node("n1", "/etc/slurm/epilog.d/95-slurm-mps.sh", env={"SLURM_JOB_ID": str(job.id)})
    site.cluster.resume("n1")
    assert left, "the journal must stay, so that it can be tried again"
    assert again.returncode == 0, again.stderr
