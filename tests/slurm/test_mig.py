"""MPS on MIG slices, a daemon for each, beside whole GPUs. All is from documentation; no GPU in MIG mode was seen.

Slurm's own code finds the slices, as its AutoDetect=nvml does, in a list that a file gives it (fake_gpus.conf).
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness.cluster import waits_for
from tests.harness.gpunode import PROLOG, job_environment
from tests.harness.site import PARTITIONS, STATE_DIRECTORY, Site, simulated_gpus

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.cluster import Job

CLIENT = "simulated-gpus client"
SMALL, LARGE = ["--gres=gpu:1g.10gb:2"], ["--gres=gpu:2g.20gb:1"]
LINE = re.compile(r"uuid=(\S+) sms=(\d+) free=(\d+) total=\d+ mps=(\S+)")


@pytest.fixture(scope="module")
def cut_site() -> Iterator[Site]:
    """Two whole GPUs, and one that is cut into three slices."""
    with Site(nodes=1, gpus_per_node=3, slices={2: ["1g.10gb", "1g.10gb", "2g.20gb"]}, constrain_devices=True) as site:
        yield site


@pytest.fixture
def cut(cut_site: Site) -> Iterator[Site]:
    """The same, which must be as before after each test: the node in service, nothing left, each mode as it was."""
    before = cut_site.snapshot()
    yield cut_site
    cut_site.configure("")
    assert not cut_site.cluster.node_states()["n1"].drained
    assert cut_site.snapshot() == before


def slices(site: Site) -> list[str]:
    return [one["uuid"] for one in simulated_gpus(site.machine, "n1", kind="slices")]


def clients(output: str) -> list[tuple[str, str, str, str]]:
    """UUID, SMs, free MiB and server of each client that said so."""
    return sorted(LINE.findall(output))


def ask(site: Site, command: str, job: Job) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(site.node("n1", "slurm-mps", command, "--json", str(job)).stdout)
    return said


@pytest.mark.parametrize("bound", [["--gpus-per-task=1g.10gb:1"], SMALL])
def test_each_slice_has_a_daemon_and_its_ranks_the_limits(cut: Site, bound: list[str]) -> None:
    """Also unbound ranks, of which CUDA would show each the same slice: they are spread over all."""
    options = [*bound, "-n2" if "per-task" in bound[0] else "-n4", "--mps-threads=50", "--mps-mem=2G"]
    found = clients(cut.cluster.srun(*options, *CLIENT.split(), "--hold", "1").check().stdout)
    each = (int(options[len(bound)][2:])) // 2
    assert [one[:3] for one in found] == [(uuid, "8", "1992") for uuid in slices(cut)[:2] for _ in range(each)]
    assert len({server for *_, server in found}) == 2


def test_a_script_with_several_slices_sees_none_and_says_why(cut: Site) -> None:
    job = cut.cluster.sbatch(*SMALL, "--mps", script=CLIENT)
    cut.cluster.wait(job)
    output = cut.cluster.output(job)
    assert "mps: each GPU of this job has a control daemon of its own, so this script sees none" in output
    assert "FAILED init 100" in output


def test_auto_divides_a_slice(cut: Site) -> None:
    """The large one has 32 SMs and 18.5 GiB; four ranks have a quarter each."""
    found = clients(cut.cluster.srun(*LARGE, "-n4", "--mps-mem=auto", *CLIENT.split(), "--hold", "1").check().stdout)
    assert {(uuid, sms) for uuid, sms, *_ in found} == {(slices(cut)[2], "32")}
    assert all(4000 < int(free) < 4864 for _, _, free, _ in found)


def test_verify_and_status_call_a_slice_by_its_profile(cut: Site) -> None:
    """And status names a program of the job's that is on the slice without MPS, which no compute mode keeps out."""
    plain = f"CUDA_MPS_PIPE_DIRECTORY=/none {CLIENT} --hold 60"
    script = f"{plain} & srun slurm-mps verify; {waits_for()}; kill %1"
    job = cut.cluster.sbatch(*LARGE, "-n2", "--mps-threads=25", script=script)
    output = cut.cluster.until_output(job, "share one server") + cut.cluster.until_output(job, "mps=none")
    pid = next(p.pid for p in cut.machine.processes() if p.cmdline[-2:] == ("--hold", "60"))
    status, table = ask(cut, "status", job), cut.node("n1", "slurm-mps", "status", str(job)).stdout
    cut.cluster.let_go(job)
    cut.cluster.wait(job)
    uuid = slices(cut)[2]
    assert f"{uuid[:17]} 2g.20gb" in output
    assert "8/32" in output
    assert f"{uuid[:17]} 2g.20gb" in table
    gpu = status["jobs"][0]["daemons"][0]["gpus"][0]
    assert (gpu["uuid"], gpu["mig_profile"], gpu["compute_mode_found"]) == (uuid, "2g.20gb", None)
    said = f"job {job}: process {pid} runs on {uuid} without the job's control daemon and its limits"
    assert status["problems"] == [said]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([*SMALL, "--mps=per-node"], "--mps=per-node: its 2 MIG slices on this node need a control daemon each"),
        ([*LARGE, "--mps-mem=40G"], r"\(2g\.20gb\) has \(19 GiB\); ask for at most 19G"),
        # Slurm 24.11 and 26.05 name one of the five to the prolog (S26).
        (
            ["--gres=gpu:5", "--mps"],
            "it has a whole GPU and a MIG slice on this node|it has 5 GPUs here, and Slurm named 1",
        ),
        (["--gres=gpu:h200:1,gpu:1g.10gb:1", "--mps"], "it has 2 GPUs here, and Slurm named 1 to the prolog"),
        (
            [*LARGE, "-n14", "--mps"],
            "14 tasks of this step share a GPU, and an MPS server takes 13 clients there",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(cut: Site, options: list[str], said: str) -> None:
    result = cut.cluster.srun(*options, "echo", "ran")
    assert result.returncode != 0
    assert "ran" not in result.stdout.split()
    assert re.search(said, result.stderr)


def test_a_whole_gpu_beside_the_slices_is_as_elsewhere(cut: Site) -> None:
    result = cut.cluster.srun("--gres=gpu:h200:1", "--mps-threads=25", "sh", "-c", f"{CLIENT}; nvidia-smi -L").check()
    ((uuid, sms, *_),) = clients(result.stdout)
    assert (uuid, sms) == (cut.gpus("n1")[0]["uuid"], "32")


def test_a_slice_that_is_gone_is_a_fault_of_the_node(cut: Site) -> None:
    """Cut anew since slurmd started, Slurm gives a UUID that NVML does not know; with fail_job the node stays."""
    cut.configure('[policy]\nnode_fault = "fail_job"\n')
    old = slices(cut)
    running = cut.cluster.sbatch(*LARGE, "--mps", script=f"echo started; {waits_for()}", until="started")
    cut.node("n1", "simulated-gpus", "mig", "2", "3g.40gb").check()
    problems = ask(cut, "status", running)["problems"]
    result = cut.cluster.srun("--gres=gpu:1g.10gb:1", "--mps", "echo", "ran")
    cut.cluster.let_go(running)
    assert cut.cluster.wait(running).state == "COMPLETED"
    assert problems == [f"{old[2]}: NVML: Not Found"]
    assert "ran" not in result.stdout
    assert f"{old[0]}: nvmlDeviceGetHandleByUUID: Not Found" in result.stderr
    assert "was the GPU cut anew? restart slurmd" in result.stderr


def test_an_index_on_a_node_with_slices_is_refused(cut: Site) -> None:
    """Slurm before 25.11 names whole GPUs by index, and counts slices, too, in an order of its own."""
    said = cut.node("n1", "slurm-mps", "plan", "--mps", "--devices=0").stderr
    assert "Slurm gives it GPU 0 by number, and a number is ambiguous on a node with MIG slices" in said


def test_a_job_named_by_index_that_did_not_ask_runs_as_before(cut: Site) -> None:
    """Its partition gives MPS to jobs that do not ask."""
    cut.machine.write(f"{PARTITIONS}/gpu", "per-node\n")
    environment = job_environment(4711, gpus="0", SLURM_JOB_PARTITION="gpu")
    result = cut.node("n1", "env", *(f"{name}={value}" for name, value in environment.items()), PROLOG)
    planned = cut.node("n1", "slurm-mps", "plan", "--devices=0", "--partition=gpu")
    cut.machine.run(["rm", "-r", PARTITIONS]).check()
    result.check()
    assert cut.node("n1", "ls", f"{STATE_DIRECTORY}/jobs").stdout == ""
    assert (planned.returncode, "the prolog does nothing" in planned.stderr) == (2, True)
