"""Kinds of jobs: requeued, heterogeneous, cancelled at odd moments, with steps side by side.

Each has MPS with its limits for as long as it runs; that it leaves the node as it was is what the fixtures check.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.harness.cluster import waits_for
from tests.harness.site import STATE_DIRECTORY, Site

if TYPE_CHECKING:
    from tests.harness.cluster import Job

CLIENT = "simulated-gpus client"
QUARTER = "--mps-threads=25"
"""Of 132 SMs leaves 32 (O10), which no client has that is not attached to the job's daemon."""


def clients(output: str) -> list[dict[str, str]]:
    """What each CUDA client in a job's output found."""
    lines = [line[line.index("uuid=") :] for line in output.splitlines() if "uuid=" in line]
    return [dict(word.split("=") for word in line.split()) for line in lines]


def servers(output: str, *, multiprocessors: str = "32") -> set[str]:
    """The MPS servers of a job's clients; fails unless each is attached and within its limit, and there is one."""
    found = clients(output)
    assert found, output
    assert {client["sms"] for client in found} == {multiprocessors}, output
    attached = {client["mps"] for client in found}
    assert "none" not in attached, output
    return attached


def start(site: Site, *options: str) -> Job:
    """Start a job on n1 whose first client has been and gone; it waits for let_go() with its second."""
    return site.cluster.sbatch("-wn1", *options, script=f"{CLIENT}; {waits_for()}; {CLIENT}", until="uuid=")


def let_go(site: Site, job: Job) -> str:
    """Let start()'s job come to its end. Returns its output."""
    site.cluster.let_go(job)
    assert site.cluster.wait(job).state == "COMPLETED"
    return site.cluster.output(job)


def as_user(site: Site, *argv: str) -> None:
    """Run one of Slurm's commands as the user that owns the jobs."""
    site.machine.run(argv, user="alice").check()


# --------------------------------------------------------------------------------------------------- run again


def wait_requeued(site: Site, job: Job) -> None:
    """Wait until a job is pending again: its epilog has run, and Slurm has put its next start off by minutes."""

    def look() -> bool | None:
        info = site.cluster.job_info(job)
        return (info.state == "PENDING" and info.fields["Restarts"] == "1") or None

    site.cluster.until(f"job {job} requeued", look, 20)


def start_soon(site: Site, job: Job) -> None:
    """Not after two minutes, and not `now`: in the second in which the last run ended, slurmd takes a launch for part
    of that run and starts it without a prolog; the plugin then refuses."""
    as_user(site, "scontrol", "update", f"JobId={job}", "StartTime=now+2")


def test_a_requeued_job_has_mps_in_its_second_run_too(any_site: Site) -> None:
    """The same job id once more, after its epilog."""
    script = f"echo run $SLURM_RESTART_COUNT; {CLIENT}; test $SLURM_RESTART_COUNT || exec {CLIENT} --hold 60"
    job = any_site.cluster.sbatch("-wn1", "--gres=gpu:1", QUARTER, "--open-mode=append", script=script, until="uuid=")
    as_user(any_site, "scontrol", "requeue", str(job))
    wait_requeued(any_site, job)
    between = (any_site.mps_processes(), any_site.state_files("n1"))
    start_soon(any_site, job)
    state = any_site.cluster.wait(job).state
    output = any_site.cluster.output(job)
    assert between == ([], [])
    assert (state, "run 1" in output.splitlines()) == ("COMPLETED", True), output
    servers(output)


def test_a_job_whose_daemon_died_can_run_again_by_itself() -> None:
    """Where its script ends with the status of a step that met no daemon, which slurm.conf takes for a requeue."""
    script = f"test $SLURM_RESTART_COUNT || {{ echo up; {waits_for()}; }}; srun {CLIENT} || exit $?"
    with Site(nodes=1, extra_slurm_conf="RequeueExit=88") as site:
        job = site.cluster.sbatch("--gres=gpu:1", QUARTER, "--open-mode=append", script=script, until="up")
        pid = f"{STATE_DIRECTORY}/jobs/{job}/pipe/nvidia-cuda-mps-control.pid"
        site.node("n1", "sh", "-c", f"kill -9 $(cat {pid})").check()
        site.cluster.let_go(job)
        wait_requeued(site, job)
        start_soon(site, job)
        assert site.cluster.wait(job).state == "COMPLETED"
        servers(site.cluster.output(job))


@pytest.mark.every_release
def test_a_job_that_met_a_node_fault_runs_when_the_node_is_well_again(site: Site) -> None:
    """The node drains, and Slurm requeues the job and holds it, as after any prolog that failed."""
    site.fault("n1", "nvml.init=999")
    job = site.cluster.sbatch("-wn1", "--gres=gpu:1", QUARTER, script=CLIENT)
    wait_requeued(site, job)
    held, drained = site.cluster.job_info(job).reason, site.cluster.node_states()["n1"].drained
    site.fault("n1")
    site.cluster.resume("n1")
    as_user(site, "scontrol", "release", str(job))
    start_soon(site, job)
    assert site.cluster.wait(job).state == "COMPLETED"
    assert (held, drained) == ("launch_failed_requeued_held", True)
    servers(site.cluster.output(job))


# ----------------------------------------------------------------------------------------------- heterogeneous


def run_heterogeneous(site: Site, first: list[str], second: list[str]) -> list[dict[str, str]]:
    """Run a client in each of two components, on n1 and n2. Slurm 22.05 gives no node to two components."""
    steps = "".join(f"srun --het-group={n} {CLIENT}\n" for n in (0, 1))
    one = ["-N1", "-n1", "--gres=gpu:1"]
    job = site.cluster.sbatch(*one, "-wn1", *first, ":", *one, "-wn2", *second, script=steps)
    site.cluster.wait(job)
    output = site.cluster.output(job)
    found = clients(output)
    assert [client["uuid"] for client in found] == [site.gpus(node)[0]["uuid"] for node in ("n1", "n2")], output
    return found


def test_each_component_of_a_heterogeneous_job_has_a_daemon(site: Site) -> None:
    first, second = run_heterogeneous(site, [QUARTER], [QUARTER])
    assert (first["sms"], second["sms"]) == ("32", "32")
    assert len({first["mps"], second["mps"], "none"}) == 3


def test_only_the_component_that_asked_has_mps(site: Site) -> None:
    """As long as it is not the first: Slurm hands an option on to the components after it."""
    first, second = run_heterogeneous(site, [], [QUARTER])
    assert (first["mps"], second["sms"]) == ("none", "32")
    assert second["mps"] != "none"


@pytest.mark.parametrize("gpus", [("--gres=gpu:1", "-n1"), ("-n1", "--gres=gpu:1")], ids=["last", "with the script"])
def test_a_component_without_a_gpu_runs(site: Site, gpus: tuple[str, str]) -> None:
    """It did not ask: Slurm keeps one set of options for all components. The other one has its daemon."""
    first, second = (["-N1", "-n1", f"-wn{number}", QUARTER, its] for number, its in enumerate(gpus, 1))
    show = "echo ${SLURMD_NODENAME} ${CUDA_MPS_PIPE_DIRECTORY:-none}"
    output = site.cluster.run_batch(*first, ":", *second, script=f"srun --het-group=0,1 sh -c '{show}'")
    found = dict(line.split() for line in output.splitlines())
    with_gpu, without = ("n1", "n2") if gpus[0].startswith("--gres") else ("n2", "n1")
    assert (found[with_gpu].startswith("/run/slurm-mps/jobs/"), found[without]) == (True, "none"), output


def test_one_srun_of_two_programs_as_components(site: Site) -> None:
    one = ["-N1", "-n1", "--gres=gpu:1", QUARTER]
    both = [*one, "-wn1", *CLIENT.split(), ":", *one, "-wn2", *CLIENT.split()]
    result = site.cluster.srun(*both).check()
    assert len(servers(result.stdout)) == 2
    assert {client["uuid"] for client in clients(result.stdout)} == {site.gpus(n)[0]["uuid"] for n in ("n1", "n2")}


# ----------------------------------------------------------------------------------------------- jobs and steps


@pytest.mark.every_release
def test_two_steps_of_an_salloc_share_its_daemon(site: Site) -> None:
    steps = f"srun -n1 {CLIENT}; srun -n2 {CLIENT}"
    result = site.cluster.salloc("-N1", "-n2", "--gres=gpu:1", QUARTER, "sh", "-c", steps).check()
    assert len(clients(result.stdout)) == 3
    assert len(servers(result.stdout)) == 1


def test_two_jobs_of_one_user_on_a_node_have_a_daemon_each(any_site: Site) -> None:
    """The end of one takes nothing away from the other, on other GPUs with other limits."""
    started = [start(any_site, "--gres=gpu:1", f"--mps-threads={percentage}") for percentage in (25, 50)]
    quarter, half = (let_go(any_site, job) for job in started)
    assert len(servers(quarter) | servers(half, multiprocessors="66")) == 2
    uuids = [[client["uuid"] for client in clients(output)] for output in (quarter, half)]
    assert uuids == [[gpu["uuid"]] * 2 for gpu in any_site.gpus("n1")[:2]]


def test_steps_side_by_side_share_the_jobs_daemon(any_site: Site) -> None:
    """Each stays a client until all three are; the daemon serves them at once."""
    meet = "while [ $(ls here.$SLURM_JOB_ID.* | wc -l) -lt 3 ]; do sleep 0.1; done"
    step = f"srun --overlap -n1 sh -c '{CLIENT} > here.$SLURM_JOB_ID.$SLURM_STEP_ID; {meet}; exec {CLIENT}' &\n"
    script = f"{step * 3}wait; rm here.$SLURM_JOB_ID.*"
    output = any_site.cluster.run_batch("-wn1", "-n3", "--gres=gpu:2", QUARTER, script=script)
    assert len(clients(output)) == 3, output
    assert len(servers(output)) == 1


@pytest.mark.every_release
def test_a_cancelled_step_leaves_the_jobs_daemon_to_the_next(any_site: Site) -> None:
    script = f"srun {CLIENT} --hold 60; echo ended; srun {CLIENT}"
    job = any_site.cluster.sbatch("-wn1", "--gres=gpu:1", QUARTER, script=script, until="uuid=")
    as_user(any_site, "scancel", f"{job}.0")
    state = any_site.cluster.wait(job).state
    output = any_site.cluster.output(job)
    assert (state, len(clients(output))) == ("COMPLETED", 2), output
    assert "task 0: Killed" in output, output
    servers(output)


# -------------------------------------------------------------------------------------------- ended by others


def test_a_job_cancelled_while_it_is_pending_touches_nothing(site: Site) -> None:
    """Least of all the job whose GPUs it waits for."""
    runs = start(site, "--gres=gpu:4", QUARTER)
    before = (site.compute_modes("n1"), site.state_files("n1"), site.mps_processes())
    waits = site.cluster.sbatch("-wn1", "--gres=gpu:1", QUARTER, script=CLIENT)
    site.cluster.until("it waits for a GPU", lambda: site.cluster.job_info(waits).reason == "Resources" or None, 20)
    site.cluster.scancel(waits)
    state = site.cluster.wait(waits).state
    after = (site.compute_modes("n1"), site.state_files("n1"), site.mps_processes())
    output = let_go(site, runs)
    assert (state, site.cluster.output(waits)) == ("CANCELLED", "")
    assert after == before
    assert len(clients(output)) == 2
    servers(output)


def test_a_job_cancelled_while_its_prolog_runs_never_starts(any_site: Site) -> None:
    """The prolog goes on to its end, and the epilog takes down all of it."""
    any_site.fault("n1", "daemon.start=slow:1500")
    job = any_site.cluster.sbatch("-wn1", "--gres=gpu:2", QUARTER, script="echo ran")
    journal = f"/run/slurm-mps/jobs/{job}/journal"
    any_site.cluster.until("its prolog at work", lambda: journal in any_site.state_files("n1") or None, 20)
    any_site.cluster.scancel(job)
    info = any_site.cluster.wait(job)
    any_site.cluster.wait_idle()
    assert (info.state, info.reason) == ("CANCELLED", "Prolog")
    assert any_site.cluster.output(job) == ""
    assert (any_site.mps_processes(), any_site.state_files("n1")) == ([], [])


def test_a_job_is_warned_or_ended_at_its_time_limit(site: Site) -> None:
    """Slurm looks at limits twice a minute, so both at once: --signal leaves MPS alone, TIMEOUT takes it down."""
    trap = f"trap '{CLIENT}; kill $!; exit 7' USR1; echo started; sleep 60 & wait"
    warned = site.cluster.sbatch("-wn1", "--gres=gpu:1", QUARTER, "--time=10", "--signal=B:USR1@900", script=trap)
    ended = site.cluster.sbatch("-wn2", "--gres=gpu:1", QUARTER, "--time=10", script=f"exec {CLIENT} --hold 60")
    site.cluster.until_output(warned, "started")
    site.cluster.until_output(ended, "uuid=")
    as_user(site, "scontrol", "update", f"JobId={ended}", "EndTime=now")
    assert site.cluster.wait(warned, 45).exit_code == 7
    assert site.cluster.wait(ended, 45).state == "TIMEOUT"
    site.cluster.wait_idle()
    for job in (warned, ended):
        servers(site.cluster.output(job))
    assert site.mps_processes() == []


def test_a_suspended_job_keeps_its_mps_and_its_gpus(any_site: Site) -> None:
    """No prolog or epilog runs, and reconcile takes nothing of a job that only stands still."""
    script = f"{CLIENT} --hold 2; exec {CLIENT}"
    job = any_site.cluster.sbatch("-wn1", "--gres=gpu:1", QUARTER, script=script, until="uuid=")
    before = (any_site.compute_modes("n1"), any_site.state_files("n1"), any_site.mps_processes())
    any_site.machine.run(("scontrol", "suspend", str(job))).check()
    assert any_site.cluster.job_info(job).state == "SUSPENDED"
    any_site.node("n1", "slurm-mps", "reconcile").check()
    during = (any_site.compute_modes("n1"), any_site.state_files("n1"), any_site.mps_processes())
    any_site.machine.run(("scontrol", "resume", str(job))).check()
    state = any_site.cluster.wait(job).state
    output = any_site.cluster.output(job)
    assert during == before
    assert (state, len(clients(output))) == ("COMPLETED", 2), output
    assert len(servers(output)) == 1
