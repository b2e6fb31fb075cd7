"""``slurm-mps config``: check the site configuration, show what holds, print its schema."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from .output import Column, Exit, add_json_option, add_table_options, chosen, print_json, print_table, refuse

if TYPE_CHECKING:
    from ..config.file import Setting

COLUMNS = (
    Column("setting", "SETTING"),
    Column("value", "VALUE"),
    Column("from", "FROM"),
    Column("default", "DEFAULT", hidden=True),
)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parts = commands.add_parser("config", help="the site configuration").add_subparsers(required=True, metavar="PART")
    check = parts.add_parser(
        "check",
        help="report every problem of the file",
        description="Prints each problem of the file on a line of its own. Exit status: 0 fine, 1 a problem was "
        "found, 2 usage, 4 only others may read the file.",
    )
    check.set_defaults(run=_check)
    add_json_option(check, "config-check/1")
    show = parts.add_parser(
        "show",
        help="what holds, and where it comes from",
        description="Prints every setting, also what the file leaves out. Exit status: 0 fine, 1 the file is wrong, "
        "2 usage, 4 only others may read it.",
    )
    show.set_defaults(run=_show)
    show.add_argument("--partition", default="", metavar="NAME", help="for jobs in this partition of Slurm")
    add_table_options(show, COLUMNS, "config/1")
    for parser in (check, show):
        parser.add_argument("file", nargs="?", help="default: the one that the prolog reads")
    schema = parts.add_parser(
        "schema",
        help="print the JSON Schema of the file",
        description="Prints what the file may hold, for editors. Exit status: 0 fine, 2 usage.",
    )
    schema.set_defaults(run=_schema)


def _read(path: str) -> bytes | None:
    """The file's text; None where there is none. Raises: OSError."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def _problems(path: str) -> tuple[bool, list[str], list[str]]:
    """Whether there is a file, everything that is wrong with it, and what a choice of it means. Raises: OSError."""
    from ..config.file import parse_site
    from ..config.settings import ALL_USERS, ConfigError, joins_all
    from ..job.plan import refusal_of_default

    text = _read(path)
    try:
        site = parse_site(text or b"", path)
    except ConfigError as error:
        return True, error.problems, []
    refusals = {name: refused for name, config in site.items() if (refused := refusal_of_default(config))}
    problems = [
        f"{path}: every job {f'in partition {name} ' if name else ''}without --mps-mem is refused: {refused}"
        for name, refused in refusals.items()
        if not name or "" not in refusals
    ]
    return text is not None, problems, [ALL_USERS] if any(map(joins_all, site.values())) else []


def _path(options: argparse.Namespace) -> str:
    from ..config.settings import CONFIG_PATH

    path: str = options.file or CONFIG_PATH
    return path


def _unreadable(options: argparse.Namespace, path: str, error: OSError) -> int:
    status = Exit.NOT_ROOT if isinstance(error, PermissionError) else Exit.PROBLEM
    return refuse(options, status, f"{path}: {error.strerror}")


def _check(options: argparse.Namespace) -> int:
    path = _path(options)
    try:
        there, problems, remarks = _problems(path)
    except OSError as error:
        return _unreadable(options, path, error)
    if options.file and not there:
        problems = [f"{path}: no such file"]
    status = Exit.PROBLEM if problems else Exit.FINE
    if options.json:
        print_json(options, status, file=path, exists=there, problems=problems)
    elif problems:
        print("\n".join(problems))
    else:
        print("\n".join((f"{path}: fine" if there else f"{path}: no such file; the defaults hold", *remarks)))
    return status


def _show(options: argparse.Namespace) -> int:
    """Print every setting with its value and where that comes from."""
    from ..config.file import effective
    from ..config.settings import ConfigError

    columns = chosen(COLUMNS, options)
    path = _path(options)
    try:
        settings = effective(_read(path) or b"", path, options.partition)
    except OSError as error:
        return _unreadable(options, path, error)
    except ConfigError as error:
        return refuse(options, Exit.PROBLEM, *error.problems)
    rows = [
        {"setting": one.name, "value": one.value, "from": _source(one, path), "default": one.default}
        for one in settings
    ]
    if options.json:
        print_json(options, Exit.FINE, file=path, settings=rows)
    else:
        print_table(rows, columns, noheader=options.noheader)
    return Exit.FINE


def _source(setting: Setting, path: str) -> str:
    if setting.table is None:
        return "default"
    return f"{path} [{setting.table}]" if setting.table else path


def _schema(_options: argparse.Namespace) -> int:
    from ..config.file import schema

    print(json.dumps(schema(), indent=2))
    return Exit.FINE
