"""The files of what was measured or recorded: docs/benchmarks/data, tests/slurm/data."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def write(target: Path, data: dict[str, Any]) -> None:
    """Write JSON with each row, and each list of numbers, on a line of its own."""
    target.write_text(_text(data, "\n") + "\n")


def _text(value: object, line: str) -> str:
    inner = f"{line} "
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {_text(part, inner)}" for key, part in value.items()]
        return f"{{{inner}{f',{inner}'.join(parts)}{line}}}" if parts else "{}"
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return f"[{inner}{f',{inner}'.join(map(json.dumps, value))}{line}]"
    return json.dumps(value)
