"""An undo line of a journal, read back into what it undoes."""

import pytest

from slurm_mps.steps import WHOLE_JOB, QuitDaemons, read_undo
from slurm_mps.wordfile import DamagedFileError


def test_the_daemons_of_a_job_from_before_an_upgrade_are_quit() -> None:
    """Version 1 journals from when each job had one daemon name none: the job still ends without a drain."""
    assert read_undo("quit_daemon") == QuitDaemons((WHOLE_JOB,))


@pytest.mark.parametrize("line", ["quit_daemons", "quit_daemons names=gpu0 more=1", "quit_daemon names=gpu0", "x"])
def test_an_undo_that_we_did_not_write_is_damage(line: str) -> None:
    with pytest.raises(DamagedFileError):
        read_undo(line)
