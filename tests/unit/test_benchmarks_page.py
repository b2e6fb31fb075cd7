"""docs/benchmarks says what its data say."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "docs/benchmarks"
README = (BENCHMARKS.parents[1] / "README.md").read_text()
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


@pytest.mark.parametrize("ranks", [8, 16])
def test_the_real_program(ranks: int) -> None:
    rates = {r["mode"]: r["requests_per_second"] for r in WORTH["inference"]["rows"] if r["ranks"] == ranks}
    program = next(line for line in PAGE.splitlines() if line.startswith("- **A real program**"))
    words = f"{rates['MPS'] / rates['time-slicing']:.1f} times with {ranks}"
    assert words in program.replace("with 8 ranks", "with 8")


@pytest.mark.parametrize("script", ["prolog", "epilog"])
def test_what_the_scripts_cost(script: str) -> None:
    samples = newest("scripts")["samples_ms"]
    pairs = zip(samples[f"ours {script}"], samples[f"by hand {script}"], strict=True)
    ratio = f"{median(ours / theirs for ours, theirs in pairs):.2f}"
    line = next(line for line in PAGE.splitlines() if f"{median(samples[f'ours {script}']):.0f} ms" in line)
    assert line.endswith(f"| {ratio} |")
    costs = next(line for line in README.splitlines() if line.startswith("On two H200s (`make bench-gpu`)"))
    assert ratio in costs


def test_the_first_context() -> None:
    """By the job before: in odd rounds it had no MPS, in even ones it had."""
    samples = newest("start")["samples_ms"]
    ours, theirs = (samples[f"{name} from the program's start"] for name in ("mps", "without"))
    assert f"a median of {median(ours[1::2]):.0f} ms" in PAGE
    assert f"and of {median(ours[0::2]):.0f} ms" in PAGE
    assert f"without MPS {median(theirs):.0f} ms" in PAGE


def test_the_advice_and_the_readme_quote_the_same_figures() -> None:
    latencies = {row["case"]: row["us"]["p50"] for row in WORTH["latency"]["rows"]}
    light, shared = latencies["MPS, heavy at 75 %"], latencies["MPS"]
    assert f"({light:.0f} against {shared:.0f} µs)" in ADVICE
    waits = f"{shared:.0f} µs instead of {latencies['time-slicing']:,.0f}, and {light:.0f} µs"
    assert waits in README


@pytest.mark.parametrize("figure", ["worth", "throughput", "latency", "inference"])
def test_the_figures_are_drawn_from_the_data(figure: str) -> None:
    """`make plots` leaves in each what it was drawn from."""
    data = max((BENCHMARKS / "data").glob("*-worth.json")).read_bytes()
    assert f"data sha256:{sha256(data).hexdigest()[:16]}" in (BENCHMARKS / f"{figure}.svg").read_text()
