"""Fixtures that every kind of test shares. Those that need a machine make a throw-away one (tests/harness)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.harness.gpunode import GpuNode
from tests.harness.machine import USERS
from tests.harness.site import Site

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

#: What `make check` runs, beside the tests that are for every release of Slurm.
QUICK = ("tests/unit/", "tests/lint/", "tests/docs/")
#: What takes more than ten seconds begins first, so that nobody waits for it at the end.
LONGEST = (
    "tests/lint/test_linters.py::test_linter_has_nothing_to_say[mypy]",
    "tests/lint/test_linters.py::test_linter_has_nothing_to_say[spank]",
    "tests/install/test_packages",
    "tests/install/test_readme",
    "tests/slurm/test_scale.py::test_a_job_on_many_nodes",
    "tests/slurm/test_job_kinds.py::test_a_job_is_warned_or_ended_at_its_time_limit",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="what `make check` runs: a part of all that takes a minute")


def is_quick(item: pytest.Item) -> bool:
    return item.nodeid.startswith(QUICK) or item.get_closest_marker("every_release") is not None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not quick, and begin with the longest."""
    if config.getoption("--quick"):
        config.hook.pytest_deselected(items=[item for item in items if not is_quick(item)])
        items[:] = filter(is_quick, items)
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


@pytest.fixture(scope="session")
def shared_gpu_node() -> Iterator[GpuNode]:
    with GpuNode(gpus=4) as node:
        yield node


@pytest.fixture
def gpu_node(shared_gpu_node: GpuNode) -> Iterator[GpuNode]:
    """A simulated GPU node without Slurm.

    When the test is over, the jobs that it left running get their epilog, and the node must be as before.
    """
    before = shared_gpu_node.snapshot()
    yield shared_gpu_node
    shared_gpu_node.fault()
    shared_gpu_node.end_jobs()
    shared_gpu_node.configure("")
    after = shared_gpu_node.snapshot()
    shared_gpu_node.clean()  # one test's failure is not to be the next one's
    assert after == before


@pytest.fixture
def own_node() -> Iterator[GpuNode]:
    """A node for a test that would leave its mark on the shared one."""
    with GpuNode(gpus=2) as node:
        yield node


@pytest.fixture(scope="session")
def shared_site() -> Iterator[Site]:
    with Site() as site:
        yield site


@pytest.fixture(scope="session")
def shared_constrained_site() -> Iterator[Site]:
    with Site(constrain_devices=True) as site:
        yield site


def _watched(site: Site) -> Iterator[Site]:
    """Lend a site to a test; afterwards everything is as before, and no node was drained unless the test resumed it."""
    before = site.snapshot()
    yield site
    for user in USERS:
        site.machine.run(["scancel", f"--user={user}"])  # a test that failed may have left jobs
    for node in site.nodes:
        site.fault(node)
    site.configure("")
    drained = {name: state.reason for name, state in site.cluster.node_states().items() if state.drained}
    after = site.snapshot()
    for node in drained:
        site.cluster.resume(node)
    assert not drained
    assert after == before


@pytest.fixture
def site(shared_site: Site) -> Iterator[Site]:
    """A two-node Slurm cluster of simulated GPU nodes, devices not confined."""
    yield from _watched(shared_site)


@pytest.fixture(params=["free", "constrained"])
def any_site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """The same with ConstrainDevices=no, then =yes."""
    name = "shared_site" if request.param == "free" else "shared_constrained_site"
    shared: Site = request.getfixturevalue(name)
    yield from _watched(shared)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep the daemons' logs when a test on a cluster fails."""
    report = yield
    fixtures: dict[str, Any] = getattr(item, "funcargs", {})
    used = [fixtures[name] for name in ("site", "any_site") if name in fixtures]
    if report.failed and used and used[0].machine.running:
        report.sections.append(("logs of the cluster", used[0].cluster.logs()))
    return report
