"""The session that CONTRIBUTING.md shows, as it was played: ``python3 -m tests.lab.session`` plays it and writes it.

The page has the commands. Each is typed into a throw-away site, and what it prints is written below it.
"""

from __future__ import annotations

import re

from tests.harness.cluster import REPOSITORY, Job
from tests.harness.site import Site

PAGE = REPOSITORY / "CONTRIBUTING.md"
_BLOCK = re.compile(r"(?<=<!-- written by tests/lab/session.py -->\n```console\n).*?(?=```\n)", re.DOTALL)
_PROMPT = re.compile(r"(?:alice\$|n1#) ")


def recorded() -> str:
    """The session on the page."""
    (text,) = _BLOCK.findall(PAGE.read_text())
    return str(text)


def play(session: str) -> str:
    """Type a session's commands, alice's on the submit host and root's on n1. Returns: the session as it went."""
    lines = []
    with Site() as site:
        for line in filter(_PROMPT.match, session.splitlines()):
            who, command = line.split(" ", 1)
            alice = {"user": "alice", "cwd": "/home/alice"}
            place: dict[str, str] = alice if who == "alice$" else {"node": "n1"}
            said = site.machine.run(["bash", "-c", command], **place)  # type: ignore[arg-type]
            lines += [line, *(one.rstrip() for one in f"{said.stdout}{said.stderr}".splitlines())]
            submitted = re.match(r"Submitted batch job (\d+)", said.stdout)
            if submitted:
                site.verdict(Job(int(submitted[1]), "alice"))
            if command.startswith("scancel"):
                site.cluster.wait_idle()
    return "\n".join(lines) + "\n"


def main() -> None:
    played = play(recorded())
    PAGE.write_text(_BLOCK.sub(lambda _: played, PAGE.read_text()))
    print(f"{played}\nsession: written into {PAGE}")


if __name__ == "__main__":
    main()
