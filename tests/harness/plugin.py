"""The plugin's file as it would be if it had been built elsewhere."""

from __future__ import annotations

import re


def built_for(number: int, data: bytes) -> bytes:
    """A plugin that says it was built with Slurm's headers of SLURM_VERSION_NUMBER `number`, to Slurm and to us."""
    (mark,) = re.findall(rb" slurm 0x([0-9a-f]{6})\n", data)
    symbol = int(mark, 16).to_bytes(4, "little")
    assert data.count(symbol) == 1
    data = data.replace(symbol, number.to_bytes(4, "little"))
    return data.replace(b" slurm 0x" + mark, f" slurm 0x{number:06x}".encode())
