"""An undo line of a journal, read back into what it undoes; and how steps are done at once."""

import pytest

from slurm_mps.job.actions import read_undo, side_by_side
from slurm_mps.node.wordfile import DamagedFileError


@pytest.mark.parametrize("line", ["quit_daemons", "quit_daemons names=gpu0 more=1", "quit_daemon", "x"])
def test_an_undo_that_we_did_not_write_is_damage(line: str) -> None:
    with pytest.raises(DamagedFileError):
        read_undo(line)


def test_where_no_thread_is_to_be_had_things_are_done_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one first: others may wait for it."""

    def no_thread(*_: object) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("_thread.start_new_thread", no_thread)
    done: list[int] = []
    side_by_side(done.append, (1, 2, 3))
    assert done == [1, 2, 3]
