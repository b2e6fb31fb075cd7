"""The plugin's C against the package's Python: one grammar for values, one format for verdicts."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm_mps.config.settings import DEFAULTS
from slurm_mps.errors import RequestError
from slurm_mps.job.plan import make_plan
from slurm_mps.job.request import JobRequest
from slurm_mps.job.verdict import VERDICT_VERSION, parse_verdict, refused, without
from slurm_mps.node.nvml import Gpu
from slurm_mps.node.wordfile import DamagedFileError, encode
from slurm_mps.units import MIB, parse_memory, parse_memory_by_gpu, parse_thread_percentage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SPANK = Path(__file__).parents[2] / "spank"
NONE, READY, REFUSED, WITHOUT = range(4)
JOB = 4711


class CDaemon(ctypes.Structure):
    """spank/verdict.h's struct verdict_daemon."""

    _fields_ = (
        ("pipe_directory", ctypes.c_char * 104),
        ("log_directory", ctypes.c_char * 104),
        ("mib", ctypes.c_uint64),
        ("shared", ctypes.c_char * 104),
    )


class CGpu(ctypes.Structure):
    """spank/verdict.h's struct verdict_gpu."""

    _fields_ = (
        ("slurm_index", ctypes.c_uint),
        ("minor", ctypes.c_uint),
        ("mib_for_clients", ctypes.c_uint64),
        ("mib", ctypes.c_uint64),
        ("uuid", ctypes.c_char * 48),
    )


class CVerdict(ctypes.Structure):
    """spank/verdict.h's struct verdict."""

    _fields_ = (
        ("status", ctypes.c_int),
        ("message", ctypes.c_char * 512),
        ("python", ctypes.c_char * 256),
        ("probe", ctypes.c_char * 256),
        ("explain", ctypes.c_char * 256),
        ("threads_tenths", ctypes.c_uint),
        ("threads_tenths_min", ctypes.c_uint),
        ("mib_min", ctypes.c_uint64),
        ("context_mib", ctypes.c_uint64),
        ("clients_per_gpu", ctypes.c_uint),
        ("priority", ctypes.c_int),
        ("auto_threads", ctypes.c_bool),
        ("auto_memory", ctypes.c_bool),
        ("share_tenths", ctypes.c_uint),
        ("shards_per_gpu", ctypes.c_uint),
        ("share_memory", ctypes.c_bool),
        ("joined", ctypes.c_bool),
        ("ordinals", ctypes.c_bool),
        ("per_gpu", ctypes.c_bool),
        ("daemon_count", ctypes.c_uint),
        ("gpu_count", ctypes.c_uint),
        ("daemons", CDaemon * 64),
        ("gpus", CGpu * 64),
        ("uid", ctypes.c_uint32),
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
    sources = [str(SPANK / name) for name in ("options.c", "verdict.c", "gpus.c", "limits.c", "rollcall.c")]
    flags = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-g", f'-DSTATE_DIRECTORY="{state}"']
    flags.append(f'-DFALLBACK_DIRECTORY="{state}/logs"')
    subprocess.run(["cc", *flags, "-shared", "-fPIC", "-o", library, *sources], check=True)
    return ctypes.CDLL(str(library))


NEAR_MISSES = st.text(alphabet="0123456789.MGTmgtX-+ \n", max_size=14)


@given(text=NEAR_MISSES | st.text(alphabet=st.characters(min_codepoint=1, exclude_categories=["Cs"])))
def test_both_sides_take_and_refuse_the_same_percentages(plugin: ctypes.CDLL, text: str) -> None:
    """What sbatch takes the prolog must take, or a user gets two opinions."""
    try:
        tenths = round(parse_thread_percentage(text) * 10)
    except ValueError:
        tenths = 0
    assert plugin.threads_tenths(text.encode()) == tenths


class CMemOption(ctypes.Structure):
    """spank/options.h's struct mem_option."""

    _fields_ = (("automatic", ctypes.c_bool), ("by_gpu", ctypes.c_bool), ("mib", ctypes.c_uint64 * 64))


LISTS = st.lists(st.from_regex(r"[0-9]{1,2}:[1-9][0-9]{0,2}[MGTmg]", fullmatch=True), min_size=1).map(",".join)


@given(text=LISTS | st.text(alphabet="0123:,GMa", max_size=14) | st.sampled_from(["0:8G,1:4G", "0:8G,0:4G", "63:1G"]))
def test_both_sides_take_and_refuse_the_same_lists_with_the_same_words(plugin: ctypes.CDLL, text: str) -> None:
    plugin.mem_option.restype = ctypes.c_char_p
    option = CMemOption()
    problem = plugin.mem_option(text.encode(), ctypes.byref(option))
    if ":" not in text:
        assert not option.by_gpu
        return
    try:
        limits = dict(parse_memory_by_gpu(text))
    except ValueError as error:
        assert (problem or b"").decode() == str(error)  # noqa: PT017 - both sides say so, or neither
    else:
        assert problem is None
        assert {gpu: mib * MIB for gpu, mib in enumerate(option.mib) if mib} == limits


@given(text=NEAR_MISSES | st.text(alphabet=st.characters(min_codepoint=1, exclude_categories=["Cs"])))
def test_both_sides_take_and_refuse_the_same_sizes(plugin: ctypes.CDLL, text: str) -> None:
    plugin.mem_mib.restype = ctypes.c_uint64
    try:
        mib = parse_memory(text) // MIB
    except ValueError:
        mib = 0
    assert plugin.mem_mib(text.encode()) == mib


PIPE = "/run/slurm-mps/jobs/4711"
SETTINGS = (
    ("daemon", f"{PIPE}/pipe /var/log/slurm-mps/4711 8G"),
    ("thread_percentage", "12.5"),
    ("clients_per_gpu", "48"),
    ("probe", "/opt/slurm-mps/bin/python3 /opt/slurm-mps/probe.py"),
    ("explain", "/opt/slurm-mps/explain.py"),
    ("thread_percentage_min", "1"),
    ("memory_min", "1M"),
    ("context_mib", "514"),
    ("visible_devices", "uuid"),
    ("gpu", "2 2 GPU-51000000-99a9-0495-d04f-b3afe1238f4c 142641 143771"),
    ("gpu", "3 3 GPU-51000000-fc4b-2381-c253-bcc185995317 142641 143771"),
)


A, B = (value.split()[2] for key, value in SETTINGS if key == "gpu")


def settings(**changes: str | list[str] | None) -> tuple[tuple[str, str], ...]:
    """SETTINGS with other values; None leaves a key out."""
    kept = [(key, value) for key, value in SETTINGS if key not in changes]
    added = [(key, [value] if isinstance(value, str) else value or []) for key, value in changes.items()]
    return (*((key, value) for key, values in added for value in values), *kept)


def ready(lines: Iterable[tuple[str, str]]) -> bytes:
    """A ready verdict of these lines, whether or not the prolog would write such."""
    return encode("verdict", VERDICT_VERSION, ["status ready", *(f"{key} {value}" for key, value in lines)])


def verdict_file(**changes: str | list[str] | None) -> bytes:
    return ready(settings(**changes))


PER_GPU = [f"{PIPE}/gpu-0 /var/log/slurm-mps/4711/gpu-0 8G", f"{PIPE}/gpu-1 /var/log/slurm-mps/4711/gpu-1 4G"]


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
    verdict = read(plugin, state, WHOLE)
    assert verdict.status == READY
    assert verdict.daemons[0].pipe_directory == b"/run/slurm-mps/jobs/4711/pipe"
    assert verdict.daemons[0].log_directory == b"/var/log/slurm-mps/4711"
    assert (verdict.threads_tenths, verdict.daemons[0].mib, verdict.clients_per_gpu) == (125, 8192, 48)
    assert (verdict.daemon_count, verdict.gpu_count, verdict.gpus[1].mib_for_clients) == (1, 2, 142641)


@pytest.mark.parametrize("number", ["2", "999999999"])
def test_a_newer_verdict_is_a_refusal_that_says_so(plugin: ctypes.CDLL, state: Path, number: str) -> None:
    verdict = read(plugin, state, WHOLE.replace(b"verdict 1", f"verdict {number}".encode()))
    assert verdict.status == REFUSED
    assert f"newer slurm-mps than spank_mps.so (verdict version {number}," in verdict.message.decode()


@pytest.mark.parametrize("number", ["", "0", "01", "+1", "1 ", "x", "9999999999"])
def test_a_verdict_of_no_version_is_none(plugin: ctypes.CDLL, state: Path, number: str) -> None:
    verdict = read(plugin, state, WHOLE.replace(b"verdict 1", f"verdict {number}".encode()))
    assert b"cannot be understood" in verdict.message


def test_the_plugin_reads_a_daemon_for_each_gpu(plugin: ctypes.CDLL, state: Path) -> None:
    verdict = read(plugin, state, verdict_file(daemons="per-gpu", daemon=PER_GPU))
    assert verdict.status == READY
    assert [daemon.mib for daemon in verdict.daemons[:2]] == [8192, 4096]


@pytest.mark.parametrize(
    "changes",
    [
        {"daemon": PER_GPU},
        {"daemons": "per-gpu"},
        {"daemons": "per-gpu", "daemon": [*PER_GPU, PER_GPU[0]]},
        {"daemon": f"{PIPE}/pipe /var/log/slurm-mps/4711"},
        {"daemon": f"{PIPE}/pipe /var/log/slurm-mps/4711 8X"},
        {"daemon": f"{PIPE}/pipe /var/log/slurm-mps/4711 8G more"},
        {"daemon": f"/{'x' * 104} /log -"},
        {"auto": "everything"},
        {"gpu": "2 2 GPU-51000000-99a9-0495-d04f-b3afe1238f4c"},
        {"gpu": "2 2 GPU-51000000-99a9-0495-d04f-b3afe1238f4c 142641 0"},
    ],
)
def test_a_verdict_whose_parts_do_not_fit_together_is_a_refusal(
    plugin: ctypes.CDLL, state: Path, changes: dict[str, str | list[str]]
) -> None:
    assert read(plugin, state, verdict_file(**changes)).status == REFUSED


def test_a_refusal_brings_its_message(plugin: ctypes.CDLL, state: Path) -> None:
    verdict = read(plugin, state, refused("no\nGPU \x1b[2J").encode())
    assert (verdict.status, verdict.message) == (REFUSED, b"no?GPU ?[2J")


def test_a_job_that_runs_without_mps_is_told_why(plugin: ctypes.CDLL, state: Path) -> None:
    verdict = read(plugin, state, without("no daemon").encode())
    assert (verdict.status, verdict.message) == (WITHOUT, b"no daemon")


def test_a_verdict_among_the_logs_is_read_like_any_other(plugin: ctypes.CDLL, state: Path) -> None:
    """The prolog leaves it there when it can leave nothing in /run."""
    place = state / f"logs/{JOB}"
    place.mkdir(parents=True)
    (place / "verdict").write_bytes(refused("no room").encode())
    (place / "verdict").chmod(0o644)
    told, forged = CVerdict(), CVerdict()
    plugin.verdict_read_elsewhere(JOB, ctypes.byref(told))
    (place / "verdict").chmod(0o666)
    plugin.verdict_read_elsewhere(JOB, ctypes.byref(forged))
    shutil.rmtree(place)
    assert (told.status, told.message) == (REFUSED, b"no room")
    assert b"cannot be understood" in forged.message


def test_no_verdict_is_none(plugin: ctypes.CDLL, state: Path) -> None:
    assert read(plugin, state, None).status == NONE


WHOLE = ready(SETTINGS)


@pytest.mark.parametrize("length", range(len(WHOLE) - len("end 00000000\n") + 1))
def test_a_verdict_cut_short_is_a_refusal_never_a_job_that_did_not_ask(
    plugin: ctypes.CDLL, state: Path, length: int
) -> None:
    verdict = read(plugin, state, WHOLE[:length])
    assert verdict.status == REFUSED
    assert b"cannot be understood" in verdict.message


@pytest.mark.parametrize("without", ["daemon", "thread_percentage", "clients_per_gpu", "probe", "explain", "gpu"])
def test_a_ready_verdict_without_one_of_its_parts_is_a_refusal(plugin: ctypes.CDLL, state: Path, without: str) -> None:
    assert read(plugin, state, verdict_file(**{without: None})).status == REFUSED


LINES = [f"{key} {value}" for key, value in (("status", "ready"), *SETTINGS)]


@pytest.mark.parametrize(
    "lines",
    [
        *([line for line in LINES if not line.startswith(f"{key} ")] for key in ("daemon", "thread_percentage", "gpu")),
        ["status ready"],
        [*LINES[1:], "status perhaps"],
        ["status refused"],
        ["status without"],
    ],
    ids=[
        "no daemon",
        "no percentage",
        "no GPU",
        "nothing",
        "no such status",
        "refused, no reason",
        "without, no reason",
    ],
)
def test_both_sides_refuse_a_verdict_that_is_not_whole(plugin: ctypes.CDLL, state: Path, lines: list[str]) -> None:
    """What status and logs would show of it no task has."""
    assert parse_verdict(encode("verdict", VERDICT_VERSION, LINES)).daemons
    data = encode("verdict", VERDICT_VERSION, lines)
    assert b"cannot be understood" in read(plugin, state, data).message
    with pytest.raises(DamagedFileError):
        parse_verdict(data)


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
    """spank/gpus.h's struct task_gpus."""

    _fields_ = (("count", ctypes.c_uint), ("gpus", ctypes.c_void_p * 64), ("ordinals", ctypes.c_uint * 64))


def find_gpus(
    plugin: ctypes.CDLL, verdict: CVerdict, visible: str | None, task: CTaskGpus, *, has_gpus: bool = False
) -> bool:
    plugin.task_gpus.restype = ctypes.c_bool
    given = visible.encode() if visible is not None else None
    found: bool = plugin.task_gpus(ctypes.byref(verdict), given, ctypes.c_bool(has_gpus), ctypes.byref(task))
    return found


def task_gpus(
    plugin: ctypes.CDLL, state: Path, visible: str | None, *, ordinals: bool = False, has_gpus: bool = False
) -> str | None:
    """What a task with this CUDA_VISIBLE_DEVICES gets; its GPUs 2 and 3 have no device nodes here, so all may open."""
    verdict, task = read(plugin, state, WHOLE), CTaskGpus()
    if not find_gpus(plugin, verdict, visible, task, has_gpus=has_gpus):
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
        ("NoDevFiles", []),
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


def test_a_task_that_slurm_does_not_bind_has_all_gpus_of_its_step(plugin: ctypes.CDLL, state: Path) -> None:
    """With --gpu-bind=none the variable is not set, as it is not in a step without GPUs."""
    assert task_gpus(plugin, state, None, has_gpus=True) == f"{A},{B}"


@pytest.mark.parametrize(("visible", "expected"), [("2,3", "0,1"), ("3", "1"), ("2", "0"), (None, "")])
def test_a_tasks_gpus_by_the_daemons_ordinals(
    plugin: ctypes.CDLL, state: Path, visible: str | None, expected: str
) -> None:
    assert task_gpus(plugin, state, visible, ordinals=True) == expected


@pytest.mark.parametrize("visible", ["2", "3"])
def test_with_a_daemon_for_each_gpu_every_ordinal_is_the_first(plugin: ctypes.CDLL, state: Path, visible: str) -> None:
    verdict, task = read(plugin, state, verdict_file(daemons="per-gpu", daemon=PER_GPU)), CTaskGpus()
    assert find_gpus(plugin, verdict, visible, task)
    assert (task.count, task.ordinals[0]) == (1, 0)


class CLimits(ctypes.Structure):
    """spank/limits.h's struct limits."""

    _fields_ = (
        ("threads_tenths", ctypes.c_uint),
        ("divide_threads", ctypes.c_bool),
        ("divide_memory", ctypes.c_bool * 64),
        ("share_tenths", ctypes.c_uint),
        ("says_memory", ctypes.c_bool),
        ("share_divides", ctypes.c_bool),
        ("priority", ctypes.c_int),
        ("ranks", ctypes.c_uint),
        ("mib", ctypes.c_uint64 * 64),
    )


class CStepOptions(ctypes.Structure):
    """spank/limits.h's struct step_options."""

    _fields_ = tuple((name, ctypes.c_char_p) for name in ("daemons", "threads", "mem", "priority"))


def of_step(plugin: ctypes.CDLL, state: Path, *, job: bytes = WHOLE, **given: str) -> CLimits | str:
    """The limits of a step of a job with 12.5 % and 8G, or why it is refused."""
    verdict, limits, message = read(plugin, state, job), CLimits(), ctypes.create_string_buffer(512)
    plugin.limits_of_step.restype = ctypes.c_bool
    options = CStepOptions(*(given.get(name, "").encode() for name in ("daemons", "threads", "mem", "priority")))
    arguments = ctypes.byref(verdict), ctypes.byref(options), ctypes.byref(limits), message, 512
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
    limits = of_step(plugin, state, threads=threads, mem=mem)
    assert isinstance(limits, CLimits)
    assert (limits.threads_tenths, list(limits.mib[:2])) == (tenths, [mib, mib])


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
    assert of_step(plugin, state, threads=threads, mem=mem) == said


SPLIT = verdict_file(daemons="per-gpu", daemon=PER_GPU)


def test_a_step_lowers_each_gpu_for_itself(plugin: ctypes.CDLL, state: Path) -> None:
    limits = of_step(plugin, state, mem="1:1G", job=SPLIT)
    assert isinstance(limits, CLimits)
    assert list(limits.mib[:2]) == [8192, 1024]


@pytest.mark.parametrize(
    ("job", "options", "said"),
    [
        (SPLIT, {"mem": "0:1G,1:5G"}, "--mps-mem=1:5G is more than the job has (4G); a step can only lower it"),
        (SPLIT, {"mem": "5G"}, "--mps-mem=5G is more than the job has (4G); a step can only lower it"),
        (SPLIT, {"mem": "2:1G"}, "--mps-mem has a limit for GPU 2, but this job's GPUs on this node are 0 to 1"),
        (
            WHOLE,
            {"mem": "0:1G"},
            "--mps-mem=0:1G needs a job with --mps=per-gpu: one control daemon cannot tell its GPUs apart",
        ),
        (
            WHOLE,
            {"daemons": "per-gpu"},
            "--mps=per-gpu: the job has --mps=per-node, and its control daemons are started with the job",
        ),
        (
            SPLIT,
            {"daemons": "per-node"},
            "--mps=per-node: the job has --mps=per-gpu, and its control daemons are started with the job",
        ),
    ],
)
def test_a_step_cannot_have_what_only_a_job_can(
    plugin: ctypes.CDLL, state: Path, job: bytes, options: dict[str, str], said: str
) -> None:
    assert of_step(plugin, state, job=job, **options) == said


AUTO = verdict_file(auto=["threads", "memory"], thread_percentage="100", daemon=f"{PIPE}/pipe /var/log/x -")


def divide(
    plugin: ctypes.CDLL,
    state: Path,
    ranks: list[int],
    visible: str = "2,3",
    *,
    job: bytes = AUTO,
    shards: int = 0,
    **given: str,
) -> tuple[int, list[int]] | str:
    """Tenths of a percent and MiB for each GPU of a task, with so many ranks on the job's GPUs; or the refusal."""
    limits = of_step(plugin, state, job=job, **given)
    assert isinstance(limits, CLimits), limits
    verdict, task, message = read(plugin, state, job), CTaskGpus(), ctypes.create_string_buffer(512)
    assert find_gpus(plugin, verdict, visible, task)
    counted = (ctypes.c_uint * 64)(*ranks)
    plugin.limits_of_share(ctypes.byref(verdict), shards, ctypes.byref(limits))
    plugin.limits_divide.restype = ctypes.c_bool
    arguments = ctypes.byref(verdict), ctypes.byref(task), counted, ctypes.byref(limits), message, 512
    if not plugin.limits_divide(*arguments):
        return message.value.decode()
    return limits.threads_tenths, list(limits.mib[:2])


@pytest.mark.parametrize(
    ("ranks", "visible", "expected"),
    [
        ([1, 1], "2,3", (1000, [142641, 142641])),
        ([4, 4], "2,3", (250, [35660, 35660])),
        ([3, 1], "2", (333, [47547, 0])),
        ([3, 1], "3", (1000, [0, 142641])),
        ([48, 0], "2", (20, [2971, 0])),
    ],
)
def test_auto_divides_by_the_ranks_on_the_tasks_own_gpus(
    plugin: ctypes.CDLL, state: Path, ranks: list[int], visible: str, expected: tuple[int, list[int]]
) -> None:
    assert divide(plugin, state, ranks, visible) == expected


PART = {"share": "12.5", "share_memory": "even"}


@pytest.mark.parametrize(
    ("shards", "lines", "given", "expected"),
    [
        (0, PART, {}, (125, [8915, 8915])),
        (0, PART, {"threads": "auto"}, (62, [8915, 8915])),
        (0, PART, {"mem": "2G"}, (125, [2048, 2048])),
        (0, {"share": "12.5"}, {}, (125, [0, 0])),
        (1, {"shards_per_gpu": "4", "share_memory": "even"}, {}, (125, [8915, 8915])),  # of two GPUs
        (8, {"shards_per_gpu": "4", "share_memory": "even"}, {}, (1000, [0, 0])),
        (9, {"shards_per_gpu": "4", "share_memory": "even"}, {}, (1000, [0, 0])),
        (1, {"share_memory": "even"}, {}, (1000, [0, 0])),
        (0, {"share": "100", "share_memory": "even"}, {}, (1000, [0, 0])),
    ],
)
def test_a_part_of_a_gpu_is_divided_by_those_that_share_it(
    plugin: ctypes.CDLL,
    state: Path,
    shards: int,
    lines: dict[str, str],
    given: dict[str, str],
    expected: tuple[int, list[int]],
) -> None:
    """Two ranks on each GPU: each may have the part of the threads, and half of that part of the memory."""
    job = verdict_file(thread_percentage="100", daemon=f"{PIPE}/pipe /var/log/x -", **lines)
    assert divide(plugin, state, [2, 2], job=job, shards=shards, **given) == expected


def test_auto_never_gives_more_than_the_job_has(plugin: ctypes.CDLL, state: Path) -> None:
    assert divide(plugin, state, [2, 2], job=WHOLE, threads="auto", mem="auto") == (125, [8192, 8192])
    assert divide(plugin, state, [20, 20], job=WHOLE, threads="auto", mem="auto") == (50, [7132, 7132])


def test_a_steps_list_leaves_the_jobs_auto_to_the_gpus_that_it_does_not_name(plugin: ctypes.CDLL, state: Path) -> None:
    split = [line.replace(" 8G", " -").replace(" 4G", " -") for line in PER_GPU]
    job = verdict_file(daemons="per-gpu", daemon=split, auto="memory", thread_percentage="100")
    assert divide(plugin, state, [4, 4], "2", job=job, mem="1:4G") == (1000, [35660, 4096])
    assert divide(plugin, state, [4, 4], "3", job=job, mem="1:4G") == (1000, [0, 4096])


def test_more_ranks_than_any_driver_takes_without_a_word_are_counted(plugin: ctypes.CDLL, state: Path) -> None:
    """60 clients fit only with CUDA_DEVICE_MAX_CONNECTIONS=2, which the plugin sets for more than 48 (M5)."""
    verdict = read(plugin, state, verdict_file(clients_per_gpu="60"))
    limits = of_step(plugin, state)
    assert isinstance(limits, CLimits)
    plugin.limits_need_ranks.restype = ctypes.c_bool
    needed = {n: plugin.limits_need_ranks(ctypes.byref(verdict), ctypes.byref(limits), n) for n in (48, 49, 61)}
    assert needed == {48: False, 49: True, 61: True}


@pytest.mark.parametrize(
    ("job", "options", "said"),
    [
        (AUTO, {"mem": "200G"}, "--mps-mem=200G is more than GPU-51000000-99a9-0495-d04f-b3afe1238f4c has (143771M)"),
        (verdict_file(memory_min="4G"), {"mem": "1G"}, "--mps-mem=1G: this site allows 4G and more"),
        (verdict_file(thread_percentage_min="10"), {"threads": "5"}, "--mps-threads=5: this site allows 10 and more"),
    ],
)
def test_a_step_is_held_to_what_a_job_is_held_to(
    plugin: ctypes.CDLL, state: Path, job: bytes, options: dict[str, str], said: str
) -> None:
    assert of_step(plugin, state, job=job, **options) == said


def test_a_steps_own_number_replaces_the_jobs_auto(plugin: ctypes.CDLL, state: Path) -> None:
    assert divide(plugin, state, [4, 4], threads="50", mem="8G") == (500, [8192, 8192])


@given(ranks=st.lists(st.integers(1, 48), min_size=2, max_size=2))
def test_what_auto_gives_all_ranks_of_a_gpu_is_there(plugin: ctypes.CDLL, state: Path, ranks: list[int]) -> None:
    result = divide(plugin, state, ranks)
    assert not isinstance(result, str)
    for count, mib in zip(ranks, result[1], strict=True):
        assert count * mib <= 142641 < count * (mib + 1)
    assert max(ranks) * result[0] <= 1000


SMALL = "3 3 GPU-51000000-fc4b-2381-c253-bcc185995317 2000 2500"


@pytest.mark.parametrize(
    ("job", "ranks", "said"),
    [
        (
            WHOLE,
            [49, 1],
            (
                "49 tasks of this step share a GPU, and an MPS server takes 48 clients there; "
                "start fewer on this node, or give the job more GPUs"
            ),
        ),
        (
            verdict_file(auto="threads", thread_percentage_min="5"),
            [21, 1],
            (
                "--mps-threads=auto: 21 tasks of this step share a GPU, which is 4.7 % of its threads for each; "
                "this site allows 5 and more"
            ),
        ),
        (
            verdict_file(auto="memory", thread_percentage="100", gpu=[SETTINGS[-2][1], SMALL]),
            [1, 4],
            (
                "--mps-mem=auto: 4 tasks of this step share a GPU, which is 500M of its memory for each; "
                "they need at least 514M"
            ),
        ),
        (
            verdict_file(auto="memory", memory_min="8G"),
            [20, 20],
            (
                "--mps-mem=auto: 20 tasks of this step share a GPU, which is 7132M of its memory for each; "
                "they need at least 8G"
            ),
        ),
    ],
)
def test_too_many_ranks_are_refused_with_the_numbers_and_the_same_for_every_task(
    plugin: ctypes.CDLL, state: Path, job: bytes, ranks: list[int], said: str
) -> None:
    assert divide(plugin, state, ranks, "2", job=job) == said
    assert divide(plugin, state, ranks, "3", job=job) == said


def answer_in_processes(plugin: ctypes.CDLL, state: Path, visible: list[str], tasks: int) -> list[list[int] | None]:
    """Fork a process for each task, as slurmstepd does, and have them answer; None for one that gave up."""
    verdict, answers = read(plugin, state, AUTO), []
    plugin.rollcall_new.restype = ctypes.c_void_p
    plugin.rollcall_answer.restype = ctypes.c_bool
    rollcall = ctypes.c_void_p(plugin.rollcall_new())
    for value in visible:
        reading, writing = os.pipe()
        if os.fork() == 0:
            task, ranks = CTaskGpus(), (ctypes.c_uint * 64)()
            find_gpus(plugin, verdict, value, task)
            there = plugin.rollcall_answer(rollcall, ctypes.byref(verdict), ctypes.byref(task), tasks, ranks)
            os.write(writing, bytes(ranks[:2]) if there else b"x")
            os._exit(0)
        os.close(writing)
        answers.append(reading)
    return [None if (said := os.read(fd, 2)) == b"x" else list(said) for fd in answers]


@pytest.mark.parametrize(
    ("visible", "ranks"),
    [
        (["2", "3"], [1, 1]),
        (["2", "2", "2", "3"], [3, 1]),
        (["2,3"] * 4, [2, 2]),
        (["2,3"] * 5, [3, 3]),
        (["2,3", "2,3", "3"], [1, 2]),
        (["", "2"], [1, 0]),
    ],
)
def test_tasks_count_one_another_by_gpu(plugin: ctypes.CDLL, state: Path, visible: list[str], ranks: list[int]) -> None:
    assert answer_in_processes(plugin, state, visible, len(visible)) == [ranks] * len(visible)


def test_a_task_that_never_comes_is_not_waited_for_without_end(plugin: ctypes.CDLL, state: Path) -> None:
    assert answer_in_processes(plugin, state, ["2", "3"], 3) == [None, None]


def memory_value(
    plugin: ctypes.CDLL, state: Path, own: str | None, visible: str = "2,3", *, job: bytes = WHOLE, **given: str
) -> str | None:
    """The memory variable of a task whose user has set `own`; None when there is none to set."""
    limits, verdict, task = of_step(plugin, state, job=job, **given), read(plugin, state, job), CTaskGpus()
    assert isinstance(limits, CLimits)
    assert find_gpus(plugin, verdict, visible, task)
    out = ctypes.create_string_buffer(4096)
    plugin.limits_memory_value.restype = ctypes.c_bool
    arguments = ctypes.byref(verdict), ctypes.byref(limits), ctypes.byref(task)
    value = plugin.limits_memory_value(*arguments, own.encode() if own is not None else None, out, 4096)
    return out.value.decode() if value else None


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (None, None),
        ("", "0=8192M"),
        ("0=2G", "0=2048M"),
        ("1=512M,0=2G", "0=2048M,1=512M"),
        (f"{B}=1G", "0=8192M,1=1024M"),
        ("0=20G", "0=8192M"),
        ("junk", "0=8192M"),
        ("2=1G", "0=8192M"),
        ("0=2G,7=1G", "0=2048M"),
        ("0=1GB,1=512MiB", "0=1024M,1=512M"),
        ("0=GB", "0=8192M"),
        ("0=1.5G", "0=8192M"),
        ("GPU-other=1G", "0=8192M"),
        ("0=2G,", "0=2048M"),
        ("0=" + "9" * 40 + "G", "0=8192M"),
    ],
)
def test_the_memory_variable_is_one_that_the_driver_can_use(
    plugin: ctypes.CDLL, state: Path, own: str | None, expected: str | None
) -> None:
    """One bad entry removes the limit of every device (O12). Where the user has none the daemon's own holds."""
    assert memory_value(plugin, state, own) == expected


def test_a_limit_that_the_daemon_prints_rounded_stands_in_the_variable(plugin: ctypes.CDLL, state: Path) -> None:
    """Of 1500M a daemon says 1G (O95), and verify is to know how much a task may have of each of its GPUs."""
    job = verdict_file(daemon=f"{PIPE}/pipe /var/log/x 1500M")
    assert memory_value(plugin, state, None, job=job) == "0=1500M,1=1500M"
    assert memory_value(plugin, state, "0=1G", job=job) == "0=1024M,1=1500M"


def test_a_steps_lower_limit_names_every_device(plugin: ctypes.CDLL, state: Path) -> None:
    """The daemon gives each of them more."""
    assert memory_value(plugin, state, None, mem="2G") == "0=2048M,1=2048M"


@pytest.mark.parametrize(("visible", "expected"), [("2", "0=8192M"), ("3", "0=4096M")])
def test_a_task_of_a_gpu_with_its_own_daemon_has_that_gpus_limit(
    plugin: ctypes.CDLL, state: Path, visible: str, expected: str
) -> None:
    assert memory_value(plugin, state, "junk", visible, job=SPLIT) == expected


def test_a_task_without_a_gpu_has_a_limit_all_the_same(plugin: ctypes.CDLL, state: Path) -> None:
    assert memory_value(plugin, state, "junk", "") == "0=8192M"


def test_without_a_limit_the_users_own_is_left_alone(plugin: ctypes.CDLL, state: Path) -> None:
    assert memory_value(plugin, state, "0=1G", job=verdict_file(daemon=f"{PIPE}/pipe /var/log/x -")) is None


@given(own=st.text(alphabet="0123456789=,.GMT-x", max_size=40))
def test_no_variable_of_the_users_lifts_the_limit(plugin: ctypes.CDLL, state: Path, own: str) -> None:
    entries = dict(entry.split("=") for entry in (memory_value(plugin, state, own) or "").split(","))
    assert entries.keys() in ({"0"}, {"0", "1"})
    assert all(size.endswith("M") and 1 <= int(size[:-1]) <= 8192 for size in entries.values())


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (None, "25"),
        ("10", "10"),
        ("2.5", "2.5"),
        ("12.55", "12.5"),
        ("25.01", "25"),
        ("50", "25"),
        ("0", "25"),
        ("junk", "25"),
        ("1.5x", "25"),
        ("0.05", "0.1"),
        ("0.00", "25"),
    ],
)
def test_the_thread_variable_keeps_a_lower_value_of_the_users(
    plugin: ctypes.CDLL, own: str | None, expected: str
) -> None:
    limits, out = CLimits(250), ctypes.create_string_buffer(64)
    plugin.limits_threads_value(ctypes.byref(limits), own.encode() if own is not None else None, out, 64)
    assert out.value.decode() == expected


LOW = verdict_file(client_priority="1")


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
    verdict = verdict_file(thread_percentage=f"{tenths // 10}.{tenths % 10}")
    gpu = Gpu("GPU-0", 0, 0, 143771 * MIB, "Simulated H200", 143155 * MIB, (9, 0), (13, 0))
    for mib in range(1, 600):
        request = JobRequest(JOB, 1, ("0",), tenths / 10, mib * MIB)
        try:
            taken = bool(make_plan(request, DEFAULTS, (gpu,)))
        except RequestError:
            taken = False
        assert isinstance(of_step(plugin, state, mem=f"{mib}M", job=verdict), CLimits) == taken, mib
