"""The contract runs on the simulated driver in a throw-away machine; with --real-gpu, as root, on this host's driver.

What is marked control_program needs no GPU. It runs on each driver that the simulator acts, and on NVIDIA's own control
programs of drivers 535 and 550, which do without a GPU.

A real driver's settings stay as they are: no compute mode is set unless --allow-compute-mode is given, too.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from typing import TYPE_CHECKING

import pytest

from tests.harness import nvidia
from tests.harness.cluster import REPOSITORY
from tests.harness.site import PYTHON, gpu_machine, show_gpus_in_proc, simulated_gpus

from .driver import CONTROL, Device, Driver, Place, ThisHost, sees

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.machine import Machine

_SIMULATED = {f"simulated-{branch}": branch for branch in (535, 550, 580)}
_NVIDIAS = {f"nvidia-{branch}": branch for branch in nvidia.SUITES}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("contract", "tests/contract on a real GPU")
    group.addoption("--real-gpu", action="store_true", help="hold this host's real driver to the contract (as root)")
    group.addoption("--allow-compute-mode", action="store_true", help="with --real-gpu: set compute modes, and back")
    group.addoption("--real-users", default="nobody,daemon", help="with --real-gpu: two ordinary accounts to use")


def _is_real(config: pytest.Config) -> bool:
    return bool(config.getoption("--real-gpu", default=False))  # not there when pytest is started for all tests


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what is marked control_program in every place that has one."""
    if metafunc.definition.get_closest_marker("control_program") and not _is_real(metafunc.config):
        metafunc.parametrize("place", [*_SIMULATED, *_NVIDIAS], indirect=True, scope="session")


def _simulated_place(named: str) -> Iterator[Place]:
    """A machine with simulated GPUs of a driver; a place of _NVIDIAS has NVIDIA's programs there."""
    branch = (_SIMULATED | _NVIDIAS)[named]
    with gpu_machine(programs=nvidia.programs_of(branch) if named in _NVIDIAS else None) as machine:
        machine.run(["simulated-gpus", "create", "2", "--driver", str(branch)]).check()
        show_gpus_in_proc(machine, simulated_gpus(machine))
        yield Place(
            machine, ("alice", "bob"), "/tmp/contract", "/usr/bin/python3", (PYTHON,), branch, nvidias=named in _NVIDIAS
        )


def _real_place(accounts: str) -> Iterator[Place]:
    plain_python = shutil.which("python3")
    if plain_python is None or shutil.which(CONTROL) is None or shutil.which("nvidia-smi") is None:
        pytest.skip(f"no {CONTROL}, nvidia-smi or python3 on PATH")
    first, second = accounts.split(",")
    with ThisHost() as machine, tempfile.TemporaryDirectory(prefix="contract-") as scratch:
        python = ("env", f"PYTHONPATH={REPOSITORY}", sys.executable)
        version = machine.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).check().stdout
        branch = int(version.partition(".")[0])
        yield Place(machine, (first, second), scratch, plain_python, python, branch, real=True)


@pytest.fixture(scope="session")
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    real, simulated = _is_real(request.config), getattr(request, "param", "simulated-580")
    places = _real_place(request.config.getoption("--real-users")) if real else _simulated_place(simulated)
    for one in places:
        one.prepare()
        yield one


@pytest.fixture(scope="session")
def card(place: Place) -> Device:
    """The first GPU as a program has it without MPS: what a limit is a limit of."""
    driver = Driver(place)
    try:
        return driver.directories().look(sees(driver.uuids[0])).only
    finally:
        driver.close()


@pytest.fixture
def driver(place: Place) -> Iterator[Driver]:
    """The driver; whatever daemons and clients the test starts end with it."""
    one = Driver(place)
    yield one
    one.close()


@pytest.fixture
def two_gpus(driver: Driver) -> tuple[str, str]:
    """The UUIDs of the first two GPUs, which are those of a daemon that is not told which."""
    if len(driver.uuids) < 2:
        pytest.skip("this host has one GPU")
    driver.gpus_needed = 2
    return driver.uuids[0], driver.uuids[1]


@pytest.fixture
def simulator(driver: Driver) -> Iterator[Machine]:
    """The simulated machine, without faults again after the test."""
    if driver.place.real:
        pytest.skip("about the simulated driver itself")
    yield driver.machine
    driver.machine.run(["simulated-gpus", "fault", "--clear"]).check()


@pytest.fixture
def card_speed(driver: Driver) -> Iterator[None]:
    """Have the driver take its time: the simulated one is otherwise too quick for a look in between."""
    if driver.place.real:
        yield
        return
    driver.machine.run(["simulated-gpus", "fault", "latency=observed"]).check()
    yield
    driver.machine.run(["simulated-gpus", "fault", "--clear"]).check()


@pytest.fixture
def compute_modes(request: pytest.FixtureRequest, driver: Driver) -> Iterator[None]:
    """Leave to set compute modes: they are put back after the test."""
    if driver.place.real and not request.config.getoption("--allow-compute-mode"):
        pytest.skip("setting a compute mode: needs --allow-compute-mode")
    found = driver.machine.run(["nvidia-smi", "--query-gpu=compute_mode", "--format=csv,noheader"]).check()
    yield
    for index, mode in enumerate(found.stdout.split()):
        driver.machine.run(["nvidia-smi", "-i", str(index), "-c", mode.upper()]).check()
