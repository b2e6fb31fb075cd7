"""Who is attacked: the product, or a build of it with a wall taken down."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.attacks.weakened import weaken
from tests.harness.gpunode import GpuNode
from tests.harness.site import Site

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
CONFIG = "/etc/slurm/mps.toml"


@pytest.fixture
def walls_down() -> tuple[str, ...]:
    """Which walls are not there; @attack gives this one to a test."""
    raise NotImplementedError


@pytest.fixture
def node(walls_down: tuple[str, ...], request: pytest.FixtureRequest) -> Iterator[GpuNode]:
    """A GPU node with this build: for the product the shared one, on which nothing may be left; else one to spoil.

    Without a configuration file, which would have to be compiled for each test.
    """
    if not walls_down:
        product: GpuNode = request.getfixturevalue("gpu_node")
        product.machine.path(CONFIG).unlink()
        yield product
        return
    with GpuNode(gpus=4) as own:
        weaken(own.machine, walls_down)
        own.machine.path(CONFIG).unlink()
        yield own


@pytest.fixture
def cluster(walls_down: tuple[str, ...], request: pytest.FixtureRequest) -> Iterator[Site]:
    """The same, with Slurm."""
    if not walls_down:
        product: Site = request.getfixturevalue("site")
        yield product
        return
    with Site(nodes=1) as own:
        weaken(own.machine, walls_down)
        yield own
        own.machine.run(["scancel", "--user=alice"])
        own.cluster.wait_idle()


@pytest.fixture(scope="session")
def stay(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A library that makes any program stay and do nothing (stay.c)."""
    target = tmp_path_factory.mktemp("stay") / "stay.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", target, HERE / "stay.c"], check=True)
    return target.read_bytes()


@pytest.fixture(scope="session")
def silent_fs(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A program that runs another from a file system of its user's own that stops answering (silent_fs.c)."""
    target = tmp_path_factory.mktemp("silent") / "silent_fs"
    subprocess.run(["cc", "-o", target, HERE / "silent_fs.c"], check=True)
    return target.read_bytes()


@pytest.fixture(scope="session")
def unreadable(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A library that makes any program stay, with memory that nobody can read (unreadable.c)."""
    target = tmp_path_factory.mktemp("unreadable") / "unreadable.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-pthread", "-o", target, HERE / "unreadable.c"], check=True)
    return target.read_bytes()
