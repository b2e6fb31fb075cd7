"""Limits that divide by the ranks on a GPU, and more ranks than a GPU takes clients: known where a step starts."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.harness.site import Site

if TYPE_CHECKING:
    from tests.harness.machine import Result

# Every task stays until all have their context: what is shared is shared at once.
CLIENT = "simulated-gpus client --hold 1"
AUTO = ("--mps-threads=auto", "--mps-mem=auto")
FOR_CLIENTS = 143155 - 514  # MiB of a simulated H200, less what its contexts need (O15, O44)


def srun(site: Site, *options: str, command: str = CLIENT) -> Result:
    return site.cluster.srun("-wn1", *options, *command.split())


def sms(output: str) -> list[int]:
    return sorted(int(found) for found in re.findall(r"sms=(\d+)", output))


def said(site: Site, text: str) -> list[str]:
    """What the plugin told the user, once for each time it did."""
    return [words for _, words in site.cluster.said(text)]


def test_ranks_that_share_a_gpu_divide_it(any_site: Site) -> None:
    """Four ranks, 25 % each: 32 SMs of 132 (O10)."""
    result = srun(any_site, "-n4", "--gres=gpu:1", *AUTO).check()
    assert sms(result.stdout) == [32, 32, 32, 32]
    assert set(re.findall(r"free=(\d+)", result.stdout)) == {str(FOR_CLIENTS // 4 - 145)}


def test_all_ranks_can_use_their_part_to_the_end(site: Site) -> None:
    """What auto hands out is there: each rank fills its limit, all of them at once."""
    fill = "python3 /home/fill.py"
    site.machine.write(
        "/home/fill.py",
        "import ctypes, time\nfrom slurm_mps.node.cuda import Cuda\n"
        "device = Cuda().open_device(0)\nsize = ctypes.c_size_t(device.free_bytes - (1 << 20))\n"
        "if ctypes.CDLL('libcuda.so.1').cuMemAlloc_v2(ctypes.byref(ctypes.c_void_p()), size) == 0:\n"
        "    print('filled', flush=True)\ntime.sleep(1.5)\n",
    )
    result = srun(site, "-n8", "--gres=gpu:1", *AUTO, command=fill.replace("python3", "/opt/slurm-mps/bin/python3"))
    assert result.check().stdout.split() == ["filled"] * 8


def test_unbound_ranks_are_taken_to_spread_evenly(any_site: Site) -> None:
    result = srun(any_site, "-n6", "--gres=gpu:2", "--mps-threads=auto").check()
    assert sms(result.stdout) == [42] * 6  # 33.3 % of 132 SMs (O10)


def test_bound_ranks_divide_their_own_gpu_however_unevenly_they_are_bound(any_site: Site) -> None:
    """Three ranks on one GPU and one on the other: no variable of Slurm's says so with ConstrainDevices=yes."""
    show = "echo $CUDA_VISIBLE_DEVICES $CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
    options = ["-n4", "--gres=gpu:2", "--gpu-bind=map_gpu:0,0,0,1", "--mps-threads=auto"]
    lines = any_site.cluster.srun("-wn1", *options, "sh", "-c", show).check().stdout.splitlines()
    first, second = (gpu["uuid"] for gpu in any_site.gpus("n1")[:2])
    assert sorted(lines) == sorted([f"{first} 33.3"] * 3 + [second])


@pytest.mark.parametrize("bind", [["--gpu-bind=none"], ["--gpu-bind=none", "--gpus-per-task=1"]])
def test_ranks_that_slurm_does_not_bind_divide_all_they_may_open(any_site: Site, bind: list[str]) -> None:
    """Slurm then leaves CUDA_VISIBLE_DEVICES unset, as it does for a step without GPUs."""
    gres = [] if "--gpus-per-task=1" in bind else ["--gres=gpu:2"]
    tasks = "-n4" if gres else "-n2"
    result = srun(any_site, tasks, *gres, *bind, *AUTO).check()
    ranks = 2 if gres else 1
    assert sms(result.stdout) == [132 // ranks] * int(tasks[2:])
    assert {int(free) for free in re.findall(r"free=(\d+)", result.stdout)} <= set(range(FOR_CLIENTS // ranks))


def test_a_plugin_that_is_loaded_twice_counts_each_task_once(site: Site) -> None:
    """A second line, as installers add with an include; doctor names it."""
    place = "/etc/slurm/plugstack.conf"
    once = site.machine.read(place)
    site.machine.write(place, f"{once}include /etc/slurm/twice.conf\n")
    site.machine.write("/etc/slurm/twice.conf", once)
    try:
        result = srun(site, "-n4", "--gres=gpu:1", *AUTO)
    finally:
        site.machine.write(place, once)
        site.machine.path("/etc/slurm/twice.conf").unlink()
    assert sms(result.check().stdout) == [132 // 4 - 1] * 4


def test_each_step_divides_for_itself(site: Site) -> None:
    script = f"srun -n2 {CLIENT} > two\nsrun -n8 {CLIENT} > eight\ncat two\necho\ncat eight\nrm two eight\n"
    output = site.cluster.run_batch("-wn1", "-n8", "--gres=gpu:1", "--mps-threads=auto", script=script)
    two, eight = output.split("\n\n")
    assert sms(two) == [66, 66]
    assert sms(eight) == [16] * 8


def test_a_step_may_divide_what_the_job_has(site: Site) -> None:
    """auto never gives more than the job has, and less where the ranks are many."""
    script = "srun -n2 --mps-threads=auto --mps-mem=auto sh -c 'echo $CUDA_MPS_ACTIVE_THREAD_PERCENTAGE'\n"
    output = site.cluster.run_batch("-wn1", "-n8", "--gres=gpu:1", "--mps-threads=60", script=script)
    assert output.split() == ["50", "50"]


def test_a_script_divides_by_the_tasks_of_the_job(site: Site) -> None:
    """What it starts without srun, such as mpirun's ranks, has the script's environment."""
    script = "echo $CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
    output = site.cluster.run_batch("-wn1", "-n8", "--gres=gpu:2", "--mps-threads=auto", script=script)
    assert output.split() == ["25"]


@pytest.mark.parametrize("option", ["threads", "mem"])
def test_auto_in_a_script_of_a_job_that_does_not_say_how_many_tasks_it_has(site: Site, option: str) -> None:
    job = site.cluster.sbatch("-wn1", "--gres=gpu:1", f"--mps-{option}=auto", script="echo ran")
    assert site.cluster.wait(job).state == "FAILED"
    assert said(site, site.cluster.output(job)) == [
        (
            f"this task cannot start: --mps-{option}=auto divides by the tasks that share a GPU, and the job does not "
            "say how many it has on this node; give -n or --ntasks-per-node"
        )
    ]
    assert "ran" not in site.cluster.output(job).splitlines()


def test_more_ranks_than_a_gpu_takes_clients_are_refused_before_the_first_starts(any_site: Site) -> None:
    any_site.configure("[gpus]\nclients_max = 3\n")
    result = srun(any_site, "-n4", "--gres=gpu:1", "--mps", command="echo ran")
    assert result.returncode != 0
    assert "ran" not in result.stdout
    assert said(any_site, result.stderr) == [
        (
            "this task cannot start: 4 tasks of this step share a GPU, and an MPS server takes 3 clients there; "
            "start fewer on this node, or give the job more GPUs"
        )
    ]


def test_as_many_ranks_as_two_gpus_take_start(any_site: Site) -> None:
    """The number is one of contexts on a GPU (O42), not of processes of a server."""
    any_site.configure("[gpus]\nclients_max = 3\n")
    result = srun(any_site, "-n6", "--ntasks-per-gpu=3", "--mps").check()
    assert result.stdout.count("mps=") == 6


def test_55_ranks_on_a_gpu_of_a_driver_that_takes_60() -> None:
    """Each must be content with two connections, or the last seven fail with 808 (M5)."""
    with Site(nodes=1, gpus_per_node=1, cpus_per_node=64) as site:
        site.node("n1", "simulated-gpus", "create", "1", "--cuda-version", "13.1").check()
        result = site.cluster.srun("-n55", "--gres=gpu:1", "--mps", "simulated-gpus", "client", "--hold", "2").check()
        assert result.stdout.count("mps=") == 55
