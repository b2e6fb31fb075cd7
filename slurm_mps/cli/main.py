"""``slurm-mps``: what users and admins type. The place that prints and exits; libraries below it never do.

Exit status: 0 fine, 1 a problem was found, 2 usage, 3 not applicable here, 4 needs root. What a command needs is
imported when it runs: 64 ranks of a step run one of them at once.
"""

from __future__ import annotations

import argparse
import json
import sys

from slurm_mps import __version__
from slurm_mps.cli import logs, metrics, reconcile, status, top, verify


def _config_check(options: argparse.Namespace) -> int:
    """Report every problem of a configuration file, one a line."""
    from slurm_mps.config import ConfigError
    from slurm_mps.config_file import parse_config
    from slurm_mps.hooks import CONFIG_PATH

    path = options.file or CONFIG_PATH
    try:
        with open(path, "rb") as file:
            parse_config(file.read(), path)
    except FileNotFoundError:
        print(f"{path}: no such file; the defaults hold")
        return 0
    except OSError as error:
        print(f"slurm-mps: {path}: {error.strerror}", file=sys.stderr)
        return 1
    except ConfigError as error:
        print("\n".join(error.problems))
        return 1
    print(f"{path}: fine")
    return 0


def _config_schema(_options: argparse.Namespace) -> int:
    from slurm_mps.config_file import schema

    print(json.dumps(schema(), indent=2))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="slurm-mps", description="CUDA MPS as an option of Slurm.")
    parser.add_argument("--version", action="version", version=f"slurm-mps {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    config = commands.add_parser("config", help="the site configuration").add_subparsers(required=True)
    check = config.add_parser("check", help="report every problem of the file")
    check.add_argument("file", nargs="?", help="default: the one that the prolog reads")
    check.set_defaults(run=_config_check)
    show = config.add_parser("schema", help="print the JSON Schema of the file")
    show.set_defaults(run=_config_schema)
    verify.add_parser(commands)
    reconcile.add_parser(commands)
    status.add_parser(commands)
    top.add_parser(commands)
    logs.add_parser(commands)
    metrics.add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns its exit status."""
    options = _parser().parse_args(argv)
    status: int = options.run(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
