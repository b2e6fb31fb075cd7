"""Which lines of an engine's site file give its containers the state directory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from slurm_mps.node.engines import Engine

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("line", "is_bound"),
    [
        ("bind path = /run/slurm-mps", True),
        ("bind path=/run/slurm-mps/:/run/slurm-mps/:ro  # MPS", True),
        ("bind path = /run", True),
        ("/run/slurm-mps /run/slurm-mps none x-create=dir,bind,ro 0 0", True),
        ("/run /run none bind", True),
        ("", False),
        ("# bind path = /run/slurm-mps", False),
        ("bind path = /run/slurm-mps-old", False),
        ("bind path = /run/slurm-mps/jobs", False),
        ("bind path = /run/slurm-mps:/mnt", False),
        ("limit container paths = /run/slurm-mps", False),
        ("/run /host/run none bind", False),
    ],
)
def test_a_line_is_read_as_the_engine_reads_it(tmp_path: Path, line: str, is_bound: bool) -> None:
    site_file = tmp_path / "site.conf"
    site_file.write_text(f"bind path = /etc/hosts\n{line}\n")
    engine = Engine("engine", str(tmp_path), str(site_file), str(site_file), "")
    assert engine.lacks_line is not is_bound
    assert engine.needs_directory is (is_bound and "/run/slurm-mps" in line)
