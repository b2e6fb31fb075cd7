"""Limits of threads and memory: where they are set, whom they reach, how they are rounded (O9 to O17, O42 to O44)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.harness.machine import Result

from .driver import RECORDED_SMS, memory, sees, threads, wait_until

if TYPE_CHECKING:
    from .driver import Client, Device, Driver

GIB = 1024
NO_LIMIT = 0
OUT_OF_MEMORY = 2
MAX_CLIENTS = "cuCtxCreate_v2 808 CUDA_ERROR_MPS_MAX_CLIENTS_REACHED"
SMS = {"0.1": 8, "1": 8, "3": 8, "10": 12, "12.5": 16, "25": 32, "33": 42, "50": 66, "75": 98, "99": 130, "100": 132}
CONTEXT_MIB = {132: 514, 32: 145}
"""What a context costs of its limit, by the SMs it has (O15)."""
SERVER_MIB = 73
"""What a server without a client takes of a recorded card, by NVML (O44)."""


def sms_at(card: Device, percentage: str) -> int:
    """The SMs of a percentage on this card, as a number when it is one of the recorded ones."""
    if card.sms != RECORDED_SMS:
        pytest.skip(f"SM granules are known for {RECORDED_SMS} SMs; this card has {card.sms}")
    return SMS[percentage]


def assert_limited(device: Device, limit_mib: int) -> None:
    """The device's free memory is what the context leaves of a limit; NO_LIMIT: of the card."""
    if limit_mib == NO_LIMIT:
        assert device.has_no_limit
    elif device.sms in CONTEXT_MIB:
        assert device.free == limit_mib - CONTEXT_MIB[device.sms]
    else:
        assert 0 < device.free < limit_mib


def test_o9_a_thread_percentage_in_the_daemons_environment_works(driver: Driver, card: Device) -> None:
    daemon = driver.daemon(threads("25"))
    assert daemon.ask("get_default_active_thread_percentage") == "25.0"
    assert daemon.look().devices[0].sms == sms_at(card, "25")


@pytest.mark.parametrize("form", ["0=8G", "0=8G,1=4G", "{uuid}=8G"])
def test_o9_a_memory_limit_in_the_daemons_environment_is_ignored(driver: Driver, form: str) -> None:
    daemon = driver.daemon(memory(form.format(uuid=driver.uuids[0])))
    assert daemon.ask("get_default_device_pinned_mem_limit 0") == ""
    assert all(device.has_no_limit for device in daemon.look().devices)


@pytest.mark.parametrize("percentage", SMS)
def test_o10_percentages_round_to_sm_granules(driver: Driver, card: Device, percentage: str) -> None:
    daemon = driver.daemon()
    daemon.ask(f"set_default_active_thread_percentage {percentage}")
    seen = {device.sms for device in daemon.look().devices}
    if card.sms == RECORDED_SMS:
        assert seen == {SMS[percentage]}
    else:
        assert all(abs(sms - card.sms * float(percentage) / 100) <= 8 for sms in seen)


def test_o11_a_clients_own_percentage_lowers_and_never_raises(driver: Driver, card: Device) -> None:
    daemon = driver.daemon()
    daemon.ask("set_default_active_thread_percentage 25")
    own = ("10", "50", "60", "0", "junk")
    seen = [daemon.look(threads(percentage)).devices[0].sms for percentage in own]
    assert seen == [sms_at(card, kept) for kept in ("10", "25", "25", "25", "25")]


@pytest.mark.parametrize(
    ("own", "limits"),
    [
        ("0=2G,1=1G", (2 * GIB, 1 * GIB)),
        ("0=2048M", (2 * GIB, 4 * GIB)),
        ("{first}=2G", (2 * GIB, 4 * GIB)),
        ("0=20G,1=20G", (8 * GIB, 4 * GIB)),
        ("{first}=100G", (8 * GIB, 4 * GIB)),
        ("0=100000K", (8 * GIB, 4 * GIB)),  # read as MiB, and so larger
        ("0=100000000", (8 * GIB, 4 * GIB)),
        ("", (8 * GIB, 4 * GIB)),
        ("junk", (NO_LIMIT, NO_LIMIT)),
    ],
)
def test_o12_a_clients_own_memory_limit(
    driver: Driver, two_gpus: tuple[str, str], own: str, limits: tuple[int, int]
) -> None:
    """It lowers, a larger one is clamped, an empty one is harmless, and junk REMOVES the limits of all devices."""
    daemon = driver.daemon()
    daemon.ask("set_default_device_pinned_mem_limit 0 8G", "set_default_device_pinned_mem_limit 1 4G")
    seen = daemon.look(memory(own.format(first=two_gpus[0])))
    assert len(seen.devices) == len(limits)
    for device, limit in zip(seen.devices, limits, strict=True):
        assert_limited(device, limit)


@pytest.mark.parametrize(
    ("own", "limit"), [("0=1G", 1 * GIB), ("1=1G", NO_LIMIT), ("{first}=2G,{second}=1G", NO_LIMIT)]
)
def test_o12_a_device_that_the_client_does_not_see_removes_the_limit(
    driver: Driver, two_gpus: tuple[str, str], own: str, limit: int
) -> None:
    first, second = two_gpus
    daemon = driver.daemon()
    daemon.ask("set_default_device_pinned_mem_limit 0 8G", "set_default_device_pinned_mem_limit 1 4G")
    own = own.format(first=first, second=second)
    seen = daemon.look(sees(second) | memory(own))
    assert_limited(seen.only, limit)


def test_o12_a_fraction_is_read_as_1_mib(driver: Driver) -> None:
    seen = driver.daemon().look(memory("0=1.5G"))
    assert seen.failed == "cuCtxCreate_v2 2 CUDA_ERROR_OUT_OF_MEMORY"


def test_o12_a_limit_holds_when_memory_is_taken(driver: Driver) -> None:
    client = driver.daemon().client(sees("0") | memory("0=2G"))
    assert client.ask("allocate 4096") == 2
    assert client.ask("allocate 1024") == 0
    assert client.ask("allocate 1024") == 2


@pytest.mark.parametrize(
    ("visible", "limits"),
    [
        ([0, 1], [8 * GIB, 4 * GIB]),
        ([0], [8 * GIB]),
        ([1], [8 * GIB]),
        ([1, 0], [8 * GIB, 4 * GIB]),
    ],
)
@pytest.mark.parametrize("by", ["ordinal", "uuid"])
def test_o13_the_default_limit_goes_by_the_clients_ordinal(
    driver: Driver, two_gpus: tuple[str, str], by: str, visible: list[int], limits: list[int]
) -> None:
    """8G for the first GPU and 4G for the second, set by ordinal or UUID: who sees the second alone has 8G."""
    first, second = ("0", "1") if by == "ordinal" else two_gpus
    daemon = driver.daemon()
    daemon.ask(f"set_default_device_pinned_mem_limit {first} 8G", f"set_default_device_pinned_mem_limit {second} 4G")
    uuids = [two_gpus[index] for index in visible]
    seen = daemon.look(sees(*uuids))
    assert seen.uuids == uuids
    for device, limit in zip(seen.devices, limits, strict=True):
        assert_limited(device, limit)


def test_o14_defaults_reach_servers_started_later(driver: Driver, card: Device) -> None:
    daemon = driver.daemon()
    daemon.ask("set_default_active_thread_percentage 25")
    assert daemon.look().devices[0].sms == sms_at(card, "25")
    assert daemon.ask("set_default_active_thread_percentage 50") == "50.0"
    assert daemon.look().devices[0].sms == sms_at(card, "25")
    server = daemon.server
    assert daemon.ask(f"get_active_thread_percentage {server}") == "25.0"
    assert daemon.ask(f"set_active_thread_percentage {server} 75") == "75.0"
    assert daemon.look().devices[0].sms == sms_at(card, "75")
    daemon.ask(f"shutdown_server {server}")
    wait_until(lambda: daemon.server == 0)
    assert daemon.look().devices[0].sms == sms_at(card, "50")


@pytest.mark.parametrize(("limit", "percentage", "free"), [("1G", "100", 510), ("1G", "25", 879), ("600M", "100", 86)])
def test_o15_a_context_costs_memory_of_its_limit(
    driver: Driver, card: Device, limit: str, percentage: str, free: int
) -> None:
    daemon = driver.daemon(threads(percentage))
    daemon.ask(f"set_default_device_pinned_mem_limit 0 {limit}")
    seen = daemon.look(sees(driver.uuids[0])).only.free
    assert seen == free if card.sms == RECORDED_SMS else 0 < seen < 1 * GIB


@pytest.mark.parametrize("limit", ["64M", "256M", "400M"])
def test_o15_a_limit_below_that_cost_fails_at_the_context(driver: Driver, card: Device, limit: str) -> None:
    sms_at(card, "100")
    daemon = driver.daemon()
    daemon.ask(f"set_default_device_pinned_mem_limit 0 {limit}")
    assert daemon.look().failed == "cuCtxCreate_v2 2 CUDA_ERROR_OUT_OF_MEMORY"


def test_o16_free_memory_and_sms_shrink_and_the_total_stays(driver: Driver, card: Device) -> None:
    daemon = driver.daemon()
    daemon.ask("set_default_active_thread_percentage 50", "set_default_device_pinned_mem_limit 0 8G")
    seen = daemon.look(sees(driver.uuids[0])).only
    assert seen.total == card.total
    assert seen.free < 8 * GIB < card.free
    assert seen.sms < card.sms


def outcomes(clients: Client) -> list[str]:
    return sorted(report.failed for report in clients.reports)


def test_o17_a_server_has_room_for_48_client_contexts(driver: Driver) -> None:
    clients = driver.daemon().client(sees(driver.uuids[0]), copies=49)
    assert outcomes(clients) == [""] * 48 + [MAX_CLIENTS]


def test_o63_the_log_says_how_many_clients_there_are_and_not_who_was_refused(driver: Driver) -> None:
    daemon = driver.daemon()
    clients = daemon.client(sees(driver.uuids[0]), copies=49)
    assert outcomes(clients) == [""] * 48 + [MAX_CLIENTS]
    refused = next(report.pid for report in clients.reports if report.failed)
    refusal = "Failed to accept new client. Maximum number of clients (48) reached."
    wait_until(lambda: refusal in daemon.log_lines("server.log"))
    log = daemon.log_lines("server.log")
    assert f"Client {{PID: {refused}, Context ID: 1}} connected" in log[: log.index(refusal)]
    assert f"Status of client {{PID: {refused}, Context ID: 1}} is ACTIVE" not in log
    assert log.count(refusal) == 1


@pytest.mark.parametrize("hit", ["context", "allocation"])
def test_o64_a_memory_limit_is_in_the_log_and_a_client_that_hits_it_is_not(driver: Driver, hit: str) -> None:
    limit = "64M" if hit == "context" else "2G"
    daemon = driver.daemon()
    daemon.ask(f"set_default_device_pinned_mem_limit 0 {limit}")
    client = daemon.client(sees(driver.uuids[0]))
    if hit == "context":
        assert client.report.failed == "cuCtxCreate_v2 2 CUDA_ERROR_OUT_OF_MEMORY"
    else:
        assert client.ask("allocate 3000") == OUT_OF_MEMORY
    client.leave()
    wait_until(lambda: f"Client process {client.pid} disconnected" in daemon.log_lines("server.log"))
    log = daemon.log_lines("server.log")
    size = {"64M": 64 << 20, "2G": 2 << 30}[limit]
    assert f"Device pinned memory limit for device 0 set to 0x{size:x} bytes" in log
    assert f"Status of client {{PID: {client.pid}, Context ID: 1}} is ACTIVE" in log
    assert not [line for line in log if "emory" in line and "pinned" not in line and "shared memory" not in line]


def test_o17_client_priority_is_0_or_1(driver: Driver) -> None:
    daemon = driver.daemon()
    assert daemon.ask("get_default_client_priority") == "0"
    assert daemon.control("set_default_client_priority 1") == Result(0, "", "")
    assert daemon.ask("set_default_client_priority 7") == "Invalid priority value - must be 0 or 1!"
    assert daemon.ask("get_default_client_priority") == "1"


def test_o42_each_gpu_of_a_server_has_room_for_48_contexts(driver: Driver, two_gpus: tuple[str, str]) -> None:
    """104 processes with one context each: 48 on either GPU, and the other eight are refused."""
    daemon = driver.daemon()
    for gpu in two_gpus:
        assert outcomes(daemon.client(sees(gpu), copies=52)) == [""] * 48 + [MAX_CLIENTS] * 4


def test_o42_a_process_on_two_gpus_counts_on_each(driver: Driver, two_gpus: tuple[str, str]) -> None:
    """A server holds 96 contexts of 48 such processes."""
    assert outcomes(driver.daemon().client(sees(*two_gpus), copies=50)) == [""] * 48 + [MAX_CLIENTS] * 2


def test_o42_two_daemons_of_one_gpu_each_have_as_much_room(driver: Driver, two_gpus: tuple[str, str]) -> None:
    for gpu in two_gpus:
        assert outcomes(driver.daemon(sees(gpu)).client(copies=49)) == [""] * 48 + [MAX_CLIENTS]


@pytest.mark.parametrize(
    ("own", "limits"),
    [
        ("0=2G", (2 * GIB, NO_LIMIT)),
        ("0=2048M", (2 * GIB, NO_LIMIT)),
        ("0=2G,1=1G", (2 * GIB, 1 * GIB)),
        ("{second}=2G", (NO_LIMIT, 2 * GIB)),
    ],
)
def test_o43_a_clients_own_limit_needs_no_default(
    driver: Driver, two_gpus: tuple[str, str], own: str, limits: tuple[int, int]
) -> None:
    seen = driver.daemon().look(sees(*two_gpus) | memory(own.format(second=two_gpus[1])))
    assert len(seen.devices) == len(limits)
    for device, limit in zip(seen.devices, limits, strict=True):
        assert_limited(device, limit)


def test_o44_nvml_counts_as_free_on_an_idle_card_what_cuda_has_in_total(driver: Driver, card: Device) -> None:
    total, free = driver.nvml_memory(0)
    assert free == card.total
    assert 0 < total - free < GIB  # the driver's own part: 616 MiB of an H200, 480 of an H100


def test_o44_a_server_without_a_client_takes_memory_of_each_of_its_gpus(driver: Driver, card: Device) -> None:
    driver.gpus_needed = min(2, len(driver.uuids))
    before = [driver.nvml_memory(gpu)[1] for gpu in range(driver.gpus_needed)]
    driver.daemon().start_server()
    taken = [free - driver.nvml_memory(gpu)[1] for gpu, free in enumerate(before)]
    assert taken == [SERVER_MIB] * len(before) if card.sms == RECORDED_SMS else all(0 < mib < 200 for mib in taken)


@pytest.mark.parametrize(("count", "percentage"), [(8, "100"), (8, "12.5"), (40, "100")])
def test_o44_clients_with_equal_shares_can_all_fill_them(
    driver: Driver, card: Device, count: int, percentage: str
) -> None:
    """A share being what the card has left after one context without MPS, divided; to the end, and all at once."""
    daemon = driver.daemon()
    own = sees(driver.uuids[0]) | threads(percentage) | memory(f"0={card.free // count}M")
    clients = [daemon.client(own) for _ in range(count)]
    assert [client.ask(f"allocate {client.report.only.free // 2 * 2}") for client in clients] == [0] * count
    assert [client.ask("allocate 2") for client in clients] == [2] * count
    assert [client.ask("synchronize") for client in clients] == [0] * count
