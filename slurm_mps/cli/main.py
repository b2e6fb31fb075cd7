"""``slurm-mps``: what users and admins type. The place that prints and exits; libraries below it never do.

Exit status: 0 fine, 1 a problem was found, 2 usage, 3 not applicable here, 4 needs root. What a command needs is
imported when it runs: 64 ranks of a step run one of them at once.
"""

from __future__ import annotations

import argparse
import sys

from slurm_mps import __version__
from slurm_mps.cli import config, doctor, plan, reconcile, verify


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="slurm-mps", description="CUDA MPS as an option of Slurm.")
    parser.add_argument("--version", action="version", version=f"slurm-mps {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    config.add_parser(commands)
    verify.add_parser(commands)
    reconcile.add_parser(commands)
    doctor.add_parser(commands)
    plan.add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns its exit status."""
    options = _parser().parse_args(argv)
    status: int = options.run(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
