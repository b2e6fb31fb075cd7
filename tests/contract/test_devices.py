"""Which GPUs a daemon shows its clients, and under which numbers (O18 to O20, O36)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from .driver import sees
from .test_limits import GIB, assert_limited

if TYPE_CHECKING:
    from .driver import Driver

NO_DEVICE = "cuInit 100 CUDA_ERROR_NO_DEVICE"


def device_row(driver: Driver, ordinal: int, gpu: int) -> str:
    """A line of device_query --csv; it writes PCI addresses in a way of its own."""
    domain, bus, device = driver.bus_ids[gpu].partition(".")[0].lower().split(":")
    return f"{ordinal},{int(domain, 16):04x}:{bus}.{device}.00,{driver.uuids[gpu]},{driver.names[gpu]},N/A"


@pytest.mark.parametrize("by", ["ordinal", "uuid"])
def test_o18_a_daemon_of_the_second_gpu_shows_it_as_the_only_one(
    driver: Driver, two_gpus: tuple[str, str], by: str
) -> None:
    """Its clients name it 0, or by UUID, or not at all; 1 and the other's UUID find no device."""
    first, second = two_gpus
    daemon = driver.daemon(sees("1" if by == "ordinal" else second))
    assert daemon.look().uuids == [second]
    assert daemon.look(sees("0")).uuids == [second]
    assert daemon.look(sees(second)).uuids == [second]
    assert daemon.look(sees("1")).failed == NO_DEVICE
    assert daemon.look(sees(first)).failed == NO_DEVICE


@pytest.mark.parametrize("by", ["ordinal", "uuid"])
def test_o19_clients_see_pci_order_whatever_the_daemons_list(
    driver: Driver, two_gpus: tuple[str, str], by: str
) -> None:
    first, second = two_gpus
    daemon = driver.daemon(sees("1", "0") if by == "ordinal" else sees(second, first))
    assert daemon.look().uuids == [first, second]
    assert daemon.look(sees("0")).uuids == [first]
    assert daemon.look(sees("1")).uuids == [second]


@pytest.mark.parametrize("visible", [[0, 1], [1], [1, 0]])
def test_o20_device_query_lists_the_daemons_devices(
    driver: Driver, two_gpus: tuple[str, str], visible: list[int]
) -> None:
    """In the daemon's own order, though clients see another (O19)."""
    daemon = driver.daemon(sees(*(two_gpus[index] for index in visible)))
    rows = [device_row(driver, ordinal, gpu) for ordinal, gpu in enumerate(visible)]
    heading = ["Default", "Device Ordinal,PCI IDs,UUID,Name,Attributes"]
    assert daemon.ask("device_query --csv").split("\n") == [*heading, *rows]


def test_o36_two_daemons_of_one_gpu_each(driver: Driver, two_gpus: tuple[str, str]) -> None:
    """Side by side, each shows its GPU, keeps its limit and refuses the other's GPU."""
    first, second = two_gpus
    for mine, other, limit in ((first, second, 8), (second, first, 4)):
        daemon = driver.daemon(sees(mine))
        daemon.ask(f"set_default_device_pinned_mem_limit 0 {limit}G")
        daemon.start_server()
        for visible in ({}, sees(mine)):
            seen = daemon.look(visible)
            assert seen.uuids == [mine]
            assert_limited(seen.only, limit * GIB)
        assert daemon.look(sees(other)).failed == NO_DEVICE
