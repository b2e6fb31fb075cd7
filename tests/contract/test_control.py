"""The control program: what it takes, what it says, and how it ends (O1 to O8, O40)."""

from __future__ import annotations

import select
import subprocess
from typing import TYPE_CHECKING

import pytest

from slurm_mps.node.control import Limits, limit_answers, limit_commands
from slurm_mps.units import MIB
from tests.harness.machine import Result

from .driver import CONTROL, sees, wait_until

if TYPE_CHECKING:
    from .driver import Driver

pytestmark = pytest.mark.control_program

NOBODY = Result(1, "", "Cannot find MPS control daemon process\n")
WRITTEN_AND_READ = {
    "8G": "8G",
    "8192M": "8G",
    "8388608K": "8192G",
    "8589934592": "8388608G",
    "8g": "8G",
    "8GB": "8G",
    "8GiB": "8G",
    "0.5G": "",
    "1.5G": "1M",
    "0": "",
    "-1G": "17179869183G",
    "": "17179869183G",  # after -1G: read so, or not at all
    "200G": "200G",
    "junk": "",
    "0G": "",
    "1M": "1M",
    "1023M": "1023M",
    "1500M": "1G",  # rounded down where it is printed, not where it is kept (O95)
    "4095M": "3G",
    "35654M": "34G",
}
"""Sizes in the order in which they were tried."""


def test_o1_a_bad_percentage_leaves_the_old_one_and_is_answered_with_it(driver: Driver) -> None:
    daemon = driver.daemon()
    words = ("25", "0", "250", "abc", "12.5")
    answers = [daemon.ask(f"set_default_active_thread_percentage {word}") for word in words]
    assert answers == ["25.0", "25.0", "25.0", "25.0", "12.5"]
    assert daemon.ask("get_default_active_thread_percentage") == "12.5"


def test_o2_any_memory_limit_is_taken_in_silence(driver: Driver) -> None:
    daemon = driver.daemon()
    for words in ("0 8G", "7 8G", "0 8X", "0 0"):
        assert daemon.control(f"set_default_device_pinned_mem_limit {words}") == Result(0, "", "")


def test_o3_sizes_it_reads_and_misreads(driver: Driver) -> None:
    daemon = driver.daemon()
    commands = "set_default_device_pinned_mem_limit 0 {}", "get_default_device_pinned_mem_limit 0"
    read = {size: daemon.ask(*(command.format(size) for command in commands)) for size in WRITTEN_AND_READ}
    assert read == WRITTEN_AND_READ | ({"": ""} if driver.branch < 580 else {})


def test_o95_every_limit_reads_back_as_the_prolog_expects(driver: Driver) -> None:
    """All percentages that there are, and sizes over the whole range: what does not would drain a node."""
    daemon = driver.daemon()
    sizes = [*range(1, 3000, 61), *range(3000, 1_200_000, 9973)]
    limits = [Limits(tenths / 10) for tenths in range(1, 1001)] + [Limits(25, mib * MIB) for mib in sizes]
    for first in range(0, len(limits), 50):
        some = limits[first : first + 50]
        said = daemon.ask(*(line for one in some for line in limit_commands(one, 1))).split()
        assert said == [word for one in some for word in limit_answers(one, 1)[0]]


def test_o4_a_limit_that_was_never_set(driver: Driver) -> None:
    """Before any was set it says so or nothing (O62); then nothing for a device without one; a UUID is no ordinal."""
    daemon = driver.daemon()
    query = "get_default_device_pinned_mem_limit"
    assert daemon.ask(f"{query} 0") in ("No default pinned memory limit set for the device!", "")
    daemon.ask(f"set_default_device_pinned_mem_limit {driver.uuids[0]} 8G")
    needs_a_gpu = driver.place.nvidias
    assert daemon.ask(f"{query} {driver.uuids[0]}") == ("" if needs_a_gpu else "8G")
    assert daemon.ask(f"{query} 0") == ""


def test_o5_an_unknown_command_is_no_error(driver: Driver) -> None:
    assert driver.daemon().control("foo") == Result(0, 'Unknown command "foo"\n', "")


def test_o5_an_unknown_option_starts_nothing_and_is_no_error(driver: Driver) -> None:
    daemon = driver.directories()
    result = daemon.start("-d", "-S")
    if driver.branch < 580:  # it talks to the daemon instead
        assert result == NOBODY
    else:
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.startswith("Unrecognized option")
        assert "nvidia-cuda-mps-control [options] [command]" in result.stdout
    assert not daemon.is_there
    assert driver.left_over() == []


def test_o6_no_such_device_exits_100_without_a_message_or_a_log(driver: Driver) -> None:
    if driver.place.nvidias:
        pytest.skip("needs a GPU")
    daemon = driver.directories()
    assert daemon.start(env=sees("GPU-00000000-0000-0000-0000-000000000000")) == Result(100, "", "")
    assert list(driver.machine.path(daemon.log).iterdir()) == []
    assert not daemon.is_there


def test_o6_a_long_pipe_directory_exits_1_without_a_message(driver: Driver) -> None:
    """Socket paths are at most 108 bytes; the two lines of the log do not say that this is why."""
    daemon = driver.directories(name="x" * 90)
    assert daemon.start() == Result(1, "", "")
    said = [
        f"Starting control daemon using socket {daemon.pipe}/control",
        f"To connect CUDA applications to this daemon, set env CUDA_MPS_PIPE_DIRECTORY={daemon.pipe}",
    ]
    wait_until(lambda: driver.branch < 580 or daemon.log_lines("control.log") == said)
    assert not daemon.is_there


def test_o6_a_second_daemon_on_a_directory_exits_1_and_says_why(driver: Driver) -> None:
    daemon = driver.daemon()
    pid = daemon.pid
    assert daemon.start() == Result(1, "An instance of this daemon is already running\n", "")
    assert daemon.pid == pid
    assert daemon.ask("get_default_active_thread_percentage") == "100.0"


def test_o7_without_a_daemon_a_command_fails(driver: Driver) -> None:
    nothing = driver.directories()
    assert nothing.control("get_server_list") == NOBODY


def test_o7_a_command_as_an_argument_does_nothing(driver: Driver) -> None:
    daemon = driver.daemon()
    assert daemon.start("get_default_active_thread_percentage") == Result(0, "", "")
    assert daemon.start("quit") == Result(0, "", "")
    assert daemon.is_there


def test_o7_several_lines_are_answered_in_their_order(driver: Driver) -> None:
    lines = ("get_default_active_thread_percentage", "foo", "get_default_client_priority")
    assert driver.daemon().control(*lines) == Result(0, '100.0\nUnknown command "foo"\n0\n', "")


def test_o40_the_daemon_talks_to_one_control_program_at_a_time(driver: Driver) -> None:
    daemon = driver.daemon()
    first = daemon.popen(CONTROL, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdin is not None
    assert first.stdout is not None
    first.stdin.write(b"get_default_client_priority\n")
    first.stdin.flush()
    # The real program says nothing to a pipe until it ends; a second is long enough for it to have the daemon's ear.
    answered = select.select([first.stdout], [], [], 1.0)[0]
    assert driver.place.real or driver.place.nvidias or answered
    refused = daemon.control("get_default_client_priority")
    if driver.branch < 580:  # now and then without a word, and with success (O90)
        assert refused.stdout == ""
    else:
        assert refused == Result(1, "", "Cannot send command to MPS control daemon process\n")
    assert first.communicate(timeout=20)[0] == b"0\n"
    assert daemon.ask("get_default_client_priority") == "0"


def test_o8_what_a_user_is_refused_comes_with_success(driver: Driver) -> None:
    daemon = driver.daemon(user="root", mode=0o755)
    who = "who " if driver.branch >= 580 else ""
    refusal = (
        f"Insufficient privileges for UID {driver.place.uid(driver.user)}. Control deamon settings can only be "
        f"modified by the user {who}started it or by the root user.\n"
    )
    quitted = daemon.control("quit", user=driver.user)
    assert quitted == Result(0, "Not enough privilege to execute quit command\n", "")
    changed = daemon.control("set_default_active_thread_percentage 77", user=driver.user)
    kept = daemon.ask("get_default_active_thread_percentage", user=driver.user)
    if driver.branch < 550:
        assert (changed, kept) == (Result(0, "77.0\n", ""), "77.0"), "driver 535 lets a user change root's daemon (O89)"
    else:
        assert (changed, kept) == (Result(0, refusal, ""), "100.0")


@pytest.mark.parametrize(("query", "since"), [("get_server_status 1", 550), ("device_query --csv", 580), ("ps", 0)])
def test_o83_queries_that_a_driver_does_not_know(driver: Driver, query: str, since: int) -> None:
    """They are unknown commands like any other, and no error."""
    answer = driver.daemon().control(query)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert (answer.stdout == f'Unknown command "{query.split(maxsplit=1)[0]}"\n') == (driver.branch < since)


def test_o83_the_usage_lists_the_commands_from_driver_580_on(driver: Driver) -> None:
    usage = driver.directories().start("-h")
    assert (usage.returncode, usage.stderr) == (0, "")
    assert usage.stdout.startswith("CUDA MPS Control for Linux")
    assert ("set_default_device_pinned_mem_limit" in usage.stdout) == (driver.branch >= 580)


def test_o83_a_daemon_without_a_pid_file_is_driver_535s(driver: Driver) -> None:
    daemon = driver.daemon()
    assert daemon.listed_files() == driver.files_of_a_daemon
    daemon.ask("quit")
    wait_until(lambda: daemon.listed_files() == ["control", "control_lock", "control_privileged"])
