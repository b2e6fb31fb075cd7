"""Percentages and memory sizes as users write them, as the control program takes them, and as people read them.

The control program's own reader cannot be trusted with anything but an integer and M or G (it makes 1M of ``1.5G``,
O3), so nothing that has not passed through here ever reaches it.
"""

from __future__ import annotations

MIB = 1024**2
GIB = 1024**3
TIB = 1024**4
#: As many GPUs as a node may have for us (spank/verdict.h).
GPUS_MAX = 64
_UNIT_BYTES = {"M": MIB, "G": GIB, "T": TIB}

_PRIORITIES = ("normal", "low")
#: Divide by the ranks that share a GPU, which is known where a step starts.
AUTO = "auto"

THREADS_EXPECTED = "a percentage above 0 and up to 100 with at most one decimal, such as 25 or 12.5, or auto"
MEMORY_EXPECTED = (
    "a whole number above 0 with M, G or T, such as 8G, or auto, or with --mps=per-gpu a list such as 0:8G,1:4G"
)


def small_number(text: str, max_digits: int = 9) -> int | None:
    """A number such as a pid, in so many ASCII digits at most; None for anything else."""
    return int(text) if 0 < len(text) <= max_digits and text.isascii() and text.isdigit() else None


def parse_thread_percentage(text: str) -> float:
    """Read an active thread percentage as a user writes it, such as ``25`` or ``12.5``.

    Returns: percent, 0.1 to 100.0 in steps of 0.1.
    Raises: ValueError when the text is no such percentage.
    Source: ``set_default_active_thread_percentage``, which takes 12.5 and answers nonsense with its old value (O1).
    """
    head, point, tail = text.partition(".")
    whole, decimal = small_number(head, 3), small_number(tail, 1) if point else 0
    if whole is not None and decimal is not None and 1 <= whole * 10 + decimal <= 1000:
        return (whole * 10 + decimal) / 10
    raise ValueError(f"expected {THREADS_EXPECTED}")


def parse_memory(text: str) -> int:
    """Read a pinned device memory limit as a user writes it, such as ``512M`` or ``8G``.

    Returns: bytes, at least 1 MiB and a multiple of it; M, G and T count in powers of 1024.
    Raises: ValueError when the text is no such size.
    Source: O3 of the observations: only an integer with M or G is safe to pass on.
    """
    number, unit = small_number(text[:-1]), text[-1:].upper()
    if number and unit in _UNIT_BYTES:
        return number * _UNIT_BYTES[unit]
    raise ValueError(f"expected {MEMORY_EXPECTED}")


def parse_memory_by_gpu(text: str) -> tuple[tuple[int, int], ...]:
    """Read memory limits that differ between a job's GPUs, such as ``0:8G,1:4G``.

    Returns: (the job's own count of a GPU, from 0 to 63; bytes) for each entry, in the order given.
    Raises: ValueError when the text is no such list, or names a GPU twice.
    """
    limits: list[tuple[int, int]] = []
    for entry in text.split(","):
        name, colon, size = entry.partition(":")
        gpu = small_number(name, 2)
        if not colon or gpu is None or gpu >= GPUS_MAX:
            raise ValueError(f"expected {MEMORY_EXPECTED}")
        if gpu in dict(limits):
            raise ValueError("it names a GPU twice")
        limits.append((gpu, parse_memory(size)))
    return tuple(limits)


def parse_client_priority(text: str) -> int:
    """Read a client priority as a user writes it.

    Returns: 0 for ``normal``, 1 for ``low``, as ``set_default_client_priority`` counts (O17).
    Raises: ValueError for anything else.
    """
    if text not in _PRIORITIES:
        raise ValueError(f"expected {' or '.join(_PRIORITIES)}")
    return _PRIORITIES.index(text)


def format_thread_percentage(percent: float) -> str:
    """Write a percentage as an option or a control command takes it: ``25``, ``12.5``."""
    return f"{percent:.1f}".removesuffix(".0")


def format_memory(size_bytes: int) -> str:
    """Write a size as an option or a control command takes it: ``8G``, ``1500M``."""
    if size_bytes % GIB == 0:
        return f"{size_bytes // GIB}G"
    return f"{size_bytes // MIB}M"


def printed_memory(size_bytes: int) -> int:
    """The size that the control program prints back: from 1 GiB on it is rounded down to GiB, but not kept so (O95)."""
    return size_bytes // GIB * GIB if size_bytes >= GIB else size_bytes


def describe_memory(size_bytes: int) -> str:
    """Write a size for a person: ``79 GiB``, ``512 MiB``."""
    if size_bytes >= GIB:
        return f"{size_bytes / GIB:.1f}".removesuffix(".0") + " GiB"
    return f"{size_bytes // MIB} MiB"


def printable(text: str, limit: int = 40) -> str:
    """Make a user's text safe to print: cut to `limit` characters, anything but printable ASCII as ``?``."""
    shown = "".join(c if " " <= c <= "~" else "?" for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
