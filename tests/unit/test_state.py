"""The state on disk: journals and ledgers as they are written, read back, and distrusted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from slurm_mps.config.settings import DEFAULTS, STATE_DIRECTORY, SiteConfig, to_lines
from slurm_mps.errors import NodeError
from slurm_mps.job.actions import gpu_daemon_name
from slurm_mps.job.journal import JOURNAL_VERSION, Journal
from slurm_mps.job.ledger import CLOSING, JOINED, OPEN, SEPARATE, STARTING, Holder, JoinedDaemon, LedgerEntry
from slurm_mps.job.request import ID_MAX
from slurm_mps.job.state import NodeState
from slurm_mps.job.verdict import VERDICT_VERSION, refused
from slurm_mps.node.control import PIPE_DIRECTORY_MAX
from slurm_mps.node.processes import ProcessIdentity
from slurm_mps.node.wordfile import DamagedFileError, NewerFileError, decode, encode
from slurm_mps.units import GPUS_MAX

if TYPE_CHECKING:
    from pathlib import Path

GPU = "GPU-51000000-78fa-2b71-eb6d-6d990af97344"
UNDO = ["release_gpu gpu=GPU-1", "remove_directories", "quit_daemons names=pipe"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "slurm-mps"


@pytest.fixture
def state(place: Path) -> NodeState:
    return NodeState(str(place))


def begin(state: NodeState, job_id: int = 4711, run: str = "5d41402a") -> Journal:
    return state.begin_journal(job_id, 20001, run)


def modes(place: Path) -> dict[str, int]:
    """The permissions of everything below, as written: an ACL's mask shows in the group's place."""
    return {str(path.relative_to(place)): path.stat().st_mode & 0o7777 for path in place.rglob("*")}


def put(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    path.chmod(0o600)


# ------------------------------------------------------------------------------------------------------- the journal


def test_a_journal_is_read_back_as_it_was_written(state: NodeState) -> None:
    """Who the job is and every undo, in order, survive the process that noted them."""
    journal = begin(state, run="1234abcd")
    for line in UNDO:
        journal.note(line)
    journal.ready = True
    journal.write()
    found = state.open_journal(4711)
    assert found is not None
    assert vars(found) | {"directory": None} == vars(journal) | {"directory": None}
    assert found.undo == UNDO


def test_an_undo_is_on_disk_when_note_returns(state: NodeState) -> None:
    """A process killed after note() has left the note, and one killed before it has not."""
    journal = begin(state)
    for number, line in enumerate(UNDO, 1):
        journal.note(line)
        found = state.open_journal(4711)
        assert found is not None
        assert (found.undo, found.ready) == (UNDO[:number], False)


def test_only_the_verdict_can_be_read(state: NodeState, place: Path) -> None:
    """Everything is root's alone but the way to the job's directory and the verdict in it."""
    journal = begin(state)
    journal.write_config(DEFAULTS)
    journal.write_verdict(refused("no"))
    assert modes(place)["jobs/4711"] == 0o700, "until the user is let in"
    journal.directory.grant_user(journal.uid)
    state.ledgers.write(GPU, LedgerEntry((Holder(4711),), 0))
    state.keep_compiled_config("stamp", to_lines(DEFAULTS))
    assert place.stat().st_mode & 0o7777 == 0o711
    assert modes(place) == {
        "jobs": 0o711,
        "jobs/4711": 0o750,  # r-x is the ACL's mask: one user's, nobody's group
        "jobs/4711/journal": 0o600,
        "jobs/4711/config": 0o600,
        "jobs/4711/verdict": 0o644,
        "gpus": 0o700,
        f"gpus/{GPU}": 0o600,
        "config": 0o600,
        "lock": 0o600,
    }


def test_a_job_of_which_nothing_is_there(state: NodeState) -> None:
    """No directory is no journal."""
    assert state.open_journal(4711) is None
    assert state.job_ids() == []


def test_a_finished_journal_is_removed_whole(state: NodeState, place: Path) -> None:
    """Verdict, configuration, and what a killed write left go with the journal."""
    journal = begin(state)
    journal.write_config(DEFAULTS)
    journal.write_verdict(refused("no"))
    for name in (".verdict.new", ".config.new", ".journal.new"):
        (place / "jobs/4711" / name).touch(mode=0o600)
    state.remove_journal(journal)
    assert list((place / "jobs").iterdir()) == []


WHO = "job id=4711 uid=20001 run=5d41402a boot=b node=n1 ready=no"


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["job"],
        ["job id=4711"],
        [WHO.replace("id=4711", "id=4712")],
        [WHO.replace("id=4711", "id=many")],
        [WHO.replace(" ready=no", "")],
        [WHO, "redo quit_daemon"],
        [WHO.replace("job ", "jobs ", 1)],
        [WHO.replace("uid=20001", "uid")],
    ],
)
def test_a_journal_that_does_not_name_its_job_is_damaged(state: NodeState, place: Path, lines: list[str]) -> None:
    """A whole file of the right kind with the wrong lines is not guessed at, and is left as it is."""
    begin(state)
    path = place / "jobs/4711/journal"
    put(path, encode("journal", JOURNAL_VERSION, lines))
    before = path.read_bytes()
    with pytest.raises(DamagedFileError):
        state.open_journal(4711)
    assert path.read_bytes() == before


def test_the_jobs_configuration_is_its_own(state: NodeState) -> None:
    """A job's configuration is what it was brought up with; a job that did not come that far has none."""
    journal = begin(state)
    assert journal.read_config() is None
    mine = SiteConfig(limits_thread_percentage_default=12.5, paths_logs="/var/log/mine")
    journal.write_config(mine)
    found = state.open_journal(4711)
    assert found is not None
    assert found.read_config() == mine


# -------------------------------------------------------------------------------------------------------- the verdict


def test_a_verdict_is_one_line_for_each_value(state: NodeState, place: Path) -> None:
    """Whatever a message holds, it cannot start a line of its own, and is not longer than the plugin reads."""
    journal = begin(state)
    journal.write_verdict(refused("no\nstatus ready\r\x1b[2Jé" + "x" * 10_000))
    lines = decode((place / "jobs/4711/verdict").read_bytes(), "verdict", VERDICT_VERSION)
    assert lines[:2] == ["uid 20001", "status refused"]
    assert lines[2].startswith("message no?status ready??[2J?xxx")
    assert (len(lines), len(lines[2])) == (4, len("message ") + 480)


# --------------------------------------------------------------------------------------------------------- the ledger


@pytest.mark.parametrize(
    "entry",
    [
        LedgerEntry((Holder(4711),), 0),
        LedgerEntry((Holder(4711, SEPARATE), Holder(4712, SEPARATE)), 2),
        LedgerEntry((Holder(4711),), None),
        LedgerEntry((), 3),
        LedgerEntry((Holder(4711, JOINED, 20001, 35654),), 0, JoinedDaemon(4711, STARTING, 20001)),
        LedgerEntry((Holder(4711, JOINED, 20001),), 0, JoinedDaemon(7, OPEN, 20001, 0, ProcessIdentity(812, 90210))),
        LedgerEntry((), 0, JoinedDaemon(7, CLOSING, 20001, 4711, ProcessIdentity(812, 90210))),
    ],
)
def test_a_ledger_is_read_back_as_it_was_written(state: NodeState, entry: LedgerEntry) -> None:
    """Holders in their order, and the mode that was found, DEFAULT as well as none."""
    for holder in entry.holders:
        begin(state, holder.job_id)
    state.ledgers.write(GPU, entry)
    assert state.ledgers.read(GPU) == entry


def test_a_ledger_of_nobody_and_nothing_is_no_file(state: NodeState, place: Path) -> None:
    """With the last holder gone and the mode put back there is nothing to remember, nor a killed write's rest."""
    begin(state)
    state.ledgers.write(GPU, LedgerEntry((Holder(4711),), 0))
    (place / f"gpus/.{GPU}.new").touch(mode=0o600)
    state.ledgers.write(GPU, LedgerEntry())
    assert list((place / "gpus").iterdir()) == []
    assert state.ledgers.read(GPU) == LedgerEntry()


def test_a_ledger_of_another_boot_says_nothing(state: NodeState, place: Path) -> None:
    """Compute modes do not outlive a boot: neither does what was found, nor who held."""
    begin(state)
    put(place / f"gpus/{GPU}", encode("ledger", 1, ["boot another", "mode_found 2", "holder 4711 way=whole"]))
    assert state.ledgers.read(GPU) == LedgerEntry()


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", DamagedFileError),
        (encode("ledger", 1, ["boot x"])[:-3], DamagedFileError),
        (encode("journal", JOURNAL_VERSION, ["boot x"]), DamagedFileError),
        (encode("ledger", 2, ["boot x"]), NewerFileError),
    ],
    ids=["empty", "cut", "another kind", "newer"],
)
def test_a_damaged_ledger_is_not_taken_for_none(
    state: NodeState, place: Path, data: bytes, error: type[NodeError]
) -> None:
    """Taking it for empty would give a held GPU away, or lose the mode that was found."""
    put(place / f"gpus/{GPU}", data)
    with pytest.raises(error):
        state.ledgers.read(GPU)


# ------------------------------------------------------------------------- the compiled configuration, the whole


def test_the_compiled_configuration_is_of_one_file(state: NodeState, place: Path) -> None:
    """It is used for the very file it was made of, and for no other; damaged, of another version or none: made anew."""
    config = SiteConfig(policy_node_fault="fail_job")
    assert state.read_compiled_config("stamp") is None
    state.keep_compiled_config("stamp", to_lines(config))
    assert state.read_compiled_config("stamp") == config
    assert state.read_compiled_config("another") is None
    whole = (place / "config").read_bytes()
    for data in (b"", whole[:-9], encode("config", 1, ["old stamp", "old_setting=1"]), encode("config", 1, [])):
        put(place / "config", data)
        assert state.read_compiled_config("stamp") is None


def test_the_state_directory_is_made_once(place: Path) -> None:
    """The first hook after a boot makes it, every other one opens it."""
    for _ in range(2):
        NodeState(str(place)).close()
    assert modes(place) == {"jobs": 0o711, "gpus": 0o700, "lock": 0o600}


def test_locks_are_by_number(state: NodeState, place: Path) -> None:
    """Jobs do not wait for one another, nor for the ledgers."""
    other = NodeState(str(place))
    state.lock_job(4711, 1)
    other.lock_job(4712, 0)
    state.ledgers.lock(0)
    state.ledgers.unlock()
    other.close()


def test_the_longest_pipe_directory_has_room_for_its_sockets() -> None:
    """The control program says nothing of a path that is too long (O6); ours cannot become so."""
    assert len(f"{STATE_DIRECTORY}/jobs/{ID_MAX}/{gpu_daemon_name(GPUS_MAX - 1)}") <= PIPE_DIRECTORY_MAX
