"""What the job's output says when tasks ended badly and MPS explains it, and that it says nothing otherwise."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

import pytest

from tests.harness.cluster import waits_for
from tests.harness.site import STATE_DIRECTORY

if TYPE_CHECKING:
    from tests.harness.cluster import Job
    from tests.harness.site import Site

CLIENT = "simulated-gpus client"
TOLD = re.compile(r"^job \d+: (.*); slurm-mps logs \d+ tells more$")
FAULT = (
    f"srun -n3 --gpus=1 sh -c 'if [ $SLURM_PROCID = 1 ]; then sleep 1; exec {CLIENT} %s; fi; exec {CLIENT} --work 9'"
)


def start(site: Site, script: str, *options: str) -> Job:
    return site.cluster.sbatch("-wn1", "-n4", "--gres=gpu:2", *(options or ("--mps",)), script=script)


def told(site: Site, job: Job) -> list[str]:
    """What the user was told, when the job is over."""
    site.cluster.wait(job)
    said = site.cluster.said(site.cluster.output(job))
    assert {node for node, _ in said} <= {"n1"}
    return [found[1] for found in (TOLD.match(words) for _, words in said) if found]


@pytest.mark.parametrize("options", [["--mps"], ["--mps=per-gpu"]], ids=["per-node", "per-gpu"])
def test_a_fault_names_the_rank_the_gpu_and_whom_it_took_along(site: Site, options: list[str]) -> None:
    """Once: the script that fails because its step did does not tell it again."""
    (words,) = told(site, start(site, FAULT % "--fault" + "\nexit 3", *options))
    uuid = site.gpus("n1")[0]["uuid"]
    assert words == f"rank 1 hit a GPU fault on {uuid} and took ranks 0,2 along: a fault ends every program on its GPU"


def test_with_devices_confined_the_job_is_told_the_same(any_site: Site) -> None:
    (words,) = told(any_site, start(any_site, FAULT % "--trap"))
    assert re.fullmatch(
        r"a GPU fault on GPU-51\S+ ended ranks 0-2; the MPS server does not say whose it was \(.*\)", words
    )


def test_what_a_wrapper_or_the_script_itself_started_goes_by_pid(site: Site) -> None:
    wrapped = start(site, f"srun -n1 --gpus=1 sh -c '{CLIENT} --fault; exit 3'")
    (words,) = told(site, wrapped)
    assert re.match(r"process \d+ hit a GPU fault on GPU-51\S+; no other program was on that GPU$", words)
    (words,) = told(site, start(site, f"{CLIENT} --work 9 &\nsleep 0.7\n{CLIENT} --fault"))
    assert re.match(r"process \d+ hit a GPU fault on GPU-51\S+ and took process \d+ along", words)


def test_a_server_that_dies_is_told(site: Site) -> None:
    job = start(site, f"srun -n2 {CLIENT} --work 9")
    site.cluster.until_output(job, "uuid=", times=2)
    (server,) = [p.pid for p in site.machine.processes() if p.comm.startswith("nvidia-cuda-mps") and p.uid]
    site.machine.run(["kill", "-9", str(server)]).check()
    (words,) = told(site, job)
    assert words == "the MPS server died, and its clients lost what they had on the GPU (CUDA error 806)"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "kill -9 $(cat $CUDA_MPS_PIPE_DIRECTORY/nvidia-cuda-mps-control.pid)",
            "is gone, and its server with it (CUDA error 806); its log does not say why",
        ),
        (
            "echo quit -t 1 | nvidia-cuda-mps-control",
            "ended (status 0), and its server with it (CUDA error 806); slurm-mps logs {job} tells more",
        ),
    ],
    ids=["killed", "quit"],
)
def test_a_daemon_that_goes_is_told_once_and_its_logs_where_they_know_of_it(
    site: Site, command: str, words: str
) -> None:
    """Of a daemon that was killed they hold nothing (O65), and nobody is sent to them. The script fails with its step,
    and tells nothing again.
    """
    job = start(site, f"srun -n1 sh -c 'echo up; {waits_for()}; exit 3'")
    site.cluster.until_output(job, "up")
    pipe = f"{STATE_DIRECTORY}/jobs/{job}/pipe"
    site.node("n1", "sh", "-c", f"export CUDA_MPS_PIPE_DIRECTORY={pipe}; {command}").check()
    site.cluster.let_go(job)
    site.cluster.wait(job)
    expected = f"job {job}: the MPS control daemon on this node {words.format(job=job)}"
    assert site.cluster.said(site.cluster.output(job)) == [("n1", expected)]


def test_a_daemon_that_goes_after_a_step_was_told_something_else_is_told_too(site: Site) -> None:
    """A program of the script's own was its client meanwhile."""
    job = start(site, f"srun -n1 --gpus=1 {CLIENT} --fault\n{CLIENT} --work 9")
    site.cluster.until_output(job, "uuid=", times=2)
    site.node("n1", "sh", "-c", f"kill -9 $(cat {STATE_DIRECTORY}/jobs/{job}/pipe/nvidia-cuda-mps-control.pid)").check()
    site.cluster.wait(job)
    (_, fault), (_, gone) = site.cluster.said(site.cluster.output(job))
    assert "rank 0 hit a GPU fault" in fault
    assert "the MPS control daemon on this node is gone" in gone


def test_more_programs_than_the_server_takes_are_told_where_the_plugin_could_not_refuse_them(site: Site) -> None:
    script = f"for i in $(seq 50); do {CLIENT} --device 0 --hold 3 >/dev/null & done; wait; {CLIENT} --fault >/dev/null"
    (words,) = told(site, start(site, script))
    assert "the MPS server takes 48 programs on a GPU and refused 2 programs more (CUDA error 808): " in words


def test_a_memory_limit_is_named_and_no_more_than_that(site: Site) -> None:
    """The logs know nothing of it, so nobody is sent there: the line ends where the sentence does."""
    job = start(site, f"srun -n1 {CLIENT} --alloc-mib 3000", "--mps-mem=2G")
    site.cluster.wait(job)
    words = (
        f"job {job}: rank 0 failed under a memory limit (2 GiB on each GPU); if it ran out of memory, that limit is why"
    )
    assert site.cluster.said(site.cluster.output(job)) == [("n1", words)]


@pytest.mark.parametrize(
    "script",
    [
        f"srun -n2 {CLIENT}",
        "srun -n2 false\nexit 3",
        f"srun -n2 {CLIENT} --alloc-mib 300000\nexit 3",
        f"srun -n2 sh -c '{CLIENT}; kill -9 $$'\nexit 143",
    ],
    ids=["all well", "its own failure", "without a limit", "killed"],
)
def test_nothing_is_told_of_what_mps_does_not_explain(site: Site, script: str) -> None:
    job = start(site, script)
    assert told(site, job) == []
    assert "mps:" not in site.cluster.output(job)


def test_a_step_that_is_cancelled_needs_no_explanation(site: Site) -> None:
    """Each rank has a GPU of its own: of two on one, the first to be killed can be what the other dies of (O47)."""
    job = start(site, f"srun -n2 --gpus-per-task=1 {CLIENT} --spin")
    site.cluster.until_output(job, "uuid=", times=2)
    site.cluster.scancel(job)
    assert told(site, job) == []


def test_a_step_whose_tasks_are_all_well_starts_no_program(site: Site) -> None:
    """The program that looks is replaced by one that leaves a trace."""
    site.machine.write("/opt/trace.py", "import os\nopen(f'/home/alice/looked-{os.getpid()}', 'w').close()\n")
    steps = "srun -n4 true\nls looked-* 2>/dev/null | wc -l\nsrun -n4 false\nls looked-* | wc -l"
    job = start(site, f"{waits_for()}\n{steps}")
    site.change_verdict(job, "^explain .*", "explain /opt/trace.py")
    site.cluster.let_go(job)
    site.cluster.wait(job)
    said = [line for line in site.cluster.output(job).splitlines() if line.isdecimal()]
    site.machine.run(["sh", "-c", "rm -f /home/alice/looked-*"]).check()
    assert said == ["0", "2"], "after the first task that failed, and after the last"


def test_a_program_that_does_not_end_costs_two_seconds_and_says_nothing(site: Site) -> None:
    site.machine.write("/opt/stay.py", "import time\nprint('never', flush=True)\ntime.sleep(60)\n")
    job = start(site, f"{waits_for()}\nsrun -n1 false\necho after")
    site.change_verdict(job, "^explain .*", "explain /opt/stay.py")
    began = time.monotonic()
    site.cluster.let_go(job)
    site.cluster.wait(job)
    assert "after" in site.cluster.output(job)
    assert "never" not in site.cluster.output(job)
    assert 2 < time.monotonic() - began < 8


def test_the_program_that_looks_is_the_jobs_user_with_nothing_of_slurmstepds(site: Site) -> None:
    """No group of slurmd's, no descriptor, no variable; and what it prints is one printable line."""
    site.machine.write(
        "/opt/tell.py",
        "import os, sys\n"
        "status = open('/proc/self/status').read()\n"
        "ids = [line.split()[1:] for line in status.splitlines() if line[:4] in ('Uid:', 'Gid:', 'Grou')]\n"
        "fds = sorted(n for n in os.listdir('/proc/self/fd') if n != '3')\n"
        "said = (ids, sorted(set(os.environ) - {'LC_CTYPE'}), fds, os.getcwd(), sys.argv[1:4])\n"
        "print('\\x1b[2J' + repr(said) + '\\nsecond')\n",
    )
    job = start(site, f"{waits_for()}\nsrun -n2 env LD_PRELOAD=/x.so PYTHONPATH=/home/alice false")
    site.change_verdict(job, "^explain .*", "explain /opt/tell.py")
    site.cluster.let_go(job)
    site.cluster.wait(job)
    (line,) = [line for line in site.cluster.output(job).splitlines() if "error: mps: " in line and "[2J" in line][:1]
    said = line.partition("error: mps: ")[2]
    assert said.startswith("?[2J(")
    ids, environment, descriptors, directory, words = eval(said[4:])  # our own program's
    assert ids == [["20001"] * 4, ["4294901760"] * 4, []]
    assert (environment, descriptors, directory) == (["PATH"], ["0", "1", "2"], "/")
    assert (words[0], words[2]) == (str(job.id), "step")
    assert "second" not in site.cluster.output(job)
