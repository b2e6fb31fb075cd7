"""What processes say of themselves, by the real kernel's /proc: their name, their environment, their title."""

from __future__ import annotations

import ctypes
import os
import signal
from contextlib import contextmanager
from shutil import copy
from time import monotonic
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from slurm_mps.errors import NodeError
from slurm_mps.job.reconcile import _by_job, is_over
from slurm_mps.job.request import ID_MAX
from slurm_mps.node import control, processes, search
from slurm_mps.slurm.jobs import SlurmJob, _read

from . import examples

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PR_SET_NAME = 15
JOBS = "/run/slurm-mps/jobs"
LINES = st.sampled_from(
    [b"Uid:\t1", b"PPid:\t1", b"State:\tZ", b") Z 1", b"\r", b"\v", b"\x1c", b"\xc2\x85", b"\n", b"\\"]
)


@given(name=st.lists(LINES | st.binary(max_size=4), max_size=4).map(b"".join))
@example(name=b"\rUid:\t1\t1\t1\t1")
@example(name=b"x) Z 1 (")
@settings(max_examples=examples(300), deadline=None)
def test_no_name_of_a_process_passes_for_what_the_kernel_says(name: bytes) -> None:
    """This process bears it, which is this test's user's, and its parent's child."""
    before = processes.identify(os.getpid())
    libc = ctypes.CDLL(None)
    own = ctypes.create_string_buffer(16)
    libc.prctl(16, own)
    libc.prctl(PR_SET_NAME, name + b"\0")
    try:
        found = processes.uid_of(os.getpid()), processes.gid_of(os.getpid()), processes.parent_of(os.getpid())
        still = processes.identify(os.getpid())
        words = processes.describe(os.getpid())
    finally:
        libc.prctl(PR_SET_NAME, own)
    assert found == (os.getuid(), os.getgid(), os.getppid())
    assert still == before
    assert words.isprintable()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A server by its name."""
    place = tmp_path_factory.mktemp("programs") / control.SERVER_PROGRAM
    copy("/usr/bin/sleep", place)
    place.chmod(0o755)
    return place


@contextmanager
def running(program: Path, environment: dict[bytes, bytes]) -> Iterator[int]:
    pid = os.posix_spawn(program, [program.name, "60"], environment)
    try:
        deadline = monotonic() + 5
        while not (processes.program_name(pid) == program.name and processes.environment_of(pid)):
            assert monotonic() < deadline
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


BYTES = st.binary(max_size=60).map(lambda b: b.replace(b"\0", b""))
JOB = st.sampled_from([b"7", b"4294967295", b"99999999999", "²".encode(), b"..", b"", b"a b", b"\n"])
PIPES = st.builds(lambda job, rest: b"/".join([JOBS.encode(), job, rest]), JOB, BYTES) | BYTES
GPUS = st.lists(st.sampled_from([b"GPU-1", b"GPU-" + b"x" * 200, b"GPU-\xff", b"0", b" ", b"\n"]) | BYTES).map(
    b",".join
)


@given(pipe=PIPES, more=st.sampled_from([0, 0, 70_000]), gpus=GPUS, everybodys=st.booleans())
@example(pipe=JOBS.encode() + b"/7/pipe", more=0, gpus=b"GPU-1,GPU-2", everybodys=False)
@settings(max_examples=examples(100), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_server_says_a_search_prints_lines_that_are_read(
    program: Path, pipe: bytes, more: int, gpus: bytes, everybodys: bool
) -> None:
    pipe += b"x" * more  # no more of an environment is read than 64 KiB
    environment = {b"CUDA_MPS_PIPE_DIRECTORY": pipe, b"CUDA_VISIBLE_DEVICES": gpus}
    directory = "" if everybodys else JOBS
    with running(program, environment) as pid, patch.object(processes, "pids", return_value=[pid]):
        said = "".join(search.search_lines(directory, (control.SERVER_PROGRAM,)))
        found = control.search(directory, 1)
        known = processes.identify(pid)
    assert said.isascii()
    assert len(found) <= 1
    for one in found:
        assert (one.process, one.uid, one.program) == (known, os.getuid(), control.SERVER_PROGRAM)
        read = len(one.pipe_directory)
        assert one.pipe_directory.encode() == pipe[:read]
        assert read in (len(pipe), processes.PROC_LIMIT_BYTES - len("CUDA_MPS_PIPE_DIRECTORY="))
        assert all(gpu.encode() in gpus.split(b",") for gpu in one.gpus)
    assert all(0 <= job <= ID_MAX for job in _by_job(found))


WORDS = st.sampled_from(
    ["7", "²", "9" * 5000, "RUNNING", "COMPLETED", "COMPLETING", "n[1-3]", "n[1-", "N/A", "|", "\n"]
)


@given(text=st.lists(WORDS | st.text(max_size=6), max_size=12).map("".join))
@example(text="²|RUNNING|N/A|n1\n")
@example(text="7|COMPLETING|²|n1\n")
@example(text=f"7|COMPLETING|{'9' * 5000}|n1\n")
@settings(max_examples=examples(300), deadline=None)
def test_any_answer_of_squeue_is_jobs_or_an_error(text: str) -> None:
    try:
        jobs = _read(text)
    except NodeError:
        return
    for job in jobs.values():
        over, why = is_over(job, "n1", 1e9)
        assert why
        assert over in (True, False)


@given(nodes=st.lists(WORDS | st.text("n[]0123456789-,", max_size=12), max_size=4).map("".join))
@settings(max_examples=examples(200), deadline=None)
def test_any_list_of_nodes_is_understood_or_may_name_this_one(nodes: str) -> None:
    """Nothing that is not understood makes a job over."""
    over, _ = is_over(SlurmJob("RUNNING", None, nodes), "n1", 1e9)
    assert over in (True, False)
