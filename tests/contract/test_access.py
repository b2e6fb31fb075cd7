"""Who gets into a daemon, who runs without MPS unawares, what lies in the directories (O21 to O25, O37 to O39, O45)."""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
import time
from typing import TYPE_CHECKING

import pytest

from tests.harness.machine import Result

from .driver import CONTROL, FILES_OF_A_DAEMON, PID_FILE, sees, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from .driver import Daemon, Device, Driver

KNOCK = """
import json, os, socket, struct, sys
try:
    socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).connect(sys.argv[1])
    refusal = 0
except OSError as error:
    refusal = error.errno
peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
peer.connect(sys.argv[1])
pid, uid, gid = struct.unpack("iII", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
print(json.dumps([refusal, pid, uid]))
"""
CONNECTION_FAILED = "cuInit 805 CUDA_ERROR_MPS_CONNECTION_FAILED"


def no_daemon(driver: Driver) -> Daemon:
    return driver.directories()


def killed_daemon(driver: Driver) -> Daemon:
    daemon = driver.daemon()
    driver.place.kill(daemon.pid)
    wait_until(lambda: not driver.left_over())
    return daemon


def missing_directory(driver: Driver) -> Daemon:
    daemon = driver.directories()
    daemon.environment["CUDA_MPS_PIPE_DIRECTORY"] += "/missing"
    return daemon


def nowhere(driver: Driver) -> Daemon:
    daemon = driver.directories()
    daemon.environment["CUDA_MPS_PIPE_DIRECTORY"] = "/dev/null"
    return daemon


def closed_directory(driver: Driver) -> Daemon:
    return driver.daemon(user=driver.other_user, mode=0o700)


@pytest.mark.parametrize("make", [no_daemon, killed_daemon, missing_directory, nowhere, closed_directory])
def test_o21_a_program_that_finds_no_daemon_runs_without_mps(
    driver: Driver, card: Device, make: Callable[[Driver], Daemon]
) -> None:
    """And without a word, with all SMs and all memory."""
    found = make(driver).look(sees(driver.uuids[0]), user=driver.user)
    assert found.devices == (card,)


@pytest.mark.parametrize("who", ["root", "other"])
def test_o22_a_foreign_client_takes_a_users_daemon_its_server(driver: Driver, who: str) -> None:
    daemon = driver.daemon(mode=0o755)
    server = daemon.start_server()
    foreign = "root" if who == "root" else driver.other_user
    assert daemon.look(user=foreign).failed == CONNECTION_FAILED
    wanted = f"Failed to start server using uid {driver.place.uid(foreign)}, error: Operation not permitted"
    log = daemon.log_lines("control.log")
    assert f"Try shutting down server {server}, backoff is disabled" in log
    assert wanted in log
    assert daemon.ask("get_server_list") == ""


def test_o22_a_daemon_of_roots_replaces_an_idle_server_for_the_next_user(driver: Driver) -> None:
    daemon = driver.daemon(user="root", mode=0o755)
    for user in (driver.user, driver.other_user):
        assert daemon.look(user=user).failed == ""
        assert driver.server_uids() == [driver.place.uid(user)]


@pytest.mark.control_program
def test_o22_the_sockets_are_open_to_all(driver: Driver) -> None:
    """0666: the directory is the gate."""
    daemon = driver.daemon()
    assert stat.S_IMODE(driver.machine.path(f"{daemon.pipe}/control").stat().st_mode) == 0o666


def test_o23_of_a_daemon_of_roots_a_user_has_a_server_and_queries(driver: Driver) -> None:
    """Settings and quit are refused (O8)."""
    daemon = driver.daemon(user="root", mode=0o755)
    client = daemon.client(user=driver.user)
    assert driver.server_uids() == [driver.place.uid(driver.user)]
    server = daemon.ask("get_server_list", user=driver.user)
    assert daemon.ask(f"get_server_status {server}", user=driver.user) == "ACTIVE"
    assert daemon.ask(f"get_client_list {server}", user=driver.user) == str(client.pid)


def test_o45_of_a_daemon_of_roots_a_user_may_terminate_a_client(driver: Driver) -> None:
    daemon = driver.daemon(user="root", mode=0o755)
    client = daemon.client(user=driver.user)
    assert daemon.control(f"terminate_client {daemon.server} {client.pid}", user=driver.user) == Result(0, "0\n", "")
    assert client.ask("work") == 810


def test_o74_users_of_one_server_see_each_other_and_change_nothing(driver: Driver) -> None:
    """Root's server serves both at once. Each may ask who is there, and the other's programs are listed."""
    if driver.branch < 580:
        pytest.skip("has no -M")
    daemon = driver.directories(user="root", mode=0o755)
    daemon.start("-d", "-M").check()
    theirs, ours = daemon.client(user=driver.other_user), daemon.client(user=driver.user)
    server = daemon.server
    assert driver.server_uids() == [0]
    listed = daemon.ask(f"get_client_list {server}", user=driver.user).split()
    assert sorted(map(int, listed)) == sorted([theirs.pid, ours.pid])
    assert str(theirs.pid) in daemon.ask("ps", user=driver.user)
    refused = "Insufficient privileges for UID"
    ended = daemon.control(f"terminate_client {server} {theirs.pid}", user=driver.user).stdout.splitlines()
    assert (ended[0].startswith(refused), ended[-1]) == (True, "800")
    assert daemon.control(f"shutdown_server {server}", user=driver.user).stdout.startswith(refused)
    assert theirs.ask("work") == 0
    named = [line.partition(" from user ")[2] for line in daemon.log_lines("control.log")]
    assert {words.partition(":")[0] for words in named if words} == {"0"}


@pytest.mark.control_program
def test_o96_a_server_for_all_users_is_not_known_before_580(driver: Driver) -> None:
    """535 and 550 take the option for a wish to talk to a daemon."""
    daemon = driver.directories(user="root", mode=0o755)
    said = daemon.start("-d", "-M")
    known = driver.branch >= 580
    assert said == (Result(0, "", "") if known else Result(1, "", "Cannot find MPS control daemon process\n"))
    assert daemon.is_there is known


@pytest.mark.parametrize("by_root", [False, True])
def test_o45_shutdown_server_ends_an_idle_server(driver: Driver, by_root: bool) -> None:
    """It says nothing, and the daemon stays and starts another."""
    daemon = driver.daemon(user="root", mode=0o755)
    server = daemon.start_server(driver.user)
    assert daemon.control(f"shutdown_server {server}", user=None if by_root else driver.user) == Result(0, "", "")
    wait_until(lambda: daemon.server == 0)
    assert daemon.look(user=driver.user).failed == ""
    assert daemon.server not in (0, server)


def test_o45_shutdown_server_leaves_a_server_with_a_client_alone(driver: Driver) -> None:
    daemon = driver.daemon(user="root", mode=0o755)
    client = daemon.client(user=driver.user)
    server = daemon.server
    assert daemon.control(f"shutdown_server {server}") == Result(0, "", "")
    assert client.ask("synchronize") == 0
    assert daemon.look(user=driver.user).failed == ""
    assert daemon.server == server


def test_o45_shutdown_server_has_no_f(driver: Driver) -> None:
    """-f is taken for a pid, which reads 0."""
    daemon = driver.daemon(user="root", mode=0o755)
    server = daemon.start_server(driver.user)
    assert daemon.control(f"shutdown_server -f {server}") == Result(0, "Server 0 not found\n", "")
    assert daemon.ask(f"get_server_status {server}") == "ACTIVE"


def test_o23_of_a_daemon_of_its_own_a_user_may_change_and_quit_everything(driver: Driver) -> None:
    daemon = driver.daemon()
    assert daemon.ask("set_default_active_thread_percentage 50") == "50.0"
    refused = daemon.ask(f"start_server -uid {driver.place.uid(driver.other_user)}")
    assert refused.startswith(f"Insufficient privileges for UID {driver.place.uid(driver.user)}. ")
    assert daemon.control("quit") == Result(0, "", "")
    assert not daemon.is_there


def admit(path: object, uid: int) -> None:
    """Let one user list and enter a directory, besides what its mode says: setfacl -m user:UID:r-x."""
    nobody = 0xFFFFFFFF
    entries = [(0x01, 7, nobody), (0x02, 5, uid), (0x04, 0, nobody), (0x10, 5, nobody), (0x20, 0, nobody)]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    os.setxattr(str(path), "system.posix_acl_access", acl)


def test_o24_an_acl_lets_in_the_jobs_user_and_nobody_else(driver: Driver, card: Device) -> None:
    daemon = driver.directories(user="root", mode=0o700)
    admit(driver.machine.path(daemon.directory), driver.place.uid(driver.user))
    assert daemon.start() == Result(0, "", "")
    assert daemon.ask("get_server_list", user=driver.user) == ""
    client = daemon.client(user=driver.user)
    assert daemon.ask(f"get_client_list {daemon.server}") == str(client.pid)
    for directory in (daemon.directory, daemon.pipe):
        assert driver.machine.run(["ls", directory], user=driver.user).returncode == 0
        assert driver.machine.run(["touch", f"{directory}/new"], user=driver.user).returncode != 0
        assert driver.machine.run(["ls", directory], user=driver.other_user).returncode != 0
    assert "Cannot find" in daemon.control("get_server_list", user=driver.other_user).stderr
    assert daemon.look(user=driver.other_user).devices[0].sms == card.sms
    assert daemon.ask(f"get_client_list {daemon.server}") == str(client.pid)


def test_o25_the_files_of_a_running_daemon(driver: Driver) -> None:
    daemon = driver.daemon()
    modes = {name: driver.machine.path(f"{daemon.pipe}/{name}").stat().st_mode for name in daemon.listed_files()}
    assert sorted(modes) == FILES_OF_A_DAEMON
    assert modes["control"] == stat.S_IFSOCK | 0o666
    assert modes["control_privileged"] == stat.S_IFSOCK | 0o755
    assert stat.S_ISFIFO(modes["log"])
    assert sorted(os.listdir(driver.machine.path(daemon.log))) == ["control.log", "server.log"]
    daemon.start_server()
    owner = driver.place.uid(daemon.user)
    assert {entry.stat().st_uid for entry in driver.machine.path(daemon.log).iterdir()} == {owner}


def test_o25_quit_leaves_the_sockets_and_the_lock(driver: Driver) -> None:
    daemon = driver.daemon()
    daemon.start_server()
    assert daemon.control("quit") == Result(0, "", "")
    assert daemon.listed_files() == ["control", "control_lock", "control_privileged"]


def test_o25_a_killed_daemon_leaves_everything_and_a_new_one_minds_nothing(driver: Driver) -> None:
    daemon = driver.daemon()
    daemon.start_server()
    driver.place.kill(daemon.pid)
    wait_until(lambda: not driver.left_over())
    assert daemon.listed_files() == FILES_OF_A_DAEMON
    assert daemon.start() == Result(0, "", "")
    assert daemon.ask("get_server_list") == ""
    assert daemon.look().failed == ""
    assert daemon.server > 0


@pytest.mark.control_program
def test_o37_the_pid_file_the_lock_and_the_fifo_are_writable_by_all(driver: Driver) -> None:
    """Whatever the umask, and though the logs are not."""
    daemon = driver.directories()
    daemon.popen("sh", "-c", f"umask 077; exec {CONTROL} -d").wait(20)
    path = driver.machine.path(daemon.pipe)
    modes = {PID_FILE: 0o666, "control_lock": 0o666, "log": 0o777}
    if driver.branch < 550:
        del modes[PID_FILE]
    assert {name: stat.S_IMODE((path / name).stat().st_mode) for name in modes} == modes
    log = driver.machine.path(driver.daemon().log)
    assert {stat.S_IMODE(entry.stat().st_mode) for entry in log.iterdir()} == {0o644}


def test_o37_junk_in_the_pid_file_misleads_no_control_program(driver: Driver) -> None:
    daemon = driver.daemon()
    driver.machine.path(f"{daemon.pipe}/{PID_FILE}").write_text("junk\n")
    assert daemon.ask("get_default_active_thread_percentage") == "100.0"


@pytest.mark.parametrize("whose", ["nobody's", "a user's"])
def test_o38_o51_a_server_has_its_users_uid_and_roots_group(driver: Driver, whose: str) -> None:
    """Gid 0, no other groups, no capabilities, and the daemon's environment; whether the uid has an account or not."""
    uid = 65000 if whose == "nobody's" else driver.place.uid(driver.user)
    daemon = driver.daemon({"MARK": "of the daemon"}, user="root", mode=0o755)
    daemon.ask(f"start_server -uid {uid}")
    wait_until(lambda: daemon.server)
    server = daemon.server
    assert daemon.ask(f"get_server_status {server}") == "ACTIVE"
    status = driver.machine.read(f"/proc/{server}/status").splitlines()
    fields = {name: words.split() for name, _, words in (line.partition(":") for line in status)}
    assert (fields["Uid"], fields["Gid"], fields["Groups"]) == ([str(uid)] * 4, ["0"] * 4, [])
    assert int(fields["CapEff"][0], 16) == 0
    assert "MARK=of the daemon" in driver.machine.read(f"/proc/{server}/environ").split("\0")


def test_o68_a_server_whose_user_cannot_enter_the_pipe_directory_does_not_come_up(driver: Driver) -> None:
    """It connects to the daemon as a client does; start_server says nothing of it."""
    daemon = driver.daemon(user="root", mode=0o700)
    assert daemon.ask(f"start_server -uid {driver.place.uid(driver.user)}") == ""
    time.sleep(1)  # longer than a server takes
    assert daemon.server == 0
    assert daemon.is_there


@pytest.mark.control_program
def test_o39_the_control_socket_takes_packets_and_names_the_daemon(driver: Driver) -> None:
    """Who hangs up at once leaves a line in the log and nothing else."""
    daemon = driver.daemon(user="root", mode=0o755)
    argv = [driver.place.plain_python, "-I", "-S", "-c", KNOCK, f"{daemon.pipe}/control"]
    said = json.loads(driver.machine.run(argv, user=driver.user).check().stdout)
    assert said == [errno.EPROTOTYPE, daemon.pid, 0]
    lines = {"Unable to accept connection", "User did not send valid credentials"}
    wait_until(lambda: lines & set(daemon.log_lines("control.log")))
    assert daemon.ask("get_default_active_thread_percentage") == "100.0"
