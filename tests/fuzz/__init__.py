"""Inputs of every kind, for a moment; FUZZ_SECONDS=300 in the environment for so long in each test."""

import os

SECONDS = float(os.environ.get("FUZZ_SECONDS", "2"))


def examples(usual: int) -> int:
    """How many inputs hypothesis tries in a test that usually takes so many."""
    return int(usual * max(1.0, SECONDS / 2))
