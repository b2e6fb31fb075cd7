"""What the logs of real daemons are taken to say (driver 580 on H200s), and that nonsense is taken for nothing."""

from __future__ import annotations

import os
from pathlib import Path
from time import mktime, process_time, strptime
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm_mps.errors import NodeError
from slurm_mps.job_log import events as kinds
from slurm_mps.job_log.blame import VANISHED, FailedStep, Task, explain, free_since, seen_since, suspect_limit
from slurm_mps.job_log.events import Event, read_events
from slurm_mps.job_log.lines import parse_lines
from slurm_mps.job_log.read import DaemonLogs, events_of, find_logs

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Whole logs, kept from the runs of O30 to O35; of the trap and of the fault state the server's alone.
LOGS = Path(__file__).with_name("logs")
FIRST, SECOND = "GPU-76bb709d-8deb-98b6-99f4-5d130535bac2", "GPU-9b6acbf3-463e-e0e5-d0ec-e7764b1d43d8"
GPUS = (FIRST, SECOND)
STARTED, ENDED = "Starting control daemon using socket /p/control", "Exit with status 0"
DEVICE = f"Device NVIDIA H200 (uuid {FIRST}) is associated"


def recorded(name: str) -> list[Event]:
    control, server = (LOGS / f"{name}.{who}.log" for who in ("control", "server"))
    return read_events(parse_lines(control.read_bytes() if control.exists() else b""), parse_lines(server.read_bytes()))


def written(who: str, pid: int, texts: Iterable[str], second: int = 0) -> bytes:
    lines = [f"[2026-11-23 09:06:{second + n // 1000:02}.{n % 1000:03} {who} {pid:5}] {t}" for n, t in enumerate(texts)]
    return "\n".join([*lines, ""]).encode()


def told(control: Iterable[str] = (), server: Iterable[str] = ()) -> list[Event]:
    """The events of lines whose times were not kept."""
    return read_events(parse_lines(written("Control", 953, control, 30)), parse_lines(written("Server", 959, server)))


def of(found: Iterable[Event], kind: str) -> list[Event]:
    return [event for event in found if event.kind == kind]


def test_an_illegal_address_has_a_culprit_and_victims() -> None:
    (fault,) = of(recorded("illegal-address"), kinds.FAULT)
    assert (fault.culprits, fault.pids, fault.device) == ((586,), (585, 586), 0)
    assert fault.age_seconds == pytest.approx(1.173, abs=1e-3)


def test_a_trap_has_victims_and_no_culprit() -> None:
    (fault,) = of(recorded("trap"), kinds.FAULT)
    assert (fault.culprits, fault.pids, fault.device) == ((), (621, 620), 0)


def test_every_client_that_came_and_left_is_told_of_with_its_gpu_and_user() -> None:
    found = recorded("illegal-address")
    assert {event.pid: event.uid for event in of(found, kinds.CONNECTED)} == {587: 2001, 586: 2001, 585: 2001}
    assert {event.pid: event.gpu for event in of(found, kinds.CONTEXT)} == {585: FIRST, 587: SECOND, 586: FIRST}
    assert sorted(event.pid for event in of(found, kinds.LEFT)) == [585, 586, 587]


def test_a_server_that_was_asked_to_go_did_not_die() -> None:
    found = recorded("illegal-address")
    assert [(event.pid, event.number) for event in of(found, kinds.SERVER_ENDED)] == [(589, 0)]
    assert not of(found, kinds.SERVER_DIED)
    assert [event.pid for event in of(found, kinds.DAEMON_ENDED)] == [583]


def test_who_came_while_a_victim_lingered_was_refused() -> None:
    found = recorded("fault-state")
    assert [(event.pid, event.number) for event in of(found, kinds.REFUSED)] == [(688, 807)]
    (fault,) = of(found, kinds.FAULT)
    assert (fault.culprits, fault.pids) == ((676,), (661, 676))


def test_a_terminated_client_and_one_that_paid_for_a_killed_one() -> None:
    """The log names the next client as the culprit (O67); what gives it away is how soon it came."""
    found = recorded("spinner")
    assert [event.pid for event in of(found, kinds.TERMINATED)] == [708]
    (fault,) = of(found, kinds.FAULT)
    assert fault.culprits == (752,)
    assert fault.age_seconds == pytest.approx(0.158, abs=1e-3)
    assert of(found, kinds.SERVER_FORCED)
    assert not of(found, kinds.SERVER_DIED), "it had clients, said that it stays, and was then forced out"


def test_of_the_49th_client_the_log_says_how_many_there_are() -> None:
    """As an H200 wrote it (O63); its pid is known where it is the only one that waits."""
    found = told(
        server=[
            "Client {PID: 1301, Context ID: 0} connected",
            "Client {PID: 1301, Context ID: 1} connected",
            "Creating worker thread for client {PID: 1301, Context ID: 1}",
            DEVICE,
            "Failed to accept new client. Maximum number of clients (48) reached.",
            "Client process 1301 disconnected",
        ]
    )
    assert [(event.pid, event.number) for event in of(found, kinds.FULL)] == [(1301, 48)]


def test_a_server_that_was_killed_died() -> None:
    """As an H200's control.log has it (O65): the status is 0, and nobody had asked."""
    control = ["Starting new server 959 for user 0", "NEW SERVER 959: Ready", "Server 959 exited with status 0"]
    assert [event.pid for event in of(told(control), kinds.SERVER_DIED)] == [959]
    assert not of(told([*control[:2], "Try shutting down server 959, backoff is disabled", control[2]]), "server died")
    busy = "Server 959 has 2 active worker threads. Server will not shutdown."
    stayed = [*control[:2], "Try shutting down server 959, backoff is disabled", busy, control[2]]
    assert of(told(stayed), kinds.SERVER_DIED), "it was asked, stayed, and was killed later"


def test_a_server_says_which_limits_it_gives() -> None:
    (ready,) = of(
        told(
            server=[
                "Active Threads Percentage set to 25.0",
                "Device pinned memory limit for device 0 set to 0x80000000 bytes",
                "Server has started",
            ]
        ),
        kinds.SERVER_READY,
    )
    assert (ready.threads, ready.memory) == ("25.0", ((0, 2 << 30),))


def test_two_contexts_made_at_once_are_not_given_each_others_gpu() -> None:
    """The line that names the GPU names no client: where two wait, none is said."""
    found = told(
        server=[
            *(f"Client {{PID: {pid}, Context ID: {context}}} connected" for pid in (1, 2) for context in (0, 1)),
            DEVICE,
            *(f"Status of client {{PID: {pid}, Context ID: 1}} is ACTIVE" for pid in (1, 2)),
        ]
    )
    assert [event.gpu for event in of(found, kinds.CONTEXT)] == ["", ""]


def test_what_came_before_explains_what_came_after(tmp_path: Path) -> None:
    """A server that was up before the step began, and dies in it, did not fail to start."""
    before = ["Starting new server 959 for user 2001", "NEW SERVER 959: Ready"]
    after = ["Server 959 exited with status 0"]
    (tmp_path / "control.log").write_bytes(written("Control", 953, before, 1) + written("Control", 953, after, 2))
    since = mktime(strptime("2026-11-23 09:06:02", "%Y-%m-%d %H:%M:%S"))
    seen = seen_since(since, GPUS, gone=False, events=events_of(DaemonLogs("", str(tmp_path))))
    assert [event.kind for event in seen.events] == [kinds.SERVER_DIED]


def test_a_server_is_free_when_it_is_ready_and_has_no_client() -> None:
    """Also one that left before; what a log does not go back to is not known."""
    ready, early, late = (Event(at, kinds.SERVER_READY, 7) for at in (10.0, 5.0, 15.0))
    came, left = Event(11.0, kinds.CONNECTED, 8), Event(12.0, kinds.LEFT, 8)
    assert free_since([ready], 13.0) == 13.0
    assert free_since([late], 13.0) == 15.0
    assert free_since([ready, came, left], 13.0) == 13.0
    assert free_since([ready, came, left], 11.5) is None
    assert free_since([early, came], 13.0) is None
    assert free_since([came, left], 13.0) is None


@given(st.binary() | st.text("[]-: 0123456789SeverContl{}PID,", max_size=200).map(str.encode))
def test_nonsense_is_nothing(data: bytes) -> None:
    for line in parse_lines(data):
        assert line.who in ("Control", "Server", "Other")


TEXTS = [
    line.text for name in ("control", "server") for line in parse_lines((LOGS / f"spinner.{name}.log").read_bytes())
]


#: Every line that a user's clients can bring about, with a number of its own.
LINES = {
    "new client": "NEW CLIENT {n} from user 20001: Server is ready, push client to 700",
    "connected": "Client {{PID: {n}, Context ID: 0}} connected",
    "context": "Client {{PID: {n}, Context ID: {n}}} connected",
    "a context of one": "Client {{PID: 7, Context ID: {n}}} connected",
    "associated": DEVICE,
    "active": "Status of client {{PID: {n}, Context ID: {n}}} is ACTIVE",
    "culprit": "Client {{PID: {n}, Context: 1}} encountered a fatal GPU error.",
    "handles": "Server is handling a fatal GPU error.",
    "victim": "Client {{PID: {n}, Context: 1}} on device 0 to be torn down",
    "full": "Failed to accept new client. Maximum number of clients 48 has been reached",
    "refused": "Failed to accept client {{PID: {n}, Context: 1}} with status 807",
    "terminated": "MPS server requesting client {{PID: {n}, Context: 1}} to terminate",
    "left": "Client process {n} disconnected",
}


@pytest.mark.parametrize("second", LINES)
@pytest.mark.parametrize("first", ["context", "a context of one", "new client", "left", "victim"])
def test_no_line_costs_more_for_those_before_it(first: str, second: str) -> None:
    """Half of one kind, half of another: each took a minute and more of quadratic time for the two pairs that were."""
    many = 8_000
    lines = [LINES[kind].format(n=n + 1) for kind in (first, second) for n in range(many)]
    start = process_time()
    found = told((), lines) if first != "new client" else told(lines[:many], lines[many:])
    step = FailedStep((Task(0, 5, 256),), is_job_script=False, memory="1024")
    explain(step, [seen_since(0, GPUS, gone=False, events=found)])
    assert process_time() - start < 1.5


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(TEXTS), st.integers(0, 80), st.text(max_size=6)), max_size=30))
def test_lines_in_any_order_and_cut_anywhere_are_read(lines: list[tuple[bool, str, int, str]]) -> None:
    control, server = (
        [f"{text[: cut or None]}{junk}" for c, text, cut, junk in lines if c is is_c] for is_c in (True, False)
    )
    for event in told(control, server):
        assert event.pid >= 0


# ------------------------------------------------------------------------------------------------- what is explained


def explained(found: list[Event], tasks: Iterable[Task], *, is_job_script: bool = False) -> list[str]:
    return explain(FailedStep(tuple(tasks), is_job_script, "-"), [seen_since(0, GPUS, gone=False, events=found)])


def suspected(found: list[Event], tasks: Iterable[Task], memory: str) -> str:
    return suspect_limit(FailedStep(tuple(tasks), False, memory), [seen_since(0, GPUS, gone=False, events=found)])


def ranks(*pids: int, status: int | None = 256) -> list[Task]:
    return [Task(rank, pid, status) for rank, pid in enumerate(pids)]


def test_the_culprit_and_those_it_took_along_go_by_rank() -> None:
    assert explained(recorded("illegal-address"), ranks(585, 586, 587)) == [
        f"rank 1 hit a GPU fault on {FIRST} and took rank 0 along: a fault ends every program on its GPU"
    ]


def test_another_steps_fault_is_told_to_its_victims_and_to_nobody_else() -> None:
    assert "process 586 hit a GPU fault" in explained(recorded("illegal-address"), ranks(585))[0]
    assert explained(recorded("illegal-address"), ranks(587)) == []


def test_without_a_culprit_nobody_is_blamed() -> None:
    (words,) = explained(recorded("trap"), ranks(620, 621, 622))
    assert words.startswith(f"a GPU fault on {FIRST} ended ranks 0-1; the MPS server does not say whose it was")


def test_the_next_after_a_killed_one_is_not_simply_blamed() -> None:
    (words,) = explained(recorded("spinner"), ranks(752))
    assert words == f"rank 0 hit a GPU fault on {FIRST}, or paid for a program that was killed inside a kernel there"


@pytest.mark.parametrize(("gpu", "leaves", "paid"), [(FIRST, "01.300", True), (FIRST, "01.700", True),
    (SECOND, "01.300", False), (FIRST, "05.000", False)])  # fmt: skip
def test_who_was_beside_a_killed_one_is_not_simply_blamed(gpu: str, leaves: str, paid: bool) -> None:
    """The server names the one that stays (O100). Another that leaves its own GPU, or later, has no part in it."""
    lines = [
        "00.900 Client {PID: 1, Context ID: 0} connected",
        "00.901 Client {PID: 1, Context ID: 1} connected",
        f"01.000 Device NVIDIA H200 (uuid {gpu}) is associated",
        "01.001 Status of client {PID: 1, Context ID: 1} is ACTIVE",
        "01.002 Client {PID: 2, Context ID: 0} connected",
        "01.002 Client {PID: 2, Context ID: 1} connected",
        f"01.003 Device NVIDIA H200 (uuid {FIRST}) is associated",
        "01.003 Status of client {PID: 2, Context ID: 1} is ACTIVE",
        "01.500 Client {PID: 2, Context: 1} encountered a fatal GPU error.",
        "01.500 Client {PID: 2, Context ID: 1} on device 0 to be torn down",
        f"{leaves} Client process 1 disconnected",
    ]
    lines.sort(key=lambda line: line[:6])
    log = "".join(f"[2026-11-28 09:06:{line[:6]} Server   959] {line[7:]}\n" for line in lines)
    found = read_events([], parse_lines(log.encode()))
    (words,) = explained(found, ranks(2))
    assert words == f"rank 0 hit a GPU fault on {FIRST}" + (
        ", or paid for a program that was killed inside a kernel there"
        if paid
        else "; no other program was on that GPU"
    )


def test_a_victim_that_leaves_in_the_same_millisecond_was_not_there_before() -> None:
    moment = "[2026-11-23 09:06:01.500 Server   959] "
    texts = [
        *(f"Client {{PID: {pid}, Context ID: {context}}} connected" for pid in (1, 2) for context in (0, 1)),
        *(f"Status of client {{PID: {pid}, Context ID: 1}} is ACTIVE" for pid in (1, 2)),
        "Client {PID: 2, Context: 1} encountered a fatal GPU error.",
        *(f"Client {{PID: {pid}, Context ID: 1}} on device 0 to be torn down" for pid in (1, 2)),
        *(f"Client process {pid} disconnected" for pid in (1, 2)),
    ]
    found = read_events([], parse_lines("\n".join(f"{moment}{text}" for text in texts).encode()))
    assert explained(found, ranks(1, 2)) == [
        f"rank 1 hit a GPU fault on {FIRST} and took rank 0 along: a fault ends every program on its GPU"
    ]


def test_programs_that_a_wrapper_started_go_by_pid() -> None:
    (words,) = explained(recorded("illegal-address"), ranks(1, 2))
    assert words.startswith(f"process 586 hit a GPU fault on {FIRST} and took process 585 along")


def test_a_dead_server_is_told() -> None:
    dead = told(["NEW SERVER 959: Ready", "Server 959 exited with status 0"])
    assert "the MPS server died" in explained(dead, ranks(1))[0]


@pytest.mark.parametrize(("log", "ended"), [([ENDED], True), ([], False), ([ENDED, STARTED], False)])
@pytest.mark.parametrize("since", [0, float("inf")], ids=["in the step", "before it"])
def test_a_daemon_that_is_gone_is_told_with_its_own_word_where_there_is_one(
    log: list[str], ended: bool, since: float
) -> None:
    """A step that fails may have begun after the daemon's end."""
    seen = seen_since(since, GPUS, gone=True, events=told(["NEW SERVER 959: Ready", *log]))
    (words,) = explain(FailedStep(tuple(ranks(1)), True, "-"), [seen])
    assert (words == VANISHED) != ended
    assert ("control daemon on this node ended (status 0)" in words) == ended


@pytest.mark.parametrize("log", [[], [ENDED]], ids=["killed", "quit"])
@pytest.mark.parametrize(("since", "again"), [(0, True), (float("inf"), False)], ids=["went on", "was gone"])
def test_what_a_step_was_told_of_a_daemon_that_is_gone_its_script_is_not(
    log: list[str], since: float, *, again: bool
) -> None:
    """Unless the daemon was there then, as its logs show."""
    events = told(log, server=["Client {PID: 1, Context ID: 0} connected"])
    seen = seen_since(since, GPUS, gone=True, events=events, explained=True)
    assert bool(explain(FailedStep(tuple(ranks(1)), True, "-"), [seen])) == again


def test_a_memory_limit_is_named_where_a_client_failed_of_itself() -> None:
    """The server does not tell who hits it (O64): it is no event of the logs, and suspected where they have none."""
    client = told(
        server=["Client {PID: 9, Context ID: 0} connected", "Status of client {PID: 9, Context ID: 1} is ACTIVE"]
    )
    said = "rank 0 failed under a memory limit (2 GiB on each GPU); if it ran out of memory, that limit is why"
    assert explained(client, ranks(9)) == []
    assert suspected(client, ranks(9), "2048") == said
    assert suspected(client, ranks(9), "-") == ""
    assert suspected(client, ranks(9, status=9), "2048") == "", "somebody killed it"
    assert suspected(client, ranks(9, status=None), "2048") == "", "it runs"
    assert suspected([], ranks(9), "2048") == "", "it was no client"


# ------------------------------------------------------------------------------------------------------ where they lie


def test_the_logs_of_a_job_are_found_whichever_way_its_daemons_were_started(tmp_path: Path) -> None:
    for part in ("", "gpu-10", "gpu-2", "gpu-x"):
        (tmp_path / "7" / part).mkdir(exist_ok=True, parents=True)
    assert [one.name for one in find_logs(str(tmp_path), 7)] == ["gpu-2", "gpu-10"]
    (tmp_path / "7/control.log").touch()
    assert [one.name for one in find_logs(str(tmp_path), 7)] == ["", "gpu-2", "gpu-10"]
    assert find_logs(str(tmp_path), 8) == []


@pytest.mark.parametrize("what", ["link", "fifo", "directory"])
def test_what_is_no_plain_file_is_not_read(tmp_path: Path, what: str) -> None:
    path = tmp_path / "server.log"
    if what == "link":
        path.symlink_to("/etc/shadow")
    elif what == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(NodeError):
        events_of(DaemonLogs("", str(tmp_path)))
