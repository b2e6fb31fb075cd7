"""Several jobs on one control daemon: the first starts it, each has a link to it, the last ends it."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness.gpunode import EPILOG, PROLOG, GpuNode, asked, job_environment
from tests.harness.site import PYTHON, STATE_DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.machine import Result

JOINED = '[gpus]\nsharing = "joined"\n'
ALL_USERS = f'{JOINED}joined_users = "all"\n[limits.memory]\nmax = "40G"\n'
WAYS = {"refuse": "", "separate": '[gpus]\nsharing = "separate"\n', "joined": JOINED}
LOGS = "/var/log/slurm-mps"
PART = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"


@pytest.fixture
def node(gpu_node: GpuNode) -> Iterator[GpuNode]:
    """A node whose jobs are joined; its GPUs were in modes of their own."""
    gpu_node.confine_devices()
    gpu_node.configure(JOINED)
    gpu_node.set_compute_modes(0, 2)
    yield gpu_node
    gpu_node.end_jobs()
    assert gpu_node.files() == []
    gpu_node.run("rmdir", f"{STATE_DIRECTORY}/daemons")
    assert gpu_node.run("ls", "-d", f"{STATE_DIRECTORY}/daemons").stdout == ""
    assert gpu_node.compute_modes() == [0, 2, 0, 0]
    gpu_node.set_compute_modes(0, 0)


def start(node: GpuNode, job_id: int, percent: int = 25, **more: Any) -> Result:
    """The prolog of a job of gres/mps."""
    return node.prolog(job_id, **{"gpus": "0", PART: str(percent), **more})


def client(node: GpuNode, job_id: int, *options: str, number: int = 0, user: str = "alice") -> str:
    """What a program of the job says, with the variables that the plugin would give it."""
    place = f"{STATE_DIRECTORY}/jobs/{job_id}/joined-{number}"
    return node.client(None, *options, user=user, CUDA_MPS_PIPE_DIRECTORY=place).stdout


def server_of(said: str) -> str:
    return said.rpartition("mps=")[2].split()[0]


def daemons(node: GpuNode) -> list[int]:
    return [
        process.pid for process in node.mps_processes() if process.comm == "nvidia-cuda-mps"[:15] and process.uid == 0
    ]


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1), (2, 1, 3)], ids=["first-first", "first-last", "between"])
def test_jobs_of_one_user_share_a_server_and_the_last_ends_it(node: GpuNode, order: tuple[int, ...]) -> None:
    """Whoever leaves first: the others' programs go on, new ones come in, and the GPU stays exclusive till the end."""
    for job in (1, 2, 3):
        start(node, job, gpus="1").check()
        assert node.verdict(job)["status"] == "ready"
    servers = {server_of(client(node, job)) for job in (1, 2, 3)}
    assert len(servers) == 1
    assert "none" not in servers
    assert len(daemons(node)) == 1
    for left in range(3):
        assert node.compute_modes()[1] == 3
        node.epilog(order[left]).check()
        for job in order[left + 1 :]:
            assert server_of(client(node, job)) in servers
    assert node.mps_processes() == []


def test_a_job_reaches_the_daemon_through_its_link_alone(node: GpuNode) -> None:
    """The job's directory has one name, and no other user gets in; when the job is over the name is gone."""
    start(node, 1).check()
    start(node, 2).check()
    assert node.run("ls", f"{STATE_DIRECTORY}/jobs/2/joined-0").stdout.split() == ["control"]
    assert node.run("ls", f"{STATE_DIRECTORY}/jobs/2", user="bob").returncode
    assert node.run("ls", f"{STATE_DIRECTORY}/daemons", user="alice").returncode
    node.epilog(2).check()
    assert "mps=" not in client(node, 2) or server_of(client(node, 2)) == "none"
    assert server_of(client(node, 1)) != "none"


def test_another_users_job_waits_for_nobody_and_is_refused(node: GpuNode) -> None:
    """It is not told whose job it is."""
    start(node, 1).check()
    start(node, 2, user="bob").check()
    message = node.verdict(2)["message"]
    assert message.endswith("is held by an MPS job of another user; this site joins jobs of one user only")
    assert server_of(client(node, 1)) != "none"


def test_jobs_of_all_users_share_roots_server_where_the_site_says_so(node: GpuNode) -> None:
    """Each comes in by its own job's directory alone, and has a limit though it asked for none."""
    node.configure(ALL_USERS)
    node.prolog(1, gpus="0", **asked()).check()
    node.prolog(2, gpus="0", user="bob", **asked()).check()
    said = [client(node, 1), client(node, 2, user="bob")]
    assert server_of(said[0]) == server_of(said[1]) != "none"
    assert {process.uid for process in node.mps_processes()} == {0}
    assert all(int(one.partition("free=")[2].split()[0]) < 40 * 1024 for one in said)
    assert "mps=" not in client(node, 1, user="bob")
    assert node.run("ls", f"{STATE_DIRECTORY}/jobs/1", user="bob").returncode
    node.epilog(1).check()
    assert server_of(client(node, 2, user="bob")) == server_of(said[0])
    assert node.run("slurm-mps", "logs", "1").returncode == 0
    assert node.run("slurm-mps", "logs", "1", user="alice").returncode == 4


def test_who_may_share_does_not_change_under_jobs_that_run(node: GpuNode) -> None:
    start(node, 1).check()
    node.configure(ALL_USERS)
    start(node, 2).check()
    assert "is held by MPS job 1, which started before this site changed how jobs share" in node.verdict(2)["message"]
    node.epilog(2).check()
    node.epilog(1).check()
    start(node, 2, user="bob").check()
    assert node.verdict(2)["status"] == "ready"


def test_memory_that_is_promised_twice_is_refused_with_the_numbers(node: GpuNode) -> None:
    """Parts of 50 and 25 %, and a third job that wants 40 GiB for each of its two tasks."""
    start(node, 1, 50).check()
    start(node, 2, 25).check()
    two = {"SLURM_JOB_NTASKS": "2", "SLURM_JOB_NUM_NODES": "1"}
    start(node, 3, 25, SPANK_MPS_MEM="40G", **two).check()
    assert "may take 80 GiB of GPU-" in node.verdict(3)["message"]
    assert "jobs 1, 2 may take 104.5 GiB of the 139.3 GiB" in node.verdict(3)["message"]
    node.epilog(3).check()
    start(node, 3, 25).check()
    assert node.verdict(3)["status"] == "ready"


def test_a_job_on_several_gpus_has_a_daemon_on_each_and_binds_its_tasks(node: GpuNode) -> None:
    node.prolog(1, gpus="0,1", **asked()).check()
    assert "ask for --mps=per-gpu, and bind each task to one GPU" in node.verdict(1)["message"]
    node.epilog(1).check()
    node.prolog(1, gpus="0,1", SPANK_MPS="per-gpu").check()
    start(node, 2, gpus="1").check()
    assert server_of(client(node, 1, number=1)) == server_of(client(node, 2))
    assert server_of(client(node, 1)) != server_of(client(node, 2))


CONFINED = "ConstrainDevices=yes\n"


@pytest.mark.parametrize(
    ("cgroup", "slurm", "why"),
    [
        ("", "TaskPlugin=task/cgroup\n", "cgroup.conf has no ConstrainDevices=yes"),
        ("# ConstrainDevices=yes\n", "TaskPlugin=task/cgroup\n", "cgroup.conf has no ConstrainDevices=yes"),
        ("ConstrainCores=yes ConstrainDevices=no\n", "TaskPlugin=task/cgroup\n", "cgroup.conf has no ConstrainDevices"),
        (CONFINED, "ClusterName=c\n", "slurm.conf has no TaskPlugin=task/cgroup"),
        (CONFINED, "TaskPlugin=task/affinity # task/cgroup\n", "slurm.conf has no TaskPlugin=task/cgroup"),
        (CONFINED, "include of-%h.conf\nTaskPlugin=task/cgroup\n", ""),
        ("ConstrainCores=yes ConstrainDevices = Yes ConstrainRAMSpace=no\n", "TaskPlugin=task/affinity,cgroup\n", ""),
        (CONFINED, 'ClusterName=c \\\n  TaskPlugin="task/cgroup"\n', ""),
        (CONFINED, "Include mps.toml\nInclude more.conf\n", ""),
    ],
)
def test_devices_that_are_not_confined_are_no_place_for_joined_jobs(
    node: GpuNode, cgroup: str, slurm: str, why: str
) -> None:
    """Who kept a handle on the socket could come back (O88): refused, and no node is drained for it.

    Slurm does what cgroup.conf says with task/cgroup alone. Several keys may share a line, and files include others.
    The files may be the user slurm's, as they are at many sites.
    """
    node.machine.write("/etc/slurm/more.conf", "TaskPlugin=task/cgroup\n")
    node.confine_devices(cgroup, slurm)
    node.machine.run(["chown", "-R", "64030:64030", "/etc/slurm/slurm.conf", "/etc/slurm/cgroup.conf"]).check()
    assert start(node, 1).check().stderr == ""
    if why:
        assert re.search(f"this site joins jobs on a GPU, and .*{why}", node.verdict(1)["message"])
    assert (node.verdict(1)["status"], bool(node.mps_processes())) == (("refused", False) if why else ("ready", True))


def test_a_daemon_that_died_under_its_jobs_is_started_again_by_the_next(node: GpuNode) -> None:
    """With the links of all of them, and said once; until then their steps do not start."""
    for job in (1, 2):
        start(node, job).check()
    for process in node.mps_processes():
        node.run("kill", "-9", str(process.pid))
    result = start(node, 3).check()
    assert result.stderr.count("its control daemon is gone and is started again") == 1
    assert len({server_of(client(node, job)) for job in (1, 2, 3)}) == 1
    assert "none" not in server_of(client(node, 1))
    node.epilog(3).check()
    assert server_of(client(node, 1)) == server_of(client(node, 2))


def test_a_link_that_comes_back_while_its_job_leaves_goes_again(node: GpuNode) -> None:
    """The next job's prolog started a dead daemon again, and linked all holders to it: the job was still one."""
    for job in (1, 2):
        start(node, job).check()
    for process in node.mps_processes():
        node.run("kill", "-9", str(process.pid))
    slow = ("strace", "-f", "-qqq", "-o", "/dev/null", "-e", "inject=unlinkat:delay_exit=2000000:when=2")
    ending = node.start(*slow, EPILOG, env=job_environment(1))
    link = node.machine.path(f"{STATE_DIRECTORY}/jobs/1/joined-0")
    while link.exists():
        assert ending.poll() is None
    start(node, 3).check()
    came_back = link.exists()
    assert ending.wait(10) == 0
    assert came_back
    assert not link.parent.exists()
    assert server_of(client(node, 2)) == server_of(client(node, 3)) != "none"


def test_jobs_that_come_at_once_start_one_daemon(node: GpuNode) -> None:
    """Eight prologs race for a GPU that nobody holds, eight epilogs for who is last."""
    jobs = range(1, 9)
    environments = [{**job_environment(job, gpus="0"), PART: "10"} for job in jobs]
    for hook in (PROLOG, EPILOG):
        running = [node.start(hook, env=environment) for environment in environments]
        assert [process.wait(60) for process in running] == [0] * len(running)
        if hook == PROLOG:
            assert [node.verdict(job)["status"] for job in jobs] == ["ready"] * len(running)
            assert len(daemons(node)) == 1
    assert node.mps_processes() == []


@pytest.mark.parametrize("then", WAYS)
def test_the_next_job_waits_for_the_daemon_that_ends_whatever_the_site_says_by_then(node: GpuNode, then: str) -> None:
    """The last joined job's epilog has marked the daemon, and the daemon takes a second and a half to go."""
    start(node, 1).check()
    node.fault("command.quit=slow:1500")
    ending = node.start(EPILOG, env=job_environment(1))
    while "stage=closing" not in ledger(node):
        assert ending.poll() is None
        time.sleep(0.01)
    node.configure(WAYS[then])
    asks = {PART: "25"} if then != "refuse" else asked("25")
    node.prolog(2, gpus="0", **asks).check()
    assert node.verdict(2)["status"] == "ready", node.verdict(2)
    assert ending.wait(30) == 0
    assert node.compute_modes()[0] == (0 if then == "separate" else 3)
    node.fault()


@pytest.mark.parametrize(
    ("then", "end_ms", "start_ms"),
    [("refuse", 1200, 4000), ("separate", 1200, 4000), ("joined", 1200, 2400)],
)
def test_a_job_that_waited_too_long_for_a_daemon_is_refused_and_no_node_drains(
    node: GpuNode, then: str, end_ms: int, start_ms: int
) -> None:
    """It has 2.4 s in all, and its own daemon takes longer to come than the old one has left of them."""
    start(node, 1).check()
    node.fault(f"command.quit=slow:{end_ms}", f"daemon.start=slow:{start_ms}")
    ending = node.start(EPILOG, env=job_environment(1))
    while "stage=closing" not in ledger(node):
        time.sleep(0.01)
    node.configure((WAYS[then] or "[gpus]\n") + "[deadlines]\nprolog = 4\n")
    node.prolog(2, gpus="0", **({PART: "25"} if then != "refuse" else asked("25"))).check()
    assert re.search("control daemon .* submit the job again", node.verdict(2)["message"])
    assert ending.wait(30) == 0
    node.fault()


@pytest.mark.parametrize("then", ["refuse", "separate"])
def test_the_next_job_ends_the_daemon_whose_epilog_was_killed_whatever_the_site_says_by_then(
    node: GpuNode, then: str
) -> None:
    """Its epilog has marked it, and told it to quit, which a daemon need not hear."""
    start(node, 1).check()
    node.fault("command.quit=hang")
    ending = node.start(EPILOG, env=job_environment(1))
    while "stage=closing" not in ledger(node):
        time.sleep(0.01)
    node.machine.signal(ending, 9)
    ending.wait(10)
    node.fault()
    node.configure(WAYS[then])
    node.prolog(2, gpus="0", **({PART: "25"} if then != "refuse" else asked("25"))).check()
    assert node.verdict(2)["status"] == "ready", node.verdict(2)


def test_logs_that_hang_when_they_are_removed_stop_no_other_job(node: GpuNode) -> None:
    """They lie where the site wants them, which may be another machine's disk. Who starts a daemon on that very GPU
    waits, and has its log directory.
    """
    start(node, 1).check()
    place = f"{LOGS}/{node.uuids[0]}"
    hangs = ("strace", "-f", "-qqq", "-o", "/dev/null", "-P", place, "-e", "inject=getdents64:delay_enter=450000")
    ending = node.start(*hangs, EPILOG, env=job_environment(1))
    while ledger(node):
        time.sleep(0.01)
    start(node, 2, gpus="1").check()
    still = ending.poll()
    start(node, 3).check()
    assert ending.wait(10) == 0
    assert still is None
    assert [node.verdict(job)["status"] for job in (2, 3)] == ["ready", "ready"]
    assert node.run("ls", place).stdout.split() == ["control.log", "joined-daemon", "server.log"]


def test_no_user_reaches_a_daemon_that_its_prolog_still_talks_to(node: GpuNode) -> None:
    """A user's connection would keep it from answering (O50): the ledger has it open when the last answer is there."""
    node.fault("command.start_server=slow:700")
    prolog = node.start(PROLOG, env={**job_environment(1, gpus="0"), PART: "25"})
    while "stage=open" not in ledger(node):
        assert prolog.poll() is None or "stage=open" in ledger(node)
    there = node.mps_processes()
    assert prolog.wait(10) == 0
    node.epilog(1).check()
    assert [process.comm for process in there if process.uid == 0] == ["nvidia-cuda-mps"]


def ledger(node: GpuNode, gpu: int = 0) -> str:
    """What is written of a GPU; empty for nothing."""
    return node.run("cat", f"{STATE_DIRECTORY}/gpus/{node.uuids[gpu]}").stdout


def test_a_start_that_was_killed_is_taken_over(node: GpuNode) -> None:
    """The next job of that GPU need not wait for the epilog of the one whose prolog is gone."""
    node.fault("daemon.start=slow:2000")
    prolog = node.start(PROLOG, env={**job_environment(1, gpus="0"), PART: "25"})
    while "stage=starting" not in ledger(node):
        time.sleep(0.01)
    node.machine.signal(prolog, 9)
    prolog.wait(10)
    node.fault()
    start(node, 2).check()
    assert node.verdict(2)["status"] == "ready", node.verdict(2)
    assert server_of(client(node, 2)) != "none"
    for job in (1, 2):
        node.epilog(job).check()


def test_a_silent_connection_keeps_nobody_from_joining_and_leaving(node: GpuNode) -> None:
    """Ledger and link say all: the daemon is not asked."""
    start(node, 1).check()
    node.fault("command.*=hang")
    began = time.monotonic()
    start(node, 2).check()
    node.epilog(2).check()
    assert time.monotonic() - began < 3
    assert server_of(client(node, 1)) != "none"


def test_a_prolog_that_is_done_is_not_done_again(node: GpuNode) -> None:
    start(node, 1).check()
    before = node.machine.read(f"{STATE_DIRECTORY}/jobs/1/journal")
    start(node, 1).check()
    assert node.machine.read(f"{STATE_DIRECTORY}/jobs/1/journal") == before


def test_plan_shows_how_a_job_joins(node: GpuNode) -> None:
    shown = node.run("slurm-mps", "plan", "--json", "--gres=mps:25").check().stdout
    actions = [one["action"] for one in json.loads(shown)["actions"]]
    assert "link joined-0 to its control daemon, or start that one" in actions[0]
    start(node, 1, user="bob").check()
    refused = node.run("slurm-mps", "plan", "--gres=mps:25", "--user=alice")
    assert "is held by an MPS job of another user" in refused.stderr


def test_daemons_whose_servers_are_stopped_are_ended_together(node: GpuNode) -> None:
    """A user can stop them, and four that are ended one after another take 7 s, sixteen 27 s."""
    node.prolog(1, gpus="0,1,2,3", SPANK_MPS="per-gpu").check()
    for number in range(4):
        client(node, 1, number=number)
    servers = [str(process.pid) for process in node.mps_processes() if process.uid]
    node.run("kill", "-STOP", *servers).check()
    began = time.monotonic()
    node.epilog(1).check()
    assert time.monotonic() - began < 4
    assert len(servers) == 4
    assert node.mps_processes() == []


def test_a_gpu_that_cannot_be_left_keeps_no_other(node: GpuNode) -> None:
    node.prolog(1, gpus="0,1", SPANK_MPS="per-gpu").check()
    path = f"{STATE_DIRECTORY}/gpus/{node.uuids[0]}"
    good = node.machine.read(path)
    node.machine.write(path, good.replace("holder", "older"), mode=0o600)
    failed = node.epilog(1)
    left = [ledger(node, gpu) != "" for gpu in (0, 1)], len(daemons(node))
    node.machine.write(path, good, mode=0o600)
    node.epilog(1).check()
    assert (failed.returncode, failed.stderr.count("ledger")) == (1, 1)
    assert left == ([True, False], 1)
    node.run("rm", f"{STATE_DIRECTORY}/last-fault").check()


def traced(node: GpuNode, job_id: int, *options: str) -> Result:
    """The epilog of a job under strace, whose lines come with standard error."""
    strace = ["strace", "-f", "-b", "execve", "-qqq", "-e", "signal=none", *options]
    epilog = [PYTHON, "-I", "-S", f"{node.package}/hook.py", "epilog"]
    return node.run(*strace, *epilog, env=job_environment(job_id))


def test_what_is_left_of_a_job_is_searched_for_once_and_not_for_ever(node: GpuNode) -> None:
    """Not once for each of its GPUs; where the node has too many processes, the epilog says so and comes again."""
    node.prolog(1, gpus="0,1", SPANK_MPS="per-gpu").check()
    first = ("-P", "/proc/1/cgroup", "-e", "inject=openat:delay_enter=2100000")
    late = traced(node, 1, *first)
    again = traced(node, 1, "-P", "/proc/1/cgroup", "-e", "trace=openat")
    assert (late.returncode, again.returncode) == (1, 0)
    assert "job 1: its processes could not be searched for within 2 s" in late.stderr
    assert again.stderr.count("/proc/1/cgroup") == 1
    node.run("rm", f"{STATE_DIRECTORY}/last-fault").check()


def test_what_is_left_of_a_job_on_the_server_is_ended_and_nobody_else(node: GpuNode) -> None:
    """By the cgroup that Slurm put it into: not what another job has there, nor what says that it is of this one."""
    start(node, 1).check()
    start(node, 2).check()
    place = (
        "/sys/fs/cgroup/freezer"
        if node.run("test", "-d", "/sys/fs/cgroup/freezer").returncode == 0
        else "/sys/fs/cgroup"
    )
    programs = {}
    for job, cgroup in ((1, "job_1/step_0"), (2, "job_2/step_0"), (3, "job_11/step_0")):
        pipe = f"{STATE_DIRECTORY}/jobs/{2 if job == 3 else job}/joined-0"
        env = {"CUDA_MPS_PIPE_DIRECTORY": pipe, "SLURM_JOB_ID": "1"}
        programs[job] = node.start("simulated-gpus", "client", "--hold", "30", user="alice", env=env)
        pid = node.machine.host_pid(programs[job])
        directory = Path(f"{place}/slurm-mps-test/{cgroup}")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "cgroup.procs").write_text(str(pid))
    result = node.epilog(1).check()
    assert "were still there when it had ended, and were killed" in result.stderr
    assert programs[1].wait(5) == -9
    assert [programs[job].poll() for job in (2, 3)] == [None, None]
    for job in (2, 3):
        node.machine.signal(programs[job], 9)
        programs[job].wait(5)
    for directory in sorted(Path(f"{place}/slurm-mps-test").rglob("*/"), key=lambda one: -len(one.parts)):
        if directory.is_dir():
            directory.rmdir()
    Path(f"{place}/slurm-mps-test").rmdir()
