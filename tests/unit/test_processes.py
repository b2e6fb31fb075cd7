"""Processes: what a child is given, how long it may take, and which process a pid still is."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from slurm_mps.errors import DeadlineError, NodeError
from slurm_mps.node.processes import (
    OUTPUT_LIMIT_BYTES,
    ProcessIdentity,
    boot_id,
    identify,
    pids,
    run,
    runs_program,
    signal_process,
    spawn,
    wait_all,
    wait_ended,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
SH = "/bin/sh"


def sh(text: str, seconds: float = 5.0, given: str = "") -> tuple[int, str, str]:
    outcome = run([SH, "-c", text], {"PATH": "/usr/bin:/bin"}, seconds, given)
    return outcome.status, outcome.output, outcome.errors


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(["/bin/sleep", "60"])
    yield child
    child.kill()
    child.wait()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def children() -> list[str]:
    """Our children, zombies among them."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


# ------------------------------------------------------------------------------------------------ what a child gets


def test_a_child_has_exactly_the_environment_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of our own environment reaches a child."""
    monkeypatch.setenv("SPANK_EVIL", "1")
    assert run(["/usr/bin/env"], {"A": "1", "B": "x y"}, 5).output == "A=1\nB=x y\n"


def test_a_child_reads_what_it_was_sent_and_then_the_end() -> None:
    """Standard input is the text, and closed after it; nothing is the empty text."""
    assert sh("cat; echo end", given="one\ntwo\n") == (0, "one\ntwo\nend\n", "")
    assert sh("cat; echo end") == (0, "end\n", "")
    assert sh("wc -c", given="x" * 200_000) == (0, "200000\n", ""), "more than a pipe holds"


def test_output_errors_and_status_are_apart() -> None:
    """What a program says, complains and ends with; a signal is a negative status."""
    assert sh("echo out; echo err >&2; exit 3") == (3, "out\n", "err\n")
    assert sh("kill -9 $$")[0] == -9


def test_a_child_that_does_not_read_is_no_trouble() -> None:
    """A program that ends without reading its input ends as it would."""
    assert sh("exit 4", given="text\n")[0] == 4
    assert sh("exit 4", given="text\n" * 50_000)[0] == 4, "more than a pipe holds"


def test_a_child_has_no_descriptor_of_ours(tmp_path: Path) -> None:
    """Whatever we hold open, also what we were started with, a child has its three streams."""
    with (tmp_path / "held").open("w") as held:
        os.set_inheritable(held.fileno(), True)
        shown = sh("ls -l /proc/self/fd")[1]
    assert str(tmp_path) not in shown


def test_a_child_has_no_signal_ignored() -> None:
    """Python ignores SIGPIPE and SIGXFSZ for itself; a daemon that we start must not inherit that."""
    status = run(["/bin/grep", "-E", "SigIgn", "/proc/self/status"], {}, 5).output
    ignored = int(status.split()[1], 16)
    assert [number for number in (signal.SIGPIPE, signal.SIGXFSZ) if ignored >> (number - 1) & 1] == []


def test_a_childs_files_can_be_bounded(tmp_path: Path) -> None:
    """A write beyond the bound fails and ends nobody; whoever started the child, and the next one, have no bound."""
    grow = f"head -c 9000 /dev/zero >{tmp_path}/file; echo $?"
    child = spawn([SH, "-c", grow], {"PATH": "/usr/bin:/bin"}, file_limit_bytes=4096)
    (bounded,) = wait_all([child], 5)
    assert bounded is not None
    assert (bounded.output, (tmp_path / "file").stat().st_size) == ("1\n", 4096)
    assert sh(grow) == (0, "0\n", "")
    (tmp_path / "own").write_bytes(b"x" * 9000)


@pytest.mark.parametrize("program", ["/nonexistent", "/etc/hostname", "/"])
def test_a_program_that_cannot_run_is_named(program: str) -> None:
    """A missing or unfit program is the node's fault, by name, and costs no descriptor."""
    before = descriptors()
    with pytest.raises(NodeError, match=f"^{program}: "):
        run([program], {}, 5)
    assert descriptors() == before


# -------------------------------------------------------------------------------------------------------- deadlines


def test_the_deadline_ends_the_whole_group(tmp_path: Path) -> None:
    """After its time a program is killed with all that it started, and nothing of it stays open here."""
    before = descriptors()
    start = time.monotonic()
    with pytest.raises(DeadlineError, match=r"/bin/sh did not answer within 0\.2 s"):
        sh(f"trap '' TERM; sleep 60 & echo $! >{tmp_path}/pid; wait; sleep 60", seconds=0.2)
    assert time.monotonic() - start < 3
    grandchild = int((tmp_path / "pid").read_text())
    end = time.monotonic() + 2
    while identify(grandchild) and time.monotonic() < end:
        time.sleep(0.01)
    assert identify(grandchild) is None
    assert descriptors() == before


@pytest.mark.parametrize("program", ["sleep 60", "exec >&- 2>&-; sleep 60", "exec yes", "sleep 60 & exit 0"])
def test_the_deadline_holds_however_a_child_dawdles(program: str) -> None:
    """Silent, with closed streams, talking for ever, or gone while another holds its streams: all end in time."""
    start = time.monotonic()
    with pytest.raises(DeadlineError):
        sh(program, seconds=0.2)
    assert time.monotonic() - start < 3


def test_the_deadline_holds_for_a_child_that_does_not_take_its_input() -> None:
    """More text than a pipe holds, for a program that does not read, is no wait without end either."""
    program = (
        "from slurm_mps.node.processes import run\n"
        "try:\n    run(['/bin/sleep', '60'], {}, 0.2, 'x' * 200_000)\n"
        "except Exception as error:\n    print(error)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert b"did not answer within" in child.communicate(timeout=10)[0]
    finally:
        for one in pids():  # the sleep is a group of its own
            if runs_program(one, ("sleep",), (0,), "") and os.getsid(one) == child.pid:
                os.kill(one, signal.SIGKILL)
        child.kill()
        child.wait()


def test_output_is_bounded() -> None:
    """Of an endless answer a bounded part is kept, and the program can still come to its end."""
    status, output, _ = sh("head -c 10000000 /dev/zero | tr '\\0' x; exit 5")
    assert status == 5
    assert OUTPUT_LIMIT_BYTES <= len(output) < OUTPUT_LIMIT_BYTES + 4096


def test_output_need_not_be_text() -> None:
    """Bytes that are no UTF-8 do not stop a hook."""
    assert "\ufffd" in sh("printf '\\377\\376'")[1]


def test_nothing_is_left_of_many_runs() -> None:
    """Neither descriptors nor zombies."""
    before = descriptors(), children()
    for _ in range(20):
        sh("exit 0")
    assert (descriptors(), children()) == before


# ---------------------------------------------------------------------------------------------------- whose pid it is


def test_a_process_is_known_by_pid_and_start(sleeper: subprocess.Popen[bytes]) -> None:
    """The same process is the same identity; another start time with this pid is another process."""
    identity = identify(sleeper.pid)
    assert identity == identify(sleeper.pid)
    assert identity is not None
    assert identity.start_ticks > 0
    assert sleeper.pid in list(pids())


LEADER = """
#include <pthread.h>
#include <unistd.h>
static void *stay(void *with) { for (;;) pause(); return with; }
int main(void) { pthread_t other; pthread_create(&other, 0, stay, 0); pthread_exit(0); }
"""


def test_a_process_is_there_as_long_as_one_of_its_threads(tmp_path: Path) -> None:
    """Of a server that ends, the main thread is a zombie after 1 ms, and the others hold the GPU (O78)."""
    program = tmp_path / "leader"
    subprocess.run(["cc", "-pthread", "-o", program, "-xc", "-"], input=LEADER, text=True, check=True)
    with subprocess.Popen([program]) as child:
        while "\nState:\tZ" not in Path(f"/proc/{child.pid}/status").read_text():
            time.sleep(0.01)
        process = identify(child.pid)
        assert process
        assert not wait_ended(process, 0.05)
        assert signal_process(process, signal.SIGKILL)
        assert wait_ended(process, 5)
        assert identify(child.pid) is None


def test_a_zombie_is_no_process() -> None:
    """A process that has ended and is not reaped yet does nothing any more."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert identify(child) is None
    os.waitpid(child, 0)
    assert identify(child) is None


def test_a_name_with_brackets_and_blanks_is_read_right(tmp_path: Path) -> None:
    """The name in /proc/PID/stat may hold anything; what follows it is counted from its end."""
    odd = tmp_path / "a) Z 1 (b"
    shutil.copy("/bin/sleep", odd)
    child = subprocess.Popen([odd, "60"])
    plain = identify(os.getpid())
    found = identify(child.pid)
    child.kill()
    child.wait()
    assert found is not None
    assert plain is not None
    assert plain.start_ticks <= found.start_ticks < plain.start_ticks + 100 * 3600


def test_a_signal_reaches_only_the_process_that_was_meant(sleeper: subprocess.Popen[bytes]) -> None:
    """A pid that has been taken by another process gets no signal; the right one does."""
    identity = identify(sleeper.pid)
    assert identity is not None
    stale = ProcessIdentity(sleeper.pid, identity.start_ticks - 1)
    assert not signal_process(stale, signal.SIGKILL)
    assert sleeper.poll() is None
    assert signal_process(identity, signal.SIGKILL)
    assert sleeper.wait(5) == -signal.SIGKILL
    assert not signal_process(identity, signal.SIGKILL)


def test_an_end_is_waited_for_in_bounded_time(sleeper: subprocess.Popen[bytes]) -> None:
    """Waiting for a process that is not our child ends with it, or after the time; another with its pid is its end."""
    identity = identify(sleeper.pid)
    assert identity is not None
    assert not wait_ended(identity, 0.05)
    assert wait_ended(ProcessIdentity(sleeper.pid, identity.start_ticks - 1), 0)
    sleeper.kill()
    assert wait_ended(identity, 5)
    sleeper.wait()
    assert wait_ended(identity, 0)


@pytest.mark.parametrize(
    ("name", "uid", "environment", "expected"),
    [
        ("nvidia-cuda-mps-server", 0, {"PIPE": "/a"}, True),
        ("nvidia-cuda-mps-server", 20001, {"PIPE": "/a"}, True),
        ("nvidia-cuda-mps-server", 20002, {"PIPE": "/a"}, False),
        ("nvidia-cuda-mps-server", 0, {"PIPE": "/ab"}, False),
        ("nvidia-cuda-mps-server", 0, {"OTHER": "PIPE=/a"}, False),
        ("nvidia-cuda-mps-server", 0, {}, False),
        ("another", 0, {"PIPE": "/a"}, False),
    ],
)
def test_a_program_is_known_by_file_user_and_environment(
    name: str, uid: int, environment: dict[str, str], *, expected: bool
) -> None:
    """Ours is what runs the program's file, as one of its users, with the whole variable; a name alone is nothing."""
    place = Path("/tmp") / f"test-processes-{os.getpid()}"
    place.mkdir(mode=0o755)
    try:
        shutil.copy("/bin/sleep", place / name)
        # The name that a process gives itself does not count, nor its arguments.
        argv = ["nvidia-cuda-mps-server", "60"]
        child = subprocess.Popen(argv, executable=place / name, env=environment, user=uid, group=uid, extra_groups=[])
        while not Path(f"/proc/{child.pid}/cmdline").read_bytes().endswith(b"60\0"):
            time.sleep(0.01)  # the kernel has closed Popen's pipe, and not yet laid out arguments and environment
        found = runs_program(child.pid, ("nvidia-cuda-mps-server",), (0, 20001), "PIPE=/a")
        (place / name).unlink()
        after_upgrade = runs_program(child.pid, ("nvidia-cuda-mps-server",), (0, 20001), "PIPE=/a")
        child.kill()
        child.wait()
    finally:
        shutil.rmtree(place)
    assert (found, after_upgrade) == (expected, expected)
    assert not runs_program(child.pid, ("nvidia-cuda-mps-server",), (0, 20001), "PIPE=/a")


def test_the_boot_has_a_name() -> None:
    """The kernel's own name of this boot."""
    assert boot_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert len(boot_id()) == 36
