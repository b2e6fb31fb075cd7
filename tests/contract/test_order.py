"""What comes before what. How long it took is in the record and no test (O26 to O28)."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.harness.machine import Result

from .driver import CONTROL, sees, wait_until

if TYPE_CHECKING:
    from .driver import Driver


@pytest.mark.usefixtures("card_speed")
def test_o26_start_server_returns_first_and_the_status_waits_for_it(driver: Driver) -> None:
    daemon = driver.daemon()
    server = daemon.ask(f"start_server -uid {driver.place.uid(driver.user)}", "get_server_list")
    ready = f"NEW SERVER {server}: Ready"
    assert ready not in daemon.log_lines("control.log")
    assert daemon.ask(f"get_server_status {server}") == "ACTIVE"
    assert ready in daemon.log_lines("control.log")


def test_o26_a_client_finds_the_server_that_was_started(driver: Driver) -> None:
    daemon = driver.daemon()
    server = daemon.start_server()
    client = daemon.client()
    assert daemon.server == server
    assert daemon.ask(f"get_client_list {server}") == str(client.pid)


def test_o26_the_first_client_has_a_server_started(driver: Driver) -> None:
    daemon = driver.daemon()
    assert daemon.ask("get_server_list") == ""
    client = daemon.client()
    assert daemon.ask(f"get_client_list {daemon.server}") == str(client.pid)


@pytest.mark.parametrize("server", [False, True])
def test_o27_quit_takes_an_idle_server_along(driver: Driver, server: bool) -> None:
    daemon = driver.daemon()
    if server:
        daemon.start_server()
    assert daemon.control("quit") == Result(0, "", "")
    wait_until(lambda: not driver.left_over())


def test_o27_quit_waits_for_a_live_client(driver: Driver) -> None:
    daemon = driver.daemon()
    client = daemon.client(sees(driver.uuids[0]))
    server = daemon.server
    quitting = daemon.start_control("quit")
    refusal = f"Server {server} has 2 active worker threads. Server will not shutdown."
    wait_until(lambda: daemon.log_lines("control.log").count(refusal) >= 2)
    log = [line for line in daemon.log_lines("control.log") if " will try " in line]
    assert log[:2] == [f"Control will try shutting down server {server} again in at most {ms}ms" for ms in (200, 400)]
    assert quitting.poll() is None
    assert client.ask("synchronize") == 0
    client.leave()
    assert quitting.wait(30) == 0
    wait_until(lambda: not driver.left_over())


def test_o27_quit_with_a_time_tries_a_last_time_and_then_forces(driver: Driver) -> None:
    """Also after a quit that somebody gave up waiting for, whose interval is kept."""
    daemon = driver.daemon()
    client = daemon.client(sees(driver.uuids[0]))
    server = daemon.server
    with pytest.raises(TimeoutError):
        daemon.control("quit", timeout=0.4)
    assert daemon.control("quit -t 1") == Result(0, "", "")
    log = daemon.log_lines("control.log")
    second = log.index("quit command issued with timeout of 1")
    last_interval = [line for line in log[:second] if " will try " in line][-1]
    attempt = [
        f"Try shutting down server {server}, backoff is disabled",
        f"Server {server} has 2 active worker threads. Server will not shutdown.",
    ]
    assert log[second + 1 : second + 4] == [*attempt, last_interval]
    forced = [f"Force shutting down server {server}", f"Server {server} exited with status 0", "Exit with status 0"]
    assert log[-5:] == [*attempt, *forced]
    assert client.ask("work") == 806
    wait_until(lambda: not driver.left_over())


@pytest.mark.control_program
def test_o28_a_daemon_leaves_the_streams_and_the_session_of_its_starter(driver: Driver) -> None:
    daemon = driver.directories()
    starting = daemon.popen(CONTROL, "-d", stdout=subprocess.PIPE)
    assert starting.communicate(timeout=20)[0] == b""
    process = driver.machine.path(f"/proc/{daemon.pid}")
    assert [os.readlink(process / f"fd/{number}") for number in range(3)] == ["/dev/null"] * 3
    _state, _parent, group, session = (process / "stat").read_text().rpartition(")")[2].split()[:4]
    assert (int(group), int(session)) == (daemon.pid, daemon.pid)


@pytest.mark.control_program
def test_o28_a_daemon_in_the_foreground_dies_of_sigterm_at_once(driver: Driver) -> None:
    """Leaving its files."""
    daemon = driver.directories()
    foreground = daemon.popen(CONTROL, "-f")
    wait_until(lambda: daemon.listed_files() == driver.files_of_a_daemon and daemon.is_there)
    assert daemon.ask("get_default_active_thread_percentage") == "100.0"
    driver.place.kill(daemon.pid, signal.SIGTERM)
    assert foreground.wait(20) == -signal.SIGTERM
    assert daemon.listed_files() == driver.files_of_a_daemon
