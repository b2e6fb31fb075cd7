"""``slurm-mps config``: check the site configuration, show what holds, print its schema."""

from __future__ import annotations

import json

from slurm_mps.cli.output import (
    EXIT_STATUSES,
    FINE,
    NOT_ROOT,
    PROBLEM,
    Column,
    add_json_option,
    add_table_options,
    chosen,
    complain,
    print_json,
    print_table,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

COLUMNS = (
    Column("setting", "SETTING"),
    Column("value", "VALUE"),
    Column("from", "FROM"),
    Column("default", "DEFAULT", hidden=True),
)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command with its three parts."""
    parts = commands.add_parser("config", help="the site configuration").add_subparsers(required=True, metavar="PART")
    check = parts.add_parser("check", help="report every problem of the file", description=EXIT_STATUSES)
    check.set_defaults(run=_check)
    add_json_option(check)
    show = parts.add_parser("show", help="what holds, and where it comes from", description=EXIT_STATUSES)
    show.set_defaults(run=_show)
    add_table_options(show, COLUMNS)
    for parser in (check, show):
        parser.add_argument("file", nargs="?", help="default: the one that the prolog reads")
    schema = parts.add_parser("schema", help="print the JSON Schema of the file")
    schema.set_defaults(run=_schema)


def _read(path: str) -> bytes | None:
    """The file's text; None where there is none. Raises: OSError."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def _problems(path: str) -> tuple[bool, list[str]]:
    """Whether there is a file, and everything that is wrong with it. Raises: OSError."""
    from slurm_mps.config import ConfigError
    from slurm_mps.config_file import parse_config

    text = _read(path)
    try:
        if text is not None:
            parse_config(text, path)
    except ConfigError as error:
        return True, error.problems
    return text is not None, []


def _path(options: argparse.Namespace) -> str:
    from slurm_mps.hooks import CONFIG_PATH

    path: str = options.file or CONFIG_PATH
    return path


def _unreadable(path: str, error: OSError) -> int:
    """Say why. Returns the exit status."""
    complain(f"{path}: {error.strerror}")
    return NOT_ROOT if isinstance(error, PermissionError) else PROBLEM


def _check(options: argparse.Namespace) -> int:
    """Report every problem of a configuration file, one a line."""
    path = _path(options)
    try:
        there, problems = _problems(path)
    except OSError as error:
        return _unreadable(path, error)
    if options.file and not there:
        problems = [f"{path}: no such file"]
    status = PROBLEM if problems else FINE
    if options.json:
        print_json("config-check/1", status=status, file=path, exists=there, problems=problems)
    elif problems:
        print("\n".join(problems))
    else:
        print(f"{path}: fine" if there else f"{path}: no such file; the defaults hold")
    return status


def _show(options: argparse.Namespace) -> int:
    """Print every setting with its value and where that comes from."""
    from slurm_mps.config import ConfigError
    from slurm_mps.config_file import effective

    path = _path(options)
    try:
        settings = effective(_read(path) or b"", path)
    except OSError as error:
        return _unreadable(path, error)
    except ConfigError as error:
        for problem in error.problems:
            complain(problem)
        return PROBLEM
    rows = [
        {"setting": one.name, "value": one.value, "from": path if one.given else "default", "default": one.default}
        for one in settings
    ]
    if options.json:
        print_json("config/1", status=FINE, file=path, settings=rows)
    else:
        print_table(rows, chosen(COLUMNS, options), noheader=options.noheader)
    return FINE


def _schema(_options: argparse.Namespace) -> int:
    from slurm_mps.config_file import schema

    print(json.dumps(schema(), indent=2))
    return FINE
