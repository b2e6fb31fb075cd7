"""docs/benchmarks says what its data say."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "docs/benchmarks"
PAGE = (BENCHMARKS / "README.md").read_text()
ADVICE = (BENCHMARKS.parent / "which-limits.md").read_text()


def newest(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(max((BENCHMARKS / "data").glob(f"*-{kind}.json")).read_text())
    return found


WORTH = newest("worth")


def rows() -> list[str]:
    """The throughput table as the data have it."""
    rates = {(r["kernel"], r["mode"], r["ranks"]): r["kernels_per_second"] for r in WORTH["throughput"]["rows"]}
    lines = []
    for ranks in sorted({ranks for _, _, ranks in rates}):
        ratios = [
            rates[kernel, mode, ranks] / rates[kernel, "time-slicing", ranks]
            for kernel in ("small", "medium", "large")
            for mode in ("MPS", "MPS, auto threads")
        ]
        lines.append(f"| {ranks} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return lines


@pytest.mark.parametrize("line", rows())
def test_the_throughput_table(line: str) -> None:
    assert line in PAGE.splitlines()


@pytest.mark.parametrize("row", WORTH["latency"]["rows"], ids=lambda row: row["case"])
def test_the_latency_table(row: dict[str, Any]) -> None:
    full = max(one.get("heavy_per_second", 0) for one in WORTH["latency"]["rows"])
    heavy = f"{100 * row['heavy_per_second'] / full:.0f} %" if "heavy_per_second" in row else ""
    case = row["case"].replace("alone, no MPS", "alone, without MPS")
    numbers = " | ".join(f"{row['us'][name]:,.0f}" for name in ("p50", "p99", "p99_9"))
    assert f"| {case} | {numbers} | {heavy} |".replace("  ", " ") in PAGE.splitlines()


@pytest.mark.parametrize("ranks", [4, 8, 16])
def test_the_real_program(ranks: int) -> None:
    rates = {r["mode"]: r["requests_per_second"] for r in WORTH["inference"]["rows"] if r["ranks"] == ranks}
    assert f"{rates['MPS'] / rates['time-slicing']:.1f}" in PAGE.partition("A real program")[2][:200]


@pytest.mark.parametrize("script", ["prolog", "epilog"])
def test_what_the_scripts_cost(script: str) -> None:
    samples = newest("scripts")["samples_ms"]
    pairs = zip(samples[f"ours {script}"], samples[f"by hand {script}"], strict=True)
    line = next(line for line in PAGE.splitlines() if f"{median(samples[f'ours {script}']):.0f} ms" in line)
    assert line.endswith(f"| {median(ours / theirs for ours, theirs in pairs):.2f} |")


def test_the_first_context() -> None:
    samples = newest("start")["samples_ms"]
    for where in ("from the program's start", "from srun"):
        ours, theirs = samples[f"mps {where}"], samples[f"without {where}"]
        ratio = median(one / other for one, other in zip(ours, theirs, strict=True))
        assert f"| {median(ours):.0f} ms | {median(theirs):.0f} ms | {ratio:.2f} |" in PAGE


def test_the_advice_quotes_the_same_figures() -> None:
    latencies = {row["case"]: row["us"] for row in WORTH["latency"]["rows"]}
    quoted = latencies["MPS, heavy at 75 %"]["p50"], latencies["MPS"]["p50"]
    assert "({:.0f} against {:.0f} µs)".format(*quoted) in ADVICE
