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
    from collections.abc import Iterable

SPANK = Path(__file__).parents[2] / "spank"
NONE, READY, REFUSED, WITHOUT = range(4)
JOB = 4711


class CDaemon(ctypes.Structure):
    """spank/verdict.h's struct verdict_daemon."""

    _fields_ = (
        ("pipe_directory", ctypes.c_char * 104),
        ("log_directory", ctypes.c_char * 104),
        ("mib", ctypes.c_uint64),
        ("joined_directory", ctypes.c_char * 104),
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
        ("unguarded", ctypes.c_bool),
        ("per_gpu", ctypes.c_bool),
        ("daemon_count", ctypes.c_uint),
        ("gpu_count", ctypes.c_uint),
        ("daemons", CDaemon * 64),
        ("gpus", CGpu * 64),
        ("exit_status", ctypes.c_int),
        ("uid", ctypes.c_uint32),
    )


class CTaskGpus(ctypes.Structure):
    """spank/gpus.h's struct task_gpus."""

    _fields_ = (("count", ctypes.c_uint), ("gpus", ctypes.c_void_p * 64), ("ordinals", ctypes.c_uint * 64))


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
        ("tasks_on_gpu", ctypes.c_uint),
        ("mib", ctypes.c_uint64 * 64),
    )


class CStepOptions(ctypes.Structure):
    """spank/limits.h's struct step_options."""

    _fields_ = tuple((name, ctypes.c_char_p) for name in ("daemons", "threads", "mem", "priority"))


class CMemOption(ctypes.Structure):
    """spank/options.h's struct mem_option."""

    _fields_ = (("automatic", ctypes.c_bool), ("by_gpu", ctypes.c_bool), ("mib", ctypes.c_uint64 * 64))


class Plugin:
    """The plugin's own readers, without Slurm, and a directory that stands for /run/slurm-mps."""

    def __init__(self, state: Path) -> None:
        self.state = state
        (state / f"jobs/{JOB}").mkdir(parents=True)
        sources = [str(SPANK / name) for name in ("options.c", "verdict.c", "gpus.c", "limits.c", "rollcall.c")]
        flags = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-g", f'-DSTATE_DIRECTORY="{state}"']
        flags.append(f'-DFALLBACK_DIRECTORY="{state}/logs"')
        subprocess.run(["cc", *flags, "-shared", "-fPIC", "-o", state / "readers.so", *sources], check=True)
        self.c = ctypes.CDLL(str(state / "readers.so"))
        self.c.mem_option.restype = ctypes.c_char_p
        self.c.mem_mib.restype = ctypes.c_uint64
        self.c.rollcall_new.restype = ctypes.c_void_p
        for name in ("task_gpus", "limits_of_step", "limits_divide", "limits_need_task_counts", "limits_memory_value"):
            getattr(self.c, name).restype = ctypes.c_bool
        self.c.rollcall_answer.restype = ctypes.c_bool

    def read(self, data: bytes | None) -> CVerdict:
        """Have the plugin read a verdict."""
        path = self.state / f"jobs/{JOB}/verdict"
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)
            path.chmod(0o644)
        verdict = CVerdict()
        self.c.verdict_read(JOB, ctypes.byref(verdict))
        return verdict

    def find_gpus(self, verdict: CVerdict, visible: str | None, *, has_gpus: bool = False) -> CTaskGpus | None:
        """The GPUs of a task with this CUDA_VISIBLE_DEVICES."""
        task, given = CTaskGpus(), visible.encode() if visible is not None else None
        found = self.c.task_gpus(ctypes.byref(verdict), given, ctypes.c_bool(has_gpus), ctypes.byref(task))
        return task if found else None

    def of_step(self, *, job: bytes | None = None, **given: str) -> CLimits | str:
        """The limits of a step, of a job with 12.5 % and 8G unless told otherwise, or why it is refused."""
        verdict, limits, message = self.read(job or WHOLE), CLimits(), ctypes.create_string_buffer(512)
        options = CStepOptions(*(given.get(name, "").encode() for name in ("daemons", "threads", "mem", "priority")))
        arguments = ctypes.byref(verdict), ctypes.byref(options), ctypes.byref(limits), message, 512
        return limits if self.c.limits_of_step(*arguments) else message.value.decode()

    def divide(
        self, job: bytes, tasks_on: list[int], visible: str, shards: int = 0, /, **given: str
    ) -> tuple[int, list[int]] | str:
        """Tenths of a percent and MiB for each GPU of a task, with so many tasks on the job's GPUs; or the refusal."""
        limits = self.of_step(job=job, **given)
        assert isinstance(limits, CLimits), limits
        verdict, message = self.read(job), ctypes.create_string_buffer(512)
        task, counted = self.find_gpus(verdict, visible), (ctypes.c_uint * 64)(*tasks_on)
        assert task
        self.c.limits_of_share(ctypes.byref(verdict), shards, ctypes.byref(limits))
        arguments = ctypes.byref(verdict), ctypes.byref(task), counted, ctypes.byref(limits), message, 512
        if not self.c.limits_divide(*arguments):
            return message.value.decode()
        return limits.threads_tenths, list(limits.mib[:2])


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Plugin:
    return Plugin(tmp_path_factory.mktemp("state"))


NEAR_MISSES = st.text(alphabet="0123456789.MGTmgtX-+ \n", max_size=14)


@given(text=NEAR_MISSES | st.text(alphabet=st.characters(min_codepoint=1, exclude_categories=["Cs"])))
def test_both_sides_take_and_refuse_the_same_percentages(plugin: Plugin, text: str) -> None:
    """What sbatch takes the prolog must take, or a user gets two opinions."""
    try:
        tenths = round(parse_thread_percentage(text) * 10)
    except ValueError:
        tenths = 0
    assert plugin.c.threads_tenths(text.encode()) == tenths


LISTS = st.lists(st.from_regex(r"[0-9]{1,2}:[1-9][0-9]{0,2}[MGTmg]", fullmatch=True), min_size=1).map(",".join)


@given(text=LISTS | st.text(alphabet="0123:,GMa", max_size=14) | st.sampled_from(["0:8G,1:4G", "0:8G,0:4G", "63:1G"]))
def test_both_sides_take_and_refuse_the_same_lists_with_the_same_words(plugin: Plugin, text: str) -> None:
    option = CMemOption()
    problem = plugin.c.mem_option(text.encode(), ctypes.byref(option))
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
def test_both_sides_take_and_refuse_the_same_sizes(plugin: Plugin, text: str) -> None:
    try:
        mib = parse_memory(text) // MIB
    except ValueError:
        mib = 0
    assert plugin.c.mem_mib(text.encode()) == mib


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


WHOLE = ready(SETTINGS)
SPLIT = verdict_file(daemons="per-gpu", daemon=PER_GPU)
NO_LIMIT = f"{PIPE}/pipe /var/log/x -"
AUTO = verdict_file(auto=["threads", "memory"], thread_percentage="100", daemon=NO_LIMIT)
LOW = verdict_file(client_priority="1")
ROUNDED = verdict_file(daemon=f"{PIPE}/pipe /var/log/x 1500M")


def test_the_plugin_reads_what_the_prolog_writes(plugin: Plugin) -> None:
    verdict = plugin.read(WHOLE)
    assert verdict.status == READY
    assert verdict.daemons[0].pipe_directory == b"/run/slurm-mps/jobs/4711/pipe"
    assert verdict.daemons[0].log_directory == b"/var/log/slurm-mps/4711"
    assert (verdict.threads_tenths, verdict.daemons[0].mib, verdict.clients_per_gpu) == (125, 8192, 48)
    assert (verdict.daemon_count, verdict.gpu_count, verdict.gpus[1].mib_for_clients) == (1, 2, 142641)
    split = plugin.read(SPLIT)
    assert (split.status, [daemon.mib for daemon in split.daemons[:2]]) == (READY, [8192, 4096])


@pytest.mark.parametrize("number", ["2", "999999999"])
def test_a_newer_verdict_is_a_refusal_that_says_so(plugin: Plugin, number: str) -> None:
    verdict = plugin.read(WHOLE.replace(b"verdict 1", f"verdict {number}".encode()))
    assert verdict.status == REFUSED
    assert f"newer slurm-mps than spank_mps.so (verdict version {number}," in verdict.message.decode()


@pytest.mark.parametrize("number", ["", "0", "01", "+1", "1 ", "x", "9999999999"])
def test_a_verdict_of_no_version_is_none(plugin: Plugin, number: str) -> None:
    verdict = plugin.read(WHOLE.replace(b"verdict 1", f"verdict {number}".encode()))
    assert b"cannot be understood" in verdict.message


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
        *({key: None} for key in ("clients_per_gpu", "probe", "explain")),
    ],
)
def test_a_verdict_whose_parts_do_not_fit_together_is_a_refusal(
    plugin: Plugin, changes: dict[str, str | list[str] | None]
) -> None:
    assert plugin.read(verdict_file(**changes)).status == REFUSED


@pytest.mark.parametrize(
    ("data", "status", "message"),
    [
        (refused("no\nGPU \x1b[2J").encode(), REFUSED, b"no?GPU ?[2J"),
        (without("no daemon").encode(), WITHOUT, b"no daemon"),
        (None, NONE, b""),
    ],
)
def test_a_job_without_mps_is_told_why(plugin: Plugin, data: bytes | None, status: int, message: bytes) -> None:
    verdict = plugin.read(data)
    assert (verdict.status, verdict.message) == (status, message)


def test_a_verdict_among_the_logs_is_read_like_any_other(plugin: Plugin) -> None:
    """The prolog leaves it there when it can leave nothing in /run."""
    place = plugin.state / f"logs/{JOB}"
    place.mkdir(parents=True)
    (place / "verdict").write_bytes(refused("no room").encode())
    (place / "verdict").chmod(0o644)
    told, forged = CVerdict(), CVerdict()
    plugin.c.verdict_read_elsewhere(JOB, ctypes.byref(told))
    (place / "verdict").chmod(0o666)
    plugin.c.verdict_read_elsewhere(JOB, ctypes.byref(forged))
    shutil.rmtree(place)
    assert (told.status, told.message) == (REFUSED, b"no room")
    assert b"cannot be understood" in forged.message


def test_a_verdict_cut_short_is_a_refusal_never_a_job_that_did_not_ask(plugin: Plugin) -> None:
    for length in range(len(WHOLE) - len("end 00000000\n") + 1):
        verdict = plugin.read(WHOLE[:length])
        assert verdict.status == REFUSED, length
        assert b"cannot be understood" in verdict.message, length


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
def test_both_sides_refuse_a_verdict_that_is_not_whole(plugin: Plugin, lines: list[str]) -> None:
    """What status and logs would show of it no task has."""
    assert parse_verdict(encode("verdict", VERDICT_VERSION, LINES)).daemons
    data = encode("verdict", VERDICT_VERSION, lines)
    assert b"cannot be understood" in plugin.read(data).message
    with pytest.raises(DamagedFileError):
        parse_verdict(data)


@pytest.mark.parametrize(
    ("visible", "uuids", "ordinals"),
    [
        *(("2,3", f"{A},{B}", "0,1"), ("0,1", f"{A},{B}", "0,1"), ("3", B, "1"), ("2", A, "0"), (B, B, "1")),
        *((None, "", ""), ("", "", ""), ("NoDevFiles", "", "")),
        *(("7", None, None), ("GPU-5", None, None), ("2x", None, None)),
    ],
)
def test_a_tasks_gpus(plugin: Plugin, visible: str | None, uuids: str | None, ordinals: str | None) -> None:
    """GPUs 2 and 3 have no device nodes here, so all may open them."""
    task, out = plugin.find_gpus(plugin.read(WHOLE), visible), ctypes.create_string_buffer(4096)
    for by_ordinal, expected in ((False, uuids), (True, ordinals)):
        if task is not None:
            plugin.c.task_gpus_list(ctypes.byref(task), ctypes.c_bool(by_ordinal), out, 4096)
        assert (None if task is None else out.value.decode()) == expected


def test_a_task_that_slurm_does_not_bind_has_all_gpus_of_its_step(plugin: Plugin) -> None:
    """With --gpu-bind=none the variable is not set, as it is not in a step without GPUs."""
    task = plugin.find_gpus(plugin.read(WHOLE), None, has_gpus=True)
    assert task
    assert (task.count, task.ordinals[:2]) == (2, [0, 1])


@pytest.mark.parametrize("visible", ["2", "3"])
def test_with_a_daemon_for_each_gpu_every_ordinal_is_the_first(plugin: Plugin, visible: str) -> None:
    task = plugin.find_gpus(plugin.read(SPLIT), visible)
    assert task
    assert (task.count, task.ordinals[0]) == (1, 0)


@pytest.mark.parametrize(
    ("job", "given", "tenths", "mib", "priority"),
    [
        (WHOLE, {}, 125, [8192, 8192], 0),
        (WHOLE, {"threads": "12.5", "mem": "8G"}, 125, [8192, 8192], 0),
        (WHOLE, {"threads": "10"}, 100, [8192, 8192], 0),
        (WHOLE, {"mem": "2G"}, 125, [2048, 2048], 0),
        (WHOLE, {"threads": "5", "mem": "1G"}, 50, [1024, 1024], 0),
        (SPLIT, {"mem": "1:1G"}, 125, [8192, 1024], 0),
        (WHOLE, {"priority": "low"}, 125, [8192, 8192], 1),
        (WHOLE, {"priority": "normal"}, 125, [8192, 8192], 0),
        (LOW, {}, 125, [8192, 8192], 1),
        (LOW, {"priority": "low"}, 125, [8192, 8192], 1),
    ],
)
def test_a_step_keeps_or_lowers_what_the_job_has(
    plugin: Plugin, job: bytes, given: dict[str, str], tenths: int, mib: list[int], priority: int
) -> None:
    limits = plugin.of_step(job=job, **given)
    assert isinstance(limits, CLimits)
    assert (limits.threads_tenths, limits.mib[:2], limits.priority) == (tenths, mib, priority)


LOWER = "; a step can only lower it"
WITH_THE_JOB = "and its control daemons are started with the job"


@pytest.mark.parametrize(
    ("job", "options", "said"),
    [
        (WHOLE, {"threads": "12.6"}, f"--mps-threads=12.6 is more than the job has (12.5){LOWER}"),
        (WHOLE, {"mem": "9G"}, f"--mps-mem=9G is more than the job has (8G){LOWER}"),
        (
            WHOLE,
            {"mem": "80M"},
            "--mps-mem=80M is less than a CUDA context costs with 12.5 % of the threads (about 83 MiB)",
        ),
        (SPLIT, {"mem": "0:1G,1:5G"}, f"--mps-mem=1:5G is more than the job has (4G){LOWER}"),
        (SPLIT, {"mem": "5G"}, f"--mps-mem=5G is more than the job has (4G){LOWER}"),
        (SPLIT, {"mem": "2:1G"}, "--mps-mem has a limit for GPU 2, but this job's GPUs on this node are 0 to 1"),
        (
            WHOLE,
            {"mem": "0:1G"},
            "--mps-mem=0:1G needs a job with --mps=per-gpu: one control daemon cannot tell its GPUs apart",
        ),
        (WHOLE, {"daemons": "per-gpu"}, f"--mps=per-gpu: the job has --mps=per-node, {WITH_THE_JOB}"),
        (SPLIT, {"daemons": "per-node"}, f"--mps=per-node: the job has --mps=per-gpu, {WITH_THE_JOB}"),
        (AUTO, {"mem": "200G"}, f"--mps-mem=200G is more than {A} has (143771M)"),
        (verdict_file(memory_min="4G"), {"mem": "1G"}, "--mps-mem=1G: this site allows 4G and more"),
        (verdict_file(thread_percentage_min="10"), {"threads": "5"}, "--mps-threads=5: this site allows 10 and more"),
        (LOW, {"priority": "normal"}, f"--mps-priority=normal is more than the job has (low){LOWER}"),
    ],
)
def test_a_step_that_asks_for_what_it_cannot_have_is_told_both_sides(
    plugin: Plugin, job: bytes, options: dict[str, str], said: str
) -> None:
    assert plugin.of_step(job=job, **options) == said


BOTH_AUTO = {"threads": "auto", "mem": "auto"}
#: A site that gives a daemon for each GPU no limit.
OPEN = verdict_file(
    daemons="per-gpu",
    daemon=[line.replace(" 8G", " -").replace(" 4G", " -") for line in PER_GPU],
    auto="memory",
    thread_percentage="100",
)


@pytest.mark.parametrize(
    ("job", "tasks_on", "visible", "given", "expected"),
    [
        (AUTO, [1, 1], "2,3", {}, (1000, [142641, 142641])),
        (AUTO, [4, 4], "2,3", {}, (250, [35660, 35660])),
        (AUTO, [3, 1], "2", {}, (333, [47547, 0])),
        (AUTO, [3, 1], "3", {}, (1000, [0, 142641])),
        (AUTO, [48, 0], "2", {}, (20, [2971, 0])),
        # Its own number replaces the job's auto, and a list leaves it to the GPUs that it does not name.
        (AUTO, [4, 4], "2,3", {"threads": "50", "mem": "8G"}, (500, [8192, 8192])),
        (OPEN, [4, 4], "2", {"mem": "1:4G"}, (1000, [35660, 4096])),
        (OPEN, [4, 4], "3", {"mem": "1:4G"}, (1000, [0, 4096])),
        # It never gives more than the job has.
        (WHOLE, [2, 2], "2,3", BOTH_AUTO, (125, [8192, 8192])),
        (WHOLE, [20, 20], "2,3", BOTH_AUTO, (50, [7132, 7132])),
    ],
)
def test_auto_divides_by_those_who_share_the_tasks_own_gpus(
    plugin: Plugin,
    job: bytes,
    tasks_on: list[int],
    visible: str,
    given: dict[str, str],
    expected: tuple[int, list[int]],
) -> None:
    assert plugin.divide(job, tasks_on, visible, **given) == expected


PART = {"share": "12.5", "share_memory": "even"}
QUARTERS = {"shards_per_gpu": "4", "share_memory": "even"}


@pytest.mark.parametrize(
    ("shards", "lines", "given", "expected"),
    [
        (0, PART, {}, (125, [8915, 8915])),
        (0, PART, {"threads": "auto"}, (62, [8915, 8915])),
        (0, PART, {"mem": "2G"}, (125, [2048, 2048])),
        (0, {"share": "12.5"}, {}, (125, [0, 0])),
        (1, QUARTERS, {}, (125, [8915, 8915])),  # of two GPUs
        (8, QUARTERS, {}, (1000, [0, 0])),
        (9, QUARTERS, {}, (1000, [0, 0])),
        (1, {"share_memory": "even"}, {}, (1000, [0, 0])),
        (0, {"share": "100", "share_memory": "even"}, {}, (1000, [0, 0])),
    ],
)
def test_a_part_of_a_gpu_is_divided_by_those_that_share_it(
    plugin: Plugin, shards: int, lines: dict[str, str], given: dict[str, str], expected: tuple[int, list[int]]
) -> None:
    """Two ranks on each GPU: each may have the part of the threads, and half of that part of the memory."""
    job = verdict_file(thread_percentage="100", daemon=NO_LIMIT, **lines)
    assert plugin.divide(job, [2, 2], "2,3", shards, **given) == expected


def test_more_ranks_than_any_driver_takes_without_a_word_are_counted(plugin: Plugin) -> None:
    """60 clients fit only with CUDA_DEVICE_MAX_CONNECTIONS=2, which the plugin sets for more than 48 (M5)."""
    verdict = plugin.read(verdict_file(clients_per_gpu="60"))
    limits = plugin.of_step()
    assert isinstance(limits, CLimits)
    need = plugin.c.limits_need_task_counts
    assert [need(ctypes.byref(verdict), ctypes.byref(limits), n) for n in (48, 49, 61)] == [False, True, True]


SMALL = "3 3 GPU-51000000-fc4b-2381-c253-bcc185995317 2000 2500"
SHARE = "tasks of this step share a GPU,"


@pytest.mark.parametrize(
    ("job", "tasks_on", "said"),
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
            f"--mps-threads=auto: 21 {SHARE} 4.7 % of its threads for each; this site allows 5 and more",
        ),
        (
            verdict_file(auto="memory", thread_percentage="100", gpu=[SETTINGS[-2][1], SMALL]),
            [1, 4],
            f"--mps-mem=auto: 4 {SHARE} 500M of memory for each; each needs at least 514M",
        ),
        (
            verdict_file(auto="memory", memory_min="8G"),
            [20, 20],
            f"--mps-mem=auto: 20 {SHARE} 7132M of memory for each; each needs at least 8G",
        ),
    ],
)
def test_too_many_ranks_are_refused_with_the_numbers_and_the_same_for_every_task(
    plugin: Plugin, job: bytes, tasks_on: list[int], said: str
) -> None:
    assert [plugin.divide(job, tasks_on, visible) for visible in ("2", "3")] == [said, said]


def answer_in_processes(plugin: Plugin, visible: list[str], tasks: int) -> list[list[int] | None]:
    """Fork a process for each task, as slurmstepd does, and have them answer; None for one that gave up."""
    verdict, answers = plugin.read(AUTO), []
    rollcall = ctypes.c_void_p(plugin.c.rollcall_new())
    for value in visible:
        reading, writing = os.pipe()
        if os.fork() == 0:
            task, ranks = plugin.find_gpus(verdict, value) or CTaskGpus(), (ctypes.c_uint * 64)()
            there = plugin.c.rollcall_answer(rollcall, ctypes.byref(verdict), ctypes.byref(task), tasks, ranks)
            os.write(writing, bytes(ranks[:2]) if there else b"x")
            os._exit(0)
        os.close(writing)
        answers.append(reading)
    return [None if (said := os.read(fd, 2)) == b"x" else list(said) for fd in answers]


@pytest.mark.parametrize(
    ("visible", "tasks_on"),
    [
        (["2", "3"], [1, 1]),
        (["2", "2", "2", "3"], [3, 1]),
        (["2,3"] * 4, [2, 2]),
        (["2,3"] * 5, [3, 3]),
        (["2,3", "2,3", "3"], [1, 2]),
        (["", "2"], [1, 0]),
    ],
)
def test_tasks_count_one_another_by_gpu(plugin: Plugin, visible: list[str], tasks_on: list[int]) -> None:
    assert answer_in_processes(plugin, visible, len(visible)) == [tasks_on] * len(visible)


def test_a_task_that_never_comes_is_not_waited_for_without_end(plugin: Plugin) -> None:
    assert answer_in_processes(plugin, ["2", "3"], 3) == [None, None]


@pytest.mark.parametrize(
    ("own", "expected", "visible", "job", "given"),
    [
        *(
            (own, expected, "2,3", WHOLE, {})
            for own, expected in (
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
            )
        ),
        (None, "0=2048M,1=2048M", "2,3", WHOLE, {"mem": "2G"}),  # the daemon gives each device more
        ("junk", "0=8192M", "2", SPLIT, {}),
        ("junk", "0=4096M", "3", SPLIT, {}),
        ("junk", "0=8192M", "", WHOLE, {}),
        ("0=1G", None, "2,3", verdict_file(daemon=NO_LIMIT), {}),  # no limit: the user's own is left alone
        # Of 1500M a daemon says 1G (O95), and verify is to know what a task may have. Not of several devices: a program
        # that then sees fewer would have no limit at all (O12).
        (None, "0=1500M", "3", ROUNDED, {}),
        (None, None, "2,3", ROUNDED, {}),
    ],
)
def test_the_memory_variable_is_one_that_the_driver_can_use(
    plugin: Plugin, own: str | None, expected: str | None, visible: str, job: bytes, given: dict[str, str]
) -> None:
    """One bad entry removes the limit of every device (O12). Where the user has none the daemon's own holds."""
    limits, verdict, out = plugin.of_step(job=job, **given), plugin.read(job), ctypes.create_string_buffer(4096)
    assert isinstance(limits, CLimits)
    task = plugin.find_gpus(verdict, visible)
    assert task
    arguments = ctypes.byref(verdict), ctypes.byref(limits), ctypes.byref(task)
    value = plugin.c.limits_memory_value(*arguments, own.encode() if own is not None else None, out, 4096)
    assert (out.value.decode() if value else None) == expected


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
def test_the_thread_variable_keeps_a_lower_value_of_the_users(plugin: Plugin, own: str | None, expected: str) -> None:
    limits, out = CLimits(250), ctypes.create_string_buffer(64)
    plugin.c.limits_threads_value(ctypes.byref(limits), own.encode() if own is not None else None, out, 64)
    assert out.value.decode() == expected


@pytest.mark.parametrize("tenths", [1, 10, 125, 250, 333, 500, 1000])
def test_both_sides_reckon_the_same_cost_of_a_context(plugin: Plugin, tenths: int) -> None:
    """A job's limit is judged by the prolog, a step's by the plugin."""
    verdict = verdict_file(thread_percentage=f"{tenths // 10}.{tenths % 10}")
    gpu = Gpu("GPU-0", 0, 0, 143771 * MIB, "Simulated H200", 143155 * MIB, (9, 0), (13, 0))
    for mib in range(1, 600):
        request = JobRequest(JOB, 1, ("0",), tenths / 10, mib * MIB)
        try:
            taken = bool(make_plan(request, DEFAULTS, (gpu,)))
        except RequestError:
            taken = False
        assert isinstance(plugin.of_step(mem=f"{mib}M", job=verdict), CLimits) == taken, mib
