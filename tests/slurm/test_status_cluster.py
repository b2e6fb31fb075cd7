"""``slurm-mps status --cluster``: its adapters, against the real Slurm of the tests and against pyslurm's interface."""

from __future__ import annotations

import json
import types
from typing import TYPE_CHECKING, Any

import pytest

from slurm_mps.errors import NodeError
from slurm_mps.slurm.cluster import ListedJob, Pyslurm, Squeue, by_node, mps_jobs, parse_squeue
from tests.harness import pyslurm
from tests.harness.release import RELEASES, chosen
from tests.harness.reports import report as checked
from tests.harness.runtime import MOUNT_POINT
from tests.harness.site import MarkedSite

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.harness.machine import Result
    from tests.harness.site import Site

COMMAND = f"{MOUNT_POINT}/bin/slurm-mps"


@pytest.fixture(scope="module")
def marked() -> Iterator[MarkedSite]:
    with MarkedSite() as site:
        yield site


def cluster(site: Site, *options: str, user: str = "bob") -> Result:
    return site.machine.run([COMMAND, "status", "--cluster", *options], user=user)


def test_the_jobs_that_asked_and_their_nodes_are_named(marked: MarkedSite) -> None:
    """On the real Slurm, by any user: what they asked, and nothing of the job that did not ask."""
    submit = marked.cluster.sbatch
    asks = [
        ["--gres=gpu:1", "--mps"],
        ["--gres=gpu:2", "--mps=per-gpu", "--mps-mem=0:8G,1:4G"],
        ["--gres=gpu:1", "--mps-threads=12.5", "--mps-mem=8G", "-N2"],
        ["--gres=gpu:1"],
    ]
    jobs = [submit(*ask, script="sleep 60") for ask in asks]
    ids = [job.id for job in jobs]
    for job in jobs:
        marked.cluster.wait_running(job)
    said = cluster(marked, "-o", "job,user,daemons,threads,mem,nodes", "-n")
    report = checked(cluster(marked, "--json").stdout, 0)
    first_node = report["jobs"][0]["nodes"][0]
    there = checked(cluster(marked, "--json", "-w", first_node).stdout, 0)
    elsewhere = checked(cluster(marked, "--json", "-w", "n[2,7-8]").stdout, 1)
    comment = marked.cluster.job_info(jobs[2]).fields["AdminComment"]
    marked.machine.run(["scancel", *map(str, ids)]).check()
    marked.cluster.wait_idle()
    after = cluster(marked)
    gone = cluster(marked, str(ids[0]))
    gone_too = checked(cluster(marked, "--json", "-w", "n1", str(ids[0])).stdout, 1)

    rows = [line.split() for line in said.stdout.splitlines()]
    assert (said.returncode, said.stderr) == (0, "")
    assert [row[:5] for row in rows] == [
        [str(ids[0]), "alice", "per-node", "-", "-"],
        [str(ids[1]), "alice", "per-gpu", "-", "0:8G,1:4G"],
        [str(ids[2]), "alice", "per-node", "12.5", "8G"],
    ]
    assert rows[2][5] == "n[1-2]"
    assert report["asked"] == "squeue --json"
    assert report["nodes"]["n2"][-1] == ids[2]
    assert {one["job_id"] for one in there["jobs"]} >= {ids[0], ids[2]}
    assert elsewhere["problems"] == [f"-w: {node}: Slurm shows you no such node" for node in ("n7", "n8")]
    assert comment == "mps:threads=12.5,mem=8G"
    assert (after.returncode, after.stdout.splitlines()[1:]) == (0, [])
    said_of_gone = f"job {ids[0]}: Slurm shows you no such job that asks for MPS"
    assert (gone.returncode, gone.stderr) == (1, f"slurm-mps: {said_of_gone}\n")
    assert (gone_too["jobs"], gone_too["problems"]) == ([], [f"{said_of_gone} on these nodes"])


def test_jobs_go_by_the_ids_that_squeue_shows(marked: MarkedSite) -> None:
    """Of an array and of a heterogeneous job, whose tasks and components have numbers of their own beside them."""
    ask = ("--gres=gpu:1", "--mps", "-wn1")
    array = marked.cluster.sbatch("--array=0-3%1", *ask, script="sleep 60")
    both = marked.cluster.sbatch("-n1", *ask, ":", "-n1", "--gres=gpu:1", "-wn2", script="sleep 60")
    names = [f"{array}_0", f"{array}_[1-3%1]", f"{both}+0", f"{both}+1"]
    marked.cluster.until(
        "all that can run", lambda: marked.machine.run(["squeue", "-htR", "-o%i"]).stdout.count("\n") == 3 or None, 20
    )
    shown = marked.machine.run(["squeue", "-h", "-o%i"]).stdout.split()
    said = cluster(marked, "-o", "job", "-n").stdout.split()
    one = cluster(marked, "-o", "job", "-n", f"{both}+1").stdout.split()
    here = [marked.node("n2", COMMAND, "status", "-n", "-o", "job", name) for name in (f"{both}+1", str(both.id + 1))]
    logs = [marked.node("n1", COMMAND, "logs", name) for name in (f"{array}_0", f"{array}_7")]
    marked.machine.run(["scancel", str(array), str(both)]).check()
    marked.cluster.wait_idle()

    assert sorted(said) == sorted(names) == sorted(shown)
    assert one == [f"{both}+1"]
    assert here[0] == here[1]
    assert (here[0].returncode, here[0].stdout) == (0, f"{both.id + 1}\n")
    assert "control daemon" in logs[0].stdout
    unknown = f"job {array}_7: Slurm no longer knows its number; sacct -j {array}_7 -X -o JobIDRaw may\n"
    assert (logs[1].returncode, logs[1].stderr) == (1, f"slurm-mps: {unknown}")


def test_a_mark_is_not_the_users_to_write(marked: MarkedSite) -> None:
    job = marked.cluster.sbatch("--gres=gpu:1", script="sleep 60")
    forged = marked.machine.run(["scontrol", "update", f"JobId={job}", "AdminComment=mps"], user="alice")
    said = cluster(marked)
    marked.cluster.scancel(job)
    marked.cluster.wait(job)
    assert forged.returncode != 0
    assert str(job) not in said.stdout.split()


def test_a_cluster_that_marks_nothing_is_not_taken_for_one_without_jobs(site: Site) -> None:
    said = cluster(site)
    assert (said.returncode, said.stdout) == (3, "")
    assert "install etc/job_submit.lua of slurm-mps on the controller" in said.stderr


def test_a_slurm_that_does_not_answer_is_a_problem(site: Site) -> None:
    said = site.machine.run([COMMAND, "status", "--cluster"], env={"SLURM_CONF": "/dev/null"})
    assert (said.returncode, said.stdout) == (1, "")
    assert said.stderr.startswith("slurm-mps: squeue --json: ")


# ------------------------------------------------------------------------------------- what the adapters have in common

EXPECTED = [
    ListedJob(7, "alice", "RUNNING", "n[1-2]", "mps:per-gpu,threads=25", "7"),
    ListedJob(8, "bob", "PENDING", "", "", "8"),
]


def squeue(*changes: dict[str, Any]) -> bytes:
    jobs = [
        {
            "job_id": 7,
            "user_name": "alice",
            "job_state": "RUNNING",
            "nodes": "n[1-2]",
            "admin_comment": EXPECTED[0].admin_comment,
        },
        {"job_id": 8, "user_name": "bob", "job_state": "PENDING", "nodes": "", "admin_comment": ""},
    ]
    for job, change in zip(jobs, changes, strict=False):
        job.update(change)
    return json.dumps({"meta": {}, "errors": [], "jobs": jobs}).encode()


def test_squeues_json_is_read_as_older_and_newer_releases_write_it() -> None:
    newer = {"job_id": {"set": True, "infinite": False, "number": 7}, "job_state": ["RUNNING", "CONFIGURING"]}
    assert parse_squeue(squeue()) == EXPECTED
    assert parse_squeue(squeue(newer)) == EXPECTED


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"jobs": 7}', b'{"jobs": [{}]}', squeue({"job_id": "x"}), squeue()[:-9]]
)
def test_what_is_no_list_of_jobs_is_an_error(data: bytes) -> None:
    with pytest.raises(NodeError):
        parse_squeue(data)


RECORDS = [name for name, one in RELEASES.items() if one.pyslurm]


def record_of(release: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((pyslurm.DATA / f"pyslurm-{release}.json").read_text())
    return record


#: What a job has in pyslurm that is neither of an array nor a component.
NO_PART = dict.fromkeys(("array_id", "array_task_id", "array_tasks_waiting")) | {
    "heterogeneous_id": 0,
    "heterogeneous_offset": 0,
}


def recorded_pyslurm(jobs: list[dict[str, Any]], problem: Exception | None = None) -> types.SimpleNamespace:
    """pyslurm's interface with jobs as it had them (tests/harness/pyslurm.py)."""

    def load() -> dict[int, types.SimpleNamespace]:
        if problem:
            raise problem
        return {job["id"]: types.SimpleNamespace(**(NO_PART | job)) for job in jobs}

    return types.SimpleNamespace(Jobs=types.SimpleNamespace(load=load))


@pytest.mark.parametrize("release", RECORDS)
def test_pyslurm_gives_what_squeue_gave_of_the_same_jobs(release: str) -> None:
    """By a record from a Slurm of that release."""
    record = record_of(release)
    runs, waits = Pyslurm(recorded_pyslurm(record["jobs"])).jobs(1)
    assert [runs, waits] == [ListedJob(*[*one[:5], str(one[0])]) for one in record["by_squeue"]]
    assert (runs.state, runs.nodes, runs.admin_comment) == ("RUNNING", "n[1-2]", "mps:per-gpu,threads=25")
    assert (waits.state, waits.nodes, waits.admin_comment) == ("PENDING", "", "")


NO_PYSLURM = chosen().no_pyslurm or "no registry has a fitting pyslurm; python3 -m tests.harness.pyslurm builds it"


@pytest.mark.skipif(pyslurm.built(chosen()) is None, reason=NO_PYSLURM)
def test_pyslurm_itself_gives_what_squeue_gives(marked: MarkedSite) -> None:
    """And has of a job what it had when it was recorded."""
    package = pyslurm.built(chosen())
    assert package
    told, record = pyslurm.told_of_jobs(marked, package), record_of(chosen().name)
    assert told["by_pyslurm"] == told["by_squeue"]
    assert [one[1:5] for one in told["by_squeue"]] == [one[1:] for one in record["by_squeue"]]
    for job, then in zip(told["jobs"], record["jobs"], strict=True):
        assert {key: type(value) for key, value in job.items()} == {key: type(value) for key, value in then.items()}


def test_pyslurm_names_jobs_as_squeue_does() -> None:
    parts: list[dict[str, Any]] = [
        {"array_id": 5},  # pyslurm has None for a task 0
        {"array_id": 5, "array_task_id": 3},
        {"array_id": 5, "array_tasks_waiting": "4-9"},
        {"heterogeneous_id": 7, "heterogeneous_offset": 1},
    ]
    jobs = [{**record_of(RECORDS[0])["jobs"][0], "id": 20 + n, **part} for n, part in enumerate(parts)]
    assert [job.name for job in Pyslurm(recorded_pyslurm(jobs)).jobs(1)] == ["5_0", "5_3", "5_[4-9]", "7+1"]


def test_what_goes_wrong_in_pyslurm_is_an_error_of_ours() -> None:
    with pytest.raises(NodeError, match=r"pyslurm: Unable to contact"):
        Pyslurm(recorded_pyslurm([], RuntimeError("Unable to contact slurm controller"))).jobs(1)


def test_a_squeue_that_hangs_or_fails_or_is_not_there_is_an_error(tmp_path: Path) -> None:
    hangs = tmp_path / "squeue"
    hangs.write_text("#!/bin/sh\nexec sleep 60\n")
    hangs.chmod(0o755)
    for program in (str(hangs), "/nonexistent/squeue", "/usr/bin/false"):
        with pytest.raises(NodeError):
            Squeue(program).jobs(0.3)


@pytest.mark.parametrize(
    ("comment", "state", "asks"),
    [
        ("mps", "RUNNING", {}),
        ("mps:threads=25,mem=0:8G+1:4G;other", "RUNNING", {"threads": "25", "mem": "0:8G,1:4G"}),
        ("mps;x", "PENDING", {}),
        ("mps", "COMPLETED", None),
        ("mpsx", "RUNNING", None),
        ("x;mps", "RUNNING", None),
        ("", "RUNNING", None),
        ("mps:\x1b[2J", "RUNNING", None),
    ],
)
def test_a_mark_is_read_and_nothing_else_is_taken_for_one(
    comment: str, state: str, asks: dict[str, str] | None
) -> None:
    found = mps_jobs([ListedJob(7, "alice", state, "n[1-2]", comment, "7")])
    assert [dict(job.request) for job in found] == ([] if asks is None else [asks])
    assert by_node(found) == ({} if asks is None else {"n1": [7], "n2": [7]})
