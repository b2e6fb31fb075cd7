"""Everything that root reads and did not just write: any bytes give a good value or one clean error.

What a run found once stays as an @example. The state's files are tried in three ways: one bit changed anywhere, cut
anywhere, and whole with a right checksum but other lines, as another version or an admin's hand may leave them.
"""

from __future__ import annotations

from binascii import crc32
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from slurm_mps.config.file import parse_config
from slurm_mps.config.settings import CONFIG_VERSION, DEFAULTS, ConfigError, SiteConfig, from_lines, to_lines
from slurm_mps.errors import NodeError, RequestError
from slurm_mps.job.journal import JOURNAL_VERSION, Journal
from slurm_mps.job.ledger import Holder, LedgerEntry
from slurm_mps.job.request import PER_GPU, JobRequest, read_request
from slurm_mps.job.state import NodeState
from slurm_mps.job.undo import read_undo
from slurm_mps.job.verdict import DaemonPlace, Verdict, VerdictGpu, parse_verdict
from slurm_mps.node.wordfile import DamagedFileError, decode, encode, quote, unquote
from slurm_mps.units import MIB

from . import examples

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GPU = "GPU-51000000-78fa-2b71-eb6d-6d990af97344"
READY = Verdict(
    "ready",
    daemons=(DaemonPlace("", "/run/slurm-mps/jobs/4711/pipe", "/var/log/slurm-mps/4711", None, (GPU,)),),
    gpus=(VerdictGpu(0, 0, GPU, 142641, 143771),),
    clients_per_gpu=48,
    probe=("/opt/slurm-mps/bin/python3", "/opt/slurm-mps/probe.py"),
    explain="/opt/slurm-mps/explain.py",
)
SLURMS = {"SLURM_JOB_ID": "4711", "SLURM_JOB_UID": "20001", "SLURM_JOB_GPUS": "0,1", "CUDA_VISIBLE_DEVICES": "0,1"}
#: What an environment can hold: no NUL, and bytes that are no UTF-8 come as surrogates.
ENVIRONMENT_BYTES = st.binary(max_size=400).map(lambda b: b.replace(b"\0", b"").decode("utf-8", "surrogateescape"))
LONG = st.builds(lambda text, times: (text * times)[:131_000], ENVIRONMENT_BYTES, st.integers(1, 2000))
VALUES = st.one_of(
    ENVIRONMENT_BYTES,
    LONG,
    st.text(alphabet="0123456789.MGTmgt+-eE \n%", max_size=16),
    st.text(alphabet="٣²0123456789", max_size=6),
    st.sampled_from(["25", "12.5", "100", "8G", "512M", "low", "normal", "1", "per-gpu", "auto", "0:8G,1:4G"]),
    st.text(alphabet="0123:,GM", max_size=9),
)
NAMES = st.sampled_from(["SPANK_MPS", "SPANK_MPS_THREADS", "SPANK_MPS_MEM", "SPANK_MPS_PRIORITY"]) | (
    ENVIRONMENT_BYTES.map(lambda text: "SPANK_MPS_" + text.replace("=", ""))
)


def check_message(said: str) -> None:
    """What goes into a verdict and from there to a terminal and to slurmd's log."""
    assert said.isascii()
    assert said.isprintable()
    assert len(said) < 300


@given(asked=st.dictionaries(NAMES, VALUES, max_size=6))
@example(asked={"SPANK_MPS_MEM": "٣G"})
@example(asked={"SPANK_MPS_THREADS": "²"})
@example(asked={"SPANK_MPS_THREADS": "25\n"})
@example(asked={"SPANK_MPS_MEM": "9" * 131_000})
@example(asked={"SPANK_MPS_\udcff\x1b[2J": ""})
@settings(max_examples=examples(400), deadline=None)
def test_any_request_is_within_bounds_or_refused_in_one_printable_line(asked: dict[str, str]) -> None:
    """Of a user's bytes only numbers come through, and only printable ASCII comes back."""
    try:
        request = read_request({**SLURMS, **asked})
    except RequestError as error:
        check_message(str(error))
        return
    assert isinstance(request, JobRequest)
    assert request.thread_percentage is None or 0.1 <= request.thread_percentage <= 100
    assert request.memory_limit_bytes is None or MIB <= request.memory_limit_bytes < 2**70
    assert (request.memory_limit_bytes or 0) % MIB == 0
    assert all(gpu < 64 and limit % MIB == 0 for gpu, limit in request.memory_by_gpu)
    assert not request.memory_by_gpu or request.daemons == PER_GPU
    assert request.client_priority in (None, 0, 1)
    assert asked.keys() <= {"SPANK_MPS", "SPANK_MPS_THREADS", "SPANK_MPS_MEM", "SPANK_MPS_PRIORITY"}


@given(
    given_by_slurm=st.dictionaries(
        st.sampled_from([*SLURMS, "SLURM_JOB_RESTART_COUNT"]),
        ENVIRONMENT_BYTES | st.text(alphabet="0123456789,-GPUMIG²٣ ", max_size=30),
    )
)
@example(given_by_slurm={"SLURM_JOB_ID": "²"})
@example(given_by_slurm={"SLURM_JOB_GPUS": "٣"})
@settings(max_examples=examples(300), deadline=None)
def test_whatever_slurmd_says_is_understood_or_refused(given_by_slurm: dict[str, str]) -> None:
    """Nonsense of slurmd's is a fault of the node."""
    try:
        request = read_request({**SLURMS, **given_by_slurm})
    except (NodeError, RequestError) as error:
        check_message(str(error))
        return
    assert 0 <= request.job_id < 2**32
    assert all(name.startswith(("GPU-", "MIG-")) or name.isdigit() for name in request.gpus)


# ----------------------------------------------------------------------------------------------- the state on disk


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state") / "slurm-mps"


@pytest.fixture(scope="module")
def state(place: Path) -> NodeState:
    return NodeState(str(place))


@pytest.fixture(scope="module")
def journal(state: NodeState) -> Journal:
    """A job's journal as it is after a bring-up, with configuration, verdict and ledger beside it."""
    journal = state.begin_journal(4711, 20001, "5d41402a")
    for line in (f"release_gpu gpu={GPU}", "remove_directories", "quit_daemons names=pipe"):
        journal.note(line)
    journal.write_config(DEFAULTS)
    journal.write_verdict(READY)
    state.ledgers.write(GPU, LedgerEntry((Holder(4711),), 0))
    return journal


def read_journal(state: NodeState, _journal: Journal) -> object:
    found = state.open_journal(4711)
    assert found is not None
    found.directory.close()
    return found.undo


KINDS: dict[str, tuple[str, Callable[[NodeState, Journal], object]]] = {
    "journal": ("jobs/4711/journal", read_journal),
    "config": ("jobs/4711/config", lambda _state, journal: journal.read_config()),
    "verdict": (
        "jobs/4711/verdict",
        lambda _state, journal: parse_verdict(journal.directory.read("verdict")),
    ),
    "ledger": (f"gpus/{GPU}", lambda state, _journal: state.ledgers.read(GPU)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_bit_or_a_missing_end_is_noticed_anywhere(
    state: NodeState, journal: Journal, place: Path, kind: str
) -> None:
    """A file of ours with a bit changed, or cut at any byte, is never taken for a good one."""
    name, read = KINDS[kind]
    whole = (place / name).read_bytes()
    good = read(state, journal)
    changed = [whole[:length] for length in range(len(whole))]
    changed += [
        whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :]
        for bit in range(0, len(whole) * 8, 3 if len(whole) < 400 else 7)
    ]
    try:
        for data in changed:
            (place / name).write_bytes(data)
            with pytest.raises(NodeError):
                read(state, journal)
    finally:
        (place / name).write_bytes(whole)
    assert read(state, journal) == good


WORDS = st.sampled_from(
    [
        *("job", "undo", "holder", "boot", "mode_found", "release_gpu", "quit_daemon", "quit_daemons"),
        *("remove_directories", "gpu=x", "gpu", "id=4711", "uid=1", "run=5d41402a", "ready=yes", "boot=b", "4711", "x"),
        *("%", "%4", "gpu=../x", "more=1", "²", "deadlines_quit=x", "deadlines_quit=nan", "logs_max_kib=1.5"),
    ]
) | st.sampled_from(["", "9" * 5000])
VERDICTS = st.sampled_from(
    ["status ready", "daemon a b 8G", "daemon a b -", "daemon a", "gpu 0 0 GPU-1 1 1", "gpu 0", "x"]
) | st.text("abc -:.0123456789", min_size=1, max_size=20)
LINES = st.lists(st.lists(WORDS, max_size=6).map(" ".join), max_size=6) | st.lists(VERDICTS, max_size=8)


@pytest.mark.parametrize("kind", KINDS)
@given(lines=LINES)
@example(lines=["job id=4711 uid=1 run=5d41402a boot=b node=n1 ready=yes", "undo release_gpu gpu=x more=1"])
@example(lines=["job id=4711 uid=1 run=5d41402a boot=b node=n1 ready=yes", "undo quit_daemons"])
@example(lines=["boot b", "holder x"])
@example(lines=["deadlines_quit=x"])
@example(lines=["²"])
@example(lines=["boot b", "mode_found " + "9" * 5000])
@settings(max_examples=examples(100), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_whole_file_with_other_lines_is_read_or_refused(
    state: NodeState, journal: Journal, place: Path, kind: str, lines: list[str]
) -> None:
    """The checksum is right and the lines are not ours: an error that names the file's fault, and no other."""
    name, read = KINDS[kind]
    whole = (place / name).read_bytes()
    lines = [line.replace("boot b", f"boot {state.boot_id}") for line in lines]
    try:
        (place / name).write_bytes(checksummed(kind, lines))
        found = read(state, journal)
        for undo in found if kind == "journal" and isinstance(found, list) else ():
            read_undo(undo)
    except NodeError:
        pass
    finally:
        (place / name).write_bytes(whole)


def checksummed(kind: str, lines: list[str]) -> bytes:
    """As encode() would, of lines that it would not take."""
    version = JOURNAL_VERSION if kind == "journal" else CONFIG_VERSION
    body = "".join(f"{line}\n" for line in (f"slurm-mps {kind} {version}", *lines)).encode()
    return body + f"end {crc32(body):08x}\n".encode()


@given(data=st.binary(max_size=400) | st.integers(0, 5000).map(lambda n: b"slurm-mps journal " + b"9" * n + b"\n"))
@example(data=b"slurm-mps journal " + b"9" * 5000 + b"\nend 00000000\n")
@example(data="slurm-mps journal ²\nend 00000000\n".encode())
@settings(max_examples=examples(200), deadline=None)
def test_any_bytes_are_a_file_of_ours_or_not(data: bytes) -> None:
    try:
        decode(data, "journal", 1)
    except NodeError:
        pass


@given(word=st.text(max_size=60))
@example(word="%\ud800")
@settings(max_examples=examples(200), deadline=None)
def test_any_word_is_unquoted_or_damaged(word: str) -> None:
    try:
        text = unquote(word)
    except DamagedFileError:
        return
    assert unquote(quote(text)) == text


# ------------------------------------------------------------------------------------------------- configuration

TOML = st.one_of(
    st.binary(max_size=300),
    st.builds(
        lambda table, key, value: f"[{table}]\n{key} = {value}\n".encode("utf-8", "surrogatepass"),
        st.sampled_from(["gpus", "limits", "limits.memory", "paths", "deadlines", "logs", "policy", "nothing", ""]),
        st.sampled_from(["sharing", "max", "logs", "quit", "max_kib", "node_fault", "thread_percentage", "x", '"\\n"']),
        st.sampled_from(
            ["nan", "inf", "-1", "1e999", "9" * 400, '"x"', "true", "[]", "{}", "1979-05-27", '"../\\u0000"']
        )
        | st.text(max_size=20),
    ),
)


def check_problems(problems: list[str]) -> None:
    assert problems
    assert all(problem.startswith("mps.toml: ") for problem in problems)


@given(text=TOML)
@example(text=b"a = " + b"[" * 3000)
@settings(max_examples=examples(200), deadline=None)
def test_any_configuration_file_is_a_configuration_or_a_list_of_problems(text: bytes) -> None:
    """It is root's file; a slip in it is to be told, whatever it is, and not to be a traceback."""
    try:
        config = parse_config(text, "mps.toml")
    except ConfigError as error:
        check_problems(error.problems)
        return
    assert from_lines(to_lines(config)) == config
    assert isinstance(config, SiteConfig)


@given(lines=LINES)
@example(lines=["deadlines_quit=x"])
@settings(max_examples=examples(200), deadline=None)
def test_a_compiled_configuration_of_any_lines(lines: list[str]) -> None:
    try:
        assert isinstance(from_lines(lines), SiteConfig)
    except NodeError:
        pass


def test_the_ways_of_spoiling_a_file_spoil_it(state: NodeState, journal: Journal) -> None:
    """What the tests above write in a file's place is of its kind: unspoilt, it is read."""
    assert decode(checksummed("journal", ["x"]), "journal", JOURNAL_VERSION) == ["x"]
    assert checksummed("ledger", ["x"]) == encode("ledger", 1, ["x"])
    assert state.ledgers.read(GPU) == LedgerEntry((Holder(4711),), 0)
    assert journal.read_config() == DEFAULTS
