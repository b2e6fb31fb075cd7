"""Lists as Slurm and the kernel write them: ``n[1-2,07-09],x`` and ``0-3,8``. Pure."""

from __future__ import annotations

MAX_HOSTS = 65536


def expand_hosts(text: str) -> list[str]:
    """The hosts of a Slurm host list, in its order; zeros in front of a number are kept.

    Raises: ValueError when it is no host list, or names more than 65,536 hosts.
    Source: slurm.conf(5) and ``scontrol show hostnames``.
    """
    hosts: list[str] = []
    for part in _split(text):
        hosts += _expand(part)
        if len(hosts) > MAX_HOSTS:
            raise ValueError(f"more than {MAX_HOSTS} hosts")
    return hosts


def hosts_of(text: str) -> list[str]:
    """expand_hosts(); empty where `text` is no host list."""
    try:
        return expand_hosts(text)
    except ValueError:
        return []


def _split(text: str) -> list[str]:
    """Cut at the commas that are not in brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if depth not in (0, 1):
            raise ValueError(f"{text}: brackets do not match")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    if depth or not all(parts):
        raise ValueError(f"{text}: no host list")
    return parts


def _expand(part: str) -> list[str]:
    """The hosts of one name with any number of brackets: ``r[1-2]n[1-4]``."""
    head, bracket, rest = part.partition("[")
    if not bracket:
        return [part]
    inside, _, tail = rest.partition("]")
    tails = _expand(tail) if tail else [""]
    numbers = _numbers(inside)
    if len(numbers) * len(tails) > MAX_HOSTS:
        raise ValueError(f"more than {MAX_HOSTS} hosts")
    return [head + number + end for number in numbers for end in tails]


def _numbers(text: str) -> list[str]:
    """``1-2,07-09`` as ``1 2 07 08 09``."""
    found: list[str] = []
    for item in text.split(","):
        first, dash, last = item.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal()):
            raise ValueError(f"[{text}]: no list of numbers")
        count = int(last) - int(first) + 1
        if not 0 < count <= MAX_HOSTS:
            raise ValueError(f"[{text}]: no list of numbers")
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return found


def expand_numbers(text: str) -> list[int]:
    """The numbers of a kernel list such as ``0-3,8``; none for an empty one."""
    return [int(number) for number in _numbers(text.strip())] if text.strip() else []


def join_numbers(numbers: list[int]) -> str:
    """Write numbers as people read them: ``0-3,8``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
