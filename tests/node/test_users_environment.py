"""slurm-mps says the same whatever its user has in the environment, in the current directory and at home."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.harness.runtime import MOUNT_POINT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.gpunode import GpuNode

COMMAND = f"{MOUNT_POINT}/bin/slurm-mps"
HOME = "/home/alice"
#: Directories of alice's: modules with names of the standard library's, libraries that are none, programs that fail.
MODULES, LIBRARIES, PROGRAMS = f"{HOME}/modules", f"{HOME}/libraries", f"{HOME}/programs"
ENVIRONMENTS = {
    "a Python of theirs": {"PYTHONHOME": "/apps/python/3.7"},
    "modules": {"PYTHONPATH": MODULES, "PYTHONSTARTUP": f"{MODULES}/enum.py"},
    "Python's switches": {"PYTHONWARNINGS": "error", "PYTHONVERBOSE": "1", "PYTHONINSPECT": "1", "PYTHONHASHSEED": "x"},
    "a virtual environment": {"PYTHONEXECUTABLE": f"{PROGRAMS}/python3", "CONDA_PREFIX": f"{HOME}/conda"},
    "macOS's word for it": {"__PYVENV_LAUNCHER__": f"{PROGRAMS}/python3"},
    "libraries": {"LD_LIBRARY_PATH": LIBRARIES},
    "programs": {"PATH": PROGRAMS},
    "no PATH": {"PATH": "/nonexistent"},
    "a broken locale": {"LANG": "xx", "LC_ALL": "xx", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    "a broken terminal": {"TERM": "xx", "COLUMNS": "x", "LINES": "-1"},
    "no home": {"HOME": "/nonexistent", "TMPDIR": "/nonexistent"},
}


@pytest.fixture(scope="module")
def node(shared_gpu_node: GpuNode) -> Iterator[GpuNode]:
    """A node whose alice has these directories."""
    write = shared_gpu_node.machine.write
    for name in ("enum", "argparse", "sitecustomize", "slurm_mps"):
        write(f"{MODULES}/{name}.py", "raise SystemExit('a module of mine')", user="alice")
    for name in ("libz.so.1", "libexpat.so.1", "libm.so.6"):
        write(f"{LIBRARIES}/{name}", "no library", user="alice")
    for name in ("python3", "readlink", "sh"):
        write(f"{PROGRAMS}/{name}", "#!/bin/sh\nexit 9\n", user="alice", mode=0o755)
    yield shared_gpu_node
    shared_gpu_node.run("rm", "-r", MODULES, LIBRARIES, PROGRAMS).check()


@pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_a_command_says_the_same(node: GpuNode, environment: dict[str, str]) -> None:
    plain, odd = (node.machine.run([COMMAND, "config", "show"], user="alice", env=env) for env in ({}, environment))
    assert plain.returncode == 0
    assert odd == plain


def test_all_of_it_at_once_in_a_directory_of_modules(node: GpuNode) -> None:
    """Through a link, as pipx and the packages have it, and under a name without a slash."""
    together = {name: value for environment in ENVIRONMENTS.values() for name, value in environment.items()}
    node.run("ln", "-s", COMMAND, f"{MODULES}/slurm-mps").check()
    for line in ([f"{MODULES}/slurm-mps"], ["/bin/sh", "slurm-mps"], ["/bin/bash", "--posix", COMMAND]):
        result = node.machine.run([*line, "--version"], user="alice", env=together, cwd=MODULES)
        assert (result.returncode, result.stdout) == (0, node.run(COMMAND, "--version").stdout), line


def test_a_copy_without_its_python_says_so(node: GpuNode) -> None:
    """As ``pip install --user`` would make it."""
    result = node.run("sh", "-c", f"cp {COMMAND} /tmp/copied; /tmp/copied; echo $?; rm /tmp/copied")
    assert result.stdout == "3\n"
    assert "there is no /tmp/python3; install slurm-mps into a virtual environment of its own" in result.stderr
