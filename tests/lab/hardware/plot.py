"""``make plots``: draw the figures of docs/benchmarks from the data beside them. Needs matplotlib, and no GPU."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BENCHMARKS = Path(__file__).resolve().parents[3] / "docs/benchmarks"
COLOURS = {"time-slicing": "#777777", "MPS": "#1f77b4", "MPS, auto threads": "#d95f02"}
KERNELS = {
    "small": "small kernel: 16 blocks, an eighth of the GPU",
    "medium": "medium: 132 blocks, one for each multiprocessor",
    "large": "large: 2112 blocks, the GPU is full",
    "memory": "memory: reads half a gigabyte",
}
BASE = "time-slicing"
INFERENCE_FROM = 8  #: ranks; with fewer it is the CPU that decides, and it varies more than the modes differ

Rows = list[dict[str, Any]]


def _style() -> None:
    plt.rcParams.update(
        {
            "figure.dpi": 100,
            "font.size": 10,
            "font.family": "sans-serif",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "svg.fonttype": "none",  # the reader's own font, not a path for each letter
            "svg.hashsalt": "slurm-mps",  # the same data make the same file
        }
    )


def _rank_axis(axes: Axes, ranks: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()
    axes.set_xlabel("ranks that share one GPU")


def _by_mode(axes: Axes, rows: Rows, value: str) -> None:
    """A line for each mode, through the medians of the rounds, each of which is a point."""
    for mode, colour in COLOURS.items():
        points = [(row["ranks"], row[value]) for row in rows if row["mode"] == mode]
        axes.plot(*zip(*points, strict=True), ".", color=colour, alpha=0.5)
        axes.plot(*zip(*_medians(points).items(), strict=True), marker="o", color=colour, label=mode)
    axes.set_ylim(0, 1.08 * max(row[value] for row in rows))


def _medians(points: list[tuple[int, float]]) -> dict[int, float]:
    """The median by ranks."""
    return {ranks: median(value for at, value in points if at == ranks) for ranks, _ in points}


def worked(part: dict[str, Any]) -> Rows:
    """The rows of a part that did not fail."""
    return [row for row in part["rows"] if "failed" not in row]


def by_case(part: dict[str, Any]) -> Rows:
    """The latencies, medians of the rounds."""
    cases: dict[str, Rows] = {}
    for row in worked(part):
        cases.setdefault(row["case"], []).append(row)
    merged = []
    for case, rows in cases.items():
        one: dict[str, Any] = {
            "case": case,
            "us": {name: median(row["us"][name] for row in rows) for name in rows[0]["us"]},
        }
        if "heavy_per_second" in rows[0]:
            one["heavy_per_second"] = median(row["heavy_per_second"] for row in rows)
        merged.append(one)
    return merged


def digest(data: bytes) -> str:
    """What a figure carries of the data that it was drawn from."""
    return f"data sha256:{hashlib.sha256(data).hexdigest()[:16]}"


def _save(name: str, drawn_from: str) -> None:
    target = BENCHMARKS / f"{name}.svg"
    plt.tight_layout()
    plt.savefig(target, metadata={"Date": None, "Description": drawn_from})
    plt.close()
    print(target.relative_to(BENCHMARKS.parents[1]))


def draw_worth(data: dict[str, Any]) -> None:
    """The README's: how many times as much with MPS, for kernels of three sizes and for a real program."""
    plt.figure(figsize=(6.4, 3.8))
    axes = plt.gca()
    rows = worked(data["throughput"])
    for kernel, marker in (("small", "o"), ("medium", "s"), ("large", "^"), ("memory", "v")):
        its = [row for row in rows if row["kernel"] == kernel]
        ratios = _ratios(its, "kernels_per_second")
        axes.plot(*zip(*ratios.items(), strict=True), marker=marker, label=KERNELS[kernel])
    served = [row for row in worked(data["inference"]) if row["ranks"] >= INFERENCE_FROM]
    ratios = _ratios(served, "requests_per_second")
    axes.plot(
        *zip(*ratios.items(), strict=True), marker="D", color="black", label="PyTorch, small transformer, batch 1"
    )
    axes.axhline(1, color="#777777", linewidth=1)
    axes.set_yscale("log", base=2)
    axes.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.minorticks_off()
    _rank_axis(axes, sorted({row["ranks"] for row in rows}))
    axes.set_ylabel("throughput, times that without MPS")
    axes.legend(fontsize=8, frameon=False)
    _save("worth", data["digest"])


def _ratios(rows: Rows, value: str) -> dict[int, float]:
    """MPS over time-slicing, by ranks: medians of the rounds."""
    with_mps, without = (
        _medians([(row["ranks"], row[value]) for row in rows if row["mode"] == mode]) for mode in ("MPS", BASE)
    )
    return {ranks: with_mps[ranks] / rate for ranks, rate in without.items() if ranks in with_mps}


def draw_throughput(data: dict[str, Any]) -> None:
    rows = worked(data["throughput"])
    _, panels = plt.subplots(2, 2, figsize=(9, 6.6))
    for axes, kernel in zip(panels.flat, KERNELS, strict=True):
        _by_mode(axes, [row for row in rows if row["kernel"] == kernel], "kernels_per_second")
        _rank_axis(axes, sorted({row["ranks"] for row in rows}))
        axes.set_title(KERNELS[kernel], fontsize=9)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for axes in panels[:, 0]:
        axes.set_ylabel("kernels per second, all ranks")
    panels[0, 0].legend(fontsize=8, frameon=False)
    _save("throughput", data["digest"])


def draw_inference(data: dict[str, Any]) -> None:
    rows: Rows = [{**row, **row["us"]} for row in worked(data["inference"])]
    _, (rate, delay) = plt.subplots(1, 2, figsize=(9, 3.6))
    for axes, value, title in (
        (rate, "requests_per_second", "requests per second, all ranks"),
        (delay, "p99", "99th percentile of a rank's latency, µs"),
    ):
        _by_mode(axes, rows, value)
        _rank_axis(axes, sorted({row["ranks"] for row in rows}))
        axes.set_ylabel(title)
    rate.legend(fontsize=8, frameon=False)
    _save("inference", data["digest"])


def draw_latency(data: dict[str, Any]) -> None:
    rows = by_case(data["latency"])
    plt.figure(figsize=(8, 4))
    axes = plt.gca()
    places = range(len(rows))
    for shift, (name, colour) in enumerate({"p50": "#a6cee3", "p99": "#1f78b4", "p99_9": "#08306b"}.items()):
        values = [row["us"][name] for row in rows]
        label = {"p50": "median", "p99": "99 %", "p99_9": "99.9 %"}[name]
        axes.barh([place + 0.27 * (shift - 1) for place in places], values, 0.25, color=colour, label=label)
    full = max(row.get("heavy_per_second", 0) for row in rows)
    for place, row in zip(places, rows, strict=True):
        if "heavy_per_second" in row:
            share = f"heavy rank: {100 * row['heavy_per_second'] / full:.0f} %"
            axes.text(row["us"]["p99_9"] * 1.1, place, share, va="center", fontsize=8)
    axes.set_yticks(list(places), [row["case"] for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(20, 6000)
    axes.set_xlabel("latency of a small kernel, µs (log)")
    axes.grid(visible=False, axis="y")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    _save("latency", data["digest"])


def draw_sharing(data: dict[str, Any]) -> None:
    """Of docs/sharing.md: four programs on one GPU, in each way, times what they do without MPS."""
    rows = data["throughput"]
    ways = ["joined", "joined, two users", "one job", "separate", "without MPS"]
    plt.figure(figsize=(7, 3.2))
    axes = plt.gca()
    for shift, (kernel, colour) in enumerate({"small": "#1f77b4", "medium": "#a6cee3"}.items()):
        rates = [
            median(row[kernel]["kernels_per_second"] for row in rows if row["way"] == way and kernel in row)
            for way in ways
        ]
        ratios = [rate / rates[-1] for rate in rates]
        places = [place + 0.38 * (shift - 0.5) for place in range(len(ways))]
        axes.barh(places, ratios, 0.36, color=colour, label=KERNELS[kernel])
        for place, ratio in zip(places, ratios, strict=True):
            axes.text(ratio + 0.03, place, f"{ratio:.2f}", va="center", fontsize=8)
    axes.set_yticks(range(len(ways)), ways)
    axes.invert_yaxis()
    axes.set_xlabel("kernels a second of four programs together, times that without MPS")
    axes.grid(visible=False, axis="y")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    _save("sharing", data["digest"])


def main() -> int:
    """Draw from the newest data."""
    _style()
    figures = {"worth": (draw_worth, draw_throughput, draw_inference, draw_latency), "sharing": (draw_sharing,)}
    for kind, draws in figures.items():
        newest = max((BENCHMARKS / "data").glob(f"*-{kind}.json"))
        data = {**json.loads(newest.read_text()), "digest": digest(newest.read_bytes())}
        for draw in draws:
            draw(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
