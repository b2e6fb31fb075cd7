"""``slurm-mps verify`` without a cluster: what is concluded from reports, how it is shown, and how ranks meet."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import replace as changed
from typing import TYPE_CHECKING, Any

import pytest

from slurm_mps.cli.verify import COLUMNS
from slurm_mps.slurm import hostlist
from slurm_mps.verify import look, meeting
from slurm_mps.verify.judge import memory_limit, own_memory_limit, priority, problems, thread_limit
from slurm_mps.verify.report import DaemonReport, Evidence, RankReport, parse_daemon_answer
from slurm_mps.verify.step import Step, read_step
from slurm_mps.verify.table import document, rows, summary

if TYPE_CHECKING:
    from pathlib import Path

GIB, MIB = 1024**3, 1024**2
A, B = "GPU-aaaa", "GPU-bbbb"
PIPE = "/run/pipe"


def rank(number: int, **fields: Any) -> RankReport:
    """A rank that is as it should be, but for `fields`: the ranks take turns on two GPUs of one node."""
    good = RankReport(
        rank=number,
        pid=100 + number,
        pid_namespace=1,
        pipe_directory=PIPE,
        step_gpus=2,
        threads="25",
        memory="0=8192M,1=8192M",
        ordinal=number % 2,
        visible=f"{A},{B}",
        gpu=(A, B)[number % 2],
        multiprocessors=32,
        card_multiprocessors=132 if number < 2 else 0,
        free_bytes=7 * GIB,
        total_bytes=140 * GIB,
        cpu_numa="0",
    )
    return changed(good, **fields)


def daemon(clients: dict[int, int], **fields: Any) -> DaemonReport:
    here = dict.fromkeys(clients, 1)
    return changed(DaemonReport("", clients, "25.0", {0: "8G", 1: "8G"}, (A, B), "0", here), **fields)


def evidence(*ranks: RankReport, clients: dict[int, int] | None = None, size: int = 0, **fields: Any) -> Evidence:
    """What is known when the daemon has these clients; all of the ranks, on server 7, unless told otherwise."""
    known = {one.pid: 7 for one in ranks} if clients is None else clients
    return Evidence("n1", tuple(range(size or len(ranks))), ranks, {PIPE: daemon(known, **fields)}, 10)


def four(*changes: tuple[int, dict[str, Any]]) -> list[RankReport]:
    by_rank = dict(changes)
    return [rank(number, **by_rank.get(number, {})) for number in range(4)]


def test_all_well_is_no_problem() -> None:
    """Clients within their limits, on all GPUs, with one server."""
    assert problems(evidence(*four())) == []


def test_a_rank_that_no_daemon_knows_runs_without_mps() -> None:
    """Its variables are as they should be; the daemon says otherwise, and its neighbour on the GPU is told from it."""
    found = problems(evidence(*four(), clients={100: 7, 101: 7, 102: 7}))
    assert found == [
        f"rank 3 runs without MPS: the control daemon of {PIPE} lists no such client",
        f"rank 1 on {B} has a server, rank 3 does not",
    ]


def test_ranks_on_one_gpu_with_different_servers_are_told_apart() -> None:
    """The larger group is the one that shares."""
    ranks = [rank(number, gpu=A) for number in (0, 1, 2, 3)]
    found = problems(evidence(*ranks, rank(4), rank(5), clients={100: 7, 101: 7, 102: 7, 103: 8, 104: 8, 105: 7}))
    assert found == [f"ranks 0-2 on {A} share one server, ranks 3-4 do not"]


def test_a_wrong_pipe_directory_is_the_reason() -> None:
    """Said once for all the ranks that have it, without control characters."""
    reason = {"pipe_problem": "CUDA_MPS_PIPE_DIRECTORY=/x\x1b does not exist", "pipe_directory": "/x\x1b"}
    found = problems(evidence(*four((1, reason), (2, reason)), clients={100: 7, 103: 7}))
    assert found[0] == "ranks 1-2 run without MPS: CUDA_MPS_PIPE_DIRECTORY=/x? does not exist"


def test_a_fault_of_the_node_is_the_reason() -> None:
    """Where a site lets jobs run without MPS no variable is wrong; what another node's fault left is no reason."""
    reason = {"pipe_problem": "CUDA_MPS_PIPE_DIRECTORY=/dev/null does not exist", "pipe_directory": "/dev/null"}
    faulty = {**reason, "node_fault": "no daemon\x1b here"}
    found = problems(evidence(*four((1, faulty), (2, {"node_fault": "stale"})), clients={100: 7, 103: 7}))
    assert found[:2] == [
        "rank 1 runs without MPS: no daemon? here; this site lets jobs run without MPS on a faulty node",
        f"rank 2 runs without MPS: the control daemon of {PIPE} lists no such client",
    ]


@pytest.mark.parametrize(
    ("said", "concluded"),
    [
        ("Cannot find MPS control daemon process", "ranks 0-3 run without MPS: the control daemon of {} is gone"),
        ("no answer", "cannot tell whether ranks 0-3 have MPS: the control daemon of {} does not answer"),
    ],
)
def test_a_daemon_that_does_not_answer_comes_first(said: str, concluded: str) -> None:
    """The cause before what follows from it; a rank that found its GPU taken is one of those without MPS."""
    ranks = four((3, {"error": "cuCtxCreate_v2: X (46)", "multiprocessors": 0, "free_bytes": 0}))
    assert problems(evidence(*ranks, clients={}, problem=said)) == [
        f"the control daemon of {PIPE} does not answer: {said}",
        f"rank 3 cannot use {B}: cuCtxCreate_v2: X (46)",
        concluded.format(PIPE),
    ]


@pytest.mark.parametrize(("percent", "sms"), [("1", 8), ("3", 8), ("10", 12), ("12.5", 16), ("25", 32), ("99", 130)])
def test_what_the_driver_makes_of_a_percentage_is_no_excess(percent: str, sms: int) -> None:
    """It rounds down, but to no less than 8 SMs (O10)."""
    one = rank(0, threads=percent, multiprocessors=sms, step_gpus=1)
    assert problems(evidence(one, threads="100.0")) == []


def test_more_sms_than_the_limit_are_a_problem() -> None:
    """Whoever set the lowest limit: the task, the plugin or the daemon."""
    ranks = four((2, {"multiprocessors": 132}))
    (problem,) = problems(evidence(*ranks))
    assert problem.startswith("rank 2 has 132 of 132 SMs although limited to 25 %: the server does not apply the limit")


def test_more_memory_than_the_limit_is_a_problem() -> None:
    """Free memory above the limit means that the limit does not hold (O16)."""
    ranks = four((2, {"free_bytes": 100 * GIB}))
    (problem,) = problems(evidence(*ranks))
    assert problem.startswith("rank 2 has too much memory although limited to 8 GiB: ")
    assert problem.endswith("; 100 GiB are free")


def test_a_limit_that_the_daemon_alone_says_may_be_rounded_down() -> None:
    """To GiB (O95): what is free of 8.9 GiB is within what it calls 8G."""
    rounded = {"memory": "", "set_memory": "", "free_bytes": 8 * GIB + 400 * MIB}
    assert problems(evidence(*four(*((number, rounded) for number in range(4))))) == []


@pytest.mark.parametrize("value", ["junk", "2=1G", "GPU-cccc=1G", "0=8X", "0=1G,7=1G", "0=0G"])
def test_a_memory_limit_that_lifts_all_limits_is_a_problem(value: str) -> None:
    """What the driver cannot use makes it drop every limit (O12)."""
    (problem,) = problems(evidence(*four((1, {"memory": value, "free_bytes": 139 * GIB}))))
    assert problem == (
        "rank 1 has no memory limit although limited to 8 GiB: "
        f"the driver cannot use CUDA_MPS_PINNED_DEVICE_MEM_LIMIT={value}; 139 GiB are free"
    )


@pytest.mark.parametrize(
    ("value", "limit"),
    [("", None), ("0=4G", None), ("1=4G", 4 * GIB), (f"{B}=512M", GIB // 2), ("0=1g,1=2GiB", 2 * GIB)],
)
def test_own_memory_limit_is_that_of_the_ranks_device(value: str, limit: int | None) -> None:
    """By ordinal or UUID, as the driver reads it."""
    assert own_memory_limit(rank(1, memory=value)) == limit


def test_the_lowest_limit_counts() -> None:
    """Of the task's environment, what the plugin had set there, and the daemon; what is no limit is none."""
    one = rank(0, threads="50", set_threads="auto", memory="0=6G", set_memory="0=8192M")
    assert thread_limit(one, daemon({})) == 25
    assert thread_limit(one, None) == 50
    assert memory_limit(one, daemon({}, memory={0: "2G"})) == 2 * GIB
    assert memory_limit(one, None) == 6 * GIB
    assert memory_limit(changed(one, memory=""), None) == 8 * GIB
    assert memory_limit(changed(one, memory="", set_memory=""), None) is None
    assert memory_limit(changed(one, memory="0=1500M"), daemon({}, memory={0: "1G"})) == 1500 * MIB  # rounded (O95)
    assert memory_limit(changed(one, memory="0=2047M"), daemon({}, memory={0: "2G"})) == 2047 * MIB


@pytest.mark.parametrize(
    ("own", "default", "said"),
    [("0", "1", "normal"), ("", "1", "low"), ("1", "0", "low"), ("", "0", "normal"), ("7", "", None)],
)
def test_a_clients_own_priority_goes_before_the_daemons(own: str, default: str, said: str | None) -> None:
    """Only normal where the job asked for low is more than it may have."""
    found = evidence(*four((1, {"priority": own})), priority=default)
    assert priority(found.ranks[1], daemon({}, priority=default)) == said
    raised = "rank 1 has normal priority although the job asked for low: CUDA_MPS_CLIENT_PRIORITY=0 was set"
    assert problems(found) == ([raised] if (own, default) == ("0", "1") else [])


@pytest.mark.parametrize("fields", [{"step_gpus": 1}, {"step_gpus": 0}])
def test_a_step_with_one_gpu_is_no_pile(fields: dict[str, Any]) -> None:
    """Nor is one of which nothing is known."""
    assert problems(evidence(*[rank(number, gpu=A, **fields) for number in range(4)])) == []


def test_table_is_grouped_by_gpu() -> None:
    """And says none where a rank is no client."""
    found = evidence(*four(), clients={100: 7, 101: 7, 102: 7})
    cells = rows(found)
    assert [(row["node"], row["gpu"], row["rank"]) for row in cells] == [
        ("n1", A, 0),
        ("n1", A, 2),
        ("n1", B, 1),
        ("n1", B, 3),
    ]
    assert cells[3]["server"] == "none"
    numbers = {"server": 7, "sms": "32/132", "free": 7168, "limit": 8192, "cpu_numa": "0", "gpu_numa": ""}
    assert numbers.items() <= cells[1].items()
    assert {column.name for column in COLUMNS} == cells[1].keys()
    assert summary(found) == "4 ranks, all clients, each GPU's ranks share one server"


def test_document_is_json() -> None:
    """With null for what is not there."""
    found = evidence(*four(), clients={100: 7})
    told = json.loads(json.dumps(document(found, ["x"])))
    assert (told["node"], told["problems"], len(told["ranks"])) == ("n1", ["x"], 4)
    assert [one["server"] for one in told["ranks"]] == [7, None, None, None]
    assert told["daemons"][0]["clients"] == 1


# -------------------------------------------------------------------------------------------------- what is read


def test_daemon_answer_is_read_with_its_empty_answers() -> None:
    """Device 0 has a limit, device 1 none, and both answers come in one stream (O4, O7)."""
    lines = [
        "Device Ordinal,PCI IDs,UUID,Name,Attributes",
        f"0,0000:06:00.00,{A},Simulated H200,N/A",
        "PID       ID        SERVER         DEVICE                    NAMESPACE      COMMAND",
        "212       1         166            GPU-51000000-99a9-4f0d    4026531836     python3 x",
        "1",
        "25.0",
        "8G",
        "25.0",
        "No default pinned memory limit set for the device!",
        "25.0",
        "512M",
    ]
    answer = parse_daemon_answer(lines)
    assert answer == DaemonReport("", {212: 166}, "25.0", {0: "8G", 2: "512M"}, (A,), "1", {212: 4026531836})


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", ["n1"]),
        ("n[1-2,07-09],x", ["n1", "n2", "n07", "n08", "n09", "x"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("r[1-2]n[3,5].cl", ["r1n3.cl", "r1n5.cl", "r2n3.cl", "r2n5.cl"]),
    ],
)
def test_host_lists_are_expanded(text: str, hosts: list[str]) -> None:
    """As ``scontrol show hostnames`` does."""
    assert hostlist.expand_hosts(text) == hosts


@pytest.mark.parametrize(
    "text", ["", "n[1-", "n1]", "n[a]", "n[3-1]", "n[1-99999999]", "a,,b", "n[[1]]", "n[1-300]m[1-300]"]
)
def test_what_is_no_host_list_is_refused(text: str) -> None:
    """Also one that would fill the memory."""
    with pytest.raises(ValueError, match=r"host list|numbers|brackets|hosts"):
        hostlist.expand_hosts(text)


def test_numbers_are_joined_and_expanded() -> None:
    """As the kernel writes CPU lists."""
    assert hostlist.join_numbers([3, 0, 1, 2, 8]) == "0-3,8"
    assert hostlist.expand_numbers("0-3,8\n") == [0, 1, 2, 3, 8]
    assert hostlist.expand_numbers("\n") == []


STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_GTIDS": "2,5,7",
    "SLURM_STEP_NODELIST": "n[1-2]",
}


def test_a_task_knows_its_step() -> None:
    """And which ranks are on its node, however Slurm dealt them out."""
    step = read_step(STEP, "here")
    assert step
    assert (step.rank, step.node_ranks, step.nodes, step.node) == (5, (2, 5, 7), ("n1", "n2"), "here")
    assert (step.is_first, step.name, step.job_ids) == (False, "7.0.2", frozenset("7"))


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_STEP_ID": None},
        {"SLURM_STEP_ID": "-5"},
        {"SLURM_PROCID": "x"},
        {"SLURM_PROCID": "4"},
        {"SLURM_GTIDS": ""},
    ],
)
def test_what_is_no_task_has_no_step(change: dict[str, str | None]) -> None:
    """A batch script has no step id."""
    assert read_step({k: v for k, v in {**STEP, **change}.items() if v is not None}, "here") is None


@pytest.mark.parametrize("kind", ["HET", "PACK"])
def test_a_component_knows_the_ids_of_its_job(kind: str) -> None:
    """Its SLURM_JOB_ID is the leader's; ids that another job's script left in the environment are not its own."""
    ids = {f"SLURM_JOB_ID_{kind}_GROUP_{number}": str(7 + number) for number in range(3)}
    step = read_step(STEP | ids, "here")
    stale = read_step(STEP | ids | {"SLURM_JOB_ID": "30"}, "here")
    assert step
    assert stale
    assert (step.job_ids, stale.job_ids) == (frozenset("789"), frozenset({"30"}))


def test_numa_nodes_of_a_mask(tmp_path: Path) -> None:
    """Every node of which a CPU is in the mask; nothing where there is no such directory."""
    for node, cpus in {"node0": "0-3", "node1": "4-7", "node2": ""}.items():
        (tmp_path / node).mkdir()
        (tmp_path / node / "cpulist").write_text(f"{cpus}\n")
    (tmp_path / "online").write_text("0-2\n")
    assert look.cpu_numa({3, 4}, str(tmp_path)) == "0-1"
    assert look.cpu_numa({0}, str(tmp_path / "none")) == ""


def test_pipe_directories_that_lead_nowhere(tmp_path: Path) -> None:
    """Missing, empty, or with a socket of whoever."""
    assert look.pipe_problem(f"{tmp_path}/x") == f"CUDA_MPS_PIPE_DIRECTORY={tmp_path}/x does not exist"
    assert look.pipe_problem(str(tmp_path)).endswith("has no control daemon")
    (tmp_path / "control").touch()
    assert look.pipe_problem(str(tmp_path)) == ""


# ------------------------------------------------------------------------------------------------ how ranks meet


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the ranks meet: the first of two places that can be written to."""
    monkeypatch.setattr(meeting, "PLACES", (f"{tmp_path}/none", str(tmp_path)))
    return tmp_path


def step_of(number: int, size: int = 3) -> Step:
    task = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number), "SLURM_GTIDS": ",".join(map(str, range(size)))}
    step = read_step(STEP | task, "n1")
    assert step
    return step


def soon(seconds: float = 5) -> float:
    return time.monotonic() + seconds


def attend(number: int, claimed: list[int]) -> None:
    """A rank that reports, and leaves when the meeting is over."""
    found = meeting.find_meeting(step_of(number), soon())
    if found.claim(A):
        claimed.append(number)
    found.put(rank(number))
    found.wait(soon())


def test_ranks_meet_whoever_comes_first(place: Path) -> None:
    """Their reports arrive as they were; one of them claims the GPU; they stay until the first rank has done."""
    claimed: list[int] = []
    ranks = [threading.Thread(target=attend, args=(number, claimed)) for number in (1, 2)]
    ranks[0].start()
    with meeting.open_meeting(step_of(0)) as held:
        ranks[1].start()
        reports = held.collect((1, 2), soon())
        there = [one.is_alive() for one in ranks]
    for one in ranks:
        one.join(5)
    assert reports == [rank(1), rank(2)]
    assert (there, [one.is_alive() for one in ranks], len(claimed)) == ([True] * 2, [False] * 2, 1)
    assert list(place.iterdir()) == []


@pytest.mark.usefixtures("place")
def test_who_does_not_come_is_waited_for_until_the_deadline() -> None:
    """The others' reports are there all the same."""
    other = threading.Thread(target=attend, args=(2, []))
    other.start()
    with meeting.open_meeting(step_of(0)) as held:
        start = time.monotonic()
        reports = held.collect((1, 2), soon(0.5))
        took = time.monotonic() - start
    other.join(5)
    assert (reports, 0.5 <= took < 3) == ([rank(2)], True)


def test_a_first_rank_that_is_killed_holds_nobody_up(place: Path) -> None:
    """The kernel frees its lock: the others leave, and clear up. What a killed run left behind is no meeting."""
    first = os.fork()
    if first == 0:
        try:
            with meeting.open_meeting(step_of(0)):
                time.sleep(60)
        finally:
            os._exit(1)
    found = meeting.find_meeting(step_of(1), soon())
    assert not found.is_over()
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    with pytest.raises(meeting.MeetingError, match="rank 0, which collects this node's reports, has no directory"):
        meeting.find_meeting(step_of(2), soon(0.2))
    found.wait(soon())
    assert list(place.iterdir()) == []


def test_a_rank_with_a_pid_of_its_containers_is_known_by_its_namespace() -> None:
    """Where the daemon prints other pids, and as many clients are in it as ranks; a rank that is no client is named."""
    ranks = four((0, {"pid": 1, "pid_namespace": 2}), (1, {"pid": 1, "pid_namespace": 3}))
    clients = {102: 7, 103: 7, 1: 7, 205: 7}
    known = {102: 1, 103: 1, 1: 3, 205: 2}
    assert problems(evidence(*ranks, clients=clients, namespaces=known)) == []
    (words, *_) = problems(evidence(*ranks, clients=clients, namespaces={**known, 205: 1}))
    assert words == f"rank 0 runs without MPS: the control daemon of {PIPE} lists no such client"


def test_what_only_looks_like_a_meeting_is_passed_by(place: Path) -> None:
    """Links, files and fifos of the right name; those of another step's, or of another node's ranks of this one."""
    prefix = "slurm-mps-verify-7.0.0-"
    (place / "elsewhere").mkdir()
    (place / f"{prefix}link").symlink_to(place / "elsewhere")
    (place / f"{prefix}file").touch()
    os.mkfifo(place / f"{prefix}fifo")
    other_node = changed(step_of(0), name="7.0.3")
    with meeting.open_meeting(other_node), pytest.raises(meeting.MeetingError):
        meeting.find_meeting(step_of(1), soon(0.2))


def test_no_place_to_meet_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "PLACES", ("/nonexistent", "/proc"))
    with (
        pytest.raises(meeting.MeetingError, match=r"no place for their reports \(/nonexistent: No such file or"),
        meeting.open_meeting(step_of(0)),
    ):
        pass


@pytest.mark.parametrize("lost", ["", "100"])
def test_a_steps_own_limit_that_the_program_lost(lost: str) -> None:
    """auto and a step's lower limits stand nowhere but in the program's environment."""
    changed = {"threads": lost, "set_threads": "25", "multiprocessors": 132}
    found = evidence(*four((2, changed)), threads="100.0")
    assert problems(found) == [
        (
            "rank 2 has 132 of 132 SMs although limited to 25 %: the step's CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=25 "
            "was changed or removed before the program started"
        )
    ]


@pytest.mark.parametrize("lost", ["", "0=100G"])
def test_a_steps_own_memory_limit_that_the_program_lost(lost: str) -> None:
    changed = {"memory": lost, "set_memory": "0=8192M", "free_bytes": 70 * GIB}
    found = evidence(*four((2, changed)), memory={})
    assert problems(found) == [
        (
            "rank 2 has too much memory although limited to 8 GiB: the step's CUDA_MPS_PINNED_DEVICE_MEM_LIMIT=0=8192M "
            "was changed or removed before the program started; 70 GiB are free"
        )
    ]


def test_ranks_that_were_told_another_jobs_daemon() -> None:
    assert problems(evidence(*four((1, {"other_job": "12"}), (3, {"other_job": "12"})))) == [
        "ranks 1,3 have the pipe directory of job 12: the environment was inherited from that job"
    ]


@pytest.mark.parametrize(
    ("directory", "owner"),
    [("/run/slurm-mps/jobs/12/pipe", "12"), ("/run/slurm-mps/jobs/13/gpu-0", "13"), ("/tmp/nvidia-mps", ""), ("", "")],
)
def test_whose_daemon_it_is(directory: str, owner: str) -> None:
    assert look.owner_of(directory) == owner


@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        ({}, False),
        ({"SLURM_SPANK_MPS": "1"}, True),
        ({"CUDA_MPS_SET_BY_SLURM": "CUDA_VISIBLE_DEVICES=GPU-1"}, True),
        ({"SLURM_MPS_NODE_FAULT": "no daemon"}, True),
        ({"CUDA_MPS_PIPE_DIRECTORY": "/run/slurm-mps/jobs/7/pipe"}, True),
        ({"CUDA_MPS_PIPE_DIRECTORY": "/run/slurm-mps/jobs/8/pipe"}, False),
        ({"CUDA_MPS_PIPE_DIRECTORY": "/tmp"}, False),
    ],
)
def test_whether_a_job_asked_for_mps(environment: dict[str, str], asked: bool) -> None:
    """Whatever shows it: only sbatch's and salloc's jobs have the option in their tasks' environment."""
    assert look.asked_for_mps(step_of(0), environment) is asked
