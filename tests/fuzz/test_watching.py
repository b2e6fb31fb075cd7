"""What status, logs and metrics read of programs and users: any bytes give a good value or one clean error."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from hypothesis import example, given, settings
from hypothesis import strategies as st

from slurm_mps.cli.status import document, rows
from slurm_mps.errors import NodeError
from slurm_mps.job.verdict import DaemonPlace, Verdict
from slurm_mps.metrics.totals import KIND, VERSION, Totals, decode_totals
from slurm_mps.node.wordfile import encode
from slurm_mps.slurm.cluster import ListedJob, mps_jobs, parse_squeue
from slurm_mps.status import node
from slurm_mps.status.daemon import Client, DaemonAnswer, Server, parse_clients, parse_servers
from slurm_mps.status.gpus import GpuState

from . import examples

if TYPE_CHECKING:
    from slurm_mps.status.node import ClientView

GPUS = ("GPU-51000000-99a9-0495-d04f-b3afe1238f4c", "GPU-51000000-fc4b-2381-c253-bcc185995317")
PLACE = DaemonPlace("", "/run/slurm-mps/jobs/7/pipe", "/var/log/slurm-mps/7", 8 << 30, GPUS)
ROW = "1166      1         1170           GPU-51000000-99a9-0495    4026531836     python3        "
ANSWERS = st.lists(
    st.sampled_from([ROW, "1170", "100.0", "ACTIVE", "Server not found", "PID ID SERVER DEVICE NAMESPACE COMMAND"])
    | st.text(max_size=80)
    | st.text("0123456789 .-GPU", max_size=60),
    max_size=12,
)


@given(lines=ANSWERS)
@example(lines=["9" * 5000, "100.0", f"{'9' * 5000} 1 1 GPU-51000000-99a9-0495 1 x"])
@example(lines=["٣", "100.0"])
@settings(max_examples=examples(100), deadline=None)
def test_any_answer_of_a_daemon_is_read(lines: list[str]) -> None:
    servers, clients = parse_clients(lines, GPUS)
    assert all(0 <= pid < 10**9 for pid in servers)
    assert all(0 <= client.pid < 10**9 and client.gpu in ("", *GPUS) for client in clients)
    assert [server.pid for server in parse_servers(servers, lines)] == list(servers)


NAMES = st.sampled_from(
    [
        *("SLURM_PROCID", "SLURM_STEP_ID", "SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES"),
        *("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"),
    ]
)
TEXTS = st.text(max_size=40) | st.text("0123456789=,.MG%GPU-", max_size=40) | st.just("9" * 5000) | st.just(GPUS[1])


def seen(environment: dict[str, str], command: str) -> ClientView:
    answer = DaemonAnswer(1, "", (Server(2, "ACTIVE", "25.0"),), (Client(3, 2, GPUS[0], command),))
    verdict = Verdict("ready", thread_percentage=25.0, daemons=(PLACE,))
    job = node._Job(7, 20001, node.READY, verdict, "", {})  # noqa: SLF001
    gpus = {GPUS[0]: GpuState(3, {3: 5}, {})}
    view = node._view(job, {PLACE.pipe_directory: answer}, gpus, {3: environment})  # noqa: SLF001
    whole = node.NodeView((view,), (), of_all=True, stuck=False)
    json.dumps(document(whole))
    assert len(list(rows(whole))) == 2
    (client,) = view.daemons[0].gpus[0].clients
    return client


@given(environment=st.dictionaries(NAMES, TEXTS), command=TEXTS)
@example(environment={"SLURM_PROCID": "9" * 5000, "SLURM_STEP_ID": "0"}, command="")
@example(environment={"CUDA_VISIBLE_DEVICES": "9" * 5000}, command="/")
@settings(max_examples=examples(100), deadline=None)
def test_whatever_a_process_says_of_itself_its_limit_is_never_shown_higher(
    environment: dict[str, str], command: str
) -> None:
    client = seen(environment, command)
    assert client.thread_percentage is not None
    assert 0 < client.thread_percentage <= 25
    assert client.limit_bytes is None or client.limit_bytes <= 8 << 30
    assert client.rank is None or client.rank >= 0


@given(
    data=st.binary(max_size=100)
    | st.recursive(st.none() | st.integers() | TEXTS, st.lists).map(json.dumps).map(str.encode)
)
@settings(max_examples=examples(100), deadline=None)
def test_any_answer_of_squeue_is_jobs_or_an_error(data: bytes) -> None:
    try:
        parse_squeue(data)
    except NodeError:
        return


@given(comment=TEXTS.map(lambda text: f"mps:{text}") | TEXTS, nodes=TEXTS)
@settings(max_examples=examples(100), deadline=None)
def test_any_admin_comment_is_read(comment: str, nodes: str) -> None:
    for job in mps_jobs([ListedJob(7, "alice", "RUNNING", nodes, comment, "7")]):
        assert set(job.request) <= {"threads", "mem", "priority"}


@given(
    text=st.text(max_size=200)
    | st.lists(st.sampled_from(["prolog", "ready", "0.1", "-", " ", "\n", "nan"])).map("".join)
)
@settings(max_examples=examples(100), deadline=None)
def test_any_events_are_counted_or_left_out(text: str) -> None:
    totals = Totals()
    totals.count_events(text)
    assert decode_totals(totals.encode()) == totals


@given(lines=st.lists(st.text('abct -:.0123456789{}[],"', min_size=1, max_size=20), max_size=6))
@settings(max_examples=examples(100), deadline=None)
def test_whole_totals_with_other_lines_are_read_or_refused(lines: list[str]) -> None:
    try:
        decode_totals(encode(KIND, VERSION, lines))
    except NodeError:
        return
