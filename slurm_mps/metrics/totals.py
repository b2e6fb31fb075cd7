"""What was counted since the boot, on disk between one run and the next.

    slurm-mps metrics 1
    taken 8812:1700000000000000000      the events that are counted in here
    count prolog ready 17
    duration prolog 17 1.82 0 4 12 ...  how many, their sum in seconds, and how many below each of BOUNDS
    log 4711 90112:2 1 0 0              a job's logs by size, and what is counted of them

Promise: an event is counted once, wherever this is killed.
"""

from __future__ import annotations

from ..node.wordfile import DamagedFileError, decode, encode

KIND, VERSION = "metrics", 1
#: Upper bounds of the histogram of durations, in seconds.
BOUNDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
HOOKS = ("prolog", "epilog")
RECONCILE = "reconcile"
#: What is counted of a job's logs, in this order.
LOG_COUNTS = ("gpu_faults", "refused_clients", "server_deaths")
_WORDS_MAX = 64


class Totals:
    """Counters by their words, durations by hook, and what was counted of which job's logs."""

    def __init__(self) -> None:
        self.taken = ""  #: which file of events is counted in here; empty for none
        self.counts: dict[tuple[str, str], float] = {}
        self.durations: dict[str, list[float]] = {hook: [0.0, 0.0, *(0.0 for _ in BOUNDS)] for hook in HOOKS}
        self.logs: dict[int, tuple[str, tuple[int, ...]]] = {}

    def add(self, what: str, word: str, number: float = 1) -> None:
        self.counts[what, word] = self.counts.get((what, word), 0) + number

    def count_events(self, text: str) -> None:
        """Count the lines that hooks and reconcile noted; what is none is left out."""
        for line in text.splitlines():
            words = line.split(" ")
            try:
                number = float(words[-2]) if len(words) >= 4 else -1.0
            except ValueError:
                continue
            if not 0 <= number < 1e6 or any(len(word) > _WORDS_MAX for word in words):
                continue
            self._count(words[0], " ".join(words[1:-2]), number, words[-1])

    def _count(self, kind: str, outcome: str, number: float, reason: str) -> None:
        if kind == RECONCILE:
            self.add(kind, outcome, number)
        elif kind in HOOKS:
            self.add(kind, outcome)
            self._time(kind, number)
            if outcome == "refused":
                self.add("refusal", reason)

    def _time(self, hook: str, seconds: float) -> None:
        row = self.durations[hook]
        row[0] += 1
        row[1] += seconds
        for place, bound in enumerate(BOUNDS, start=2):
            row[place] += seconds <= bound

    def log_totals(self) -> dict[str, float]:
        """What all logs came to, those that are gone among them."""
        return {
            name: self.counts.get(("log", name), 0) + sum(counted[place] for _, counted in self.logs.values())
            for place, name in enumerate(LOG_COUNTS)
        }

    def forget_log(self, job_id: int) -> None:
        """A job's logs are gone: keep what they came to."""
        _, counted = self.logs.pop(job_id)
        for name, number in zip(LOG_COUNTS, counted, strict=True):
            self.add("log", name, number)

    def encode(self) -> bytes:
        lines = [f"taken {self.taken or '-'}"]
        lines += [
            f"count {what} {word.replace(' ', '_')} {number:.17g}" for (what, word), number in self.counts.items()
        ]
        lines += [
            f"duration {hook} " + " ".join(f"{value:.17g}" for value in row) for hook, row in self.durations.items()
        ]
        for job_id, (size, counted) in self.logs.items():
            lines.append(f"log {job_id} {size} " + " ".join(map(str, counted)))
        return encode(KIND, VERSION, lines)


def decode_totals(data: bytes) -> Totals:
    """Raises: DamagedFileError, NewerFileError."""
    totals = Totals()
    try:
        for line in decode(data, KIND, VERSION):
            kind, *words = line.split(" ")
            if kind == "taken":
                totals.taken = "" if words[0] == "-" else words[0]
            elif kind == "count":
                totals.counts[words[0], words[1]] = float(words[2])
            elif kind == "duration" and len(words) == len(BOUNDS) + 3:
                totals.durations[words[0]] = [float(word) for word in words[1:]]
            elif kind == "log" and len(words) == len(LOG_COUNTS) + 2:
                totals.logs[int(words[0])] = (words[1], tuple(int(word) for word in words[2:]))
    except (ValueError, IndexError):
        raise DamagedFileError("the counters are damaged") from None
    return totals
