"""``slurm-mps verify`` in jobs on a real Slurm: what is fine, and every fault that it is there for."""

from __future__ import annotations

import re
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness.reports import report as checked
from tests.harness.runtime import MOUNT_POINT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.site import Site

VERIFY = f"{MOUNT_POINT}/bin/slurm-mps verify"
ASKED = ("--mps-threads=25", "--mps-mem=8G")
ONE_NODE = ("-N1", "-n4", "--gres=gpu:2", *ASKED)
PIPE = "/run/slurm-mps/jobs/$SLURM_JOB_ID/pipe"


def run_verify(
    site: Site, *options: str, before: str = "", srun: str = "", env: dict[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    """Run it in a batch job's step on one node, after shell commands in the task. Returns the job's exit code and the
    report.
    """
    script = f"srun {srun} sh -c '{before}\nexec {VERIFY} --json'"
    job = site.cluster.sbatch(*options, script=script, env=env or {})
    return report_of(site, job)


def report_of(site: Site, job: Any) -> tuple[int, dict[str, Any]]:
    code, found = reports_of(site, job)
    if len(found) != 1:
        pytest.fail(f"the job printed not one report: {site.cluster.output(job)}")
    return code, found[0]


def reports_of(site: Site, job: Any) -> tuple[int, list[dict[str, Any]]]:
    info = site.cluster.wait(job)
    found = re.findall(r"^{$.*?^}$", site.cluster.output(job), re.MULTILINE | re.DOTALL)
    return info.exit_code, [checked(one) for one in found]


def on_each_node(*steps: str) -> str:
    """A batch script in which each node writes its report to a file of its own (docs/json.md), and all are printed."""
    runs = "".join(f"srun -o report.$SLURM_JOB_ID.%n {step} {VERIFY} --json || code=$?\n" for step in steps)
    return f"code=0\n{runs}cat report.$SLURM_JOB_ID.*; rm report.$SLURM_JOB_ID.*; exit $code"


def test_ranks_on_two_nodes_are_fine(any_site: Site) -> None:
    """Two ranks a GPU on two nodes: clients, within their limits, one server a node; also in a step made for MPI."""
    layout = ("-N2", "-n8", "--ntasks-per-node=4", "--gres=gpu:2")
    job = any_site.cluster.sbatch(*layout, *ASKED, script=on_each_node("--mpi=pmi2"))
    code, reports = reports_of(any_site, job)
    assert (code, [(one["node"], one["problems"], one["status"]) for one in reports]) == (
        0,
        [("n1", [], 0), ("n2", [], 0)],
    )
    ranks = [rank | {"node": one["node"]} for one in reports for rank in one["ranks"]]
    uuids = {node: [gpu["uuid"] for gpu in any_site.gpus(node)[:2]] for node in any_site.nodes}
    assert Counter((r["node"], r["gpu"]) for r in ranks) == {(n, u): 2 for n in uuids for u in uuids[n]}
    assert {(r["multiprocessors"], r["card_multiprocessors"], r["thread_percentage"]) for r in ranks} == {(32, 132, 25)}
    assert {(r["free_bytes"] >> 20, r["limit_bytes"] >> 20) for r in ranks} == {(8047, 8192)}
    assert {(r["client"], r["priority"]) for r in ranks} == {(True, "normal")}
    assert len({(r["node"], r["server"]) for r in ranks}) == 2
    assert [one["daemons"][0]["clients"] for one in reports] == [4, 4]


@pytest.mark.every_release
@pytest.mark.parametrize("step", ["--het-group=0", "--het-group=1", "--het-group=0,1"])
def test_components_of_a_heterogeneous_job_are_fine(site: Site, step: str) -> None:
    """SLURM_JOB_ID is the leader's in each, and each has a daemon, a pipe directory and limits of its own."""
    first = ("-wn1", "-n2", "--gres=gpu:1", *ASKED)
    second = ("-wn2", "-n3", "--gres=gpu:2", *ASKED)
    job = site.cluster.sbatch(*first, ":", *second, script=on_each_node(step))
    code, reports = reports_of(site, job)
    site.cluster.wait_idle()
    second_ranks = [0, 1, 2] if step == "--het-group=1" else [2, 3, 4]
    expected = [("n1", [0, 1]), ("n2", second_ranks)]
    expected = {"--het-group=0": expected[:1], "--het-group=1": expected[1:]}.get(step, expected)
    assert (code, [one["problems"] for one in reports]) == (0, [[]] * len(expected)), site.cluster.output(job)
    assert [(one["node"], [rank["rank"] for rank in one["ranks"]]) for one in reports] == expected
    assert {(r["multiprocessors"], r["limit_bytes"] >> 20) for one in reports for r in one["ranks"]} == {(32, 8192)}


@pytest.mark.parametrize("gpus", [("--gres=gpu:1", "-n2"), ("-n2", "--gres=gpu:1")], ids=["last", "with the script"])
def test_a_component_without_a_gpu_is_fine(any_site: Site, gpus: tuple[str, str]) -> None:
    """Its job has all that it can have; the other component is looked at as ever."""
    first, second = (["-n2", f"-wn{number}", *ASKED, its] for number, its in enumerate(gpus, 1))
    job = any_site.cluster.sbatch(*first, ":", *second, script=on_each_node("--het-group=0,1"))
    code, reports = reports_of(any_site, job)
    with_gpu, without = ("n1", "n2") if gpus[0].startswith("--gres") else ("n2", "n1")
    assert (code, [one["problems"] for one in reports]) == (0, [[], []])
    assert {one["node"]: len(one["ranks"]) for one in reports} == {with_gpu: 2, without: 0}
    said = f"slurm-mps: {without}: this component of the job has no GPU and runs without MPS"
    assert any_site.cluster.output(job).count(said) == 1


@pytest.mark.every_release
def test_two_programs_of_one_srun_are_fine(site: Site) -> None:
    """``srun A : B`` makes a heterogeneous job of its own, and tells its tasks less than sbatch does."""
    one = ("-n2", "--gres=gpu:1", "--mps", *VERIFY.split())
    result = site.cluster.srun("-wn1", *one, ":", "-wn2", *one)
    site.cluster.wait_idle()
    said = [line for line in result.stdout.splitlines() if line.startswith(("n1:", "n2:"))]
    well = "2 ranks, all clients, each GPU's ranks share one server"
    assert (result.returncode, sorted(said)) == (0, [f"n1: {well}", f"n2: {well}"])


def test_one_rank_is_fine(site: Site) -> None:
    """Nobody to meet."""
    code, report = run_verify(site, "-N1", "-n1", "--gres=gpu:1", *ASKED)
    assert (code, report["problems"], len(report["ranks"])) == (0, [], 1)


def test_a_umask_that_closes_everything_is_fine(site: Site) -> None:
    asked = ("-N1", "-n2", "--gres=gpu:1", *ASKED)
    result = site.cluster.srun(*asked, "sh", "-c", f"umask 777; exec {VERIFY}")
    assert result.returncode == 0, result


@contextmanager
def driver_moved_to(site: Site, directory: str) -> Iterator[None]:
    """The CUDA driver of n1 is in `directory` alone; beside it, what keeps a Python of Debian's from starting."""
    system = "/usr/lib/x86_64-linux-gnu/libcuda.so.1"
    site.machine.write(f"{directory}/libz.so.1", "no library")
    site.node("n1", "cp", system, directory).check()
    site.node("n1", "mount", "--bind", "/dev/null", system).check()
    yield
    site.node("n1", "umount", system).check()
    site.node("n1", "rm", "-r", directory).check()


def test_a_driver_that_only_programs_are_told_of_is_found(site: Site) -> None:
    """By LD_LIBRARY_PATH, where CUDA's forward compatibility is; our own Python starts without it, as users call it."""
    with driver_moved_to(site, "/opt/compat"):
        environment = {"LD_LIBRARY_PATH": "/nowhere:/opt/compat", "PYTHONHOME": "/apps/python/3.7"}
        given = " ".join(f"{name}={value}" for name, value in environment.items())
        result = site.cluster.srun("-wn1", "--gres=gpu:1", *ASKED, *f"env {given} slurm-mps verify".split())
    assert result.returncode == 0, result
    assert " 32/132 " in result.stdout


def test_bound_tasks_are_fine(any_site: Site) -> None:
    """Each task has a GPU of its own, none of a pile; confined to it, no other task could ask how large the GPU is."""
    layout = ("-N2", "-n8", "--ntasks-per-node=4", "--gpus-per-task=1")
    job = any_site.cluster.sbatch(*layout, *ASKED, script=on_each_node(""))
    code, reports = reports_of(any_site, job)
    assert (code, [one["problems"] for one in reports]) == (0, [[], []])
    ranks = [rank for one in reports for rank in one["ranks"]]
    assert (len({r["gpu"] for r in ranks}), {r["card_multiprocessors"] for r in ranks}) == (8, {132})


def test_the_table_is_grouped_and_says_that_all_is_well(site: Site) -> None:
    """What a user sees: a line for each rank, by GPU, and one sentence."""
    job = site.cluster.sbatch("-N1", "-n4", "--gres=gpu:2", *ASKED, script=f"srun {VERIFY}")
    assert site.cluster.wait(job).exit_code == 0
    lines = site.cluster.output(job).splitlines()
    print("\n".join(lines))
    assert lines[0].split()[:6] == ["NODE", "GPU", "RANK", "PID", "SERVER", "SMS"]
    assert [line.split()[2] for line in lines[1:5]] == ["0", "2", "1", "3"]
    assert {line.split()[5] for line in lines[1:5]} == {"32/132"}
    assert lines[5:] == ["", "4 ranks, all clients, each GPU's ranks share one server"]


def test_each_node_prints_its_own_table_and_has_its_own_status(site: Site) -> None:
    """Whichever is first: with headings, in columns that line up, with sentences that name it. Its first rank alone has
    the exit status, so srun's own, the highest, is the answer, and srun -K ends nobody before that.
    """
    astray = "test $SLURM_NODEID = 1 && export CUDA_MPS_PIPE_DIRECTORY=/tmp"
    command = f"{astray}; {VERIFY} --timeout 4; echo rank $SLURM_PROCID: $? >&2"
    layout = ("-N2", "-n4", "--ntasks-per-node=2", "--gres=gpu:1")
    result = site.cluster.srun(*layout, *ASKED, "sh", "-c", command)
    print(result.stdout)
    lines = result.stdout.splitlines()
    table = [line for line in lines if re.match(r"NODE |n[12] ", line)]
    assert [line.split()[0] for line in sorted(table)] == ["NODE", "NODE", "n1", "n1", "n2", "n2"]
    rows = [line for line in table if not line.startswith("NODE")]
    assert len({tuple(match.end() for match in re.finditer(r"\S+", row)) for row in rows}) == 1
    assert "n1: 2 ranks, all clients, each GPU's ranks share one server" in lines
    assert "n2: ranks 2-3 run without MPS: CUDA_MPS_PIPE_DIRECTORY=/tmp has no control daemon" in lines
    statuses = sorted(line for line in result.stderr.splitlines() if line.startswith("rank"))
    assert statuses == ["rank 0: 0", "rank 1: 0", "rank 2: 1", "rank 3: 0"]


def test_the_fields_asked_for_and_nothing_else(site: Site) -> None:
    """A program reads the table; words on what is wrong go to stderr."""
    uuid = site.gpus("n1")[0]["uuid"]
    options = ("-wn1", "-n2", "--gres=gpu:1", *ASKED)
    result = site.cluster.srun(*options, *VERIFY.split(), "--noheader", "-o", "rank,uuid")
    assert [line.split() for line in result.stdout.splitlines()] == [["0", uuid], ["1", uuid]]
    command = f"unset CUDA_MPS_PIPE_DIRECTORY; exec {VERIFY} -o rank"
    result = site.cluster.srun(*options, "sh", "-c", command)
    assert result.stdout.split() == ["RANK", "0", "1"]
    assert "slurm-mps: ranks 0-1 run without MPS" in result.stderr


def test_64_ranks_are_done_in_five_seconds(site: Site) -> None:
    """32 ranks on each of two nodes of this machine's few processors, which do other things, too: where 64 programs
    that do nothing take long, four times as long as they.
    """
    layout = "--overcommit -n64 -N2 --ntasks-per-node=32"
    nothing = f"srun {layout} /opt/slurm-mps/bin/python3 -I -c 'import json, ctypes'"
    ours = f"srun {layout} -o report.%n {VERIFY} --json"
    script = f"date +%s.%N; {nothing}; date +%s.%N; {ours}; code=$?; date +%s.%N; cat report.?; rm report.?; exit $code"
    job = site.cluster.sbatch("-N2", "-n4", "--gres=gpu:4", *ASKED, script=script)
    code, reports = reports_of(site, job)
    start, began, end = map(float, re.findall(r"^\d+\.\d+$", site.cluster.output(job), re.MULTILINE))
    idle, took = began - start, end - began
    print(f"64 ranks in {took:.2f} s, 64 programs that do nothing in {idle:.2f} s")
    assert (code, [one["problems"] for one in reports]) == (0, [[], []])
    assert sum(len(one["ranks"]) for one in reports) == 64
    assert took < max(5, 4 * idle)


def test_a_job_without_mps_is_told(site: Site) -> None:
    """No option, no MPS: said with how to get it."""
    code, report = run_verify(site, "-N1", "-n2", "--gres=gpu:2")
    assert code == report["status"] == 1
    assert report["problems"] == [
        "ranks 0-1 run without MPS: CUDA_MPS_PIPE_DIRECTORY is not set; this job did not ask for MPS (--mps)"
    ]


def test_a_job_of_srun_that_asked_is_not_told_that_it_did_not(site: Site) -> None:
    """Its tasks have no SLURM_SPANK_MPS, and this one has lost all that the plugin set; the job's state is here."""
    lost = ("env", "-u", "CUDA_MPS_PIPE_DIRECTORY", "-u", "CUDA_MPS_SET_BY_SLURM")
    result = site.cluster.srun("-wn1", "--gres=gpu:1", "--mps", *lost, *VERIFY.split())
    assert "rank 0 runs without MPS: CUDA_MPS_PIPE_DIRECTORY is not set\n" in result.stdout


def test_a_priority_that_was_raised_is_caught(site: Site) -> None:
    """The job asked for low; the program's own variable goes before the daemon's default."""
    options = ("-wn1", "-n2", "--gres=gpu:1", "--mps-priority=low")
    code, report = run_verify(site, *options)
    assert (code, [rank["priority"] for rank in report["ranks"]]) == (0, ["low"] * 2)
    code, report = run_verify(site, *options, before="export CUDA_MPS_CLIENT_PRIORITY=0")
    assert (code, report["problems"]) == (
        1,
        ["ranks 0-1 have normal priority although the job asked for low: CUDA_MPS_CLIENT_PRIORITY=0 was set"],
    )


def test_a_wrong_pipe_directory_is_caught(any_site: Site) -> None:
    """A user's own CUDA_MPS_PIPE_DIRECTORY: the program would run without MPS and without a word (O21)."""
    code, report = run_verify(any_site, *ONE_NODE, before="export CUDA_MPS_PIPE_DIRECTORY=/tmp/none")
    assert code == 1
    assert "ranks 0-3 run without MPS: CUDA_MPS_PIPE_DIRECTORY=/tmp/none does not exist" in report["problems"]
    assert not any(rank["client"] for rank in report["ranks"])


def test_one_rank_that_went_astray_is_named(site: Site) -> None:
    """Three ranks are clients, one is not: its neighbour on the GPU is told from it."""
    site.configure('[gpus]\ncompute_mode = "unchanged"\n')
    before = "test $SLURM_PROCID = 3 && export CUDA_MPS_PIPE_DIRECTORY=/tmp CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=25"
    code, report = run_verify(site, *ONE_NODE, before=before)
    gpu = report["ranks"][3]["gpu"]
    assert code == 1
    assert report["problems"] == [
        "rank 3 runs without MPS: CUDA_MPS_PIPE_DIRECTORY=/tmp has no control daemon",
        f"rank 1 on {gpu} has a server, rank 3 does not",
        "rank 3 has 132 of 132 SMs although limited to 25 %: without MPS no limit holds",
    ]


def test_a_dead_daemon_is_caught(any_site: Site) -> None:
    """The control daemon is killed while the step runs; its socket stays, and nobody listens (O21, O25)."""
    pid = f"pid=$(cat {PIPE}/nvidia-cuda-mps-control.pid)"
    wait = f"{pid}; touch started.$SLURM_PROCID; while test -d /proc/$pid; do sleep 0.05; done"
    job = any_site.cluster.sbatch(*ONE_NODE, script=f"srun sh -c '{wait}; exec {VERIFY} --json'")
    home = any_site.machine.path("/home/alice")
    until(lambda: len(list(home.glob("started.*"))) == 4)
    kill = f"kill -9 $(cat /run/slurm-mps/jobs/{job}/pipe/nvidia-cuda-mps-control.pid)"
    any_site.node("n1", "sh", "-c", kill).check()
    code, report = report_of(any_site, job)
    for mark in home.glob("started.*"):
        mark.unlink()
    assert code == 1
    pipe = f"/run/slurm-mps/jobs/{job}/pipe"
    assert report["problems"][0].startswith(f"the control daemon of {pipe} does not answer: ")
    assert f"ranks 0-3 run without MPS: the control daemon of {pipe} is gone" in report["problems"]


def test_a_daemon_that_hangs_is_caught(site: Site) -> None:
    """It takes connections and answers nothing: whether the ranks are clients is unknown, and that is a problem."""
    wait = "touch started.$SLURM_PROCID; while ! test -e hung; do sleep 0.05; done"
    verify = f"srun sh -c '{wait}; exec {VERIFY} --timeout 3 --json'"
    stay = "code=$?; touch asked; while test -e hung; do sleep 0.05; done; exit $code"
    job = site.cluster.sbatch(*ONE_NODE, script=f"{verify}; {stay}")
    home = site.machine.path("/home/alice")
    until(lambda: len(list(home.glob("started.*"))) == 4)
    site.fault("n1", "command.*=hang")
    (home / "hung").touch()
    until((home / "asked").exists)
    site.fault("n1")
    (home / "hung").unlink()
    code, report = report_of(site, job)
    for mark in (home / "asked", *home.glob("started.*")):
        mark.unlink()
    assert code == 1
    pipe = f"/run/slurm-mps/jobs/{job}/pipe"
    silence, doubt = report["problems"]
    assert silence.startswith(f"the control daemon of {pipe} does not answer: ")
    assert silence.endswith("did not answer within 1 s")
    assert doubt == f"cannot tell whether ranks 0-3 have MPS: the control daemon of {pipe} does not answer"


def until(look: Any) -> None:
    """Wait, bounded, for a state."""
    deadline = time.monotonic() + 20
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_lifted_limit_is_caught(any_site: Site) -> None:
    """A value that the driver cannot use drops every memory limit (O12); the rank is a client all the same."""
    code, report = run_verify(any_site, *ONE_NODE, before="export CUDA_MPS_PINNED_DEVICE_MEM_LIMIT=junk")
    assert code == 1
    assert all(rank["client"] for rank in report["ranks"])
    (problem,) = report["problems"]
    assert problem.startswith(
        "ranks 0-3 have no memory limit although limited to 8 GiB: "
        "the driver cannot use CUDA_MPS_PINNED_DEVICE_MEM_LIMIT=junk; 139."
    )


def test_piled_up_ranks_are_caught(any_site: Site) -> None:
    """All tasks took the first of two GPUs; a limit that names the second is lifted by that, too (O12)."""
    before = "export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES%%,*}"
    code, report = run_verify(any_site, *ONE_NODE, before=before)
    first, second = (gpu["uuid"] for gpu in any_site.gpus("n1")[:2])
    assert code == 1
    assert (
        f"all 4 ranks are on {first}, although the step has 2 GPUs on this node: no rank uses {second}"
        in report["problems"]
    )


@pytest.mark.parametrize(("bind", "exit_code"), [("map_gpu:0", 1), ("map_gpu:0,1", 0)])
def test_ranks_that_a_binding_piled_up_are_caught(any_site: Site, bind: str, exit_code: int) -> None:
    """Slurm's lists name a bound task's own GPU only."""
    options = ["-wn1", "-n4", "--gres=gpu:2", f"--gpu-bind={bind}", *ASKED]
    result = any_site.cluster.srun(*options, *VERIFY.split(), "--json")
    first = any_site.gpus("n1")[0]["uuid"]
    said = f"all 4 ranks are on {first}, although the step has 2 GPUs on this node"
    assert result.returncode == exit_code
    assert (said in result.stdout) == bool(exit_code)


def test_four_ranks_on_the_only_gpu_of_their_step_are_no_pile(any_site: Site) -> None:
    script = f"srun -n4 --gres=gpu:1 {VERIFY}\n"
    job = any_site.cluster.sbatch("-wn1", "-n4", "--gres=gpu:2", *ASKED, script=script)
    assert any_site.cluster.wait(job).state == "COMPLETED"
    assert "4 ranks, all clients" in any_site.cluster.output(job)


def test_a_rank_that_never_reports_is_named(site: Site) -> None:
    """One task hangs; the others are not held up for longer than was said."""
    script = f"srun -n3 sh -c 'test $SLURM_PROCID = 1 && sleep 3; exec {VERIFY} --timeout 2 --json 2>&1'"
    job = site.cluster.sbatch("-N1", "-n3", "--gres=gpu:1", *ASKED, script=script)
    code, report = report_of(site, job)
    assert code == 1
    assert "rank 1 did not report within 2 s" in report["problems"]


def run_to_the_end_of_all(site: Site, *options: str, script: str) -> tuple[int, str]:
    """What a job has printed and its exit code, once the daemons of a step that was killed are gone, too."""
    job = site.cluster.sbatch(*options, script=script)
    info = site.cluster.wait(job)
    until(lambda: not any(process.comm == "slurmstepd" for process in site.machine.processes()))
    return info.exit_code, site.cluster.output(job)


def test_every_report_is_out_before_the_first_rank_that_ends_takes_all_along(site: Site) -> None:
    """With srun -K, or KillOnBadExit=1 in slurm.conf, Slurm terminates all other ranks. The second node is soonest."""
    script = f"srun -K sh -c 'export CUDA_MPS_PIPE_DIRECTORY=/tmp/none; exec {VERIFY}'"
    code, said = run_to_the_end_of_all(site, "-N2", "-n5", "--gres=gpu:2", *ASKED, script=script)
    for ranks in ("ranks 0-3 run", "rank 4 runs"):
        assert said.count(f"{ranks} without MPS: CUDA_MPS_PIPE_DIRECTORY=/tmp/none does not exist") == 1
    assert code == 1


def test_a_rank_that_does_not_find_the_first_one_says_so(site: Site) -> None:
    """As in a container with a /dev/shm and a /tmp of its own. With srun -K the first rank's report comes all the same,
    and so does what the rank itself says later.
    """
    alone = f"mount -t tmpfs none /dev/shm; mount -t tmpfs none /tmp; exec {VERIFY} --timeout 1"
    unshare = f'exec unshare --user --map-root-user --mount sh -c "{alone}"'
    task = f"test $SLURM_PROCID = 1 && {unshare}; exec {VERIFY} --timeout 1"
    _, said = run_to_the_end_of_all(site, "-wn1", "-n3", "--gres=gpu:2", "--mps", script=f"srun -K sh -c '{task}'")
    assert said.count("rank 1 did not report within 1 s") == 1
    assert (
        said.count("rank 1: rank 0, which collects this node's reports, has no directory for them in /dev/shm or") == 1
    )


def test_what_cannot_be_printed_is_a_problem(site: Site) -> None:
    """All is well but for the first rank's stdout, on a disk that is full, say."""
    task = f"test $SLURM_PROCID = 0 && exec >/dev/full; {VERIFY}; echo status $? >&2"
    job = site.cluster.sbatch(*ONE_NODE, script=f"srun sh -c '{task}'")
    site.cluster.wait(job)
    assert sorted(site.cluster.output(job).splitlines()) == [
        "slurm-mps: the output cannot be written: No space left on device",
        *["status 0"] * 3,
        "status 1",
    ]


def test_nobody_waits_for_a_report_that_nobody_reads(site: Site) -> None:
    """Rank 0's stdout is a pipe that is full, as a pager's that waits. The others go."""
    verify = f"verify() {{ {VERIFY} --timeout 1; echo rank $SLURM_PROCID: $? >&2; }}"
    unread = "{ head -c 65536 /dev/zero; verify; } | sleep 6"
    task = f"{verify}; if test $SLURM_PROCID = 0; then {unread}; else verify; fi"
    job = site.cluster.sbatch(*ONE_NODE, script=f"srun sh -c '{task}'")
    site.cluster.wait(job)
    *others, first = site.cluster.output(job).splitlines()
    assert (sorted(others), first) == (["rank 1: 0", "rank 2: 0", "rank 3: 0"], "rank 0: 1")


@pytest.mark.every_release
def test_outside_a_step_is_status_3(site: Site) -> None:
    """In the batch script itself, and in no job at all, there are no ranks to look at."""
    job = site.cluster.sbatch("-N1", "-n2", "--gres=gpu:1", *ASKED, script=f"{VERIFY}; exit $?")
    assert site.cluster.wait(job).exit_code == 3
    assert "start it with srun" in site.cluster.output(job)
    assert site.machine.run(VERIFY.split()).returncode == 3


def test_a_container_without_slurms_variables_is_told_which_it_needs(site: Site) -> None:
    few = "env -i CUDA_MPS_PIPE_DIRECTORY=$CUDA_MPS_PIPE_DIRECTORY SLURM_JOB_ID=$SLURM_JOB_ID"
    result = site.cluster.srun("-N1", "-n1", "--gres=gpu:1", *ASKED, "sh", "-c", f"{few} {VERIFY}")
    assert result.returncode == 3, result
    assert "lacks SLURM_STEP_ID, SLURM_STEP_NODELIST, SLURM_GTIDS, SLURM_PROCID, SLURM_LOCALID: let" in result.stderr


def test_whether_a_steps_own_limits_were_lost_is_not_passed_over(site: Site) -> None:
    """As in a container that is given the pipe directory alone: the job's limits hold, which are higher."""
    task = f"unset ${{!CUDA_MPS_ACT*}} CUDA_MPS_SET_BY_SLURM; exec {VERIFY}"
    script = f"srun --mps-threads=10 bash -c '{task}'; exit $?"
    job = site.cluster.sbatch("-N1", "-n2", "--gres=gpu:1", *ASKED, script=script)
    assert site.cluster.wait(job).exit_code == 1
    words = "cannot tell which limits the step set for ranks 0-1: CUDA_MPS_SET_BY_SLURM was removed; let all CUDA_* in"
    assert words in site.cluster.output(job)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--timeout abc", "expected seconds, 1 to 600"),
        ("-o nonsense", "there is no field"),
        ("--nonsense", "unrecognized arguments"),
    ],
)
def test_wrong_usage_of_a_step_is_said_once_on_a_node(site: Site, wrong: str, message: str) -> None:
    script = f"srun sh -c '{VERIFY} --json {wrong}; echo ended $?'"
    job = site.cluster.sbatch("-N1", "-n4", "--gres=gpu:1", *ASKED, script=script)
    _, report = report_of(site, job)
    said = site.cluster.output(job)
    assert (report["status"], said.count("ended 2"), said.count("ended 0")) == (2, 1, 3)
    assert message in report["error"]
    assert said.count(message) == 2, "on stderr and in the report"
