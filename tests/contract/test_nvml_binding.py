"""slurm_mps.node.nvml, our binding of NVML, held to the maintained pynvml: the same values, the same errors.

Each question is put to both in one process (nvml_both.py).
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

from .driver import sees, wait_until

if TYPE_CHECKING:
    from tests.harness.machine import Machine

    from .driver import Driver

DEFAULT, EXCLUSIVE_THREAD, PROHIBITED, EXCLUSIVE_PROCESS = range(4)
NO_SUCH_UUID = "GPU-00000000-0000-0000-0000-000000000000"
WITHOUT_LIBRARY = 'mount --bind /dev/null /usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1 && exec "$@"'
FIRST_FAILS = """
import subprocess
from slurm_mps.errors import NodeError
from slurm_mps.node.nvml import Gpus
gpus = Gpus()
for _ in range(2):
    try:
        gpus.resolve("0")
    except NodeError as error:
        print(error)
subprocess.run(["simulated-gpus", "fault", "--clear"], check=True)
print(gpus.resolve("0").uuid)
"""


@pytest.mark.parametrize("by", ["index", "uuid"])
@pytest.mark.parametrize(
    "field", ["uuid", "index", "minor", "memory_bytes", "name", "free_bytes", "compute_capability", "cuda_version"]
)
def test_what_a_gpu_is(driver: Driver, field: str, by: str) -> None:
    for index, uuid in enumerate(driver.uuids):
        ours, pynvmls = driver.place.ask_nvml("ask", str(index) if by == "index" else uuid, field)
        assert ours == pynvmls
        assert ours["value"] == {"uuid": uuid, "index": index, "name": driver.names[index]}.get(field, ours["value"])


def test_a_minor_number_is_no_index(driver: Driver) -> None:
    (index, _), (minor, pynvmls) = (
        driver.place.ask_nvml("ask", "0", field, env={"MINORS_FROM": "10"}) for field in ("index", "minor")
    )
    assert minor == pynvmls
    assert index == {"value": 0}
    assert minor["value"] >= 10


def test_o60_who_is_on_a_gpu(driver: Driver) -> None:
    """Programs without MPS, and a server with its clients; not a control daemon."""
    gpu = driver.uuids[0]
    assert driver.place.ask_nvml("processes", gpu)[0]["value"] == []
    alone = [driver.directories().client(sees(gpu)) for _ in range(2)]
    assert [client.report.failed for client in alone] == ["", ""]
    ours, pynvmls = driver.place.ask_nvml("processes", gpu)
    assert ours == pynvmls == {"value": sorted(client.pid for client in alone)}
    for client in alone:
        client.leave()
    assert driver.place.ask_nvml("processes", gpu)[0]["value"] == []
    daemon = driver.daemon(sees(gpu))
    assert driver.place.ask_nvml("processes", gpu)[0]["value"] == []
    server = daemon.start_server()
    assert driver.place.ask_nvml("processes", gpu) == [{"value": [server]}] * 2


def test_o69_the_kernel_lists_gpus_in_the_order_of_their_indices(driver: Driver) -> None:
    for index, uuid in enumerate(driver.uuids):
        assert driver.place.ask_nvml("expected", str(index)) == [{"value": [uuid]}] * 2


def test_o98_what_ran_on_a_gpu_is_seen_after_its_end(driver: Driver) -> None:
    gpu, began = driver.uuids[0], time.time()
    client = driver.directories().client(sees(gpu))
    assert client.ask("allocate 1024") == 0
    client.leave()
    wait_until(lambda: driver.place.ask_nvml("busy", gpu, str(began))[0]["value"])
    ours, pynvmls = driver.place.ask_nvml("busy", gpu, str(began))
    assert ours == pynvmls == {"value": True}
    later = time.time() + 0.2  # the sample of its end covers so much
    time.sleep(0.5)
    assert driver.place.ask_nvml("busy", gpu, str(later)) == [{"value": False}] * 2


def test_o66_how_much_memory_each_client_uses(driver: Driver) -> None:
    """What it allocated and what its context costs; the server is not among the clients."""
    gpu = driver.uuids[0]
    daemon = driver.daemon(sees(gpu))
    clients = [daemon.client(sees(gpu)) for _ in range(2)]
    before = dict(driver.place.ask_nvml("clients", gpu)[0]["value"])
    assert clients[0].ask("allocate 1000") == 0
    ours, pynvmls = driver.place.ask_nvml("clients", gpu)
    assert ours == pynvmls
    used = dict(ours["value"])
    assert used.keys() == before.keys() == {client.pid for client in clients}
    assert used[clients[0].pid] - before[clients[0].pid] == 1000
    assert used[clients[1].pid] == before[clients[1].pid] > 0


@pytest.mark.parametrize("mode", [DEFAULT, PROHIBITED, EXCLUSIVE_PROCESS])
@pytest.mark.usefixtures("compute_modes")
def test_a_compute_mode_is_set_and_read(driver: Driver, mode: int) -> None:
    gpu, other = driver.uuids[0], PROHIBITED if mode != PROHIBITED else DEFAULT
    driver.place.ask_nvml("set-mode", gpu, str(other))
    assert driver.place.ask_nvml("set-ours", gpu, str(mode))[1] == {"value": mode}
    assert driver.place.ask_nvml("mode", gpu) == [{"value": mode}, {"value": mode}]


@pytest.mark.usefixtures("compute_modes")
def test_a_compute_mode_that_is_none(driver: Driver) -> None:
    ours, pynvmls = driver.place.ask_nvml("set-mode", driver.uuids[0], "7")
    assert ours == {"function": "nvmlDeviceSetComputeMode", **pynvmls}
    assert pynvmls == {"number": 2, "words": "Invalid Argument"}


def test_an_unknown_index(driver: Driver) -> None:
    ours, pynvmls = driver.place.ask_nvml("ask", "99", "uuid")
    assert ours == {"function": "nvmlDeviceGetHandleByIndex_v2", **pynvmls}
    assert pynvmls == {"number": 2, "words": "Invalid Argument"}


@pytest.mark.parametrize("question", ["ask", "mode"])
def test_an_unknown_uuid(driver: Driver, question: str) -> None:
    ours, pynvmls = driver.place.ask_nvml(question, NO_SUCH_UUID, "uuid")
    assert ours == {"function": "nvmlDeviceGetHandleByUUID", **pynvmls}
    assert pynvmls == {"number": 6, "words": "Not Found"}


@pytest.mark.usefixtures("compute_modes")
def test_an_ordinary_user_sets_no_compute_mode(driver: Driver) -> None:
    (found, _) = driver.place.ask_nvml("mode", driver.uuids[0])
    ours, pynvmls = driver.place.ask_nvml("set-mode", driver.uuids[0], str(found["value"]), user=driver.user)
    assert ours == {"function": "nvmlDeviceSetComputeMode", **pynvmls}
    assert pynvmls == {"number": 4, "words": "Insufficient Permissions"}


@pytest.mark.parametrize("number", [1, 17])  # uninitialised, blocked by the operating system
@pytest.mark.parametrize(
    ("function", "question"),
    [
        ("nvmlDeviceGetHandleByIndex_v2", "ask 0 uuid"),
        ("nvmlDeviceGetHandleByUUID", "mode {uuid}"),
        ("nvmlDeviceGetUUID", "ask 0 uuid"),
        ("nvmlDeviceGetMemoryInfo", "ask 0 memory_bytes"),
        ("nvmlDeviceGetIndex", "ask 0 index"),
        ("nvmlDeviceGetMinorNumber", "ask 0 minor"),
        ("nvmlDeviceGetName", "ask 0 name"),
        ("nvmlDeviceGetCudaComputeCapability", "ask 0 compute_capability"),
        ("nvmlSystemGetCudaDriverVersion_v2", "ask 0 cuda_version"),
        ("nvmlDeviceGetComputeMode", "mode {uuid}"),
        ("nvmlDeviceSetComputeMode", "set-mode {uuid} 0"),
        ("nvmlDeviceGetComputeRunningProcesses_v3", "processes {uuid}"),
    ],
)
def test_an_error_of_any_function(
    driver: Driver, simulator: Machine, function: str, question: str, number: int
) -> None:
    key = function.removeprefix("nvmlDevice").removeprefix("nvmlSystem").removesuffix("_v2").removesuffix("_v3")
    simulator.run(["simulated-gpus", "fault", f"nvml.{key}={number}"]).check()
    ours, pynvmls = driver.place.ask_nvml(*question.format(uuid=driver.uuids[0]).split())
    assert ours == {"function": function, **pynvmls}
    assert pynvmls["number"] == number


@pytest.mark.parametrize(("number", "words"), [(9, "Driver Not Loaded"), (18, "Driver/library version mismatch")])
def test_a_library_that_does_not_initialise(driver: Driver, simulator: Machine, number: int, words: str) -> None:
    simulator.run(["simulated-gpus", "fault", f"nvml.init={number}"]).check()
    ours, pynvmls = driver.place.ask_nvml("ask", "0", "uuid")
    assert ours == {"function": "nvmlInit_v2", **pynvmls}
    assert pynvmls == {"number": number, "words": words}


def test_ours_initialises_again_after_a_failure(driver: Driver, simulator: Machine) -> None:
    """It never goes on with a library that did not initialise, which would answer Uninitialized."""
    simulator.run(["simulated-gpus", "fault", "nvml.init=9"]).check()
    said = simulator.run([*driver.place.python, "-c", FIRST_FAILS]).check().stdout.splitlines()
    failed = "this node's NVIDIA driver: nvmlInit_v2: Driver Not Loaded (NVML error 9)"
    assert said == [failed, failed, driver.uuids[0]]


def test_a_missing_library(driver: Driver, simulator: Machine) -> None:
    """Where pynvml says that it is not found, ours passes on what the loader said."""
    argv = [*driver.place.python, f"{driver.place.scratch}/nvml_both.py", "ask", "0", "uuid"]
    said = simulator.run(["unshare", "-m", "sh", "-c", WITHOUT_LIBRARY, "sh", *argv]).check().stdout
    ours, pynvmls = json.loads(said)
    assert ours["words"].startswith("NVML cannot be loaded: ")
    assert pynvmls == {"number": 12, "words": "NVML Shared Library Not Found"}


@pytest.mark.usefixtures("compute_modes")
def test_a_compute_mode_that_does_not_stay(driver: Driver, simulator: Machine) -> None:
    """pynvml has no opinion; ours reads back and says so."""
    simulator.run(["simulated-gpus", "fault", "nvml.SetComputeMode=noop"]).check()
    ours, pynvmls = driver.place.ask_nvml("set-mode", driver.uuids[0], str(EXCLUSIVE_PROCESS))
    said = "compute mode EXCLUSIVE_PROCESS was set, but NVML reads back DEFAULT"
    assert (ours, pynvmls) == ({"words": f"{driver.uuids[0]}: {said}"}, {"value": DEFAULT})
