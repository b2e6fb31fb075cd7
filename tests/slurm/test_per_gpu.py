"""--mps=per-gpu: one control daemon for each of a job's GPUs, each with its own directories, limits and fate."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

import pytest

from tests.harness.cluster import waits_for
from tests.harness.gpunode import asked

if TYPE_CHECKING:
    from tests.harness.gpunode import GpuNode
    from tests.harness.site import Site

CLIENT = "simulated-gpus client"
PER_GPU = {**asked(), "SPANK_MPS": "per-gpu"}
LINE = re.compile(r"uuid=(\S+) sms=(\d+) free=(\d+) total=\d+ mps=(\S+)")


def clients(output: str) -> list[tuple[str, str, str, str]]:
    """UUID, SMs, free MiB and server of each client that said so."""
    return sorted(LINE.findall(output))


@pytest.mark.every_release
def test_each_task_is_a_client_of_its_own_gpus_daemon_with_that_gpus_limit(any_site: Site) -> None:
    options = ["-wn1", "-n4", "--ntasks-per-gpu=2", "--mps=per-gpu", "--mps-threads=25", "--mps-mem=0:8G,1:4G"]
    result = any_site.cluster.srun(*options, *CLIENT.split(), "--hold", "1").check()
    first, second = (gpu["uuid"] for gpu in any_site.gpus("n1")[:2])
    found = clients(result.stdout)
    assert sorted((uuid, free) for uuid, _, free, _ in found) == sorted([(first, "8047")] * 2 + [(second, "3951")] * 2)
    servers = {uuid: {server for one, _, _, server in found if one == uuid} for uuid in (first, second)}
    assert all(len(one) == 1 for one in servers.values())
    assert servers[first] != servers[second]


@pytest.mark.parametrize("visible", ["uuid", "ordinal"])
def test_every_task_sees_one_device(any_site: Site, visible: str) -> None:
    """The daemon has no other: as an ordinal it is 0 in each (O18)."""
    any_site.configure(f'[gpus]\nclient_visible_devices = "{visible}"\n')
    show = ["sh", "-c", f"echo $CUDA_VISIBLE_DEVICES; {CLIENT}"]
    result = any_site.cluster.srun("-wn1", "-n2", "--gpus-per-task=1", "--mps=per-gpu", *show).check()
    uuids = [gpu["uuid"] for gpu in any_site.gpus("n1")[:2]]
    assert sorted(uuid for uuid, *_ in clients(result.stdout)) == sorted(uuids)
    seen = sorted(line for line in result.stdout.splitlines() if "sms=" not in line)
    assert seen == (["0", "0"] if visible == "ordinal" else sorted(uuids))


@pytest.mark.parametrize("bind", [[], ["--gpu-bind=none"]])
def test_a_task_with_several_gpus_is_refused_with_the_reason(any_site: Site, bind: list[str]) -> None:
    """Also where Slurm leaves CUDA_VISIBLE_DEVICES unset: tasks cannot pile up on one GPU's daemon."""
    result = any_site.cluster.srun("-wn1", "-n2", "--gres=gpu:2", *bind, "--mps=per-gpu", "echo", "ran")
    assert result.returncode != 0
    assert "ran" not in result.stdout
    said = [line for line in result.stderr.splitlines() if "error: mps: " in line]
    assert len(said) == 1
    assert "with --mps=per-gpu a task can use one GPU, and it has 2; bind each to its own" in said[0]


def test_the_script_of_a_job_with_several_gpus_sees_none_and_its_steps_do(any_site: Site) -> None:
    script = f"echo script $CUDA_VISIBLE_DEVICES\n{CLIENT}\nsrun -n2 --gpus-per-task=1 {CLIENT}\n"
    job = any_site.cluster.sbatch("-wn1", "-n2", "--gres=gpu:2", "--mps=per-gpu", script=script)
    any_site.cluster.wait(job)
    output = any_site.cluster.output(job)
    assert (
        "has a control daemon of its own, so this script sees none; each task that it starts with srun sees one"
        in output
    )
    assert "script NoDevFiles" in output
    assert "FAILED init 100" in output
    assert len(clients(output)) == 2
    assert len({uuid for uuid, *_ in clients(output)}) == 2


def test_the_script_of_a_job_with_one_gpu_has_it(site: Site) -> None:
    output = site.cluster.run_batch("-wn1", "--gres=gpu:1", "--mps=per-gpu", script=CLIENT)
    assert clients(output)


KILL_OWN_SERVER = """
simulated-gpus client --work 3 > $SLURM_LOCALID.out &
until grep -q mps= $SLURM_LOCALID.out; do sleep 0.1; done
[ $SLURM_LOCALID = 1 ] || { until grep -q mps= 1.out; do sleep 0.1; done; kill -9 $(sed 's/.*mps=//' 0.out); }
wait; cat $SLURM_LOCALID.out; rm $SLURM_LOCALID.out
"""


def test_a_server_that_dies_on_one_gpu_leaves_the_other_alone(site: Site) -> None:
    """One daemon for both has one server for both."""
    options = ["-wn1", "-n2", "--gpus-per-task=1", "--kill-on-bad-exit=0"]
    split = site.cluster.srun(*options, "--mps=per-gpu", "sh", "-c", KILL_OWN_SERVER)
    shared = site.cluster.srun(*options, "--mps=per-node", "sh", "-c", KILL_OWN_SERVER)
    assert len(clients(split.stdout)) == len(clients(shared.stdout)) == 2
    assert split.stdout.count("FAILED") == 1
    assert shared.stdout.count("FAILED") == 2


def test_a_daemon_that_dies_on_one_gpu_keeps_no_step_from_the_other(any_site: Site) -> None:
    script = (
        f"echo started; {waits_for()}\n"
        f"srun -n2 --gpus-per-task=1 --kill-on-bad-exit=0 {CLIENT}\necho next\nsrun -n1 --gres=gpu:1 {CLIENT}\n"
    )
    job = any_site.cluster.sbatch("-wn1", "-n2", "--gres=gpu:2", "--mps=per-gpu", script=script, until="started")
    pid_file = f"/run/slurm-mps/jobs/{job}/gpu-1/nvidia-cuda-mps-control.pid"
    any_site.node("n1", "sh", "-c", f"kill -9 $(cat {pid_file})").check()
    any_site.cluster.let_go(job)
    any_site.cluster.wait(job)
    both, _, one = any_site.cluster.output(job).partition("next\n")
    second = any_site.gpus("n1")[1]["uuid"]
    assert len(clients(both)) == 1
    assert f"its MPS control daemon on this node does not answer; submit the job again ({second})" in both
    assert len(clients(one)) == 1


def test_a_program_on_one_gpu_starts_while_a_faults_victim_stays_on_the_other(any_site: Site) -> None:
    """The victim stays until that program lets it go; the one that waits for the victim's GPU starts then."""
    victim = f"{CLIENT} --hold 60 >held & {waits_for('let')}; kill $!"
    each = {
        "faulty": f"[ $SLURM_PROCID = 1 ] || {CLIENT} --fault",
        "next": f"{CLIENT} && touch ~/let.$SLURM_JOB_ID",
    }
    steps = "".join(
        f"srun --overlap -n2 --gpus-per-task=1 --kill-on-bad-exit=0 sh -c '{program}'; echo {name}\n"
        for name, program in each.items()
    )
    script = (
        f"srun --overlap -n1 --gres=gpu:1 sh -c '{victim}' &\nuntil grep -q uuid= held; do sleep 0.1; done\n{steps}wait"
    )
    options = ("-wn1", "-n2", "--gres=gpu:2", "--mps=per-gpu", "--mps-threads=auto")
    output = any_site.cluster.run_batch(*options, script=script)
    said = output.partition("faulty\n")[2].partition("next\n")[0]
    assert len({uuid for uuid, *_ in clients(said)}) == 2, output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gres=gpu:2", "--mps=per-gpu", "--mps-mem=0:8G,0:4G"], "--mps-mem=0:8G,0:4G: it names a GPU twice"),
        (
            ["--gres=gpu:1", "--mps=per-gpu", "--mps-mem=1:8G"],
            "--mps-mem has a limit for GPU 1, but this job has one GPU on this node, which is 0",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(site: Site, options: list[str], said: str) -> None:
    result = site.cluster.srun("-wn1", *options, "echo", "ran")
    assert result.returncode != 0
    assert "ran" not in result.stdout
    assert said in result.stderr
    assert result.stderr.count("error: mps: ") == 1


def test_a_step_lowers_the_limit_of_one_gpu(site: Site) -> None:
    script = f"srun -n2 --gpus-per-task=1 --mps-mem=1:1G {CLIENT}\n"
    options = ["-wn1", "-n2", "--gres=gpu:2", "--mps=per-gpu", "--mps-threads=25", "--mps-mem=0:8G,1:4G"]
    output = site.cluster.run_batch(*options, script=script)
    first, second = (gpu["uuid"] for gpu in site.gpus("n1")[:2])
    found = {uuid: free for uuid, _, free, _ in clients(output)}
    assert found == {first: "8047", second: "879"}


def test_the_daemons_have_directories_and_logs_of_their_own(gpu_node: GpuNode) -> None:
    gpu_node.prolog(4711, **PER_GPU).check()
    try:
        names = gpu_node.run("ls", "/run/slurm-mps/jobs/4711").stdout.split()
        logs = gpu_node.run("find", "/var/log/slurm-mps/4711", "-name", "control.log").stdout.split()
        assert len([p for p in gpu_node.mps_processes() if p.uid == 0]) == 2
    finally:
        gpu_node.epilog(4711).check()
    assert names == ["config", "gpu-0", "gpu-1", "journal", "verdict"]
    assert sorted(logs) == [f"/var/log/slurm-mps/4711/gpu-{n}/control.log" for n in (0, 1)]
    kept = gpu_node.run("find", "/var/log/slurm-mps/4711", "-name", "control.log").stdout.split()
    assert sorted(kept) == sorted(logs)


@pytest.mark.alone
def test_the_daemons_start_side_by_side(gpu_node: GpuNode) -> None:
    """Four daemons that take a second each are up in not much more than one."""
    gpu_node.fault("daemon.start=slow:1000")
    started = time.monotonic()
    gpu_node.prolog(4711, gpus="0,1,2,3", **PER_GPU).check()
    took = time.monotonic() - started
    assert 1.0 <= took < 2.0


def test_one_daemon_that_does_not_start_leaves_none(gpu_node: GpuNode) -> None:
    """What was up is undone with it; the node fixture sees that nothing is left."""
    gpu_node.fault("daemon.start=exit:7")
    result = gpu_node.prolog(4711, **PER_GPU)
    assert result.returncode == 1
    assert "-d ended with status 7" in result.stderr
    assert not gpu_node.mps_processes()


def test_daemons_that_are_stuck_are_ended_side_by_side(gpu_node: GpuNode) -> None:
    """None answers quit; the epilog has to end inside its deadline all the same."""
    gpu_node.prolog(4711, gpus="0,1,2,3", **PER_GPU).check()
    gpu_node.fault("command.quit=hang")
    started = time.monotonic()
    gpu_node.epilog(4711).check()
    took = time.monotonic() - started
    assert took < 6
    assert not gpu_node.mps_processes()


def test_a_prolog_run_again_keeps_all_daemons_or_begins_anew(gpu_node: GpuNode) -> None:
    gpu_node.prolog(4711, **PER_GPU).check()
    before = sorted(process.pid for process in gpu_node.mps_processes())
    gpu_node.prolog(4711, **PER_GPU).check()
    again = sorted(process.pid for process in gpu_node.mps_processes())
    pid = gpu_node.machine.read("/run/slurm-mps/jobs/4711/gpu-1/nvidia-cuda-mps-control.pid").strip()
    gpu_node.run("kill", "-9", pid).check()
    gpu_node.prolog(4711, **PER_GPU).check()
    anew = {process.pid for process in gpu_node.mps_processes()}
    assert set(before) <= set(again)
    assert not anew & set(before)
