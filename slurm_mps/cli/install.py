"""``slurm-mps install`` and ``uninstall``: into a node's Slurm, and out of it again."""

from __future__ import annotations

import argparse
import os
import re
from typing import TYPE_CHECKING

from ..units import printable
from .output import Column, Exit, add_json_option, complain, print_json, print_table, refuse

if TYPE_CHECKING:
    from ..install.actions import Installed, Uninstalled
    from ..install.by_hand import Todo
    from ..install.changes import Comparison

_COLUMNS = (Column("what", "WHAT"), Column("path", "PATH"))
_STATUSES = "Exit status: 0 fine, 1 a problem was found, 2 usage, 3 no Slurm here, 4 not root."


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "install",
        help="as root: put plugin, prolog, epilog and sample configuration into this node's Slurm",
        description="Installs slurm-mps into this node's Slurm: the plugin, built for this Slurm, a file with the "
        "plugin's line for plugstack.conf, prolog, epilog, and a sample mps.toml. The site's own files are read and "
        "never changed; the command prints what is left to do by hand. Each file is noted in /var/lib/slurm-mps before "
        f"it is written, for slurm-mps uninstall. A second run finishes or upgrades the installation. {_STATUSES}",
    )
    parser.add_argument("--dry-run", action="store_true", help="show every file and line, and change nothing")
    parser.add_argument(
        "--login-node", action="store_true", help="only what submitting needs: plugin, its line, slurm-mps in PATH"
    )
    parser.add_argument(
        "--plugin", type=_file, metavar="FILE", help="a plugin built elsewhere, instead of building it here"
    )
    parser.add_argument(
        "--plugin-dir",
        type=_directory,
        metavar="DIR",
        help="where Slurm's plugins are (default: slurm.conf's PluginDir)",
    )
    parser.add_argument("--slurm-include", type=_headers, metavar="DIR", help="the directory that holds slurm/spank.h")
    _common_options(parser, "install/1")
    parser.add_argument("--no-doctor", action="store_true", help="do not run slurm-mps doctor at the end")
    parser.set_defaults(run=run_install)
    parser = commands.add_parser(
        "uninstall",
        help="as root: remove what slurm-mps install put into this node's Slurm",
        description="Removes the files that slurm-mps install noted, newest first. A file that was changed since "
        "stays, and is named. The command refuses while a job has MPS on this node, and while slurm.conf or "
        "plugstack.conf still needs one of these files. "
        "Exit status: 0 fine, 1 a problem was found, 2 usage, 4 not root.",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be removed, and change nothing")
    parser.add_argument("--force", action="store_true", help="do not refuse for jobs with MPS, nor for slurm.conf")
    _common_options(parser, "uninstall/1")
    parser.set_defaults(run=run_uninstall)


def _common_options(parser: argparse.ArgumentParser, report: str) -> None:
    parser.add_argument(
        "--slurm-conf", type=_file, metavar="FILE", help="the site's slurm.conf (default: where Slurm looks)"
    )
    add_json_option(parser, report)


def _file(text: str) -> str:
    if not os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"{printable(text, 200)}: there is no such file")
    return text


def _directory(text: str) -> str:
    """A directory that is there, so that a typo makes none; of a name that plugstack.conf, make and sh take as one."""
    if not re.fullmatch(r"/[\w./+@=,-]*", text, re.ASCII):
        why = "expected an absolute path of letters, digits and _./+@=,-"
        raise argparse.ArgumentTypeError(f"{printable(text, 200)!r}: {why}")
    if not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text}: there is no such directory")
    return text.rstrip("/") or "/"


def _headers(text: str) -> str:
    if not os.path.exists(f"{_directory(text)}/slurm/spank.h"):
        raise argparse.ArgumentTypeError(f"{text}: there is no slurm/spank.h in it")
    return text


def _not_root(command: str, options: argparse.Namespace) -> int:
    return refuse(options, Exit.NOT_ROOT, f"{command} reads and changes what belongs to root; run it as root")


def run_install(options: argparse.Namespace) -> int:
    """Install, or show what would be done. Returns the exit status."""
    if os.geteuid() != 0:
        return _not_root("install", options)
    from ..errors import MpsError
    from ..install.actions import install
    from ..install.wanted import Options
    from ..slurm.host import NoSlurmError

    chosen = Options(options.slurm_conf, options.plugin, options.plugin_dir, options.slurm_include, options.login_node)
    try:
        done = install(chosen, os.environ, dry_run=options.dry_run)
    except NoSlurmError as error:
        return refuse(options, Exit.NOT_HERE, str(error))
    except MpsError as error:
        return refuse(options, Exit.PROBLEM, str(error))
    if options.json:
        _report_install(done, options)
    else:
        _print_install(done)
    if not (options.dry_run or options.json or options.no_doctor):
        _doctor()
    return Exit.PROBLEM if done.problems else Exit.FINE


def run_uninstall(options: argparse.Namespace) -> int:
    """Uninstall, or say what would be done. Returns the exit status."""
    if os.geteuid() != 0:
        return _not_root("uninstall", options)
    from ..errors import MpsError
    from ..install.actions import uninstall

    try:
        done = uninstall(options.slurm_conf, os.environ, force=options.force, dry_run=options.dry_run)
    except MpsError as error:
        return refuse(options, Exit.PROBLEM, str(error))
    if options.json:
        changes = [{"path": one.path, "what": one.what, "kept": one.kept} for one in done.undone]
        status = Exit.PROBLEM if done.problems else Exit.FINE
        problems = done.problems + done.remarks
        print_json(options, status, dry_run=options.dry_run, changes=changes, problems=problems)
    else:
        _print_uninstall(done, dry_run=options.dry_run)
    return Exit.PROBLEM if done.problems else Exit.FINE


# ------------------------------------------------------------------------------------------------------- printing


def _what(one: Comparison, *, dry_run: bool) -> str:
    if one.stays:
        return "stays"
    if not one.is_needed:
        return "is there"
    kind = "make" if one.change.data is None else "write" if one.before is None else "replace"
    return kind if dry_run else {"make": "made", "write": "wrote", "replace": "replaced"}[kind]


def _report_install(done: Installed, options: argparse.Namespace) -> None:
    print_json(
        options,
        Exit.PROBLEM if done.problems else Exit.FINE,
        dry_run=done.dry_run,
        slurm_release=done.release,
        changes=[
            {"path": one.change.path, "what": _what(one, dry_run=done.dry_run), "mode": f"{one.change.mode:o}"}
            for one in done.comparisons
        ],
        undone=[{"path": one.path, "what": one.what} for one in done.undone],
        by_hand=[{"where": todo.where, "lines": list(todo.lines), "why": todo.why} for todo in done.by_hand],
        problems=done.problems,
    )


def _print_install(done: Installed) -> None:
    rows = [{"what": _what(one, dry_run=done.dry_run), "path": one.change.path} for one in done.comparisons]
    rows += [{"what": one.what.partition(":")[0], "path": one.path} for one in done.undone]
    print(f"Slurm {done.release}, {done.conf_path or 'without a slurm.conf yet'}")
    print_table(rows, _COLUMNS)
    if done.dry_run:
        for one in done.comparisons:
            _print_difference(one)
    _print_by_hand(done.by_hand)
    for problem in done.problems:
        complain(problem)


def _print_difference(one: Comparison) -> None:
    """Every line that would be written; of a plugin its size."""
    import difflib

    path, data, mode = one.change.path, one.change.data, one.change.mode
    if not one.is_needed or data is None:
        return
    if b"\0" in data:
        print(f"\n{path}: {len(data)} bytes, mode {mode:o}")
        return
    before, after = ((text or b"").decode(errors="replace").splitlines() for text in (one.before, data))
    print(f"\n{path}: mode {mode:o}")
    for line in difflib.unified_diff(
        before, after, "/dev/null" if one.before is None else path, path, lineterm="", n=1
    ):
        print(line)


def _print_by_hand(todos: list[Todo]) -> None:
    print("\nLeft to do by hand:" if todos else "\nNothing is left to do by hand on this node.")
    for todo in todos:
        print(f"  {todo.where}{f' ({todo.why})' if todo.why else ''}:")
        for line in todo.lines:
            print(f"      {line}")


def _print_uninstall(done: Uninstalled, *, dry_run: bool) -> None:
    if not done.undone and not done.refused:
        print("slurm-mps install has changed nothing on this node")
    if done.undone:
        if dry_run:
            print("would be done:")
        print_table([{"what": one.what, "path": one.path} for one in done.undone], _COLUMNS)
    for problem in [*done.problems, *done.remarks]:
        complain(problem)
    if done.refused:
        complain(
            f"not uninstalled. First {'; '.join(done.refused)}. Then try again (--force goes past jobs and slurm.conf)"
        )
    elif done.undone and not dry_run:
        print("\nLeft to do by hand:\n  on each node, where slurmd runs:\n      systemctl restart slurmd")
        if done.left:
            print(f"Left, until you remove it: {' '.join(done.left)}")


def _doctor() -> None:
    """Print what doctor finds now."""
    from ..doctor.examine import examine
    from .doctor import print_findings

    print("\nslurm-mps doctor:")
    findings = examine(os.environ)
    print_findings(findings)
    if any(one.severity == "problem" for one in findings):
        complain("installed, but jobs with --mps will fail until the problems above are fixed")
