"""A job's GPUs: which ones, the compute mode they are in while it runs, and the one that they get back."""

from __future__ import annotations

import time
from contextlib import contextmanager
from itertools import permutations
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness.gpunode import PROLOG, GpuNode, asked, job_environment
from tests.harness.site import STATE_DIRECTORY, show_gpus_in_proc

if TYPE_CHECKING:
    from collections.abc import Iterator

SEPARATE, JOINED = '[gpus]\nsharing = "separate"\n', '[gpus]\nsharing = "joined"\n'
UNCHANGED = '[gpus]\ncompute_mode = "unchanged"\n'


def gpu_lines(node: GpuNode, job_id: int = 4711) -> list[str]:
    lines = node.machine.read(f"{STATE_DIRECTORY}/jobs/{job_id}/verdict").splitlines()
    return [line.removeprefix("gpu ").rsplit(" ", 2)[0] for line in lines if line.startswith("gpu ")]


def daemons_gpus(node: GpuNode, job_id: int = 4711) -> list[str]:
    """The GPUs of the job's daemon, as the daemon lists them."""
    table = node.control(job_id, "device_query --csv").check().stdout.splitlines()
    return [line.split(",")[2] for line in table[2:]]


# ------------------------------------------------------------------------------------------------- compute modes


def test_each_gpu_gets_back_the_mode_it_was_found_in(gpu_node: GpuNode) -> None:
    """A job's own GPUs are EXCLUSIVE_PROCESS while it runs, and then each as it was, whatever that was.

    One that was found exclusive stays so: putting back is not the same as resetting to DEFAULT.
    """
    gpu_node.set_compute_modes(0, 2, 3, 2)
    gpu_node.prolog(4711, gpus="0,1,2").check()
    assert gpu_node.compute_modes() == [3, 3, 3, 2]
    gpu_node.epilog(4711).check()
    assert gpu_node.compute_modes() == [0, 2, 3, 2]
    gpu_node.set_compute_modes(0, 0, 0, 0)


def test_the_mode_is_left_alone_where_the_site_says_so(gpu_node: GpuNode) -> None:
    """With an unchanged compute mode, neither prolog nor epilog touches the mode of any GPU."""
    gpu_node.configure(UNCHANGED)
    gpu_node.set_compute_modes(0, 2, 3, 0)
    gpu_node.fault("nvml.SetComputeMode=4")  # and it would show even if the same mode were set
    gpu_node.prolog(4711, gpus="0,1,2").check()
    assert gpu_node.compute_modes() == [0, 2, 3, 0]
    gpu_node.epilog(4711).check()
    assert gpu_node.compute_modes() == [0, 2, 3, 0]
    gpu_node.set_compute_modes(0, 0, 0, 0)


@pytest.mark.parametrize("order", [(4711, 4712), (4712, 4711)], ids=["first-first", "first-last"])
def test_the_last_of_two_sharing_jobs_leaves_the_gpu_as_the_first_found_it(
    gpu_node: GpuNode, order: tuple[int, int]
) -> None:
    """Two jobs share a GPU, each with a daemon and limits of its own; in either order nothing is left.

    One that was exclusive takes no second server: it is DEFAULT as long as one of them holds it.
    """
    gpu_node.configure(SEPARATE)
    gpu_node.set_compute_modes(3)
    gpu_node.prolog(4711, gpus="0", **asked("25")).check()
    gpu_node.prolog(4712, gpus="0", user="bob", **asked("50")).check()
    assert " sms=32 " in gpu_node.client(4711).check().stdout
    assert " sms=66 " in gpu_node.client(4712, user="bob").check().stdout
    gpu_node.epilog(order[0]).check()
    assert len(gpu_node.mps_processes()) == 2
    assert gpu_node.compute_modes()[0] == 0
    gpu_node.epilog(order[1]).check()
    assert gpu_node.files() == []
    assert gpu_node.compute_modes()[0] == 3
    gpu_node.set_compute_modes(0)


@pytest.mark.parametrize(("first", "then"), list(permutations(("", SEPARATE, JOINED), 2)))
def test_a_job_does_not_come_beside_one_that_holds_the_gpu_in_another_way(
    gpu_node: GpuNode, first: str, then: str
) -> None:
    """Where the site changed its mind while a job runs, that job keeps its GPU, in the mode that it needs."""
    gpu_node.confine_devices()
    gpu_node.set_compute_modes(2)
    gpu_node.configure(first)
    gpu_node.prolog(4711, gpus="0").check()
    mode = gpu_node.compute_modes()[0]
    gpu_node.configure(then)
    gpu_node.prolog(4712, gpus="0").check()
    assert "is held by MPS job 4711" in gpu_node.verdict(4712)["message"]
    gpu_node.epilog(4712).check()
    assert gpu_node.compute_modes()[0] == mode
    gpu_node.epilog(4711).check()
    assert gpu_node.compute_modes()[0] == 2
    gpu_node.set_compute_modes(0)


def test_the_mode_is_put_back_though_the_first_holder_vanished(gpu_node: GpuNode) -> None:
    """A holder whose job directory is gone does not hold; the mode that it found is still the one put back."""
    gpu_node.set_compute_modes(2)
    gpu_node.prolog(4711, gpus="0").check()
    for process in gpu_node.mps_processes():
        gpu_node.run("kill", "-9", str(process.pid))
    gpu_node.run("rm", "-r", f"{STATE_DIRECTORY}/jobs/4711").check()
    gpu_node.prolog(4712, gpus="0").check()
    assert gpu_node.verdict(4712)["status"] == "ready"
    gpu_node.epilog(4712).check()
    assert gpu_node.compute_modes()[0] == 2
    gpu_node.set_compute_modes(0)


# ------------------------------------------------------------------------------------------ a GPU that is held


def test_a_held_gpu_is_refused_with_its_holder(gpu_node: GpuNode) -> None:
    """A second MPS job on a held GPU is refused by name of the holder, and its epilog leaves the holder alone."""
    gpu_node.prolog(4711, gpus="0,1", **asked("25", "8G")).check()
    before = {process.pid for process in gpu_node.mps_processes()}
    gpu_node.prolog(4712, gpus="1,2", user="bob").check()
    assert gpu_node.verdict(4712)["status"] == "refused"
    assert f"{gpu_node.uuids[1]} is held by MPS job 4711" in gpu_node.verdict(4712)["message"]
    for _ in range(2):
        assert {process.pid for process in gpu_node.mps_processes()} == before
        assert gpu_node.compute_modes() == [3, 3, 0, 0]
        assert " sms=32 free=8047 " in gpu_node.client(4711, "--device", "1").check().stdout
        gpu_node.epilog(4712).check()


# -------------------------------------------------------------------------------------------------- their names


# SLURM_JOB_GPUS, CUDA_VISIBLE_DEVICES, the GPUs that they lead to, and Slurm's index of each where it is another.
NAMES: list[tuple[str | None, str | None, list[int], list[int] | None]] = [
    ("0,2", "0,2", [0, 2], None),
    ("2,0", "2,0", [0, 2], None),
    ("3", None, [3], None),
    (None, "1", [1], None),
    ("2,3", "0,1", [2, 3], None),  # ConstrainDevices counts the job's own devices; Slurm's own numbers hold
    ("0,1", "UUID:3,UUID:1", [1, 3], [1, 0]),
    (None, "UUID:1,UUID:0", [0, 1], None),
    (None, "UUID:2", [2], None),
]


def test_slurms_names_of_gpus(gpu_node: GpuNode) -> None:
    """Indices and UUIDs, in any order and in either variable, lead to exactly the job's GPUs, in PCI order."""
    known = gpu_node.uuids
    for slurm, cuda, wanted, indices in NAMES:
        what = f"SLURM_JOB_GPUS={slurm} CUDA_VISIBLE_DEVICES={cuda}"
        for index, uuid in enumerate(known):
            cuda = cuda and cuda.replace(f"UUID:{index}", uuid)  # noqa: PLW2901
        given = {"SLURM_JOB_GPUS": slurm, "CUDA_VISIBLE_DEVICES": cuda}
        environment = job_environment(4711, gpus="", **asked())
        environment |= {name: value for name, value in given.items() if value is not None}
        gpu_node.run(PROLOG, env=environment).check()
        numbered = zip(indices or wanted, wanted, strict=True)
        assert gpu_lines(gpu_node) == [f"{number} {index} {known[index]}" for number, index in numbered], what
        assert daemons_gpus(gpu_node) == [known[index] for index in wanted], what
        assert gpu_node.compute_modes() == [3 if index in wanted else 0 for index in range(4)], what
        gpu_node.epilog(4711).check()


# ------------------------------------------------------------------------------------------ what the kernel lists first

CALLS = "/run/calls"
NOTING = f"""#!/bin/sh
[ $# = 0 ] || echo "$CUDA_VISIBLE_DEVICES" >>{CALLS}
exec nvidia-cuda-mps-control "$@"
"""


@contextmanager
def kernel_lists(node: GpuNode, listed: list[dict[str, Any]]) -> Iterator[None]:
    """Have the kernel list other GPUs than NVML has."""
    show_gpus_in_proc(node.machine, listed)
    try:
        yield
    finally:
        node.run("umount", "/proc/driver", "/sys/bus/pci/drivers").check()


def starts(node: GpuNode, gpus: str, **asked_for: str) -> tuple[list[str], float]:
    """Run a prolog, which tells the admin where there are two starts and the job is ready all the same.

    Returns: the GPUs of each start of a control daemon, and when the first was, in seconds from the prolog's own.
    """
    node.machine.write("/run/noting", NOTING, mode=0o755)
    node.configure('[paths]\ncontrol_program = "/run/noting"\n')
    node.machine.write(CALLS, "")
    began = time.time()
    said = node.prolog(4711, gpus=gpus, **asked_for).check().stderr
    calls = node.machine.read(CALLS).split()
    twice = "slurm-mps: job 4711: its control daemon was started twice: the kernel lists other GPUs than NVML\n"
    assert said == ("" if len(calls) == 1 else twice)
    return calls, node.machine.path(CALLS).stat().st_mtime - began


def test_the_daemon_starts_while_nvml_opens(gpu_node: GpuNode) -> None:
    """The kernel's list says which GPUs they are, so that nothing waits for NVML but what asks it."""
    gpu_node.run_job(4711)  # compiles the configuration
    gpu_node.fault("nvml.init=slow:2000")
    calls, after = starts(gpu_node, "1")
    gpu_node.fault()
    assert calls == daemons_gpus(gpu_node) == [gpu_node.uuids[1]]
    assert after < 1.5


def test_where_the_kernel_lists_nothing_the_daemon_waits_for_nvml(gpu_node: GpuNode) -> None:
    """As in some containers: all of it in turn."""
    with kernel_lists(gpu_node, []):
        gpu_node.fault("nvml.init=slow:500")
        calls, after = starts(gpu_node, "1")
    assert calls == [gpu_node.uuids[1]]
    assert after > 0.5


@pytest.mark.parametrize("asked_for", [asked(), {"SPANK_MPS": "per-gpu"}], ids=["per-node", "per-gpu"])
def test_where_the_kernel_lists_other_gpus_nvml_is_right(gpu_node: GpuNode, asked_for: dict[str, str]) -> None:
    """A daemon that was started on the wrong GPU is ended before anything else is done, and no trace of it stays."""
    gpus, right = gpu_node.gpus(), gpu_node.uuids
    for gpu, uuid in zip(gpus, right[::-1], strict=True):
        gpu["uuid"] = uuid
    with kernel_lists(gpu_node, gpus):
        calls, _ = starts(gpu_node, "0", **asked_for)
    assert calls == [right[3], right[0]]
    assert [line.split()[2] for line in gpu_lines(gpu_node)] == [right[0]]
    assert asked_for != asked() or right[0] in gpu_node.client(4711).stdout
    assert len(gpu_node.mps_processes()) == 2


@pytest.mark.parametrize(
    ("change", "calls_of"),
    [({"excluded": "Yes"}, [1]), ({"uuid": "GPU-????????-????-????-????-????????????"}, [1]), ({}, [0, 1])],
    ids=["excluded", "not-used-yet", "only-listed"],
)
def test_a_gpu_that_only_the_kernel_lists(gpu_node: GpuNode, change: dict[str, str], calls_of: list[int]) -> None:
    """One that the admin excluded has no number; one without a UUID makes the list worth nothing; a third kind, that
    NVML has lost, costs a start.
    """
    gpus, right = gpu_node.gpus(), gpu_node.uuids
    first = {**gpus[0], "pci_bus_id": "00000000:00:01.0", "uuid": "GPU-00000000-0000-0000-0000-000000000000"}
    with kernel_lists(gpu_node, [{**first, **change}, *gpus]):
        calls, _ = starts(gpu_node, "1")
    assert calls == [right[number] for number in calls_of]


def test_a_daemon_that_fails_on_a_gpu_that_is_not_the_jobs_does_not_matter(gpu_node: GpuNode) -> None:
    """As on one that NVML has lost and the kernel lists: no daemon starts for a UUID that the driver does not know."""
    gpus, right = gpu_node.gpus(), gpu_node.uuids
    gpus[1]["uuid"] = "GPU-00000000-0000-0000-0000-000000000000"
    with kernel_lists(gpu_node, gpus):
        calls, _ = starts(gpu_node, "1")
    assert calls == [gpus[1]["uuid"], right[1]]
    assert (len(gpu_node.mps_processes()), gpu_node.verdict(4711)["status"]) == (2, "ready")


def test_a_daemon_that_starts_in_its_turn_alone_is_enough(gpu_node: GpuNode) -> None:
    """Ahead, its GPU may still be in a mode that the driver does not start a daemon on."""
    once = f"""#!/bin/sh
[ $# = 0 ] || echo x >>{CALLS}
[ $# = 0 ] || [ $(wc -l <{CALLS}) -gt 1 ] || exit 1
exec nvidia-cuda-mps-control "$@"
"""
    gpu_node.machine.write("/run/once", once, mode=0o755)
    gpu_node.machine.write(CALLS, "")
    gpu_node.configure('[paths]\ncontrol_program = "/run/once"\n')
    said = gpu_node.prolog(4711, gpus="0").check().stderr
    assert (gpu_node.verdict(4711)["status"], gpu_node.compute_modes()[0]) == ("ready", 3)
    assert said == (
        "slurm-mps: job 4711: its control daemon was started twice: /run/once -d ended with status 1: no message\n"
    )


@pytest.mark.parametrize("start", ["", "daemon.start=exit:1"], ids=["", "the daemon does not start"])
def test_a_request_that_is_refused_for_what_nvml_says(gpu_node: GpuNode, start: str) -> None:
    """What was begun for it is undone, and it is refused however that went: nothing else could have come of it."""
    gpu_node.fault(*start.split())
    calls, _ = starts(gpu_node, "0", **asked(mem="999G"))
    assert len(calls) == 1, "it was refused before"
    assert (gpu_node.mps_processes(), gpu_node.compute_modes()) == ([], [0, 0, 0, 0])
    assert gpu_node.verdict(4711)["status"] == "refused"


def test_refused_jobs_cost_no_other_jobs_logs(gpu_node: GpuNode) -> None:
    gpu_node.configure('[paths]\nlogs = "/var/log/few"\n[logs]\nmax_jobs = 2\n')
    for job, mem in ((1, "8G"), (2, "8G"), (3, "999G"), (4, "999G")):
        gpu_node.run_job(job, **asked(mem=mem))
    assert gpu_node.run("ls", "/var/log/few").stdout.split() == ["1", "2"]
