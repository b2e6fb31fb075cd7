"""What the epilog does when a daemon will not go: it insists, in bounded time, and only on what is the job's own."""

from __future__ import annotations

import signal
from time import monotonic, sleep
from typing import TYPE_CHECKING

import pytest

from tests.harness.gpunode import EPILOG, PROLOG, GpuNode, asked, job_environment
from tests.harness.site import PYTHON, STATE_DIRECTORY

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator

    from tests.harness.machine import Result

SHORT = "[deadlines]\nepilog = 5\nquit = 0.3\nsignal = 0.3\n"
STUBBORN = ("command.quit=ignore", "daemon.sigterm=ignore", "server.sigterm=ignore")
DAEMON, SERVER = "nvidia-cuda-mps-control", "nvidia-cuda-mps-server"
FREEZER = "/sys/fs/cgroup/freezer/mps-test"


def pid_file(node: GpuNode, job_id: int = 4711) -> str:
    return f"{node.pipe_directory(job_id)}/{DAEMON}.pid"


def bring_up(node: GpuNode, *faults: str, gpus: str = "0,1") -> tuple[int, int]:
    """A job with short deadlines whose server runs; then the faults. Gives the pids of daemon and server."""
    node.configure(SHORT)
    node.prolog(4711, gpus=gpus, **asked("25", "8G")).check()
    server = int(node.control(4711, "get_server_list").stdout)
    if "server.start=hang" not in faults:
        assert node.control(4711, f"get_server_status {server}").stdout == "ACTIVE\n"
    if faults:
        node.fault(*faults)
    return int(node.machine.read(pid_file(node))), server


def timed_epilog(node: GpuNode) -> tuple[Result, float]:
    start = monotonic()
    return node.epilog(4711), monotonic() - start


def assert_nothing_left(node: GpuNode) -> None:
    assert (node.files(), node.mps_processes(), node.compute_modes()) == ([], [], [0, 0, 0, 0])


# ----------------------------------------------------------------------------------------- a daemon that will not go


@pytest.mark.parametrize(
    "faults",
    [
        ("command.quit=exit:1",),
        ("command.quit=wrong:Not enough privilege to execute quit command",),
        ("command.*=hang",),
        ("command.quit=ignore", "daemon.sigterm=ignore"),
        ("command.quit=hang", "server.sigterm=ignore"),
        ("command.*=hang", "daemon.sigterm=ignore", "server.sigterm=ignore"),
    ],
    ids=" ".join,
)
def test_a_daemon_that_will_not_quit_is_ended(gpu_node: GpuNode, faults: tuple[str, ...]) -> None:
    """Quit refused, ignored or without end is followed by SIGTERM and SIGKILL, each in its time; nothing is left."""
    bring_up(gpu_node, *faults)
    result, took = timed_epilog(gpu_node)
    assert (result.returncode, result.stderr) == (0, "")
    assert took < 3.0  # quit twice 0.3 s, two signals of 0.3 s, and room for a busy machine


@pytest.mark.parametrize("daemons", [{}, {"SPANK_MPS": "per-gpu"}], ids=["per-node", "per-gpu"])
def test_programs_that_are_left_are_ended_with_their_servers(daemons: dict[str, str]) -> None:
    """A stuck kernel on each of eight GPUs: quit forces the programs out all at once, and they learn so (O27, O35)."""
    with GpuNode(gpus=8) as node:
        before = node.snapshot()
        node.prolog(4711, gpus="0,1,2,3,4,5,6,7", **{**asked("25", "8G"), **daemons}).check()
        pipes = [f"{STATE_DIRECTORY}/jobs/4711/{f'gpu-{number}' if daemons else 'pipe'}" for number in range(8)]
        clients = [
            node.start(
                "simulated-gpus", "client", "--device", "0" if daemons else str(number), "--spin",
                user="alice", env={"CUDA_MPS_PIPE_DIRECTORY": pipe},
            )
            for number, pipe in enumerate(pipes)
        ]  # fmt: skip
        for pipe in pipes:
            while node.run(DAEMON, env={"CUDA_MPS_PIPE_DIRECTORY": pipe}, text="ps\n").stdout.count(
                "simulated-gpus"
            ) < 8 // len(set(pipes)):
                assert not any(client.poll() for client in clients)
        result, took = timed_epilog(node)
        assert (result.returncode, result.stderr) == (0, "")
        assert took < 4.0  # Slurm's MessageTimeout is 10 s
        assert [client.wait(5) for client in clients] == [4] * 8
        assert node.snapshot() == before


def test_a_server_that_starts_for_ever_is_ended(gpu_node: GpuNode) -> None:
    """The prolog does not wait for the server, so it may never have come up: the epilog ends it with its daemon."""
    gpu_node.fault("server.start=hang", "server.sigterm=ignore")
    bring_up(gpu_node, "server.start=hang", "server.sigterm=ignore")
    assert timed_epilog(gpu_node)[0].check().stderr == ""


@pytest.mark.parametrize(
    ("killed", "also"),
    [("daemon", ()), ("daemon", (*STUBBORN, "server.alone=stay")), ("server", STUBBORN), ("both", ())],
    ids=["daemon", "daemon, and a server that stays", "server, and a stubborn daemon", "both"],
)
def test_what_a_dead_daemon_left_is_found(gpu_node: GpuNode, killed: str, also: tuple[str, ...]) -> None:
    """After the daemon, its server or both died of SIGKILL, the epilog ends what is left and removes the files."""
    daemon, server = bring_up(gpu_node, *also)
    # A server that stays without its daemon goes with its last client.
    client = gpu_node.start(
        "simulated-gpus", "client", "--hold", "60", user="alice",
        env={"CUDA_MPS_PIPE_DIRECTORY": gpu_node.pipe_directory(4711)},
    )  # fmt: skip
    while not gpu_node.control(4711, "ps").stdout.count("simulated-gpus"):
        assert client.poll() is None
    victims = {"daemon": [daemon], "server": [server], "both": [server, daemon]}[killed]  # it goes with its daemon
    gpu_node.run("kill", "-9", *map(str, victims)).check()
    result, took = timed_epilog(gpu_node)
    left = gpu_node.mps_processes()  # while the client is there: a server leaves with its last one
    gpu_node.machine.signal(client, signal.SIGKILL)
    client.wait(5)
    assert (result.returncode, result.stderr, left) == (0, "", [])
    assert took < 3.0


@pytest.fixture
def frozen_job() -> Iterator[GpuNode]:
    """A job whose daemon and server not even SIGKILL ends, as when they wait in the driver: they are frozen."""
    with GpuNode(gpus=4) as node:
        if "freezer" not in node.machine.cgroups:
            pytest.skip("needs the freezer controller of cgroup v1")
        pids = bring_up(node)
        adding = "".join(f"echo {pid} >{FREEZER}/cgroup.procs; " for pid in pids)
        node.run("sh", "-ec", f"mkdir {FREEZER}; {adding} echo FROZEN >{FREEZER}/freezer.state").check()
        yield node
        node.run("sh", "-c", f"echo THAWED >{FREEZER}/freezer.state").check()
        while node.mps_processes():
            sleep(0.01)
        node.run("rmdir", FREEZER).check()


def test_a_daemon_that_not_even_sigkill_ends_drains_the_node(frozen_job: GpuNode) -> None:
    """Every epilog fails and names the processes while they are there; the one after their end finds nothing wrong."""
    pids = [str(process.pid) for process in frozen_job.mps_processes()]
    for attempt in ("first", "second"):
        result, took = timed_epilog(frozen_job)
        assert result.returncode == 1, attempt
        assert f"MPS processes {', '.join(pids)} of /run/slurm-mps/jobs/4711/pipe are still there" in result.stderr
        assert took < 3.0, attempt
        assert "/run/slurm-mps/jobs/4711/journal" in frozen_job.files(), attempt
    frozen_job.run("sh", "-c", f"echo THAWED >{FREEZER}/freezer.state").check()
    while frozen_job.mps_processes():
        sleep(0.01)
    assert frozen_job.epilog(4711).check().stderr == ""
    assert_nothing_left(frozen_job)


@pytest.mark.parametrize("fault", ["nvml.init=9", "nvml.SetComputeMode=4", "gpu.1=lost"])
def test_what_one_undo_cannot_do_keeps_no_other_from_its_work(gpu_node: GpuNode, fault: str) -> None:
    """The epilog goes on past a failure, says it, exits 1, and is finished by the next one."""
    bring_up(gpu_node, fault)
    result = gpu_node.epilog(4711)
    assert result.returncode == 1
    assert "NVML error" in result.stderr
    assert gpu_node.mps_processes() == []
    assert gpu_node.compute_modes() == ([0, 3, 0, 0] if fault == "gpu.1=lost" else [3, 3, 0, 0])
    gpu_node.fault()
    assert gpu_node.epilog(4711).check().stderr == ""


def test_an_epilog_that_hangs_in_the_driver_ends_itself(gpu_node: GpuNode) -> None:
    """The site's deadline for the epilog holds inside NVML, too: exit 1 and a message; the next one finishes."""
    gpu_node.configure("[deadlines]\nepilog = 1\n")
    gpu_node.prolog(4711).check()
    gpu_node.fault("nvml.init=hang")
    result = gpu_node.run("timeout", "-s", "KILL", "3", EPILOG, env=job_environment(4711))
    gpu_node.fault()
    again = gpu_node.epilog(4711)
    assert result.returncode == 1
    assert "job 4711: not done after 1 s; the NVIDIA driver may hang" in result.stderr
    assert (again.returncode, again.stderr) == (0, "")


# ----------------------------------------------------------------------------------------------------- whose is it


def impostor(node: GpuNode, program: str, user: str, pipe_directory: str) -> subprocess.Popen[bytes]:
    """A process that runs a program of this name with this pipe directory in its environment."""
    place = f"/tmp/{user}-{program}"
    node.machine.make_directory(place, user=user)
    node.run("cp", "/usr/bin/sleep", f"{place}/{program}").check()
    child = node.start(f"{place}/{program}", "60", user=user, env={"CUDA_MPS_PIPE_DIRECTORY": pipe_directory})
    inside = node.machine.pid_inside(child)
    while not any(p.pid == inside and p.comm == program[:15] for p in node.machine.processes()):
        assert child.poll() is None
    return child


def test_only_the_jobs_own_processes_are_signalled(gpu_node: GpuNode) -> None:
    """However hard the epilog insists, a namesake of another user, of root or of another job's daemon is left alone."""
    own = gpu_node.pipe_directory(4711)
    bring_up(gpu_node)
    gpu_node.prolog(4712, user="bob", gpus="2", **asked("50")).check()
    others = {p.pid for p in gpu_node.mps_processes() if p.pid not in ours(gpu_node)}
    bystanders = [
        impostor(gpu_node, DAEMON, "bob", own),
        impostor(gpu_node, SERVER, "bob", own),
        impostor(gpu_node, SERVER, "carol", own),
        impostor(gpu_node, DAEMON, "alice", own),  # the job's user runs servers, never a daemon
        impostor(gpu_node, DAEMON, "root", "/run/slurm-mps/jobs/4711/pipe2"),
        impostor(gpu_node, "sleep", "root", own),
    ]
    gpu_node.fault(*STUBBORN)
    result = gpu_node.epilog(4711)
    gone = [child.args for child in bystanders if child.poll() is not None]
    left = {process.pid for process in gpu_node.mps_processes()}
    for child in bystanders:
        gpu_node.machine.signal(child, signal.SIGKILL)
        child.wait(5)
    gpu_node.fault()
    works = gpu_node.client(4712, user="bob").stdout
    assert (result.returncode, result.stderr) == (0, "")
    assert gone == []
    assert others <= left
    assert " sms=66 " in works


def ours(node: GpuNode) -> set[int]:
    """Daemon and server of job 4711."""
    return {int(node.machine.read(pid_file(node))), int(node.control(4711, "get_server_list").stdout)}


def test_a_pid_file_is_not_believed_without_proof(gpu_node: GpuNode) -> None:
    """A pid file that names another process, or none, harms nobody, and the daemon is ended all the same."""
    gpu_node.configure(SHORT)
    gpu_node.prolog(4712, user="bob", gpus="2").check()
    sleeper = gpu_node.start("sleep", "60")
    inside = str(gpu_node.machine.pid_inside(sleeper))
    another = gpu_node.machine.read(pid_file(gpu_node, 4712)).strip()
    left = {}
    for named in (inside, another, "1", "4194303", "-1\n; quit", ""):
        gpu_node.prolog(4711).check()
        gpu_node.machine.write(pid_file(gpu_node), f"{named}\n")
        result = gpu_node.epilog(4711)
        well = sleeper.poll() is None and gpu_node.control(4712, "get_server_list").returncode == 0
        left[named] = result.returncode, result.stderr, well, len(gpu_node.mps_processes())
    gpu_node.machine.signal(sleeper, signal.SIGKILL)
    sleeper.wait(5)
    assert left == dict.fromkeys(left, (0, "", True, 2))


# ------------------------------------------------------------------------------------------------------------ logs


def kept(node: GpuNode, directory: str) -> list[str]:
    return node.run("find", directory, "-mindepth", "1", "-printf", "%P %m %u\n").stdout.splitlines()


def test_logs_are_kept_for_root_and_the_jobs_user(gpu_node: GpuNode) -> None:
    """The daemon's and the server's log outlive the job, where the site wants them; no other user reads them."""
    gpu_node.configure('[paths]\nlogs = "/var/log/kept"\n')
    gpu_node.run_job(4711, **asked("25", "8G"))
    assert sorted(kept(gpu_node, "/var/log/kept")) == [
        "4711 750 root", "4711/control.log 644 root", "4711/server.log 644 root"
    ]  # fmt: skip
    control_log = gpu_node.machine.read("/var/log/kept/4711/control.log")
    assert "Cmd:set_default_active_thread_percentage 25" in control_log
    assert control_log.rstrip().endswith("Exit with status 0")
    assert gpu_node.run("cat", "/var/log/kept/4711/server.log", user="alice").returncode == 0
    assert gpu_node.run("cat", "/var/log/kept/4711/server.log", user="bob").returncode != 0


def test_kept_logs_are_bounded(gpu_node: GpuNode) -> None:
    """Of each log the end is kept, up to the site's size; of the jobs the latest, up to the site's number.

    Ids begin anew, where the controller's state was lost; a user's many jobs push out none of another's.
    """
    gpu_node.configure('[paths]\nlogs = "/var/log/bounded"\n[logs]\nmax_kib = 2\nmax_jobs = 2\n')
    for job, user in ((50, "bob"), (100, "alice"), (101, "alice"), (7, "alice")):
        gpu_node.prolog(job, user=user).check()
        gpu_node.control(job, "get_default_client_priority\n" * 200)
        gpu_node.epilog(job).check()
    assert gpu_node.run("ls", "/var/log/bounded").stdout.split() == ["50", "7"]
    log = gpu_node.machine.path("/var/log/bounded/7/control.log").read_bytes()
    assert len(log) == 2048
    assert log.endswith(b"Exit with status 0\n")


def test_no_logs_are_kept_where_the_site_says_never(gpu_node: GpuNode) -> None:
    """With keep = "never" a job's logs go with it."""
    gpu_node.configure('[paths]\nlogs = "/var/log/never"\n[logs]\nkeep = "never"\n')
    gpu_node.run_job(4711)
    assert not gpu_node.machine.path("/var/log/never/4711").exists()


@pytest.mark.parametrize("place", ["/var/log/place", "/var/log/place/not/made"])
def test_logs_that_cannot_be_kept_cost_no_more_than_a_message(gpu_node: GpuNode, place: str) -> None:
    """Whatever is wrong with the log directory, the prolog says so, the job has MPS and nothing of it is left."""
    gpu_node.configure(f'[paths]\nlogs = "{place}"\n')
    spoilt = (
        "touch /var/log/place",
        "mkdir -m 777 /var/log/place",
        "ln -s /tmp /var/log/place",
        "mkdir /var/log/place; mount -t tmpfs -o size=4k,mode=700 none /var/log/place",
    )
    for prepare in spoilt if place == "/var/log/place" else ("true",):
        gpu_node.run("sh", "-c", prepare).check()
        brought_up = gpu_node.prolog(4711).check()
        gpu_node.control(4711, "get_default_client_priority\n" * 200)  # more than a page of log
        assert " sms=132 " in gpu_node.client(4711).stdout, prepare
        result = gpu_node.epilog(4711)
        gpu_node.run("sh", "-c", "umount /var/log/place; rm -rf /var/log/place")
        assert result.returncode == 0, prepare
        if "mount" not in prepare:
            assert "job 4711: its logs are not written below /var/log/place" in brought_up.stderr, prepare
        assert_nothing_left(gpu_node)


def test_a_message_that_cannot_be_said_costs_nothing(gpu_node: GpuNode) -> None:
    """Whoever reads the hooks' messages may be gone (slurmd restarts): the work is done and its outcome is the same."""
    gpu_node.configure('[paths]\nlogs = "/var/log/nowhere/at/all"\n')
    gpu_node.prolog(4711).check()
    mute = f"exec {EPILOG} 2>/dev/full"
    epilog = gpu_node.run("sh", "-c", mute, env=job_environment(4711))
    left = gpu_node.files(), gpu_node.mps_processes(), gpu_node.compute_modes()
    gpu_node.epilog(4711)
    gpu_node.fault("daemon.start=exit:1")
    environment = job_environment(4711, **asked())
    prolog = gpu_node.run("sh", "-c", f"exec {PROLOG} 2>/dev/full", env=environment)
    left_by_prolog = gpu_node.files()
    gpu_node.epilog(4711)
    assert (epilog.returncode, *left) == (0, [], [], [0, 0, 0, 0])
    assert (prolog.returncode, left_by_prolog) == (1, [])


def test_a_server_that_denies_its_daemon_is_ended_all_the_same(gpu_node: GpuNode) -> None:
    """Its environment is not what tells whose server it is, but whose child it is; its user can stop it.

    Root rewrites the environment here: the user cannot (O51).
    """
    gpu_node.configure("[deadlines]\nquit = 0.5\nsignal = 0.5\n")
    gpu_node.prolog(4711).check()
    gpu_node.client(4711)
    (server,) = (process.pid for process in gpu_node.mps_processes() if process.uid)
    deny = f"""
import os, re
start, end = (int(n) for n in open("/proc/{server}/stat").read().rpartition(")")[2].split()[47:49])
memory = os.open("/proc/{server}/mem", os.O_RDWR)
text = os.pread(memory, end - start, start)
os.pwrite(memory, b"X", start + text.index(b"CUDA_MPS_PIPE_DIRECTORY"))
os.kill({server}, 19)
"""
    denied = gpu_node.run("/usr/bin/python3", "-c", deny)
    gpu_node.fault("command.quit=ignore")
    result = gpu_node.epilog(4711)
    assert denied.returncode == 0, denied.stderr
    assert result.returncode == 0, result.stderr


def test_a_file_that_is_not_ours_is_left_for_the_admin(gpu_node: GpuNode) -> None:
    """Something that root put into a job's directory is not removed with it: the epilog names it and exits 1."""
    gpu_node.prolog(4711).check()
    stranger = f"{gpu_node.pipe_directory(4711)}/../notes"
    gpu_node.run(PYTHON, "-c", f"open('{stranger}', 'w').close()").check()
    result = gpu_node.epilog(4711)
    assert result.returncode == 1
    assert "/run/slurm-mps/jobs/4711 holds 'notes', which slurm-mps did not put there" in result.stderr
    assert (gpu_node.mps_processes(), gpu_node.compute_modes()) == ([], [0, 0, 0, 0])
    gpu_node.run("rm", stranger.replace("pipe/../", "")).check()


# ------------------------------------------------------------------------ after a prolog that was killed while it waits


def eventually(condition: Callable[[], bool]) -> bool:
    end = monotonic() + 20
    while monotonic() < end:
        if condition():
            return True
        sleep(0.005)
    return False


@pytest.mark.parametrize(
    ("fault", "reached"),
    [
        ("nvml.init=hang", lambda node: node.machine.path(f"{STATE_DIRECTORY}/jobs/4711/config").exists()),
        ("daemon.start=hang", lambda node: bool(node.mps_processes())),
        ("command.set_default_active_thread_percentage=hang", lambda node: len(node.mps_processes()) == 2),
        ("command.start_server=hang", lambda node: len(node.mps_processes()) == 2),
        ("command.*=hang", lambda node: len(node.mps_processes()) == 2),
        ("server.start=hang", lambda node: {p.uid for p in node.mps_processes()} == {0, 20001}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_epilog_alone_restores_what_a_prolog_killed_while_it_hung_left(
    gpu_node: GpuNode, fault: str, reached: Callable[[GpuNode], bool]
) -> None:
    """A prolog that Slurm kills while driver or daemon hangs is undone by the epilog, while the daemon still hangs."""
    gpu_node.configure(SHORT)
    gpu_node.fault(fault)
    prolog = gpu_node.start(PROLOG, env=job_environment(4711, gpus="0", **asked("25", "8G")))
    assert eventually(lambda: reached(gpu_node))
    gpu_node.machine.signal(prolog, signal.SIGKILL)
    prolog.wait(5)
    if fault == "nvml.init=hang":
        gpu_node.fault()  # nothing can be asked of a driver that hangs: test_hooks_takedown.py
    result = gpu_node.epilog(4711)
    assert (result.returncode, result.stderr) == (0, "")
