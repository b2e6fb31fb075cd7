"""The commands for real GPUs, on simulated ones: that they submit, gather and write what they say, not what is fast.

The simulated driver runs no kernels, so that the load's driver calls are taken out; all else is what runs on hardware.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.harness.gpunode import UNCHANGED
from tests.harness.site import Site

from . import containers, cost, many_gpus, sharing, show, site, worth

if TYPE_CHECKING:
    from collections.abc import Iterator

IMPORTED = 'cuda = ctypes.CDLL("libcuda.so.1")\n'
IDLE = '''
class _Idle:
    """Counts the multiprocessors as the simulated driver does, and answers every other call with success."""

    def __init__(self):
        self._real = ctypes.CDLL("libcuda.so.1")

    def __getattr__(self, name):
        if name in ("cuInit", "cuDeviceGet", "cuCtxCreate_v2", "cuDeviceGetAttribute", "cuCtxSynchronize"):
            return getattr(self._real, name)

        def call(*_):
            if name == "cuLaunchKernel":
                time.sleep(50e-6)
            return 0

        setattr(self, name, call)
        return call


cuda = _Idle()
'''


def make_idle(simulated: site.RealSite) -> None:
    """Take the driver calls out of the load."""
    for load in (f"{site.PLACE}/load.py", f"{site.PLACE}/tests/lab/hardware/load.py"):
        text = simulated.machine.read(load)
        assert IMPORTED in text
        simulated.machine.write(load, text.replace(IMPORTED, IDLE), mode=0o755)


class SimulatedSite(site.RealSite):
    """The same site on a simulated node."""

    def __init__(self, config: str = "") -> None:
        Site.__init__(self, nodes=1, gpus_per_node=2, cpus_per_node=site.CPUS, config=config, constrain_devices=True)
        self._meetings = 0

    def begin(self) -> None:
        super().begin()
        make_idle(self)


class SimulatedSharedSite(sharing.SharedSite):
    """The same site of one GPU in a hundred parts on a simulated node."""

    def __init__(self) -> None:
        Site.__init__(self, nodes=1, gpus_per_node=1, mps_per_node=100, config=UNCHANGED, constrain_devices=True)
        self._meetings = 0

    def begin(self) -> None:
        super().begin()
        make_idle(self)


@pytest.fixture(scope="module")
def simulated() -> Iterator[SimulatedSite]:
    with SimulatedSite() as one:
        yield one


def test_throughput_has_a_row_for_each_mode_and_kernel(
    simulated: SimulatedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worth, "RANKS", (2,))
    rows = list(worth.throughput(simulated, 0.2, 1))
    assert [row.get("failed") for row in rows] == [None] * 12
    assert {(row["mode"], row["sms"]) for row in rows} == {
        ("time-slicing", 132),
        ("MPS", 132),
        ("MPS, auto threads", 66),
    }
    assert all(len(row["shares"]) == 2 and row["kernels_per_second"] == sum(row["shares"]) > 0 for row in rows)


def test_a_limit_that_did_not_take_is_a_failed_row(simulated: SimulatedSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worth, "RANKS", (2,))
    monkeypatch.setattr(worth, "MODES", {"MPS, auto threads": ["--mps", "--mps-threads=auto", "--mps-threads=100"]})
    (row,) = worth.throughput(simulated, 0.1, 1)
    assert "ranks with [132] of 132 multiprocessors" in row["failed"]


def test_the_heavy_step_has_its_own_limit(simulated: SimulatedSite, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = ("alone, MPS", "MPS, heavy at 25 %")
    monkeypatch.setattr(worth, "LATENCIES", {name: worth.LATENCIES[name] for name in cases})
    alone, beside = worth.latency(simulated, 0.3, 1)
    assert (alone["case"], beside["sms"], beside["heavy_sms"]) == ("alone, MPS", 132, 32)
    assert alone["us"]["p50"] <= alone["us"]["p99"]
    assert "heavy_per_second" not in alone


def test_what_it_costs_a_user_has_a_sample_a_round(
    simulated: SimulatedSite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both parts, with as many samples as rounds; what is printed says which is which."""
    monkeypatch.setattr(cost, "TASKS", (1,))
    samples = {**cost.start(simulated, 2, 2), **cost.launch(simulated, 2)}
    assert {len(values) for values in samples.values()} == {2}
    cost.show(samples)
    shown = capsys.readouterr().out
    assert "from the program's start" in shown
    simulated.end_meetings()


def test_what_is_shown_of_containers_is_as_it_should_be() -> None:
    problems: list[str] = []
    with SimulatedSite(UNCHANGED) as unchanged:
        before = unchanged.snapshot()
        containers.lay(unchanged, "/run/simulated-gpus")
        containers.jobs(show.Show(unchanged, problems), unchanged)
        assert unchanged.snapshot() == before
    assert "\n".join(problems) == ""


def test_several_jobs_share_a_gpu_in_every_way(capsys: pytest.CaptureFixture[str]) -> None:
    """Each way has its four programs; with a daemon each the other job goes on after a fault, with one daemon not.

    In the simulator whoever is killed in an endless kernel harms the others on its server, and nobody else does.
    """
    with SimulatedSharedSite() as one:
        rows = list(sharing.throughput(one, 0.2, 1))
        assert {row["way"]: row.get("sms", row.get("failed")) for row in rows} == {
            "joined": [32],
            sharing.ALL_USERS: [32],
            "separate": [32],
            "one job": [32],
            "without MPS": [132],
        }
        joined, separate = sharing.faults(one)
        cancelled = list(sharing.cancelled(one, 2, ("kernels 10", "persistent")))
    assert [joined.get("failed"), separate.get("failed")] == [None, None]
    assert not joined["goes_on"]
    assert re.search("another job(.s)? of yours.*took rank 0 along", joined["victim"]), joined["victim"]
    assert separate["goes_on"]
    assert [row.get("failed") for row in cancelled] == [None] * 5
    assert [row.get("goes_on") for row in cancelled] == [None, True, False, True, False]
    assert all(row["next_s"] > 0 for row in cancelled)
    assert "rank 0 hit a GPU fault" in cancelled[2]["victim_told"]
    assert "or paid for a program that was killed inside a kernel there" in cancelled[2]["victim_told"]
    sharing.show(cancelled)
    assert "2 of 2" in capsys.readouterr().out


def test_a_node_of_several_gpus_has_a_row_for_each_mode(
    simulated: SimulatedSite, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two GPUs: one daemon for both keeps new programs off each while the rank that was hit stays, two do not."""
    parts = {
        "crowd": list(many_gpus.crowd(simulated, 3, 0.2)),
        "fault": list(many_gpus.fault(simulated)),
        "stuck": list(many_gpus.stuck(simulated)),
    }
    assert [row.get("failed") for rows in parts.values() for row in rows] == [None] * 6
    assert [(row["verified"], row["sms"]) for row in parts["crowd"]] == [(True, [32])] * 2
    assert [(row["ended_well"], row["errors"]) for row in parts["fault"]] == [(2, ["700", "700"])] * 2
    waited = [
        [row["new"][where][-1]["programs"][0]["context_s"] > 2 for where in ("its GPU", "the others")]
        for row in parts["fault"]
    ]
    assert waited == [[True, True], [True, False]]
    assert [(row["left"], row["epilog_s"] < 10) for row in parts["stuck"]] == [([], True)] * 2
    many_gpus.show(parts)
    assert "limits hold: True" in capsys.readouterr().out
    simulated.end_meetings()
