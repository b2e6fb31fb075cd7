"""``slurm-mps status`` and ``logs`` on a node: what root and users see, what is a problem, and that nothing hangs."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import termios
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from slurm_mps.cli.status import COLUMNS
from tests.harness.gpunode import asked
from tests.harness.reports import report as checked
from tests.harness.runtime import MOUNT_POINT

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from tests.harness.gpunode import GpuNode
    from tests.harness.machine import Result

COMMAND = f"{MOUNT_POINT}/bin/slurm-mps"
GIB = 1024**3


def status(node: GpuNode, *options: str, user: str | None = None) -> Result:
    return node.run(COMMAND, "status", *options, user=user)


def report(node: GpuNode, *options: str, user: str | None = None) -> dict[str, Any]:
    said = status(node, "--json", *options, user=user)
    return checked(said.stdout, said.returncode)


def cells(node: GpuNode, fields: str, *options: str, user: str | None = None) -> list[list[str]]:
    said = status(node, "-n", "-o", fields, *options, user=user)
    return [line.split() for line in said.stdout.splitlines()]


@contextmanager
def client(
    node: GpuNode, job_id: int, *options: str, pipe: str = "pipe", user: str = "alice", **env: str
) -> Iterator[int]:
    """A client that stays; its pid inside. It says that it is rank 3 of step 0."""
    environment = {
        "CUDA_MPS_PIPE_DIRECTORY": f"/run/slurm-mps/jobs/{job_id}/{pipe}",
        "SLURM_JOB_ID": str(job_id),
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "3",
        **env,
    }
    child: subprocess.Popen[bytes] = node.start(
        "simulated-gpus", "client", *options, "--hold", "60", user=user, env=environment
    )
    pid = node.machine.pid_inside(child)
    control = {"CUDA_MPS_PIPE_DIRECTORY": environment["CUDA_MPS_PIPE_DIRECTORY"]}
    end = time.monotonic() + 10
    while str(pid) not in node.run("nvidia-cuda-mps-control", env=control, text="ps\n").stdout.split():
        assert time.monotonic() < end
        time.sleep(0.02)
    yield pid
    node.machine.signal(child, 9)
    child.wait(5)


@contextmanager
def job(node: GpuNode, job_id: int, *, user: str = "alice", gpus: str = "0,1", **spank: str) -> Iterator[None]:
    node.prolog(job_id, user=user, gpus=gpus, **(spank or asked())).check()
    yield
    node.fault()
    node.epilog(job_id).check()


def test_root_sees_every_job_with_what_each_client_has(gpu_node: GpuNode) -> None:
    with (
        job(gpu_node, 5, **asked("25", "8G")),
        job(gpu_node, 6, user="bob", gpus="2,3", SPANK_MPS="per-gpu", SPANK_MPS_MEM="0:4G"),
        client(gpu_node, 5, "--alloc-mib", "1000") as pid,
    ):
        found = report(gpu_node)
        (line, other, *bobs) = cells(gpu_node, "job,user,gpu,mode,found,client,task,threads,limit,state")
    assert (found["status"], found["problems"]) == (0, [])
    assert [(one["job_id"], one["user"], one["state"]) for one in found["jobs"]] == [
        (5, "alice", "ready"),
        (6, "bob", "ready"),
    ]
    (daemon,) = found["jobs"][0]["daemons"]
    assert daemon["servers"] == [{"pid": daemon["servers"][0]["pid"], "state": "ACTIVE"}]
    first, second = daemon["gpus"]
    assert (first["compute_mode"], first["compute_mode_found"]) == ("EXCLUSIVE_PROCESS", "DEFAULT")
    (seen,) = first["clients"]
    assert second["clients"] == []
    assert (seen["pid"], seen["uid"], seen["step"], seen["rank"]) == (pid, 20001, "0", 3)
    assert (seen["thread_percentage"], seen["limit_bytes"], seen["command"]) == (25, 8 * GIB, "simulated-gpus")
    assert 1000 * 1024**2 < seen["memory_bytes"] < 2 * GIB
    assert [len(one["gpus"]) for one in found["jobs"][1]["daemons"]] == [1, 1]
    assert [one["limit_bytes"] for one in found["jobs"][1]["daemons"]] == [4 * GIB, None]
    assert line[:2] == ["5", "alice"]
    assert line[3:] == ["E.", "Process", "Default", str(pid), "0.3", "25%", "8192", "ACTIVE"]
    assert other[-4:-1] == ["-", "-", "-"]
    assert len(bobs) == 2


def test_a_client_with_a_lower_limit_of_its_own_has_that(gpu_node: GpuNode) -> None:
    own = {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "12.5", "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=2G"}
    with job(gpu_node, 5, **asked("25", "8G")), client(gpu_node, 5, **own):
        ((threads, limit),) = [row for row in cells(gpu_node, "threads,limit") if row[0] != "-"]
    assert (threads, limit) == ("12.5%", "2048")


def test_a_user_sees_their_own_jobs_and_no_other(gpu_node: GpuNode) -> None:
    """By what the kernel says of their own processes; another's job is as one that is not there."""
    with job(gpu_node, 5), job(gpu_node, 6, user="bob", gpus="2,3"), client(gpu_node, 5) as pid:
        found = report(gpu_node, user="alice")
        assert [one["job_id"] for one in found["jobs"]] == [5]
        gpu = found["jobs"][0]["daemons"][0]["gpus"][0]
        assert ([one["pid"] for one in gpu["clients"]], gpu["compute_mode"]) == ([pid], "EXCLUSIVE_PROCESS")
        assert gpu["compute_mode_found"] is None, "the ledger is root's"
        assert report(gpu_node, user="bob")["jobs"] == [], "no process of bob's says so"
        assert [one["job_id"] for one in report(gpu_node, "6", user="bob")["jobs"]] == [6]
        other = status(gpu_node, "6", user="alice")
        absent = status(gpu_node, "7", user="alice")
    assert (other.returncode, absent.returncode) == (1, 1)
    assert other.stderr.replace("6", "7") == absent.stderr


def test_a_node_without_jobs_is_fine_and_one_without_slurm_mps_is_another_matter(gpu_node: GpuNode) -> None:
    gpu_node.run_job(5)
    said = status(gpu_node)
    assert (said.returncode, said.stderr) == (0, "slurm-mps: no job has MPS on this node\n")
    said = status(gpu_node, user="carol")
    assert (said.returncode, said.stderr) == (0, "slurm-mps: no job of yours has MPS on this node\n")
    hidden = gpu_node.run("unshare", "-m", "sh", "-c", f"mount -t tmpfs none /run; {COMMAND} status; echo $?")
    assert hidden.stdout == "3\n"


def test_a_daemon_that_is_gone_is_a_problem(gpu_node: GpuNode) -> None:
    with job(gpu_node, 5):
        daemon = report(gpu_node)["jobs"][0]["daemons"][0]["pid"]
        gpu_node.run("kill", "-9", str(daemon)).check()
        said = status(gpu_node)
    assert said.returncode == 1
    assert " gone " in said.stdout
    assert said.stderr == "slurm-mps: job 5: its control daemon is gone\n"


@pytest.mark.parametrize(
    ("fault", "shows", "says"),
    [
        ("command.ps=hang", " silent ", "job 5: its control daemon does not answer: "),
        ("command.get_server_status=hang", " {pid} ", "its MPS server did not report its state within 0.5 s"),
        ("nvml.init=hang", " ACTIVE ", "the NVIDIA driver did not answer within 0.5 s"),
    ],
)
def test_what_hangs_is_a_problem_and_delays_nobody_elses_row(
    gpu_node: GpuNode, fault: str, shows: str, says: str
) -> None:
    with job(gpu_node, 5), job(gpu_node, 6, user="bob", gpus="2"), client(gpu_node, 5) as pid:
        gpu_node.fault(fault)
        began = time.monotonic()
        said = status(gpu_node, "--timeout", "0.5")
        took = time.monotonic() - began
    assert (said.returncode, took < 4) == (1, True)
    assert says in said.stderr
    assert shows.format(pid=pid) in said.stdout
    assert len(said.stdout.splitlines()) == 4, "a heading and a row for each GPU"


def test_a_server_in_fault_names_who_must_leave(gpu_node: GpuNode) -> None:
    with job(gpu_node, 5), client(gpu_node, 5) as victim:
        gpu_node.client(5, "--fault")
        said = status(gpu_node)
        logs = gpu_node.run(COMMAND, "logs", "5", "--trouble")
    assert said.returncode == 1
    assert " FAULT " in said.stdout
    assert f"has a GPU fault and takes no programs until all that it hit have ended (process {victim})" in said.stderr
    assert logs.returncode == 1
    assert f"took client {victim} (rank 3 of step 0) along" in logs.stdout


def test_a_server_that_died_under_its_clients_is_named_until_there_is_another(gpu_node: GpuNode) -> None:
    """Of a daemon for each GPU only the one that lost it; to its user and to root."""
    with job(gpu_node, 5, SPANK_MPS="per-gpu"):
        with client(gpu_node, 5, pipe="gpu-1"):
            first, second = (daemon["servers"][0]["pid"] for daemon in report(gpu_node)["jobs"][0]["daemons"])
            gpu_node.run("kill", "-9", str(second)).check()
            said, mine = status(gpu_node), status(gpu_node, user="alice")
            found = report(gpu_node)
            states = [row[1:] for row in cells(gpu_node, "gpu,server,state")]
        gpu_node.client(None, CUDA_MPS_PIPE_DIRECTORY=found["jobs"][0]["daemons"][1]["pipe_directory"]).check()
        after = status(gpu_node)
    assert (said.returncode, mine.returncode, mine.stderr) == (1, 1, said.stderr)
    assert said.stderr == (
        f"slurm-mps: job 5: MPS server {second} died: its clients lost what they had on the GPU (CUDA error 806), the "
        "next program gets a new one; slurm-mps logs 5 tells more (gpu-1)\n"
    )
    assert [daemon["servers"] for daemon in found["jobs"][0]["daemons"]] == [
        [{"pid": first, "state": "ACTIVE"}],
        [{"pid": second, "state": "DIED"}],
    ]
    assert states == [[str(first), "ACTIVE"], [str(second), "DIED"]]
    assert (after.returncode, after.stderr) == (0, "")


def test_a_server_that_is_gone_without_a_trace_is_missed_all_the_same(gpu_node: GpuNode) -> None:
    """Its log may be cut, or away."""
    with job(gpu_node, 5):
        daemon = report(gpu_node)["jobs"][0]["daemons"][0]
        gpu_node.machine.path("/var/log/slurm-mps/5/control.log").unlink()
        gpu_node.run("kill", "-9", str(daemon["servers"][0]["pid"])).check()
        said = status(gpu_node)
    assert said.returncode == 1
    assert said.stdout.count(" no server ") == 2
    assert (
        f"job 5: its control daemon {daemon['pid']} has no MPS server; the next program gets a new one" in said.stderr
    )


def test_a_compute_mode_that_somebody_changed_is_a_problem(gpu_node: GpuNode) -> None:
    with job(gpu_node, 5):
        gpu_node.set_compute_modes(3, 0)
        said = status(gpu_node)
        gpu_node.set_compute_modes(3, 3)
    assert said.returncode == 1
    assert "is DEFAULT, though the job holds it EXCLUSIVE_PROCESS" in said.stderr


def test_a_program_without_the_jobs_daemon_is_a_problem_and_a_row(gpu_node: GpuNode) -> None:
    """Where compute modes are left alone nothing else says so: a program without the directory, one of another daemon.

    A client in a pid namespace of its own has both of its pids; another user's program is not the job's.
    """
    gpu_node.configure('[gpus]\ncompute_mode = "unchanged"\n')
    own = {"CUDA_MPS_PIPE_DIRECTORY": "/tmp/own", "CUDA_MPS_LOG_DIRECTORY": "/tmp/own"}
    of_task = {"SLURM_JOB_ID": "5", "SLURM_STEP_ID": "1", "SLURM_PROCID": "2"}
    hold = ("simulated-gpus", "client", "--hold", "60")
    inside = ("unshare", "--user", "--pid", "--fork", "--kill-child", *hold)
    with job(gpu_node, 5):
        gpu_node.run("mkdir", "/tmp/own", user="alice").check()
        gpu_node.run("nvidia-cuda-mps-control", "-d", user="alice", env=own).check()
        pipe = {"CUDA_MPS_PIPE_DIRECTORY": gpu_node.pipe_directory(5)}
        started = [
            gpu_node.start(*argv, user=user, env=env)
            for argv, user, env in (
                (hold, "alice", of_task),
                (hold, "alice", {}),
                (hold, "alice", {**of_task, **own}),
                (hold, "alice", {"SLURM_JOB_ID": "6"}),
                (hold, "bob", {}),
                (inside, "alice", pipe),
            )
        ]
        without = [gpu_node.machine.pid_inside(child) for child in started[:3]]
        end = time.monotonic() + 20
        while len((found := report(gpu_node))["jobs"][0]["daemons"][0]["gpus"][0]["without_mps"]) < 3 or not (
            clients := found["jobs"][0]["daemons"][0]["gpus"][0]["clients"]
        ):
            assert time.monotonic() < end, found
        rows = [row for row in cells(gpu_node, "client,task,state,server,inside") if "MPS" in row]
        mine = report(gpu_node, user="alice")
        gpu_node.run("nvidia-cuda-mps-control", user="alice", env=own, text="quit -t 1\n").check()
        for child in started:
            gpu_node.machine.signal(child, 9)
            child.wait(5)
    uuid = gpu_node.uuids[0]
    pids = ", ".join(map(str, sorted(without)))
    words = f"job 5: processes {pids} run on {uuid} without the job's control daemon and its limits"
    assert (found["status"], found["problems"], mine["problems"]) == (1, [words], [words])
    assert [one["pid_inside"] for one in clients] == [1], clients
    assert sorted(rows) == sorted(
        [[str(pid), task, "no", "MPS", "-", "-"] for pid, task in zip(without, ("1.2", "-", "1.2"), strict=True)]
    )


def test_a_client_whose_own_variable_lifts_the_limit_is_a_problem(gpu_node: GpuNode) -> None:
    with job(gpu_node, 5, **asked("25", "8G")), client(gpu_node, 5, CUDA_MPS_PINNED_DEVICE_MEM_LIMIT="junk") as pid:
        said = status(gpu_node)
    assert said.returncode == 1
    assert f"process {pid} may take more than 8 GiB of GPU-51" in said.stderr


def test_a_refused_job_says_why(gpu_node: GpuNode) -> None:
    with job(gpu_node, 5, **asked(mem="900G")):
        said = status(gpu_node)
        mine = status(gpu_node, "5", user="alice")
    assert (said.returncode, mine.returncode) == (0, 0)
    assert " refused " in said.stdout
    assert "job 5 has no MPS here: --mps-mem=900G is more than GPU-51" in said.stderr
    assert mine.stderr == said.stderr


def test_what_a_client_calls_itself_cannot_move_the_cursor(gpu_node: GpuNode) -> None:
    script = "exec -a $'x\\033[2J\\nslurm' simulated-gpus client --hold 20"
    with job(gpu_node, 5):
        environment = {"CUDA_MPS_PIPE_DIRECTORY": gpu_node.pipe_directory(5), "SLURM_PROCID": "\033[2J"}
        child = gpu_node.start("bash", "-c", script, user="alice", env=environment)
        end = time.monotonic() + 10
        while " x?" not in (said := status(gpu_node).stdout):
            assert time.monotonic() < end, said
        gpu_node.machine.signal(child, 9)
        child.wait(5)
    assert said.isprintable() or "\033" not in said


@pytest.mark.parametrize("options", [["--timeout", "0"], ["-o", "nonsense"], ["-w", "n1"], ["x"], ["--nonsense"]])
def test_wrong_usage_is_status_2(gpu_node: GpuNode, options: list[str]) -> None:
    assert status(gpu_node, *options).returncode == 2


# ------------------------------------------------------------------------------------------------------------ the logs


def logs(node: GpuNode, *options: str, user: str | None = None) -> Result:
    return node.run(COMMAND, "logs", *options, user=user)


def test_the_logs_tell_in_words_who_came_and_went_during_the_job_and_after(gpu_node: GpuNode) -> None:
    with job(gpu_node, 5, **asked("25", "8G")):
        gpu_node.client(5).check()
        during = logs(gpu_node, "5", user="alice")
    after = logs(gpu_node, "5", user="alice")
    assert (during.returncode, after.returncode) == (0, 0)
    words = [line.split("  ", 1)[1] for line in after.stdout.splitlines()]
    server = next(word.split()[1] for word in words if word.startswith("server "))
    assert words[0].startswith("control daemon ")
    assert f"server {server} is started for uid 20001" in words
    uuid = f"GPU-51{words[3].partition('GPU-51')[2].split(',')[0]}" if "GPU-51" in words[3] else "GPU 0"
    assert any(
        f"server {server} is up; each client gets at most 25.0 % of the threads, 8 GiB of {uuid}" in w for w in words
    )
    assert any("of uid 20001 connected" in word for word in words)
    assert any("has a context on GPU-51" in word for word in words)
    assert words[-2:] == [
        f"server {server} ended, as requested",
        f"{words[0].rpartition(' ')[0]} ended (status 0)",
    ]
    assert len(during.stdout.splitlines()) == len(words) - 2


def test_the_logs_of_daemons_for_each_gpu_are_told_apart(gpu_node: GpuNode) -> None:
    with job(gpu_node, 5, SPANK_MPS="per-gpu"):
        said = logs(gpu_node, "5", "--json")
    events = checked(said.stdout, said.returncode)["events"]
    assert {event["daemon"] for event in events} == {"gpu-0", "gpu-1"}


def test_another_users_logs_are_not_told(gpu_node: GpuNode) -> None:
    with job(gpu_node, 5):
        during = logs(gpu_node, "5", user="bob")
    after = logs(gpu_node, "5", user="bob")
    absent = logs(gpu_node, "77", user="bob")
    assert (during.returncode, after.returncode, absent.returncode) == (4, 4, 3)
    assert after.stderr.startswith("slurm-mps: the logs of job 5 can be read by its user and root")
    assert (during.stdout, after.stdout, absent.stdout) == ("", "", "")


def test_raw_logs_are_whole_and_harmless(gpu_node: GpuNode) -> None:
    gpu_node.run_job(5)
    path = gpu_node.machine.path("/var/log/slurm-mps/5/server.log")
    with path.open("ab") as file:
        file.write(b"\x1b[2J\xff planted\n")
    said = logs(gpu_node, "5", "--raw")
    assert said.returncode == 0
    assert "CUDA MPS Control binary version" in said.stdout
    assert "?[2J? planted" in said.stdout


def test_a_planted_fifo_holds_nobody_up(gpu_node: GpuNode) -> None:
    """Nobody but root can plant one; whatever lies there, root's command ends."""
    gpu_node.run_job(5)
    path = gpu_node.machine.path("/var/log/slurm-mps/5/server.log")
    path.unlink()
    gpu_node.run("mkfifo", "/var/log/slurm-mps/5/server.log").check()
    said = logs(gpu_node, "5")
    assert said.returncode == 1
    assert said.stderr == "slurm-mps: /var/log/slurm-mps/5/server.log is no plain file\n"


def test_the_site_may_keep_logs_elsewhere(gpu_node: GpuNode) -> None:
    gpu_node.configure('[paths]\nlogs = "/var/log/mps-elsewhere"\n')
    gpu_node.run_job(5)
    said = logs(gpu_node, "5", user="alice")
    assert said.returncode == 0
    assert "control daemon" in said.stdout


# ------------------------------------------------------------------------------------------------------------ live


class Terminal:
    """``slurm-mps top`` in a terminal of its own; `said` is all that it wrote."""

    def __init__(
        self, node: GpuNode, *options: str, user: str | None = None, lines: int = 12, columns: int = 200
    ) -> None:
        self._node = node
        self.ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.before = termios.tcgetattr(theirs)
        self._theirs = theirs
        self.child = node.machine.popen(
            ["setsid", "--ctty", "--wait", COMMAND, "top", *options],
            user=user,
            env={"TERM": "xterm"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        self.said = ""

    def until(self, text: str, seconds: float = 20) -> None:
        """Wait for new output that has `text`."""
        end = time.monotonic() + seconds
        seen = ""
        while text not in seen:
            ready, _, _ = select.select([self.ours], [], [], max(0.0, end - time.monotonic()))
            assert ready, (text, seen)
            seen += os.read(self.ours, 65536).decode(errors="replace")
        self.said += seen

    def frame(self, text: str, seconds: float = 10) -> list[str]:
        """The lines of the next whole screen that has `text`, as they stand there."""
        end = time.monotonic() + seconds
        while True:
            assert time.monotonic() < end, (text, self.said.split("\x1b[H")[-1])
            self.until("\x1b[H")
            for frame in self.said.split("\x1b[H")[1:-1]:
                if text in frame:
                    self.said = self.said.rpartition("\x1b[H")[2]
                    lines = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", frame).splitlines()
                    return [line.rstrip() for line in lines]

    def press(self, key: bytes) -> int:
        """The exit status after a key."""
        os.write(self.ours, key)
        return self.child.wait(10)

    def close(self) -> tuple[bool, str]:
        """Whether the terminal is as it was, and what it was told last."""
        while select.select([self.ours], [], [], 0.2)[0]:
            self.said += os.read(self.ours, 65536).decode(errors="replace")
        same = termios.tcgetattr(self._theirs) == self.before
        os.close(self.ours)
        os.close(self._theirs)
        return same, self.said


@pytest.mark.parametrize("key", [b"q", b"\x03"], ids=["q", "Ctrl-C"])
def test_top_shows_what_comes_and_goes_and_gives_the_terminal_back(gpu_node: GpuNode, key: bytes) -> None:
    with job(gpu_node, 5):
        top = Terminal(gpu_node, "--iterate", "0.2")
        top.until("1 job, 0 clients")
        with client(gpu_node, 5) as pid:
            top.until(f"{pid}")
        top.until("0 clients")
        assert top.press(key) == 0
        same, said = top.close()
    assert same
    assert said.index("\033[?1049h") < said.rindex("\033[?1049l"), "the other screen, and back"
    assert said.rindex("\033[?25l") < said.rindex("\033[?25h"), "the cursor hidden, and shown"


def test_top_that_is_ended_gives_the_terminal_back_too(gpu_node: GpuNode) -> None:
    with job(gpu_node, 5):
        top = Terminal(gpu_node, "--iterate", "0.2")
        top.until("1 job")
        (process,) = [p for p in gpu_node.machine.processes() if p.cmdline[-3:-1] == ("top", "--iterate")]
        gpu_node.run("kill", "-TERM", str(process.pid)).check()
        assert top.child.wait(10) == 0
        same, said = top.close()
    assert same
    assert "\033[?1049l" in said


def test_top_fits_what_it_shows_into_the_terminal(gpu_node: GpuNode) -> None:
    """Four daemons want four lines, and there is room for two of them, or one while something is to be said; of the
    columns what is spare goes before a number is cut. What is not shown is counted, or named, and the rest is whole:
    what is too much would be cut off by the terminal's library, without a word."""
    lines, columns = 6, 80
    with job(gpu_node, 5, gpus="0,1,2,3", SPANK_MPS="per-gpu"):
        top = Terminal(gpu_node, "--iterate", "0.2", lines=lines, columns=columns)
        well = top.frame(" ACTIVE ")
        gpu_node.set_compute_modes(3, 3, 3, 0)
        one = top.frame("is DEFAULT, though")
        gpu_node.set_compute_modes(0, 0, 0, 0)
        many = top.frame("4 remarks; slurm-mps status tells them")
        gpu_node.set_compute_modes(3, 3, 3, 3)
        assert top.press(b"q") == 0
        assert top.close()[0]
    for frame, rows, remarks in ((well, 2, 0), (one, 1, 1), (many, 1, 1)):
        head, empty, headings, *rest = frame
        assert len(frame) == lines
        assert max(map(len, frame)) <= columns
        assert f", {4 - rows} not shown  (q quits)" in head
        assert empty == ""
        left_out = rest[-1].removeprefix("too narrow for ").split(", ")
        shown = [column for column in COLUMNS if not column.hidden and column.name not in left_out]
        assert len(shown) + len(left_out) == len([column for column in COLUMNS if not column.hidden])
        assert re.split(r"  +", headings.strip()) == [column.heading for column in shown]
        assert [len(re.split(r"  +", row.strip())) for row in rest[:rows]] == [len(shown)] * rows
        assert len(rest) == rows + remarks + 1


def test_top_sees_that_a_server_died(gpu_node: GpuNode) -> None:
    """Though NVML lists the same clients as before: none."""
    with job(gpu_node, 5):
        top = Terminal(gpu_node, "--iterate", "0.2")
        top.until(" ACTIVE ")
        server = report(gpu_node)["jobs"][0]["daemons"][0]["servers"][0]["pid"]
        gpu_node.run("kill", "-9", str(server)).check()
        top.until(f"MPS server {server} died")
        assert top.press(b"q") == 0
        top.close()


def test_top_without_a_terminal_says_so(gpu_node: GpuNode) -> None:
    said = gpu_node.run(COMMAND, "top")
    assert (said.returncode, said.stdout) == (3, "")
    assert said.stderr == "slurm-mps: top needs a terminal; slurm-mps status prints the same once\n"


def test_looking_again_and_again_asks_a_daemon_only_when_something_changed(gpu_node: GpuNode) -> None:
    """Its log has a bound, and each question is some lines in it."""
    log = gpu_node.machine.path("/var/log/slurm-mps/5/control.log")
    with job(gpu_node, 5), client(gpu_node, 5) as pid:
        top = Terminal(gpu_node, "--iterate", "0.1")
        top.until(f"{pid}")
        before = log.read_text().count("Cmd:ps")
        for _ in range(5):
            top.until("(q quits)")
        unchanged = log.read_text().count("Cmd:ps")
        with client(gpu_node, 5, "--device", "1") as other:
            top.until(f"{other}")
        assert top.press(b"q") == 0
        top.close()
    assert unchanged == before
