"""docs/benchmarks says what its data say."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    Row = dict[str, Any]

BENCHMARKS = Path(__file__).resolve().parents[2] / "docs/benchmarks"
README = (BENCHMARKS.parents[1] / "README.md").read_text()
PAGE = (BENCHMARKS / "README.md").read_text()
ADVICE = (BENCHMARKS.parent / "which-limits.md").read_text()


def newest(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(max((BENCHMARKS / "data").glob(f"*-{kind}.json")).read_text())
    return found


WORTH = newest("worth")


def medians(part: str, key: Callable[[Row], Any], value: Callable[[Row], float]) -> dict[Any, float]:
    """Of the rounds."""
    found: dict[Any, list[float]] = {}
    for row in WORTH[part]["rows"]:
        found.setdefault(key(row), []).append(value(row))
    return {name: median(values) for name, values in found.items()}


def rows() -> list[str]:
    """The throughput table as the data have it."""
    rates = medians("throughput", lambda r: (r["kernel"], r["mode"], r["ranks"]), lambda r: r["kernels_per_second"])
    lines = []
    for ranks in sorted({ranks for _, _, ranks in rates}):
        ratios = [
            rates[kernel, mode, ranks] / rates[kernel, "time-slicing", ranks]
            for kernel in ("small", "medium", "large", "memory")
            for mode in ("MPS", "MPS, auto threads")
        ]
        lines.append(f"| {ranks} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return lines


@pytest.mark.parametrize("line", rows())
def test_the_throughput_table(line: str) -> None:
    assert line in PAGE.splitlines()


def waits(name: str) -> dict[str, float]:
    """A percentile of the light rank's latency, in microseconds, by case."""
    return medians("latency", lambda r: r["case"], lambda r: r["us"][name])


@pytest.mark.parametrize("case", list(waits("p50")))
def test_the_latency_table(case: str) -> None:
    done = medians("latency", lambda r: r["case"], lambda r: r.get("heavy_per_second", 0))
    heavy = f"{100 * done[case] / max(done.values()):.0f} %" if done[case] else ""
    numbers = " | ".join(f"{waits(name)[case]:,.0f}" for name in ("p50", "p99", "p99_9"))
    shown = case.replace("alone, no MPS", "alone, without MPS")
    assert f"| {shown} | {numbers} | {heavy} |".replace("  ", " ") in PAGE.splitlines()


@pytest.mark.parametrize("ranks", [8, 16])
def test_the_real_program(ranks: int) -> None:
    rates = medians("inference", lambda r: (r["mode"], r["ranks"]), lambda r: r["requests_per_second"])
    program = next(line for line in PAGE.splitlines() if line.startswith("- **A real program**"))
    words = f"{rates['MPS', ranks] / rates['time-slicing', ranks]:.1f} times with {ranks}"
    assert words in program


def paired(samples: dict[str, list[float]], ours: str, theirs: str) -> str:
    """The median of both, and that of the ratios of the rounds, as a table has them."""
    ratio = median(one / other for one, other in zip(samples[ours], samples[theirs], strict=True))
    return f"{median(samples[ours]):.0f} | {median(samples[theirs]):.0f} | {ratio:.2f}"


def costs() -> list[str]:
    """The rows of what slurm-mps costs: of each run, whose file says when, and on how many GPUs."""
    pairs = {
        "scripts": [("ours prolog", "by hand prolog"), ("ours epilog", "by hand epilog")],
        "start": [(f"mps from {start}", f"without from {start}") for start in ("the program's start", "srun")],
    }
    lines = []
    for kind, names in pairs.items():
        for path in sorted((BENCHMARKS / "data").glob(f"*-{kind}.json")):
            date, gpus = path.name[:10], path.name[11:].removesuffix(f"-{kind}.json")
            gpus = gpus.replace("of", " of ").replace("x", " x ")  # 1of2xH200: a job with one of two
            samples = json.loads(path.read_text())["samples_ms"]
            lines.append(f"| {gpus} | {date} | " + " | ".join(paired(samples, *pair) for pair in names) + " |")
            if "per-gpu from srun" in samples:
                each = [paired(samples, ours.replace("mps", "per-gpu"), theirs) for ours, theirs in names]
                lines.append(f"| {gpus}, `--mps=per-gpu` | {date} | " + " | ".join(each) + " |")
    samples = newest("start")["samples_ms"]
    for tasks in (1, 16):
        medians_of = [f"{median(samples[f'{name} {tasks}']):.1f}" for name in ("no plugin", "does not ask", "asks")]
        lines.append(f"| {tasks} | {' | '.join(medians_of)} |")
    return lines


@pytest.mark.parametrize("line", costs())
def test_what_it_costs(line: str) -> None:
    assert line in PAGE.splitlines()


def test_the_advice_and_the_readme_quote_the_same_figures() -> None:
    latencies = waits("p50")
    light, shared = latencies["MPS, heavy at 75 %"], latencies["MPS"]
    assert f"({light:.0f} against {shared:.0f} µs)" in ADVICE
    quoted = f"{shared:.0f} µs instead of {latencies['time-slicing']:,.0f}"
    assert f"{quoted}, and {light:.0f} µs" in README
    assert f"{quoted} by time-slicing" in ADVICE


def sharing() -> list[str]:
    """The rows of several jobs on one GPU; those that failed are none."""
    rates: dict[str, list[tuple[int, int]]] = {}
    for row in newest("sharing")["throughput"]:
        if "failed" not in row:
            both = (row["small"]["kernels_per_second"], row["medium"]["kernels_per_second"])
            rates.setdefault(row["way"], []).append(both)
    medians = {way: [median(rate) for rate in zip(*both, strict=True)] for way, both in rates.items()}
    base = medians["without MPS"]
    return [
        f"| {way} | "
        + " | ".join(f"{one:,.0f} | {one / other:.2f}" for one, other in zip(both, base, strict=True))
        + " |"
        for way, both in medians.items()
    ]


@pytest.mark.parametrize("line", sharing())
def test_the_ways_to_share_a_gpu(line: str) -> None:
    assert line in (BENCHMARKS.parent / "sharing.md").read_text().replace(" (`-M`)", "").splitlines()


CULPRITS = {
    "matmul 4096": "cuBLAS matrix products, 4096",
    "matmul 12288": "cuBLAS matrix products, 12288",
    "training": "a training step of a small PyTorch model",
    "kernels 10": "single kernels | 7 ms",
    "kernels 100": "single kernels | 71 ms",
    "persistent": "an endless kernel",
}


@pytest.mark.parametrize("culprit", CULPRITS)
def test_who_is_ended_beside_a_cancelled_job(culprit: str) -> None:
    goes_on = [row["goes_on"] for row in newest("cancelled")["cancelled"] if row["culprit"] == culprit]
    page = (BENCHMARKS.parent / "sharing.md").read_text()
    (line,) = (line for line in page.splitlines() if line.startswith(f"| {CULPRITS[culprit]}"))
    assert f"| {goes_on.count(False)} of {len(goes_on)}" in line


@pytest.mark.parametrize(
    ("figure", "kind"),
    [("worth", "worth"), ("throughput", "worth"), ("latency", "worth"), ("inference", "worth"), ("sharing", "sharing")],
)
def test_the_figures_are_drawn_from_the_data(figure: str, kind: str) -> None:
    """`make plots` leaves in each what it was drawn from."""
    data = max((BENCHMARKS / "data").glob(f"*-{kind}.json")).read_bytes()
    assert f"data sha256:{sha256(data).hexdigest()[:16]}" in (BENCHMARKS / f"{figure}.svg").read_text()
