"""Inputs of every kind, for a moment each. FUZZ_SECONDS=300 in the environment looks for longer.

libFuzzer then runs for so many seconds on each target, and hypothesis tries 150 times as many inputs in each test.
"""

import os

SECONDS = float(os.environ.get("FUZZ_SECONDS", "2"))


def examples(usual: int) -> int:
    """How many inputs hypothesis tries in a test that usually takes so many."""
    return int(usual * max(1.0, SECONDS / 2))
