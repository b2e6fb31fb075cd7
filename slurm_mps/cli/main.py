"""``slurm-mps``: what users and admins type. The place that prints and exits; libraries below it never do.

Exit status: 0 fine, 1 a problem was found, 2 usage, 3 not applicable here, 4 needs root. Each command imports its own
modules when it runs, since 64 ranks of a step may run one at the same moment.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys

from .. import __version__
from . import completion, config, doctor, install, logs, metrics, plan, reconcile, status, top, verify
from .output import Exit, Parser, complain, parse

_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def build_parser() -> argparse.ArgumentParser:
    """The one parser, of which man pages and shell completion are made, too."""
    parser: argparse.ArgumentParser = Parser(prog="slurm-mps", description="CUDA MPS as an option of Slurm.")
    parser.add_argument("--version", action="version", version=f"slurm-mps {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (config, verify, reconcile, status, top, logs, metrics, doctor, plan, install):
        command.add_parser(commands)
    completion.add_parser(commands, parser)
    return parser


def _open_missing() -> None:
    """Let what a caller has closed (``>&-``, some cron's) be /dev/null, before a file that we open takes its number."""
    for fd, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, fd)
            os.set_inheritable(fd, True)
            if null != fd:
                os.close(null)
            setattr(sys, name, open(fd, mode, closefd=False))  # noqa: SIM115 - as long as the process


def _take_libraries_back() -> None:
    """Give LD_LIBRARY_PATH its value again, which slurm_mps/cli/slurm-mps kept from this Python's own libraries."""
    libraries = os.environ.pop("SLURM_MPS_LIBRARIES", "")
    if libraries:
        os.environ["LD_LIBRARY_PATH"] = libraries


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns its exit status."""
    os.umask(0o022)
    _open_missing()
    _take_libraries_back()
    options = parse(build_parser(), sys.argv[1:] if argv is None else argv)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read it has enough
        status = Exit.PROBLEM
    except OSError as error:
        if error.errno not in _NOT_WRITTEN:
            raise
        complain(f"the output cannot be written: {error.strerror}")
        status = Exit.PROBLEM
    else:
        return status
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter, too, flushes at its end
    return status


if __name__ == "__main__":
    sys.exit(main())
