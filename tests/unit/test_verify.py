"""``slurm-mps verify`` without a cluster: what is concluded from reports, how it is shown, and how ranks meet."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from slurm_mps.cli.verify import COLUMNS
from slurm_mps.record import replace as changed
from slurm_mps.slurm import hostlist
from slurm_mps.verify import link, look, report
from slurm_mps.verify.judge import Findings, memory_limit, own_memory_limit, problems, thread_limit
from slurm_mps.verify.report import DaemonAnswer, Report
from slurm_mps.verify.step import Step, read_step
from slurm_mps.verify.table import document, rows, summary

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1024**3
A, B = "GPU-aaaa", "GPU-bbbb"
PIPE = "/run/pipe"


def rank(number: int, **fields: Any) -> Report:
    """A rank that is as it should be, but for `fields`: the ranks take turns on two GPUs of one node."""
    gpu = (A, B)[number % 2]
    good = Report(
        rank=number,
        host="n1",
        pid=100 + number,
        error="",
        no_driver=False,
        pipe_directory=PIPE,
        pipe_problem="",
        asked=True,
        step_gpus=2,
        threads="25",
        memory="0=8192M,1=8192M",
        job_threads="25",
        job_memory="8G",
        ordinal=number % 2,
        visible=f"{A},{B}",
        gpu=gpu,
        multiprocessors=32,
        free_bytes=7 * GIB,
        total_bytes=140 * GIB,
        cpu_numa="0",
        gpu_numa="",
    )
    return changed(good, **fields)


def daemon(clients: dict[int, int], **fields: Any) -> DaemonAnswer:
    return changed(DaemonAnswer("", clients, "25.0", {0: "8G", 1: "8G"}, (A, B)), **fields)


def findings(*ranks: Report, clients: dict[int, int] | None = None, size: int = 0, **fields: Any) -> Findings:
    """What is found when the daemon has these clients; all of the ranks, on server 7, unless told otherwise."""
    known = {one.pid: 7 for one in ranks} if clients is None else clients
    return Findings(ranks, {("n1", PIPE): daemon(known, **fields)}, {A: 132, B: 132}, size or len(ranks), 10)


def four(*changes: tuple[int, dict[str, Any]]) -> list[Report]:
    by_rank = dict(changes)
    return [rank(number, **by_rank.get(number, {})) for number in range(4)]


def test_all_well_is_no_problem() -> None:
    """Clients within their limits, on all GPUs, with one server."""
    assert problems(findings(*four())) == []


def test_a_rank_that_no_daemon_knows_runs_without_mps() -> None:
    """Its variables are as they should be; the daemon says otherwise, and its neighbour on the GPU is told from it."""
    found = problems(findings(*four(), clients={100: 7, 101: 7, 102: 7}))
    assert found == [
        f"rank 3 runs without MPS: the control daemon of {PIPE} lists no such client",
        f"rank 1 on {B} of n1 has a server, rank 3 does not",
    ]


def test_ranks_on_one_gpu_with_different_servers_are_told_apart() -> None:
    """The larger group is the one that shares."""
    ranks = [rank(number, gpu=A) for number in (0, 1, 2, 3)]
    found = problems(findings(*ranks, rank(4), rank(5), clients={100: 7, 101: 7, 102: 7, 103: 8, 104: 8, 105: 7}))
    assert found == [f"ranks 0-2 on {A} of n1 share one server, ranks 3-4 do not"]


def test_missing_ranks_are_named() -> None:
    """Those that never reported, with the time they had."""
    assert problems(findings(rank(0), rank(1), size=5)) == ["ranks 2-4 did not report within 10 s"]


def test_a_wrong_pipe_directory_is_the_reason() -> None:
    """Said once for all the ranks that have it, without control characters."""
    reason = {"pipe_problem": "CUDA_MPS_PIPE_DIRECTORY=/x\x1b does not exist", "pipe_directory": "/x\x1b"}
    found = problems(findings(*four((1, reason), (2, reason)), clients={100: 7, 103: 7}))
    assert found[0] == "ranks 1-2 run without MPS: CUDA_MPS_PIPE_DIRECTORY=/x? does not exist"


def test_a_fault_of_the_node_is_the_reason() -> None:
    """Where a site lets jobs run without MPS no variable is wrong; what another node's fault left is no reason."""
    reason = {"pipe_problem": "CUDA_MPS_PIPE_DIRECTORY=/dev/null does not exist", "pipe_directory": "/dev/null"}
    faulty = {**reason, "node_fault": "no daemon\x1b here"}
    found = problems(findings(*four((1, faulty), (2, {"node_fault": "stale"})), clients={100: 7, 103: 7}))
    assert found[:2] == [
        "rank 1 runs without MPS: no daemon? here; this site then lets a job run without",
        f"rank 2 runs without MPS: the control daemon of {PIPE} lists no such client",
    ]


def test_a_job_that_did_not_ask_is_told() -> None:
    """The commonest reason of all."""
    bare = {"pipe_problem": "CUDA_MPS_PIPE_DIRECTORY is not set", "asked": False, "threads": "", "job_threads": ""}
    one = rank(0, **bare, job_memory="", memory="", pipe_directory="/tmp/nvidia-mps", step_gpus=1)
    assert problems(findings(one)) == [
        "rank 0 runs without MPS: CUDA_MPS_PIPE_DIRECTORY is not set; this job did not ask for MPS (--mps)"
    ]


@pytest.mark.parametrize(
    ("said", "concluded"),
    [
        ("Cannot find MPS control daemon process", "ranks 0-3 run without MPS: the control daemon of {} is gone"),
        ("no answer", "nobody can say whether ranks 0-3 have MPS: the control daemon of {} does not answer"),
    ],
)
def test_a_daemon_that_does_not_answer_comes_first(said: str, concluded: str) -> None:
    """The cause before what follows from it; a rank that found its GPU taken is one of those without MPS."""
    ranks = four((3, {"error": "cuCtxCreate_v2: X (46)", "multiprocessors": 0, "free_bytes": 0}))
    assert problems(findings(*ranks, clients={}, problem=said)) == [
        f"the control daemon of {PIPE} on n1 does not answer: {said}",
        f"rank 3 cannot use {B}: cuCtxCreate_v2: X (46)",
        concluded.format(PIPE),
    ]


@pytest.mark.parametrize(("percent", "sms"), [("1", 8), ("3", 8), ("10", 12), ("12.5", 16), ("25", 32), ("99", 130)])
def test_what_the_driver_makes_of_a_percentage_is_no_excess(percent: str, sms: int) -> None:
    """It rounds down, but to no less than 8 SMs (O10)."""
    one = rank(0, threads=percent, job_threads="", multiprocessors=sms, step_gpus=1)
    assert problems(findings(one, threads="100.0")) == []


def test_more_sms_than_the_limit_are_a_problem() -> None:
    """Whoever set the lowest limit: the task, the job or the daemon."""
    ranks = four((2, {"multiprocessors": 132}))
    (problem,) = problems(findings(*ranks))
    assert problem.startswith("rank 2 has 132 of 132 SMs although limited to 25 %: the server does not keep to it")


def test_more_memory_than_the_limit_is_a_problem() -> None:
    """Free memory above the limit means that the limit does not hold (O16)."""
    ranks = four((2, {"free_bytes": 100 * GIB}))
    (problem,) = problems(findings(*ranks))
    assert problem.startswith("rank 2 has too much memory although limited to 8 GiB: ")
    assert problem.endswith("; 100 GiB are free")


@pytest.mark.parametrize("value", ["junk", "2=1G", "GPU-cccc=1G", "0=8X", "0=1G,7=1G", "0=0G"])
def test_a_memory_limit_that_lifts_all_limits_is_a_problem(value: str) -> None:
    """What the driver cannot use makes it drop every limit (O12)."""
    (problem,) = problems(findings(*four((1, {"memory": value, "free_bytes": 139 * GIB}))))
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
    """Of the task's environment, the job's and the daemon's; what is no limit is none."""
    one = rank(0, threads="50", job_threads="auto", memory="0=6G", job_memory="0:8G,1:4G")
    assert thread_limit(one, daemon({})) == 25
    assert thread_limit(one, None) == 50
    assert memory_limit(one, daemon({}, memory={0: "2G"})) == 2 * GIB
    assert memory_limit(one, None) == 6 * GIB
    assert memory_limit(changed(one, memory=""), None) is None


def test_a_pile_is_told_with_what_is_unused() -> None:
    """All ranks of a node on one GPU, though the step has two there."""
    ranks = [rank(number, gpu=A, ordinal=0) for number in range(4)]
    assert problems(findings(*ranks)) == [
        f"all 4 ranks of n1 are on {A}, although the step has 2 GPUs there: nobody uses {B}"
    ]


@pytest.mark.parametrize("fields", [{"step_gpus": 1}, {"step_gpus": 0}])
def test_a_step_with_one_gpu_is_no_pile(fields: dict[str, Any]) -> None:
    """Nor is one of which nothing is known."""
    assert problems(findings(*[rank(number, gpu=A, **fields) for number in range(4)])) == []


def test_table_is_grouped_by_node_and_gpu() -> None:
    """And says none where a rank is no client."""
    found = findings(*four((3, {"host": "n0"})))
    cells = rows(found)
    assert [(row["node"], row["gpu"], row["rank"]) for row in cells] == [
        ("n0", B, 3),
        ("n1", A, 0),
        ("n1", A, 2),
        ("n1", B, 1),
    ]
    assert cells[0]["server"] == "none"
    numbers = {"server": 7, "sms": "32/132", "free": 7168, "limit": 8192, "cpu_numa": "0", "gpu_numa": ""}
    assert numbers.items() <= cells[1].items()
    assert {column.name for column in COLUMNS} == cells[1].keys()
    assert summary(found) == "4 ranks, all clients, each GPU's ranks share one server"


def test_document_is_json() -> None:
    """With null for what is not there."""
    found = findings(*four(), clients={100: 7})
    told = json.loads(json.dumps(document(found, ["x"])))
    assert (told["problems"], len(told["ranks"])) == (["x"], 4)
    assert [one["server"] for one in told["ranks"]] == [7, None, None, None]
    assert told["daemons"][0]["clients"] == 1


# -------------------------------------------------------------------------------------------------- what is read


def test_a_report_is_read_as_it_was_written() -> None:
    """Through JSON."""
    assert report.from_message(json.loads(json.dumps(report.to_message(rank(3))))) == rank(3)


@pytest.mark.parametrize(
    "change",
    [{"rank": "3"}, {"rank": -1}, {"rank": True}, {"extra": 1}, {"host": None}, {"host": "x" * 5000}, {"asked": 1}],
)
def test_anything_else_is_no_report(change: dict[str, Any]) -> None:
    """Other fields, other types, negative numbers, endless texts."""
    with pytest.raises(ValueError, match=r"report|no int|no str|no bool"):
        report.from_message({**report.to_message(rank(3)), **change})


def test_daemon_answer_is_read_with_its_empty_answers() -> None:
    """Device 0 has a limit, device 1 none, and both answers come in one stream (O4, O7)."""
    lines = [
        "Device Ordinal,PCI IDs,UUID,Name,Attributes",
        f"0,0000:06:00.00,{A},Simulated H200,N/A",
        "PID       ID        SERVER         DEVICE                    NAMESPACE      COMMAND",
        "212       1         166            GPU-51000000-99a9-4f0d    4026531836     python3 x",
        "25.0",
        "8G",
        "25.0",
        "No default pinned memory limit set for the device!",
        "25.0",
        "512M",
    ]
    answer = report.parse_daemon_answer(lines)
    assert answer == DaemonAnswer("", {212: 166}, "25.0", {0: "8G", 2: "512M"}, (A,))
    assert report.daemon_from_message(json.loads(json.dumps(report.daemon_message(answer)))) == answer


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
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "9",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
    "SLURM_SRUN_COMM_HOST": "10.0.0.1",
}


def test_a_task_knows_its_step() -> None:
    """The step's own count goes before the job's."""
    step = read_step(STEP, "here")
    assert step
    assert (step.rank, step.size, step.hosts, step.host) == (1, 2, ("n1", "n2"), "here")
    assert step.launch_addresses == ("10.0.0.1",)


@pytest.mark.parametrize(
    "change", [{"SLURM_STEP_ID": None}, {"SLURM_STEP_ID": "-5"}, {"SLURM_PROCID": "x"}, {"SLURM_PROCID": "2"}]
)
def test_what_is_no_task_has_no_step(change: dict[str, str | None]) -> None:
    """A batch script has no step id."""
    assert read_step({k: v for k, v in {**STEP, **change}.items() if v is not None}, "here") is None


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


def step_of(number: int, size: int, *hosts: str, job: str = "7") -> Step:
    """A task of a step; the second host's tasks reach the first over the loopback's address."""
    found = read_step(
        {
            **STEP,
            "SLURM_JOB_ID": job,
            "SLURM_PROCID": str(number),
            "SLURM_STEP_NUM_TASKS": str(size),
            "SLURM_STEP_NODELIST": ",".join(hosts),
            "SLURM_NODEID": str(0 if len(hosts) == 1 else min(number, 1)),
            "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
            "SLURM_SRUN_COMM_HOST": "",
        },
        hosts[0],
    )
    assert found
    return found


def soon(seconds: float = 5) -> float:
    return time.monotonic() + seconds


def speak(step: Step, heard: list[int]) -> None:
    """A rank that says its number and hears rank 0's answer."""
    way = link.open_link(step, STEP, soon())
    way.gather({"rank": step.rank}, soon())
    heard.append(way.broadcast({}, soon())["sum"])
    way.close()


@pytest.mark.parametrize("hosts", [("n1",), ("localhost", "n2")], ids=["one node", "two nodes"])
def test_ranks_meet_and_hear_rank_0(hosts: tuple[str, ...]) -> None:
    """Whoever comes first; on one node and over TCP."""
    heard: list[int] = []
    ranks = [threading.Thread(target=speak, args=(step_of(n, 5, *hosts), heard)) for n in range(1, 5)]
    for one in ranks[:2]:
        one.start()
    root = link.open_link(step_of(0, 5, *hosts), STEP, soon())
    for one in ranks[2:]:
        one.start()
    messages = root.gather({"rank": 0}, soon())
    root.broadcast({"sum": sum(message["rank"] for message in messages.values())}, soon())
    for one in ranks:
        one.join(5)
    root.close()
    assert (sorted(messages), heard) == ([0, 1, 2, 3, 4], [10] * 4)


def test_what_rank_0_says_in_one_breath_is_heard_word_by_word() -> None:
    """Both lines come as one chunk."""
    others: list[link.Link] = []
    step = step_of(1, 2, "n1", job="10")
    opener = threading.Thread(target=lambda: others.append(link.open_link(step, STEP, soon())))
    opener.start()
    root = link.open_link(step_of(0, 2, "n1", job="10"), STEP, soon())
    root.gather({}, soon(0.5))
    opener.join(5)
    root.broadcast({"word": 1}, soon())
    root.broadcast({"word": 2}, soon())
    assert [others[0].broadcast({}, soon(1)) for _ in range(2)] == [{"word": 1}, {"word": 2}]
    others[0].close()
    root.close()


def test_a_rank_that_never_came_is_waited_for_once() -> None:
    """Else it would give up, and with srun -K end the step, when rank 0 is about to print."""
    heard: list[int] = []
    other = threading.Thread(target=speak, args=(step_of(1, 3, "n1", job="11"), heard))
    other.start()
    root = link.open_link(step_of(0, 3, "n1", job="11"), STEP, soon())
    assert sorted(root.gather({}, soon(0.5))) == [0, 1]
    root.broadcast({"sum": 1}, soon())
    other.join(5)
    start = time.monotonic()
    root.gather({}, soon())
    root.close()
    assert time.monotonic() - start < 2


def test_strangers_and_second_comers_are_not_heard() -> None:
    """Nonsense, a wrong step, a rank out of range, endless text, and one that says to be a rank that has come."""
    step = step_of(0, 3, "localhost", "n2")
    place = link.meeting(step, STEP, os.getuid())
    root = link.open_link(step, STEP, soon())
    hello = {"rank": 1, "step": place.watchword}
    first = [b"junk\n", b"[1]\n", b'{"rank": 1}\n', json.dumps({**hello, "rank": 3}).encode() + b"\n", b"x" * 300000]
    good = json.dumps(hello).encode() + b'\n{"said": 1}\n'
    second = json.dumps(hello).encode() + b'\n{"said": 2}\n'
    port = next(port for port in place.ports if connects(port))
    connections = []
    for text in [*first, good, second]:
        connection = socket.create_connection(("127.0.0.1", port), timeout=5)
        connection.setblocking(False)
        connection.send(text)
        connections.append(connection)
    messages = root.gather({"said": 0}, soon(0.5))
    for connection in connections:
        connection.close()
    root.close()
    assert messages == {0: {"said": 0}, 1: {"said": 1}}


def connects(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def test_a_rank_whose_rank_0_never_comes_gives_up() -> None:
    """Within its time, and with a word."""
    start = time.monotonic()
    with pytest.raises(link.LinkError, match="rank 0 could not be reached"):
        link.open_link(step_of(1, 2, "n1", job="8"), STEP, soon(0.3))
    assert time.monotonic() - start < 2


def test_a_taken_place_is_passed_by() -> None:
    """Another program listens at the first place: rank 0 takes the next, and its ranks find it there."""
    step = step_of(0, 2, "n1", job="9")
    place = link.meeting(step, STEP, os.getuid())
    with socket.socket(socket.AF_UNIX) as squatter:
        squatter.bind(place.names[0])
        root = link.open_link(step, STEP, soon())
        heard: list[int] = []
        other = threading.Thread(target=speak, args=(step_of(1, 2, "n1", job="9"), heard))
        other.start()
        root.gather({}, soon())
        root.broadcast({"sum": 1}, soon())
        other.join(5)
        root.close()
    assert heard == [1]


@pytest.mark.parametrize("lost", ["", "100"])
def test_a_steps_own_limit_that_the_program_lost(lost: str) -> None:
    """auto and a step's lower limits stand nowhere but in the program's environment."""
    changed = {"threads": lost, "set_threads": "25", "job_threads": "auto", "multiprocessors": 132}
    found = findings(*four((2, changed)), threads="100.0")
    assert problems(found) == [
        (
            "rank 2 has 132 of 132 SMs although limited to 25 %: the step's CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=25 "
            "was changed or taken away before the program started"
        )
    ]


@pytest.mark.parametrize("lost", ["", "0=100G"])
def test_a_steps_own_memory_limit_that_the_program_lost(lost: str) -> None:
    changed = {"memory": lost, "set_memory": "0=8192M", "job_memory": "auto", "free_bytes": 70 * GIB}
    found = findings(*four((2, changed)), memory={})
    assert problems(found) == [
        (
            "rank 2 has too much memory although limited to 8 GiB: the step's CUDA_MPS_PINNED_DEVICE_MEM_LIMIT=0=8192M "
            "was changed or taken away before the program started; 70 GiB are free"
        )
    ]


def test_ranks_that_were_told_another_jobs_daemon() -> None:
    assert problems(findings(*four((1, {"other_job": "12"}), (3, {"other_job": "12"})))) == [
        "ranks 1,3 were told to use the control daemon of job 12: the environment is its"
    ]


@pytest.mark.parametrize(
    ("directory", "job", "owner"),
    [
        ("/run/slurm-mps/jobs/12/pipe", "13", "12"),
        ("/run/slurm-mps/jobs/13/gpu-0", "13", ""),
        ("/tmp/nvidia-mps", "13", ""),
        ("/run/slurm-mps/jobs/12/pipe", "", ""),
    ],
)
def test_whose_daemon_it_is(directory: str, job: str, owner: str) -> None:
    assert look.other_job(directory, job) == owner
