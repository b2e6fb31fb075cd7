"""An undo line of a journal, read back into what it undoes."""

import pytest

from slurm_mps.job.undo import read_undo
from slurm_mps.node.wordfile import DamagedFileError


@pytest.mark.parametrize("line", ["quit_daemons", "quit_daemons names=gpu0 more=1", "quit_daemon", "x"])
def test_an_undo_that_we_did_not_write_is_damage(line: str) -> None:
    with pytest.raises(DamagedFileError):
        read_undo(line)
