"""The plugin's C against the package's Python: one grammar for values, one format for verdicts."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm_mps.config import DEFAULTS
from slurm_mps.errors import RequestError
from slurm_mps.node.gpus import Gpu
from slurm_mps.plan import make_plan
from slurm_mps.request import JobRequest
from slurm_mps.state import Verdict, refused
from slurm_mps.units import MIB, parse_memory, parse_thread_percentage
from slurm_mps.wordfile import encode

if TYPE_CHECKING:
    from collections.abc import Iterator

SPANK = Path(__file__).parents[2] / "spank"
NONE, READY, REFUSED = range(3)
JOB = 4711


class CVerdict(ctypes.Structure):
    """The beginning of spank/verdict.h's struct verdict."""

    _fields_ = (
        ("status", ctypes.c_int),
        ("message", ctypes.c_char * 512),
        ("pipe_directory", ctypes.c_char * 104),
        ("log_directory", ctypes.c_char * 104),
        ("thread_percentage", ctypes.c_char * 8),
        ("memory_limit", ctypes.c_char * 24),
        ("context_mib", ctypes.c_uint64),
        ("priority", ctypes.c_int),
        ("ordinals", ctypes.c_bool),
        ("gpu_count", ctypes.c_uint),
        ("room", ctypes.c_char * 8192),
    )


@pytest.fixture(scope="session")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stands for /run/slurm-mps; holds one job's directory."""
    directory = tmp_path_factory.mktemp("state")
    (directory / f"jobs/{JOB}").mkdir(parents=True)
    return directory


@pytest.fixture(scope="session")
def plugin(state: Path) -> ctypes.CDLL:
    """The plugin's own readers, without Slurm."""
    library = state / "readers.so"
    sources = [str(SPANK / name) for name in ("options.c", "verdict.c", "devices.c", "limits.c")]
    flags = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-g", f'-DSTATE_DIRECTORY="{state}"']
    subprocess.run(["cc", *flags, "-shared", "-fPIC", "-o", library, *sources], check=True)
    return ctypes.CDLL(str(library))


NEAR_MISSES = st.text(alphabet="0123456789.MGTmgtX-+ \n", max_size=14)


@given(text=NEAR_MISSES | st.text(alphabet=st.characters(min_codepoint=1, exclude_categories=["Cs"])))
def test_both_sides_take_and_refuse_the_same_percentages(plugin: ctypes.CDLL, text: str) -> None:
    """What sbatch takes the prolog must take, or a user gets two opinions."""
    try:
        tenths = round(parse_thread_percentage(text) * 10)
    except RequestError:
        tenths = 0
    assert plugin.threads_tenths(text.encode()) == tenths


@given(text=NEAR_MISSES | st.text(alphabet=st.characters(min_codepoint=1, exclude_categories=["Cs"])))
def test_both_sides_take_and_refuse_the_same_sizes(plugin: ctypes.CDLL, text: str) -> None:
    plugin.mem_mib.restype = ctypes.c_uint64
    try:
        mib = parse_memory(text) // MIB
    except RequestError:
        mib = 0
    assert plugin.mem_mib(text.encode()) == mib


SETTINGS = (
    ("pipe_directory", "/run/slurm-mps/jobs/4711/pipe"),
    ("log_directory", "/run/slurm-mps/jobs/4711/log"),
    ("thread_percentage", "12.5"),
    ("memory_limit", "8G"),
    ("context_mib", "514"),
    ("visible_devices", "uuid"),
    ("gpu", "2 2 GPU-51000000-99a9-0495-d04f-b3afe1238f4c"),
    ("gpu", "3 3 GPU-51000000-fc4b-2381-c253-bcc185995317"),
)


def read(plugin: ctypes.CDLL, state: Path, data: bytes | None) -> CVerdict:
    """Have the plugin read a verdict."""
    path = state / f"jobs/{JOB}/verdict"
    path.unlink(missing_ok=True)
    if data is not None:
        path.write_bytes(data)
        path.chmod(0o644)
    verdict = CVerdict()
    plugin.verdict_read(JOB, ctypes.byref(verdict))
    return verdict


def test_the_plugin_reads_what_the_prolog_writes(plugin: ctypes.CDLL, state: Path) -> None:
    verdict = read(plugin, state, encode("verdict", 1, Verdict("ready", settings=SETTINGS).lines()))
    assert verdict.status == READY
    assert verdict.pipe_directory == b"/run/slurm-mps/jobs/4711/pipe"
    assert verdict.thread_percentage == b"12.5"
    assert verdict.memory_limit == b"8G"
    assert verdict.gpu_count == 2


def test_a_refusal_brings_its_message(plugin: ctypes.CDLL, state: Path) -> None:
    verdict = read(plugin, state, encode("verdict", 1, refused("no\nGPU \x1b[2J").lines()))
    assert (verdict.status, verdict.message) == (REFUSED, b"no?GPU ?[2J")


def test_no_verdict_is_none(plugin: ctypes.CDLL, state: Path) -> None:
    assert read(plugin, state, None).status == NONE


WHOLE = encode("verdict", 1, Verdict("ready", settings=SETTINGS).lines())


@pytest.mark.parametrize("length", range(len(WHOLE) - len("end 00000000\n") + 1))
def test_a_verdict_cut_short_is_a_refusal_never_a_job_that_did_not_ask(
    plugin: ctypes.CDLL, state: Path, length: int
) -> None:
    verdict = read(plugin, state, WHOLE[:length])
    assert verdict.status == REFUSED
    assert b"cannot be understood" in verdict.message


@pytest.mark.parametrize("without", range(3))
def test_a_ready_verdict_without_one_of_its_parts_is_a_refusal(plugin: ctypes.CDLL, state: Path, without: int) -> None:
    settings = SETTINGS[:without] + SETTINGS[without + 1 :]
    assert read(plugin, state, encode("verdict", 1, Verdict("ready", settings=settings).lines())).status == REFUSED


@given(
    data=st.binary(max_size=2000)
    | st.builds(
        lambda a, b, c: WHOLE[:a] + b + WHOLE[c:], *[st.integers(0, 300), st.binary(max_size=600), st.integers(0, 300)]
    )
)
def test_no_bytes_crash_the_plugin(plugin: ctypes.CDLL, state: Path, data: bytes) -> None:
    assert read(plugin, state, data).status in (READY, REFUSED)


@pytest.fixture
def _link(state: Path) -> Iterator[None]:
    yield
    (state / f"jobs/{JOB}/verdict").unlink(missing_ok=True)


@pytest.mark.usefixtures("_link")
@pytest.mark.parametrize("kind", ["link", "users", "writable", "fifo", "huge"])
def test_only_a_plain_file_of_roots_is_a_verdict(plugin: ctypes.CDLL, state: Path, kind: str) -> None:
    path = state / f"jobs/{JOB}/verdict"
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        (state / "elsewhere").write_bytes(WHOLE)
        path.symlink_to(state / "elsewhere")
    else:
        path.write_bytes(WHOLE if kind != "huge" else WHOLE.replace(b"end", b"x y\n" * 10000 + b"end"))
        path.chmod(0o666 if kind == "writable" else 0o644)
        os.chown(path, 20001 if kind == "users" else 0, 0)
    verdict = CVerdict()
    plugin.verdict_read(JOB, ctypes.byref(verdict))
    assert verdict.status == REFUSED


class CTaskGpus(ctypes.Structure):
    """spank/devices.h's struct task_gpus."""

    _fields_ = (("count", ctypes.c_uint), ("gpus", ctypes.c_void_p * 64), ("ordinals", ctypes.c_uint * 64))


def task_gpus(plugin: ctypes.CDLL, state: Path, visible: str | None, *, ordinals: bool = False) -> str | None:
    """What a task with this CUDA_VISIBLE_DEVICES gets; its GPUs 2 and 3 have no device nodes here, so all may open."""
    verdict, task = read(plugin, state, WHOLE), CTaskGpus()
    plugin.task_gpus.restype = ctypes.c_bool
    given = visible.encode() if visible is not None else None
    if not plugin.task_gpus(ctypes.byref(verdict), given, ctypes.byref(task)):
        return None
    out = ctypes.create_string_buffer(4096)
    plugin.task_gpus_list(ctypes.byref(task), ctypes.c_bool(ordinals), out, 4096)
    return out.value.decode()


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("2,3", [0, 1]),
        ("0,1", [0, 1]),
        ("3", [1]),
        ("2", [0]),
        ("GPU-51000000-fc4b-2381-c253-bcc185995317", [1]),
        (None, []),
        ("", []),
        ("7", None),
        ("GPU-5", None),
        ("2x", None),
    ],
)
def test_a_tasks_gpus_by_uuid(
    plugin: ctypes.CDLL, state: Path, visible: str | None, expected: list[int] | None
) -> None:
    uuids = [value.split()[2] for key, value in SETTINGS if key == "gpu"]
    wanted = None if expected is None else ",".join(uuids[i] for i in expected)
    assert task_gpus(plugin, state, visible) == wanted


@pytest.mark.parametrize(("visible", "expected"), [("2,3", "0,1"), ("3", "1"), ("2", "0"), (None, "")])
def test_a_tasks_gpus_by_the_daemons_ordinals(
    plugin: ctypes.CDLL, state: Path, visible: str | None, expected: str
) -> None:
    assert task_gpus(plugin, state, visible, ordinals=True) == expected


class CLimits(ctypes.Structure):
    """spank/limits.h's struct limits."""

    _fields_ = (
        ("threads_tenths", ctypes.c_uint),
        ("memory_mib", ctypes.c_uint64),
        ("daemon_mib", ctypes.c_uint64),
        ("priority", ctypes.c_int),
    )


def of_step(
    plugin: ctypes.CDLL, state: Path, threads: str = "", mem: str = "", priority: str = "", job: bytes = WHOLE
) -> CLimits | str:
    """The limits of a step of a job with 12.5 % and 8G, or why it is refused."""
    verdict, limits, message = read(plugin, state, job), CLimits(), ctypes.create_string_buffer(512)
    plugin.limits_of_step.restype = ctypes.c_bool
    options = threads.encode(), mem.encode(), priority.encode()
    arguments = ctypes.byref(verdict), *options, ctypes.byref(limits), message, 512
    return limits if plugin.limits_of_step(*arguments) else message.value.decode()


@pytest.mark.parametrize(
    ("threads", "mem", "tenths", "mib"),
    [
        ("", "", 125, 8192),
        ("12.5", "8G", 125, 8192),
        ("10", "", 100, 8192),
        ("", "2G", 125, 2048),
        ("5", "1G", 50, 1024),
    ],
)
def test_a_step_keeps_or_lowers_the_jobs_limits(
    plugin: ctypes.CDLL, state: Path, threads: str, mem: str, tenths: int, mib: int
) -> None:
    limits = of_step(plugin, state, threads, mem)
    assert isinstance(limits, CLimits)
    assert (limits.threads_tenths, limits.memory_mib) == (tenths, mib)


@pytest.mark.parametrize(
    ("threads", "mem", "said"),
    [
        ("12.6", "", "--mps-threads=12.6 is more than the job has (12.5); a step can only lower it"),
        ("", "9G", "--mps-mem=9G is more than the job has (8G); a step can only lower it"),
        ("", "80M", "--mps-mem=80M is less than a CUDA context costs with 12.5 % of the threads (about 83 MiB)"),
    ],
)
def test_a_step_that_asks_for_what_it_cannot_have_is_told_both_numbers(
    plugin: ctypes.CDLL, state: Path, threads: str, mem: str, said: str
) -> None:
    assert of_step(plugin, state, threads, mem) == said


A, B = (value.split()[2] for key, value in SETTINGS if key == "gpu")


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (None, "0=8192M"),
        ("", "0=8192M"),
        ("0=2G", "0=2048M"),
        ("1=512M,0=2G", "0=2048M,1=512M"),
        (f"{B}=1G", "0=8192M,1=1024M"),
        ("0=20G", "0=8192M"),
        ("junk", "0=8192M"),
        ("2=1G", "0=8192M"),
        ("0=2G,7=1G", "0=8192M"),
        ("0=1.5G", "0=8192M"),
        ("GPU-other=1G", "0=8192M"),
        ("0=2G,", "0=2048M"),
        ("0=" + "9" * 40 + "G", "0=8192M"),
    ],
)
def test_the_memory_variable_is_one_that_the_driver_can_use(
    plugin: ctypes.CDLL, own: str | None, expected: str
) -> None:
    """One bad entry removes the limit of every device (O12)."""
    limits, out = CLimits(1000, 8192, 8192), ctypes.create_string_buffer(4096)
    plugin.limits_memory_value.restype = ctypes.c_bool
    given = own.encode() if own is not None else None
    assert plugin.limits_memory_value(ctypes.byref(limits), f"{A},{B}".encode(), given, out, 4096)
    assert out.value.decode() == expected


def test_a_steps_lower_limit_names_every_device(plugin: ctypes.CDLL) -> None:
    """The daemon gives each of them more."""
    limits, out = CLimits(1000, 2048, 8192), ctypes.create_string_buffer(4096)
    plugin.limits_memory_value(ctypes.byref(limits), f"{A},{B}".encode(), None, out, 4096)
    assert out.value == b"0=2048M,1=2048M"


@given(own=st.text(alphabet="0123456789=,.GMT-x", max_size=40))
def test_no_variable_of_the_users_lifts_the_limit(plugin: ctypes.CDLL, own: str) -> None:
    limits, out = CLimits(1000, 8192, 8192), ctypes.create_string_buffer(4096)
    plugin.limits_memory_value(ctypes.byref(limits), f"{A},{B}".encode(), own.encode(), out, 4096)
    entries = dict(entry.split("=") for entry in out.value.decode().split(","))
    assert entries.keys() in ({"0"}, {"0", "1"})
    assert all(size.endswith("M") and 1 <= int(size[:-1]) <= 8192 for size in entries.values())


@pytest.mark.parametrize(
    ("own", "expected"), [(None, "25"), ("10", "10"), ("2.5", "2.5"), ("50", "25"), ("0", "25"), ("junk", "25")]
)
def test_the_thread_variable_keeps_a_lower_value_of_the_users(
    plugin: ctypes.CDLL, own: str | None, expected: str
) -> None:
    limits, out = CLimits(250, 0), ctypes.create_string_buffer(64)
    plugin.limits_threads_value(ctypes.byref(limits), own.encode() if own is not None else None, out, 64)
    assert out.value.decode() == expected


LOW = encode("verdict", 1, Verdict("ready", settings=(*SETTINGS, ("client_priority", "1"))).lines())


@pytest.mark.parametrize(
    ("job", "asked", "priority"),
    [(WHOLE, "", 0), (WHOLE, "low", 1), (WHOLE, "normal", 0), (LOW, "", 1), (LOW, "low", 1)],
)
def test_a_step_keeps_or_lowers_the_jobs_priority(
    plugin: ctypes.CDLL, state: Path, job: bytes, asked: str, priority: int
) -> None:
    limits = of_step(plugin, state, priority=asked, job=job)
    assert isinstance(limits, CLimits)
    assert limits.priority == priority


def test_a_step_cannot_raise_the_jobs_priority(plugin: ctypes.CDLL, state: Path) -> None:
    said = of_step(plugin, state, priority="normal", job=LOW)
    assert said == "--mps-priority=normal is more than the job has (low); a step can only lower it"


@pytest.mark.parametrize("tenths", [1, 10, 125, 250, 333, 500, 1000])
def test_both_sides_reckon_the_same_cost_of_a_context(plugin: ctypes.CDLL, state: Path, tenths: int) -> None:
    """A job's limit is judged by the prolog, a step's by the plugin."""
    job = (("thread_percentage", f"{tenths // 10}.{tenths % 10}"), ("memory_limit", "8G"), ("context_mib", "514"))
    settings = tuple((key, value) for key, value in SETTINGS if key not in dict(job))
    verdict = encode("verdict", 1, Verdict("ready", settings=(*job, *settings)).lines())
    gpu = Gpu("GPU-0", 0, 0, 143771 * MIB, "Simulated H200")
    for mib in range(1, 600):
        request = JobRequest(JOB, 1, 0, ("0",), tenths / 10, mib * MIB)
        try:
            taken = bool(make_plan(request, DEFAULTS, (gpu,)))
        except RequestError:
            taken = False
        assert isinstance(of_step(plugin, state, mem=f"{mib}M", job=verdict), CLimits) == taken, mib
