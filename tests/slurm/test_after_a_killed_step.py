"""The step after one that was cancelled or faulted works: a server that a killed client left is made good first."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import slurm_mps.task.probe
from tests.harness.cluster import waits_for
from tests.harness.site import PYTHON, STATE_DIRECTORY

if TYPE_CHECKING:
    from tests.harness.cluster import Job
    from tests.harness.site import Site

CLIENT = "simulated-gpus client"
GOOD = re.compile(r"uuid=\S+ sms=\d+ free=\d+ total=\d+ mps=\d+")


def start(site: Site, script: str, *options: str) -> Job:
    return site.cluster.sbatch("-wn1", *options, script=f"echo started\n{script}", until="started")


def after(site: Site, job: Job) -> str:
    """What the job's script said after the word `next`."""
    site.cluster.wait(job)
    return site.cluster.output(job).partition("next\n")[2]


@pytest.mark.parametrize("options", [["--mps"], ["--mps=per-gpu"]], ids=["per-node", "per-gpu"])
def test_a_cancelled_step_does_not_poison_the_next(any_site: Site, options: list[str]) -> None:
    """It was killed inside a kernel: without the cure the next client on its GPU fails with 719 (O46)."""
    script = f"srun -n2 --gpus-per-task=1 {CLIENT} --spin\necho next\nsrun -n2 --gpus-per-task=1 {CLIENT}\n"
    job = start(any_site, script, "-n2", "--gres=gpu:2", *options)
    any_site.cluster.until_output(job, "uuid=", times=2)
    any_site.machine.run(["scancel", f"{job}.0"], user="alice").check()
    said = after(any_site, job)
    assert len(GOOD.findall(said)) == 2, any_site.cluster.output(job)
    assert "FAILED" not in said


def test_a_step_after_a_fault_waits_for_its_victims_to_leave(any_site: Site) -> None:
    """The server is in FAULT until then and takes nobody, on no GPU (O34)."""
    one = "srun --overlap -n1 --gres=gpu:1"
    script = (
        f"{one} {CLIENT} --hold 3 &\nsleep 1\n"
        f"{one} {CLIENT} --fault\necho next\n"
        f"srun --overlap -n2 --gpus-per-task=1 --kill-on-bad-exit=0 {CLIENT}\nwait\n"
    )
    job = start(any_site, script, "-n2", "--gres=gpu:2", "--mps")
    said = after(any_site, job)
    assert len(GOOD.findall(said)) == 2, any_site.cluster.output(job)


def test_a_server_that_does_not_come_back_fails_the_step_with_one_message(site: Site) -> None:
    script = "srun -n1 false\necho next\nsrun -n4 echo ran\n"
    site.fault("n1", "server.start=hang")
    job = start(site, script, "-n4", "--gres=gpu:1", "--mps")
    said = after(site, job)
    site.fault("n1")
    assert "ran" not in said.splitlines()
    messages = [line for line in said.splitlines() if "error: mps: " in line]
    assert len(messages) == 1
    assert "its MPS server accepts no programs" in messages[0]


def test_only_a_task_that_ended_badly_leaves_a_mark_and_the_next_good_step_takes_it_away(site: Site) -> None:
    mark = f"{STATE_DIRECTORY}/jobs/*/suspect-0"
    steps = {"good": "true", "bad": "false", "cured": "true"}
    script = "".join(f"srun {step}; echo {stage}; {waits_for(stage)}\n" for stage, step in steps.items())
    job = start(site, script, "--gres=gpu:1", "--mps")
    seen = {}
    for stage in steps:
        site.cluster.until_output(job, stage)
        seen[stage] = site.node("n1", "sh", "-c", f"ls -l {mark}").stdout.split()[:3]
        site.cluster.let_go(job, stage)
    site.cluster.wait(job)
    assert seen == {"good": [], "bad": ["-rw-------", "1", "root"], "cured": []}


def test_a_job_without_mps_leaves_no_mark(site: Site) -> None:
    job = site.cluster.sbatch("-wn1", "--gres=gpu:1", script="srun false")
    site.cluster.wait(job)
    assert site.state_files("n1") == []


def test_the_probe_runs_as_the_jobs_user_with_nothing_of_slurmstepds(site: Site) -> None:
    """Its program is root's and its environment made from nothing; here it only tells what it is."""
    site.machine.write(
        "/opt/tell.py",
        "import os\n"
        "status = open('/proc/self/status').read()\n"
        "ids = [line.split()[1:] for line in status.splitlines() if line[:4] in ('Uid:', 'Gid:')]\n"
        "fds = sorted(os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd') if n != '3')\n"
        "open('/home/alice/told', 'w').write(repr((ids, sorted(os.environ), set(fds))))\n",
    )
    script = "srun false\necho next\nsrun env LD_PRELOAD=/home/alice/x.so PYTHONPATH=/home/alice true\n"
    job = start(site, f"{waits_for()}\n{script}", "--gres=gpu:1", "--mps")
    site.change_verdict(job, "^(probe .*) .*", r"\1 /opt/tell.py")
    site.cluster.let_go(job)
    site.cluster.wait(job)
    told = site.machine.path("/home/alice/told")
    ids, environment, descriptors = eval(told.read_text())  # our own file
    told.unlink()
    assert ids == [["20001"] * 4, ["4294901760"] * 4]  # nobody's group, so that its user cannot trace it
    assert set(environment) - {"LC_CTYPE"} == {
        "PATH",
        "CUDA_MPS_PIPE_DIRECTORY",
        "CUDA_MPS_LOG_DIRECTORY",
        "CUDA_VISIBLE_DEVICES",
    }
    assert descriptors == {"/dev/null"}


@pytest.mark.parametrize(
    ("python", "probe"),
    [
        (PYTHON, "/opt/gone/slurm_mps/task/probe.py"),
        ("/opt/gone/bin/python3", "/opt/gone/slurm_mps/task/probe.py"),
        (PYTHON, "/opt/alone/slurm_mps/task/probe.py"),
    ],
    ids=["no program", "no Python", "no package"],
)
def test_a_step_whose_server_cannot_be_tried_says_why_and_the_next_one_goes_on(
    site: Site, python: str, probe: str
) -> None:
    """An upgrade moved what the verdict names: nothing is known of the server, and it is not blamed.

    When the program is back the same job's next step runs.
    """
    site.machine.write("/opt/alone/slurm_mps/task/probe.py", Path(slurm_mps.task.probe.__file__).read_text())
    script = (
        f"{waits_for()}; srun false\nsrun -n2 {CLIENT}; echo refused; {waits_for('again')}\necho next\nsrun {CLIENT}\n"
    )
    job = start(site, script, "-n2", "--gres=gpu:1", "--mps")
    good = re.findall("^probe .*", site.verdict(job), re.MULTILINE)[0]
    site.change_verdict(job, "^probe .*", f"probe {python} {probe}")
    site.cluster.let_go(job)
    refused = site.cluster.until_output(job, "refused")
    site.change_verdict(job, "^probe .*", good)
    site.cluster.let_go(job, "again")
    said = after(site, job)
    messages = [line for line in refused.splitlines() if "error: mps: " in line]
    assert len(messages) == 1
    assert (
        f"cannot test its MPS server on this node after an earlier step failed: {python} -I -S {probe} does not run"
        in messages[0]
    )
    assert "uuid=" not in refused
    assert GOOD.search(said), site.cluster.output(job)
    assert "error: mps" not in said


def test_only_what_the_probe_says_of_the_server_is_said_of_it(site: Site) -> None:
    """Here the probe ends as the script wants. Of a server that takes nobody it says 3."""
    nobody, untried, unsaid = "accepts no programs", "cannot test", "did not answer"
    endings = {"1": untried, "3": nobody, "2": untried, "-9": unsaid}
    script = f"{waits_for()}; srun false\n" + "".join(
        f"echo 'import os; os.kill(os.getpid(), 9) if {n} < 0 else os._exit({n})' >probe.py; echo next; srun echo ran\n"
        for n in endings
    )
    job = start(site, script, "--gres=gpu:1", "--mps")
    site.change_verdict(job, "^probe .*", f"probe {PYTHON} /home/alice/probe.py")
    site.cluster.let_go(job)
    said = after(site, job).split("next\n")
    site.machine.path("/home/alice/probe.py").unlink()
    for reason in (nobody, untried, unsaid):
        assert [reason in words for words in said] == [reason == why for why in endings.values()], said


def test_a_step_that_the_plugin_refused_leaves_no_mark(any_site: Site) -> None:
    """Its programs never ran, so that nothing is to be suspected of the server."""
    script = "srun -n1 echo ran\necho next\nls /run/slurm-mps/jobs/$SLURM_JOB_ID\nsrun -n1 --gres=gpu:1 " + CLIENT
    job = start(any_site, script, "-n2", "--gres=gpu:2", "--mps=per-gpu")
    said = after(any_site, job)
    assert "suspect" not in said
    assert GOOD.search(said), any_site.cluster.output(job)


@pytest.mark.parametrize("options", [["--mps"], ["--mps=per-gpu"]], ids=["per-node", "per-gpu"])
def test_a_step_of_one_gpu_after_a_bad_one_looks_at_its_own_only(any_site: Site, options: list[str]) -> None:
    """With devices confined it can open no other, and says nothing about it."""
    script = f"srun -n1 --gres=gpu:1 false\necho next\nsrun -n1 --gres=gpu:1 {CLIENT}\nsrun -n1 --gres=none echo ran"
    job = start(any_site, script, "-n2", "--gres=gpu:2", *options)
    said = after(any_site, job)
    assert GOOD.search(said), any_site.cluster.output(job)
    assert "ran" in said.splitlines()


def test_a_step_on_one_gpu_does_not_absolve_the_other(any_site: Site) -> None:
    """The step on the last GPU is killed in a kernel, one on the first runs, and then one on the last again."""
    one = "srun -n1 --exact --gres=gpu:1"
    script = (
        f"{one} sh -c 'touch busy; while [ -e busy ]; do sleep 0.1; done' &\n"
        "while [ ! -e busy ]; do sleep 0.1; done\n"
        f"timeout -s TERM 2 {one} {CLIENT} --spin\nrm busy\nwait\n"
        f"{one} sh -c '{CLIENT}; touch first; while [ ! -e done ]; do sleep 0.1; done' &\n"
        f"while [ ! -e first ]; do sleep 0.1; done\necho next\n{one} {CLIENT}\ntouch done\nwait\nrm -f first done\n"
    )
    job = start(any_site, script, "-n3", "--gres=gpu:2", "--mps")
    said = after(any_site, job)
    assert GOOD.search(said), any_site.cluster.output(job)
    assert "FAILED" not in said


def test_the_probes_own_failure_is_not_laid_to_the_step(site: Site) -> None:
    """Its first context fails where a client was killed in a kernel (O46); the tasks start after that."""
    script = f"srun {CLIENT} --spin\necho next\nsrun false\ntrue\n"
    job = start(site, script, "--gres=gpu:1", "--mps")
    site.cluster.until_output(job, "uuid=")
    site.machine.run(["scancel", f"{job}.0"], user="alice").check()
    said = after(site, job)
    assert "mps: " not in said
