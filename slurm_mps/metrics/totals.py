"""The counters since the boot, which lie on disk between runs.

Promise: an event is counted once, whenever the command is killed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from ..node.wordfile import DamagedFileError, decode, encode

KIND, VERSION = "metrics", 1
#: Upper bounds of the histogram of durations, in seconds.
BOUNDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
HOOKS = ("prolog", "epilog")
RECONCILE = "reconcile"
#: What is counted of a job's logs, in this order.
LOG_COUNTS = ("gpu_faults", "refused_clients", "server_deaths")
_WORDS_MAX = 64


def _no_durations() -> dict[str, list[float]]:
    return {hook: [0.0] * (2 + len(BOUNDS)) for hook in HOOKS}


@dataclass
class Totals:
    """taken: which file of events is counted in here; empty for none. counts: by kind and word: ``prolog``, ``ready``.

    durations: of each hook how many, their sum in seconds, and how many below each of BOUNDS. logs: of each job, or
    daemon of joined jobs, the size of its logs, and what is counted of them.
    """

    taken: str = ""
    counts: dict[str, dict[str, float]] = field(default_factory=dict)
    durations: dict[str, list[float]] = field(default_factory=_no_durations)
    logs: dict[str, tuple[str, list[int]]] = field(default_factory=dict)

    def add(self, kind: str, word: str, number: float = 1) -> None:
        self.counts.setdefault(kind, {})[word] = self.count_of(kind, word) + number

    def count_of(self, kind: str, word: str) -> float:
        return self.counts.get(kind, {}).get(word, 0)

    def count_events(self, text: str) -> None:
        """Count the lines that hooks and reconcile noted; other lines are left out."""
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
            row = self.durations[kind]
            for place, more in enumerate((1, number, *(number <= bound for bound in BOUNDS))):
                row[place] += more
            if outcome == "refused":
                self.add("refusal", reason)

    def log_totals(self) -> dict[str, float]:
        """The counts of all logs, including removed ones."""
        return {
            name: self.count_of("log", name) + sum(counted[place] for _, counted in self.logs.values())
            for place, name in enumerate(LOG_COUNTS)
        }

    def forget_log(self, job: str) -> None:
        """A job's logs are gone: keep what they came to."""
        _, counted = self.logs.pop(job)
        for name, number in zip(LOG_COUNTS, counted, strict=True):
            self.add("log", name, number)

    def encode(self) -> bytes:
        return encode(KIND, VERSION, [json.dumps(vars(self))])


def decode_totals(data: bytes) -> Totals:
    """Raises: DamagedFileError, NewerFileError."""
    try:
        return Totals(**json.loads("".join(decode(data, KIND, VERSION))))
    except (ValueError, TypeError):
        raise DamagedFileError("the counters are damaged") from None
