"""The simulated driver itself: it says that it is simulated, keeps compute modes, and misbehaves as told.

What it does when well is the rest of the contract; its README lists the faults.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from .driver import FILES_OF_A_DAEMON, sees

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.harness.machine import Machine

    from .driver import Driver

UNAVAILABLE = "cuCtxCreate_v2 46 CUDA_ERROR_DEVICE_UNAVAILABLE"
CONNECTION_FAILED = "cuInit 805 CUDA_ERROR_MPS_CONNECTION_FAILED"
RESERVED, PLAIN_CONTEXT, SERVER_CONTEXT, CLIENT_CONTEXT = 616, 526, 76, 514  # MiB

PYNVML_VIEW = """
import json, pynvml
pynvml.nvmlInit()
handle = pynvml.nvmlDeviceGetHandleByIndex(0)
def rows(processes):
    return [[process.pid, process.usedGpuMemory >> 20] for process in processes]
print(json.dumps({
    "name": pynvml.nvmlDeviceGetName(handle),
    "driver": pynvml.nvmlSystemGetDriverVersion(),
    "used": pynvml.nvmlDeviceGetMemoryInfo(handle).used >> 20,
    "used_v2": pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2).used >> 20,
    "compute": rows(pynvml.nvmlDeviceGetComputeRunningProcesses(handle)),
    "mps": rows(pynvml.nvmlDeviceGetMPSComputeRunningProcesses(handle)),
}))
"""


VERSIONS = """
import ctypes, pynvml
pynvml.nvmlInit()
cuda = ctypes.c_int()
ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(cuda))
capability = pynvml.nvmlDeviceGetCudaComputeCapability(pynvml.nvmlDeviceGetHandleByIndex(0))
print(*capability, pynvml.nvmlSystemGetCudaDriverVersion_v2(), cuda.value)
"""

FAILS = """
import sys, pynvml
pynvml.nvmlInit()
arguments = [pynvml.nvmlDeviceGetHandleByIndex(0)] if sys.argv[1].startswith("nvmlDevice") else []
try:
    getattr(pynvml, sys.argv[1])(*arguments)
except pynvml.NVMLError as error:
    print(error.value)
"""


def pynvml_view(driver: Driver) -> dict[str, Any]:
    """The first GPU as the maintained pynvml shows it; memory in MiB."""
    view: dict[str, Any] = json.loads(driver.machine.run([*driver.place.python, "-c", PYNVML_VIEW]).check().stdout)
    return view


def test_every_interface_calls_the_cards_simulated(driver: Driver, simulator: Machine) -> None:
    seen = driver.directories().look()
    assert {device.name for device in seen.devices} == {"Simulated H200"}
    assert pynvml_view(driver)["name"] == "Simulated H200"
    listed = simulator.run(["nvidia-smi", "-L"]).check().stdout.splitlines()
    assert listed == [f"GPU {i}: Simulated H200 (UUID: {uuid})" for i, uuid in enumerate(driver.uuids)]
    assert all("Simulated H200" in row for row in driver.daemon().ask("device_query").splitlines()[2:])
    assert all(uuid.startswith("GPU-51000000-") for uuid in seen.uuids)


def test_it_has_the_recorded_card(driver: Driver, simulator: Machine) -> None:
    """132 SMs and 143,771 MiB, of which CUDA sees 143,155 and leaves a program 142,629, or a client 142,565."""
    assert json.loads(simulator.run(["simulated-gpus", "show", "--json"]).check().stdout)["contexts"] == []
    plain = driver.directories().look().devices[0]
    assert (plain.sms, plain.total, plain.free) == (132, 143155, 142629)
    assert driver.daemon().look().devices[0].free == 142565
    ours, _ = driver.place.ask_nvml("ask", "0", "memory_bytes")
    assert ours["value"] >> 20 == 143771


@pytest.fixture
def made_anew(simulator: Machine) -> Iterator[Callable[..., None]]:
    """Make the node with other options; afterwards it is the first one again."""

    def make(*options: str) -> None:
        simulator.run(["simulated-gpus", "create", "2", *options]).check()

    yield make
    make()


@pytest.mark.parametrize(
    ("options", "versions"),
    [("", [9, 0, 13000, 13000]), ("--compute-capability 6.1 --cuda-version 12.9", [6, 1, 12090, 12090])],
)
def test_a_node_has_the_compute_capability_and_cuda_version_that_it_was_told(
    driver: Driver, made_anew: Callable[..., None], options: str, versions: list[int]
) -> None:
    """NVML, CUDA and the daemon's log say the same."""
    made_anew(*options.split())
    said = driver.machine.run([*driver.place.python, "-c", VERSIONS]).check().stdout
    assert [int(word) for word in said.split()] == versions
    log = driver.daemon().log_lines("control.log")
    assert f"CUDA MPS Control binary version: {versions[-1]}" in log


@pytest.mark.parametrize("words", ["--compute-capability 9", "--cuda-version 13", "--cuda-version 13.0x"])
def test_a_version_is_written_with_its_minor_number(simulator: Machine, words: str) -> None:
    refused = simulator.run(["simulated-gpus", "create", "2", *words.split()])
    expected = "simulated-gpus: create: a compute capability and a CUDA version are written as 9.0 and 13.0\n"
    assert (refused.returncode, refused.stderr) == (1, expected)


@pytest.mark.parametrize("function", ["nvmlDeviceGetCudaComputeCapability", "nvmlSystemGetCudaDriverVersion_v2"])
def test_nvml_was_told_not_to_say_a_version(driver: Driver, simulator: Machine, function: str) -> None:
    key = function.removeprefix("nvmlDevice").removeprefix("nvmlSystem").removesuffix("_v2")
    simulator.run(["simulated-gpus", "fault", f"nvml.{key}=17"]).check()
    assert driver.machine.run([*driver.place.python, "-c", FAILS, function]).check().stdout == "17\n"


@pytest.mark.parametrize(
    ("options", "connections", "most"),
    [
        ("--compute-capability 6.1", "", 16),
        ("--compute-capability 6.1 --cuda-version 13.1", "2", 16),
        ("--compute-capability 7.0", "", 48),
        ("--cuda-version 13.0", "2", 48),
        ("--cuda-version 13.1", "", 48),
        ("--cuda-version 13.1", "8", 48),
        ("--cuda-version 13.1", "1", 60),
        ("--cuda-version 13.1", "2", 60),
    ],
)
def test_how_many_contexts_a_gpu_takes_goes_by_card_driver_and_connections(
    driver: Driver, made_anew: Callable[..., None], options: str, connections: str, most: int
) -> None:
    """Documented, not observed: M5."""
    made_anew(*options.split())
    asked = {"CUDA_DEVICE_MAX_CONNECTIONS": connections} if connections else {}
    clients = driver.daemon().client(sees("0") | asked, copies=most + 1)
    failed = sorted(report.failed for report in clients.reports)
    assert failed == [""] * most + ["cuCtxCreate_v2 808 CUDA_ERROR_MPS_MAX_CLIENTS_REACHED"]


def test_pynvml_sees_a_program_without_mps(driver: Driver, simulator: Machine) -> None:
    assert simulator
    before = pynvml_view(driver)
    assert before == {
        "name": "Simulated H200",
        "driver": "580.159.04",
        "used": RESERVED,
        "used_v2": 0,
        "compute": [],
        "mps": [],
    }
    client = driver.directories().client()
    assert client.ask("allocate 1024") == 0  # the current context is the last device's
    during = pynvml_view(driver)
    assert (during["used"], during["used_v2"]) == (RESERVED + PLAIN_CONTEXT, PLAIN_CONTEXT)
    assert (during["compute"], during["mps"]) == ([[client.pid, PLAIN_CONTEXT]], [])
    client.leave()
    assert pynvml_view(driver) == before


def test_pynvml_sees_a_server_and_its_client(driver: Driver, simulator: Machine) -> None:
    assert simulator
    daemon = driver.daemon()
    client = daemon.client(sees("0"))
    assert client.ask("allocate 1024") == 0
    view = pynvml_view(driver)
    assert view["compute"] == [[daemon.server, SERVER_CONTEXT]]
    assert view["mps"] == [[client.pid, CLIENT_CONTEXT + 1024]]
    assert view["used_v2"] == SERVER_CONTEXT + CLIENT_CONTEXT + 1024


@pytest.mark.usefixtures("compute_modes")
def test_exclusive_process_admits_one_program(driver: Driver, simulator: Machine) -> None:
    simulator.run(["simulated-gpus", "set-mode", "0", "EXCLUSIVE_PROCESS"]).check()
    nobody = driver.directories()
    first = nobody.client(sees("0"))
    assert first.report.only.mode == 3
    assert nobody.look(sees("0")).failed == UNAVAILABLE
    assert nobody.look(sees("1")).failed == ""
    first.leave()
    assert nobody.look(sees("0")).failed == ""


@pytest.mark.usefixtures("compute_modes")
def test_exclusive_process_admits_a_server_and_all_its_clients(driver: Driver, simulator: Machine) -> None:
    simulator.run(["simulated-gpus", "set-mode", "0", "EXCLUSIVE_PROCESS"]).check()
    daemon = driver.daemon()
    clients = [daemon.client(sees("0")) for _ in range(2)]
    assert [client.report.failed for client in clients] == ["", ""]
    assert driver.directories().look(sees("0")).failed == UNAVAILABLE


@pytest.mark.usefixtures("compute_modes")
def test_prohibited_admits_nobody(driver: Driver, simulator: Machine) -> None:
    simulator.run(["simulated-gpus", "set-mode", "0", "PROHIBITED"]).check()
    assert driver.directories().look(sees("0")).failed == UNAVAILABLE
    assert driver.daemon(sees("0")).look().failed == CONNECTION_FAILED


# ---- Faults: what is done to a node with each, and how that ends when one waits so many seconds


def becomes_gone(driver: Driver, pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while pid in driver.left_over():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def start(driver: Driver, seconds: float) -> str:
    daemon = driver.directories()
    result = daemon.start(timeout=seconds)
    return f"exit {result.returncode}, {'a daemon' if daemon.is_there else 'no daemon'}"


def start_in_foreground(driver: Driver, seconds: float) -> str:
    return f"exit {driver.directories().start('-f', timeout=seconds).returncode}"


def start_and_wait(driver: Driver, seconds: float) -> str:
    daemon = driver.daemon()
    fate = "gone" if becomes_gone(driver, daemon.pid, seconds) else "stays"
    return f"{fate}, {'files' if daemon.listed_files() == FILES_OF_A_DAEMON else 'no files'}"


def terminate_daemon(driver: Driver, seconds: float) -> str:
    pid = driver.daemon().pid
    driver.place.kill(pid, signal.SIGTERM)
    return "gone" if becomes_gone(driver, pid, seconds) else "stays"


def terminate_server(driver: Driver, seconds: float) -> str:
    pid = driver.daemon().start_server()
    driver.place.kill(pid, signal.SIGTERM)
    return "gone" if becomes_gone(driver, pid, seconds) else "stays"


def kill_daemon_of_a_client(driver: Driver, seconds: float) -> str:
    daemon = driver.daemon()
    daemon.client(sees("0"))
    server = daemon.server
    driver.place.kill(daemon.pid)
    return "gone" if becomes_gone(driver, server, seconds) else "stays"


def get_priority(driver: Driver, seconds: float) -> str:
    result = driver.daemon().control("get_default_client_priority", timeout=seconds)
    return f"exit {result.returncode}, {result.stdout.strip() or 'nothing'}"


def set_priority(driver: Driver, seconds: float) -> str:
    """Whatever it says, what it did."""
    daemon = driver.daemon()
    with contextlib.suppress(TimeoutError):
        daemon.control("set_default_client_priority 1", timeout=seconds)
    return daemon.ask("get_default_client_priority")


def run_client(driver: Driver, _seconds: float) -> str:
    return driver.daemon(sees("0")).look().failed


def start_server(driver: Driver, seconds: float) -> str:
    daemon = driver.daemon()
    server = daemon.ask(f"start_server -uid {driver.place.uid(driver.user)}", "get_server_list")
    return daemon.control(f"get_server_status {server}", timeout=seconds).stdout.strip()


def list_gpus(driver: Driver, seconds: float) -> str:
    return f"exit {driver.machine.run(['nvidia-smi', '-L'], timeout=seconds).returncode}"


def set_mode(driver: Driver, seconds: float) -> str:
    changed = driver.machine.run(["nvidia-smi", "-i", "0", "-c", "EXCLUSIVE_PROCESS"], timeout=seconds)
    mode = driver.machine.run(["nvidia-smi", "-i", "0", "--query-gpu=compute_mode", "--format=csv,noheader"])
    driver.machine.run(["simulated-gpus", "set-mode", "0", "DEFAULT"]).check()
    return f"exit {changed.returncode}, {mode.stdout.strip()}"


@pytest.mark.parametrize(
    ("told", "deed", "outcome"),
    [
        ("", start, "exit 0, a daemon"),
        ("daemon.start=hang", start, "no end"),
        ("daemon.start=hang", start_in_foreground, "no end"),
        ("daemon.start=exit:7", start, "exit 7, no daemon"),
        ("daemon.start=exit:7", start_in_foreground, "exit 7"),
        ("daemon.start=noop", start, "exit 0, no daemon"),
        ("daemon.start=noop", start_in_foreground, "exit 0"),
        ("", start_and_wait, "stays, files"),
        ("daemon.after_start=die", start_and_wait, "gone, files"),
        ("", terminate_daemon, "gone"),
        ("daemon.sigterm=ignore", terminate_daemon, "stays"),
        ("", get_priority, "exit 0, 0"),
        ("command.get_default_client_priority=hang", get_priority, "no end"),
        ("command.get_default_client_priority=ignore", get_priority, "exit 0, nothing"),
        ("command.get_default_client_priority=wrong:5", get_priority, "exit 0, 5"),
        ("command.get_default_client_priority=exit:9", get_priority, "exit 9, nothing"),
        ("command.*=wrong:5", get_priority, "exit 0, 5"),
        ("command.*=exit:9 command.get_default_client_priority=wrong:5", get_priority, "exit 0, 5"),
        ("command.quit=wrong:5", get_priority, "exit 0, 0"),
        ("", set_priority, "1"),
        ("command.set_default_client_priority=ignore", set_priority, "0"),
        ("command.set_default_client_priority=wrong:5", set_priority, "0"),
        ("command.set_default_client_priority=exit:9", set_priority, "0"),
        ("", run_client, ""),
        ("server.start=fail", run_client, CONNECTION_FAILED),
        ("", start_server, "ACTIVE"),
        ("server.start=hang", start_server, "no end"),
        ("", terminate_server, "gone"),
        ("server.sigterm=ignore", terminate_server, "stays"),
        ("", kill_daemon_of_a_client, "gone"),
        ("server.alone=stay", kill_daemon_of_a_client, "stays"),
        ("", list_gpus, "exit 0"),
        ("nvml.init=9", list_gpus, "exit 9"),
        ("nvml.init=hang", list_gpus, "no end"),
        ("nvml.GetUUID=15", list_gpus, "exit 15"),
        ("nvml.GetUUID=hang", list_gpus, "no end"),
        ("nvml.GetHandleByIndex=17", list_gpus, "exit 17"),
        ("gpu.1=lost", list_gpus, "exit 15"),
        ("gpu.1=lost", run_client, ""),
        ("gpu.0=lost", run_client, CONNECTION_FAILED),
        ("", set_mode, "exit 0, Exclusive_Process"),
        ("nvml.SetComputeMode=4", set_mode, "exit 4, Default"),
        ("nvml.SetComputeMode=noop", set_mode, "exit 0, Default"),
    ],
)
def test_a_fault_does_what_the_readme_says(
    driver: Driver, simulator: Machine, told: str, deed: Callable[[Driver, float], str], outcome: str
) -> None:
    if told:
        simulator.run(["simulated-gpus", "fault", *told.split()]).check()
    seconds = 0.4 if outcome.startswith(("no end", "stays")) else 30.0
    try:
        ended = deed(driver, seconds)
    except TimeoutError:
        ended = "no end"
    assert ended == outcome


@pytest.mark.parametrize(
    ("told", "deed", "seconds"),
    [
        ("daemon.start=slow:200", start, 0.2),
        ("command.get_default_client_priority=slow:200", get_priority, 0.2),
        ("command.set_default_client_priority=slow:200", set_priority, 0.2),
        ("command.*=slow:200", get_priority, 0.2),
        ("nvml.init=slow:200", list_gpus, 0.2),
        ("latency=observed", run_client, 0.25),
    ],
)
def test_a_slow_node_does_the_same_later(
    driver: Driver, simulator: Machine, told: str, deed: Callable[[Driver, float], str], seconds: float
) -> None:
    soon = deed(driver, 30)
    simulator.run(["simulated-gpus", "fault", told]).check()
    began = time.monotonic()
    assert deed(driver, 30) == soon
    assert time.monotonic() - began >= seconds


def test_a_lost_gpu_fails_at_the_context(driver: Driver, simulator: Machine) -> None:
    simulator.run(["simulated-gpus", "fault", "gpu.0=lost"]).check()
    nobody = driver.directories()
    assert nobody.look(sees("0")).failed == "cuCtxCreate_v2 999 CUDA_ERROR_UNKNOWN"
    assert nobody.look(sees("1")).failed == ""


def test_faults_are_added_listed_taken_back_and_cleared(simulator: Machine) -> None:
    def fault(*words: str) -> str:
        return simulator.run(["simulated-gpus", "fault", *words]).check().stdout

    fault("nvml.init=9", "gpu.0=lost")
    fault("nvml.init=18")
    assert sorted(fault().splitlines()) == ["gpu.0=lost", "nvml.init=18"]
    fault("gpu.0=")
    assert fault() == "nvml.init=18\n"
    fault("--clear")
    assert fault() == ""


def test_a_running_daemon_hears_of_a_fault(driver: Driver, simulator: Machine) -> None:
    daemon = driver.daemon()
    assert daemon.ask("get_default_client_priority") == "0"
    simulator.run(["simulated-gpus", "fault", "command.*=wrong:5"]).check()
    assert daemon.ask("get_default_client_priority") == "5"
    simulator.run(["simulated-gpus", "fault", "command.*="]).check()
    assert daemon.ask("get_default_client_priority") == "0"
