"""Runs inside the virtual machine: takes command lines from its second serial port, one at a time, and says what came.

A line of JSON each way: ``{"argv": [...], "timeout": SECONDS}``, and ``{"code": EXIT, "out": TEXT}``, both streams in
one; at the start ``{"code": 0, "out": "up"}``.
"""

from __future__ import annotations

import json
import os
import subprocess
import tty


def run(argv: list[str], timeout_seconds: float) -> dict[str, object]:
    line = ["timeout", "--kill-after=5", str(timeout_seconds), *argv]
    done = subprocess.run(
        line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, cwd="/"
    )
    return {"code": done.returncode, "out": done.stdout.decode(errors="replace")}


def main() -> None:
    port = os.open("/dev/ttyS1", os.O_RDWR | os.O_NOCTTY)
    tty.setraw(port)
    with open(port, "rb") as asked, open(os.dup(port), "wb", buffering=0) as told:
        answer: dict[str, object] = {"code": 0, "out": "up"}
        while True:
            told.write(json.dumps(answer).encode() + b"\n")
            given = json.loads(asked.readline())
            answer = run(given["argv"], given["timeout"])


if __name__ == "__main__":
    main()
