"""Reading a plugin file: what it was built for, and nothing else than an MpsError for any other file."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import slurm_mps
from slurm_mps.errors import MpsError
from slurm_mps.install.build import read_plugin_for
from slurm_mps.job.verdict import VERDICT_VERSION
from slurm_mps.slurm.plugin_file import PluginFile, read_plugin
from tests.harness.cluster import REPOSITORY

PLUGIN = REPOSITORY / "build/spank/spank_mps.so"
OTHERS = {
    "/etc/passwd": "is not the plugin of slurm-mps",
    "/bin/ls": "is not the plugin of slurm-mps",
    "/nowhere": "No such file or directory",
    "/": "Is a directory",
}


def test_it_names_the_release_of_the_headers_and_our_own_version() -> None:
    found = subprocess.run(
        ["cc", "-E", "-P", "-include", "slurm/slurm_version.h", "-"],
        input="SLURM_VERSION_NUMBER",
        capture_output=True,
        text=True,
        check=True,
    )
    number = int(found.stdout.split()[-1], 16)
    release = f"{number >> 16}.{number >> 8 & 255:02}.{number & 255}"
    assert read_plugin(PLUGIN) == PluginFile(release, slurm_mps.__version__, VERDICT_VERSION)


def test_a_stripped_plugin_is_read_as_well(tmp_path: Path) -> None:
    """Packages strip what they ship."""
    shutil.copy(PLUGIN, tmp_path / "stripped.so")
    subprocess.run(["strip", tmp_path / "stripped.so"], check=True)
    assert read_plugin(tmp_path / "stripped.so") == read_plugin(PLUGIN)


@pytest.mark.parametrize("path", sorted(OTHERS))
def test_another_file_is_none(path: str) -> None:
    with pytest.raises(MpsError, match=OTHERS[path]):
        read_plugin(path)


def test_a_plugin_that_does_not_read_our_verdicts_is_not_installed(tmp_path: Path) -> None:
    plugin = read_plugin(PLUGIN)
    mark = f"verdict {plugin.verdict_version} ".encode()
    old = tmp_path / "old.so"
    old.write_bytes(PLUGIN.read_bytes().replace(mark, b"verdict 0 "))
    with pytest.raises(MpsError, match=r"reads verdicts up to version 0, and the prolog writes"):
        read_plugin_for(plugin.slurm_release, str(old))


def test_a_mark_outside_a_plugin_is_none(tmp_path: Path) -> None:
    """Text that quotes the mark, and a plugin that is cut before it."""
    data = PLUGIN.read_bytes()
    at = data.index(b"slurm-mps plugin ")
    for name, some in (("text", data[at:]), ("cut", data[: at + 20])):
        (tmp_path / name).write_bytes(some)
        with pytest.raises(MpsError, match="is not the plugin of slurm-mps"):
            read_plugin(tmp_path / name)


def test_only_releases_of_the_same_year_and_month_take_it() -> None:
    plugin = PluginFile("24.11.5", "1", 1)
    assert [plugin.loads_in(one) for one in ("24.11.5", "24.11.0", "24.05.5", "25.11.5", "2.4")] == [
        True, True, False, False, False,
    ]  # fmt: skip


def test_make_builds_it_anew_when_slurms_headers_are_of_another_release(tmp_path: Path) -> None:
    """A package's headers keep the time of their package, which is older than any plugin."""
    version = Path("/usr/include/slurm/slurm_version.h").read_text()
    header = tmp_path / "slurm/slurm_version.h"
    header.parent.mkdir()
    found = []
    for patch in ("7f", "7e"):
        header.write_text(re.sub(r"(define SLURM_VERSION_NUMBER 0x....)..", rf"\g<1>{patch}", version))
        os.utime(header, (0, 0))
        make = ["make", "-s", "-C", str(REPOSITORY / "spank"), f"BUILD={tmp_path}", f"CPPFLAGS=-I{tmp_path}"]
        subprocess.run(make, check=True)
        found.append(read_plugin(tmp_path / "spank_mps.so").slurm_release.rpartition(".")[2])
    assert found == ["127", "126"]
