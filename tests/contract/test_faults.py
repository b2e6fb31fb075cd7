"""What one client's fault is to the others, to the server and to the next (O30 to O35, O46 to O48)."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from tests.harness.machine import Result

from .driver import wait_until
from .test_limits import sms_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .driver import Client, Daemon, Device, Driver

ILLEGAL_ADDRESS, LAUNCH_FAILED, RPC_FAILURE, TERMINATED = 700, 719, 806, 810
CONTEXT_FAILED = f"cuCtxCreate_v2 {LAUNCH_FAILED} CUDA_ERROR_LAUNCH_FAILED"
NOT_READY = "cuInit 807 CUDA_ERROR_MPS_SERVER_NOT_READY"
PS_HEADER = "PID       ID        SERVER         DEVICE                    NAMESPACE      COMMAND        "


def on(driver: Driver, gpu: int) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": driver.uuids[gpu]}


def contains(lines: Sequence[str], wanted: Sequence[str]) -> bool:
    """All wanted lines are there, in this order."""
    rest = iter(lines)
    return all(line in rest for line in wanted)


def misbehave(client: Client, how: str) -> int:
    client.misbehave(how)
    return client.answer()


def wait_until_active(daemon: Daemon, server: int) -> None:
    wait_until(lambda: daemon.ask(f"get_server_status {server}") == "ACTIVE")


@pytest.mark.usefixtures("two_gpus")
def test_o30_an_illegal_address_reaches_the_clients_of_that_gpu(driver: Driver) -> None:
    """On the other GPUs, however many there are, the clients go on."""
    driver.gpus_needed = len(driver.uuids)
    daemon = driver.daemon()
    culprit, bystander, *elsewhere = (daemon.client(on(driver, gpu)) for gpu in (0, *range(driver.gpus_needed)))
    server = daemon.server
    assert misbehave(culprit, "fault") == ILLEGAL_ADDRESS
    assert bystander.ask("work") == ILLEGAL_ADDRESS
    assert [client.ask("synchronize") for client in elsewhere] == [0] * (driver.gpus_needed - 1)
    for client in (culprit, bystander, *elsewhere):
        client.leave()
    wait_until_active(daemon, server)
    assert daemon.look().uuids == driver.uuids
    assert daemon.server == server


def test_o31_a_killed_server_fails_its_clients_and_is_replaced(driver: Driver, card: Device) -> None:
    """The new one has the defaults."""
    daemon = driver.daemon()
    daemon.ask("set_default_active_thread_percentage 25")
    client = daemon.client(on(driver, 0))
    old = daemon.server
    daemon.ask(f"set_active_thread_percentage {old} 75")
    driver.place.kill(old)
    assert client.ask("work") == RPC_FAILURE
    wait_until(lambda: daemon.server == 0)
    assert daemon.look().devices[0].sms == sms_at(card, "25")
    assert daemon.server not in (0, old)


def test_o31_a_killed_client_leaves_the_server_usable(driver: Driver) -> None:
    daemon = driver.daemon()
    client = daemon.client(on(driver, 0))
    server = daemon.server
    client.kill()
    assert daemon.look().failed == ""
    assert daemon.server == server


def test_o32_ps_and_the_lists_name_a_client(driver: Driver) -> None:
    daemon = driver.daemon(on(driver, 0))
    client = daemon.client()
    server = daemon.server
    assert daemon.ask(f"get_client_list {server}") == str(client.pid)
    assert daemon.ask("get_device_client_list") == f"[0] 00:00.0, {driver.names[0]}\n{client.pid}.1"
    header, row = daemon.ask("ps").split("\n")
    namespace = driver.machine.path(f"/proc/{client.pid}/ns/pid").stat().st_ino
    python = driver.place.plain_python
    assert header == PS_HEADER
    assert row == f"{client.pid:<10}{1:<10}{server:<15}{driver.uuids[0][:22]:<26}{namespace:<15}{python}"


def test_o32_terminate_client_answers_0(driver: Driver) -> None:
    daemon = driver.daemon()
    client = daemon.client(on(driver, 0))
    assert daemon.control(f"terminate_client {daemon.server} {client.pid}") == Result(0, "0\n", "")
    assert client.ask("work") == TERMINATED


def test_o32_a_server_that_is_not_there(driver: Driver) -> None:
    assert driver.daemon().ask("get_server_status 1") == "Server 1 not found"


@pytest.mark.parametrize(("kernel", "error"), [("fault", ILLEGAL_ADDRESS), ("trap", LAUNCH_FAILED)])
def test_o33_the_log_names_the_culprit_of_an_illegal_address_but_not_of_a_trap(
    driver: Driver, kernel: str, error: int
) -> None:
    daemon = driver.daemon()
    bystander, culprit = (daemon.client(on(driver, 0)) for _ in range(2))
    assert misbehave(culprit, kernel) == error
    assert bystander.ask("work") == error
    pids = (bystander.pid, culprit.pid)
    wanted = ["Server is handling a fatal GPU error."]
    wanted += [f"Client {{PID: {pid}, Context ID: 1}} on device 0 to be torn down" for pid in pids]
    for pid in pids:
        wanted += [
            f"All clients belonging to error trigging process {pid} will be torn down",
            f"Client {{PID: {pid}, Context ID: 1}} on the error-trigging process {pid} to be torn down",
        ]
    wanted += ["The following devices will be reset:", "0"]
    wanted += ["The following client process have a sticky error set:", *map(str, pids)]
    wait_until(lambda: contains(daemon.log_lines("server.log"), wanted))
    log = daemon.log_lines("server.log")
    named = f"Client {{PID: {culprit.pid}, Context: 1}} encountered a fatal GPU error."
    assert [line for line in log if "encountered" in line] == ([named] if kernel == "fault" else [])


def test_o34_while_a_victim_lingers_nobody_new_gets_in(driver: Driver) -> None:
    daemon = driver.daemon()
    victim, culprit = (daemon.client(on(driver, 0)) for _ in range(2))
    server = daemon.server
    assert misbehave(culprit, "fault") == ILLEGAL_ADDRESS
    culprit.leave()
    assert daemon.ask(f"get_server_status {server}") == "FAULT"
    refused = daemon.look()
    assert refused.failed == NOT_READY
    who = f"{{PID: {refused.pid}, Context ID: 0}}"
    wanted = [
        f"Server teardown in progress. Refusing to accept new client {who}",
        f"Failed to accept client {who} with status 807",
    ]
    wait_until(lambda: contains(daemon.log_lines("server.log"), wanted))
    assert victim.ask("work") == ILLEGAL_ADDRESS
    victim.leave()
    wait_until_active(daemon, server)
    assert daemon.look().failed == ""
    assert daemon.server == server


def test_o35_terminate_client_ends_an_endless_kernel(driver: Driver, two_gpus: tuple[str, str]) -> None:
    """The others finish clean, and the next one works."""
    daemon = driver.daemon()
    spinner, other = (daemon.client(on(driver, gpu)) for gpu in (0, 1))
    server = daemon.server
    spinner.misbehave("spin")
    assert daemon.ask(f"terminate_client {server} {spinner.pid}") == "0"
    assert spinner.answer() == TERMINATED
    assert other.ask("synchronize") == 0
    spinner.leave()
    assert daemon.look().uuids == list(two_gpus)
    assert daemon.server == server


def test_o35_a_killed_spinner_costs_the_next_client_its_context(driver: Driver) -> None:
    """The server says that it is ACTIVE; the one after the next works."""
    daemon = driver.daemon()
    spinner = daemon.client(on(driver, 0))
    server = daemon.server
    spinner.misbehave("spin")
    spinner.kill()
    assert daemon.ask(f"get_server_status {server}") == "ACTIVE"
    assert daemon.look(on(driver, 0)).failed == CONTEXT_FAILED
    wait_until_active(daemon, server)
    assert daemon.look(on(driver, 0)).failed == ""


def programs(driver: Driver) -> int:
    """How many programs nvidia-smi sees on the GPUs."""
    listed = driver.machine.run(["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]).check()
    return len(listed.stdout.splitlines())


def test_o35_quit_with_a_time_ends_an_endless_kernel(driver: Driver) -> None:
    daemon = driver.daemon()
    spinner = daemon.client(on(driver, 0))
    spinner.misbehave("spin")
    before = programs(driver)
    assert daemon.control("quit -t 1") == Result(0, "", "")
    assert spinner.answer() == RPC_FAILURE
    spinner.leave()
    wait_until(lambda: not driver.left_over())
    assert programs(driver) < before  # others may have the GPU, too


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_o65_a_server_that_was_killed_exited_with_status_0_and_nobody_had_asked_it_to(
    driver: Driver, number: int
) -> None:
    daemon = driver.daemon()
    client = daemon.client(on(driver, 0))
    server = daemon.server
    driver.place.kill(server, number)
    assert client.ask("work") == RPC_FAILURE
    wait_until(lambda: f"Server {server} exited with status 0" in daemon.log_lines("control.log"))
    assert not [line for line in daemon.log_lines("control.log") if "shutting down" in line]
    assert "Exiting" not in daemon.log_lines("server.log")


def test_o65_a_daemon_that_is_killed_takes_its_server_along_without_a_word(driver: Driver) -> None:
    """At once, though it has a client."""
    daemon = driver.daemon()
    client = daemon.client(on(driver, 0))
    assert daemon.server
    driver.place.kill(daemon.pid)
    wait_until(lambda: not driver.left_over())
    assert client.ask("work") == RPC_FAILURE
    lines = daemon.log_lines("control.log") + daemon.log_lines("server.log")
    assert not [line for line in lines if "xit" in line or "shut" in line]


def killed_spinner(driver: Driver, number: int = signal.SIGKILL) -> tuple[Daemon, int]:
    """A daemon of root's and its server, in which a client on the first GPU was killed in an endless kernel."""
    daemon = driver.daemon(user="root", mode=0o755)
    spinner = daemon.client(on(driver, 0), user=driver.user)
    spinner.misbehave("spin")
    spinner.kill(number)
    return daemon, daemon.server


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_o46_a_spinner_that_a_signal_ends_costs_the_next_one_on_its_gpu_its_context(
    driver: Driver, number: int
) -> None:
    """The server says that it is ACTIVE, and shows no trace of it to clients on another GPU."""
    daemon, server = killed_spinner(driver, number)
    assert daemon.ask(f"get_server_status {server}") == "ACTIVE"
    assert daemon.ask(f"get_client_list {server}") == ""
    assert [daemon.look(on(driver, 1), user=driver.user).failed for _ in range(2)] == ["", ""]
    assert daemon.look(on(driver, 0), user=driver.user).failed == CONTEXT_FAILED
    wait_until_active(daemon, server)
    assert daemon.look(on(driver, 0), user=driver.user).failed == ""
    assert daemon.server == server


@pytest.mark.parametrize("how", ["shutdown_server", "SIGTERM", "SIGKILL"])
def test_o46_a_new_server_is_free_of_a_killed_spinner(driver: Driver, how: str) -> None:
    """The daemon starts it for the next client."""
    daemon, server = killed_spinner(driver)
    if how == "shutdown_server":
        assert daemon.ask(f"shutdown_server {server}") == ""
    else:
        driver.place.kill(server, signal.Signals[how])
    wait_until(lambda: daemon.server == 0)
    assert daemon.look(on(driver, 0), user=driver.user).failed == ""
    assert daemon.server not in (0, server)


def test_o47_a_killed_spinner_takes_along_who_is_on_its_gpu(driver: Driver) -> None:
    """Nobody new gets in until they have left."""
    daemon = driver.daemon()
    spinner, other = (daemon.client(on(driver, 0)) for _ in range(2))
    server = daemon.server
    spinner.misbehave("spin")
    spinner.kill()
    wait_until(lambda: daemon.ask(f"get_server_status {server}") == "FAULT")
    assert daemon.look(on(driver, 0)).failed == NOT_READY
    assert other.ask("synchronize") == ILLEGAL_ADDRESS
    assert daemon.look(on(driver, 0)).failed == NOT_READY
    other.leave()
    wait_until_active(daemon, server)
    assert daemon.look(on(driver, 0)).failed == ""
    assert daemon.server == server


def test_o48_a_spinner_that_is_terminated_before_it_is_killed_costs_nobody_anything(driver: Driver) -> None:
    daemon = driver.daemon()
    spinner = daemon.client(on(driver, 0))
    server = daemon.server
    spinner.misbehave("spin")
    assert daemon.ask(f"terminate_client {server} {spinner.pid}") == "0"
    spinner.kill()
    assert daemon.look(on(driver, 0)).failed == ""
    assert daemon.server == server
