"""MIG slices as NVML, CUDA and MPS have them: from documentation, until a host with a GPU in MIG mode runs this."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.harness.site import show_slices

from .driver import memory, sees, threads
from .test_limits import MAX_CLIENTS, outcomes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .driver import Driver

LIST = """
import pynvml
pynvml.nvmlInit()
for index in range(pynvml.nvmlDeviceGetCount()):
    gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
    for number in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(gpu)):
        try:
            mig = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, number)
        except pynvml.NVMLError:
            break
        print(pynvml.nvmlDeviceGetUUID(mig))
"""


@pytest.fixture
def slices(driver: Driver) -> Iterator[list[str]]:
    """The UUIDs of this host's slices, of the smallest first where they are simulated."""
    if not driver.place.real:
        driver.machine.run(["simulated-gpus", "mig", "1", "1g.10gb", "2g.20gb"]).check()
        show_slices(driver.machine)
    found = driver.machine.run([*driver.place.python, "-c", LIST]).stdout.split()
    if not found:
        pytest.skip("no GPU of this host is in MIG mode")
    yield found
    if not driver.place.real:
        driver.machine.run(["simulated-gpus", "mig", "1"]).check()
        driver.machine.run(["rm", "-r", "/proc/driver/nvidia/capabilities"]).check()


@pytest.mark.parametrize("field", ["uuid", "memory_bytes", "name", "free_bytes", "cuda_version"])
def test_what_a_slice_is(driver: Driver, slices: list[str], field: str) -> None:
    """What NVML answers for a MIG handle; all else our binding asks of the slice's GPU."""
    ours, pynvmls = driver.place.ask_nvml("ask", slices[0], field)
    assert ours == pynvmls
    assert "value" in ours


def test_a_slice_has_a_profile_a_part_and_a_device_node(driver: Driver, slices: list[str]) -> None:
    said = {field: driver.place.ask_ours(slices[0], field) for field in ("profile", "parts", "minor", "index")}
    assert re.fullmatch(r"(\d+c\.)?\d+g\.\d+gb.*", said["profile"])
    assert 0 < said["parts"][0] <= said["parts"][1]
    assert driver.machine.path(f"/dev/nvidia-caps/nvidia-cap{said['minor']}").exists()
    assert said["index"] < len(driver.uuids)


def test_cuda_shows_a_process_one_slice(driver: Driver, slices: list[str]) -> None:
    directories = driver.directories()
    assert directories.look(sees(*slices)).uuids == slices[:1]
    assert directories.look(sees(slices[-1])).only.name.rpartition(" MIG ")[2] == driver.place.ask_ours(
        slices[-1], "profile"
    )


def test_a_daemon_on_a_slice_serves_and_limits_clients(driver: Driver, slices: list[str]) -> None:
    """By the slice's UUID, without a compute mode; a percentage is of the slice's multiprocessors."""
    whole = driver.directories().look(sees(slices[0])).only
    daemon = driver.daemon(sees(slices[0]))
    daemon.ask("set_default_active_thread_percentage 50", "set_default_device_pinned_mem_limit 0 2G")
    daemon.start_server()
    seen = daemon.look(sees(slices[0])).only
    assert (seen.uuid, seen.mode) == (slices[0], 0)
    assert seen.sms == max(8, whole.sms // 2 & ~1)
    assert 1024 < seen.free < 2048
    assert daemon.look({**sees(slices[0]), **memory("0=1G"), **threads("25")}).only.free < 1024


def test_a_server_on_a_slice_takes_clients_in_proportion(driver: Driver, slices: list[str]) -> None:
    """48 of a whole GPU (O17); the rounding is a guess that errs on the safe side."""
    part, of = driver.place.ask_ours(slices[0], "parts")
    clients = driver.daemon(sees(slices[0])).client(sees(slices[0]), copies=48 * part // of + 1)
    assert outcomes(clients) == [""] * (48 * part // of) + [MAX_CLIENTS]
