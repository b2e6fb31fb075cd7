"""Builds with a wall taken down, to show of each attack that it would work there.

A wall is named for what is no longer done when it is down. ``@attack("links are not followed")`` runs a test against
the product and against a build without that wall; with ``even_without=`` also against one in which an outer wall has
fallen already and this one alone must hold. The test states ``assert what_the_attacker_got is works``.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from shutil import copytree
from typing import TYPE_CHECKING

import pytest

from tests.harness.cluster import REPOSITORY
from tests.harness.gpunode import EPILOG, PROLOG
from tests.harness.site import PLUGIN_DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.harness.machine import Machine

WEAK_PACKAGE, WEAK_PLUGIN = "/srv/weakened/slurm_mps", "/srv/weakened/plugin"


@dataclass(frozen=True)
class Change:
    """One place in one file; `old` must be there exactly once, or the wall has moved and the table must follow it."""

    file: str
    old: str
    new: str

    def apply(self, text: str) -> str:
        if text.count(self.old) != 1:
            raise AssertionError(f"{self.file} has {text.count(self.old)} times, not once: {self.old}")
        return text.replace(self.old, self.new)


FILES, PROCESSES, CONTROL = "slurm_mps/node/files.py", "slurm_mps/node/processes.py", "slurm_mps/node/control.py"
SEARCH, READING = "slurm_mps/node/search.py", "slurm_mps/node/reading.py"
ACTIONS, STATE, VERDICTS = "slurm_mps/job/actions.py", "slurm_mps/job/state.py", "slurm_mps/job/verdict.py"
UNITS, LOGS, HOOKS = "slurm_mps/units.py", "slurm_mps/job/logs.py", "slurm_mps/job/hook.py"
HOOK, LIFECYCLE = "slurm_mps/hook.py", "slurm_mps/job/lifecycle.py"
LIMITS, HEALTH, VERDICT = "spank/limits.c", "spank/health.c", "spank/verdict.c"
HELPER, JOBDIR = "spank/helper.c", "spank/jobdir.c"
PROLOG_SCRIPT, MEETING = "prolog/10-slurm-mps.sh", "slurm_mps/verify/meeting.py"
EVENTS = "slurm_mps/job_log/events.py"
JOINED = "slurm_mps/job/joined.py"

WALLS: dict[str, tuple[Change, ...]] = {
    # ------------------------------------------------------------------------------------------------------- files
    "links are not followed": (
        Change(
            FILES,
            "_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW",
            "_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY",
        ),
    ),
    "what was checked is what is used": (
        Change(
            FILES,
            "            fd = os.open(_check_name(name), _DIRECTORY, dir_fd=self.fd)\n",
            "            if stat.S_ISLNK(os.stat(name, dir_fd=self.fd, follow_symlinks=False).st_mode):\n"
            "                raise OSError(40, '')\n"
            "            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.fd)\n",
        ),
    ),
    "the pipe directory is root's alone to write": (
        Change(
            ACTIONS,
            "job.journal.directory.make(name, 0o755).close()",
            "pipe = job.journal.directory.make(name, 0o755)\n"
            '            __import__("os").fchmod(pipe.fd, 0o1777)\n'
            "            pipe.close()",
        ),
    ),
    "removal follows nothing": (
        Change(
            FILES,
            "_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW",
            "_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY",
        ),
        Change(
            FILES,
            "            status = os.stat(entry, dir_fd=fd, follow_symlinks=False)\n",
            "            status = os.stat(entry, dir_fd=fd)\n",
        ),
    ),
    "removal is bounded": (Change(FILES, "        if budget[0] < 0 or depth == 0:", "        if False:"),),
    "the user may only read": (
        Change(FILES, "(_ACL_USER, 5, uid)", "(_ACL_USER, 7, uid)"),
        Change(FILES, "(_ACL_MASK, 5, _ACL_NO_ID)", "(_ACL_MASK, 7, _ACL_NO_ID)"),
        Change(FILES, "    return status.st_uid == 0 and not status.st_mode & others", "    return True"),
    ),
    "only root's plain file is read": (
        Change(
            FILES,
            "os.open(_check_name(name), how | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self.fd)",
            "os.open(_check_name(name), how, dir_fd=self.fd)",
        ),
        Change(
            FILES,
            "if not (stat.S_ISREG(status.st_mode) and status.st_nlink <= 1 and status.st_uid == 0):",
            "if False:",
        ),
    ),
    "a journal is its own job's": (Change(STATE, "if journal.job_id != job_id:", "if False:"),),
    "nobody else may enter": (
        Change(FILES, "(_ACL_OTHER, 0, _ACL_NO_ID)", "(_ACL_OTHER, 5, _ACL_NO_ID)"),
        Change(FILES, "(_ACL_GROUP_OBJ, 0, _ACL_NO_ID)", "(_ACL_GROUP_OBJ, 5, _ACL_NO_ID)"),  # a server's, O51
    ),
    "jobs cannot be listed": (Change(STATE, 'self.root.make("jobs", 0o711)', 'self.root.make("jobs", 0o755)'),),
    # ------------------------------------------------------------------------------------ environment, descriptors
    "the hook's Python is isolated": (Change(PROLOG_SCRIPT, 'exec "$python" -I -S ', 'exec "$python" '),),
    "the package comes last on the path": (Change(HOOK, "sys.path.append(", "sys.path.insert(0, "),),
    "a child's environment is made from nothing": (
        Change(PROCESSES, "                dict(environment),\n", "                {**os.environ, **environment},\n"),
    ),
    "a child has no other descriptor": (
        Change(PROCESSES, "actions += [(os.POSIX_SPAWN_CLOSE, fd) for fd in to_close]", "_ = to_close"),
    ),
    # ------------------------------------------------------------------------------------------------ user's text
    "a priority is one of two words": (
        Change(UNITS, "    if text not in _PRIORITIES:", "    if False:"),
        Change(UNITS, "    return _PRIORITIES.index(text)", "    return text"),
    ),
    "a command is of plain characters": (Change(CONTROL, "if not _GRAMMAR.issuperset(line):", "if False:"),),
    "a size is a number": (
        Change(
            UNITS,
            '[unit]\n    raise ValueError(f"expected {MEMORY_EXPECTED}")',
            "[unit]\n    return 8 * 1024 * MIB",
        ),
        Change(
            CONTROL,
            "        size = format_memory(limits.memory_bytes)",
            '        size = processes.os.environ["SPANK_MPS_MEM"]',
        ),
        Change(
            CONTROL,
            "sizes = [[]] if size is None else [[format_memory(printed_memory(size))],",
            'sizes = [[]] if size is None else [[processes.os.environ["SPANK_MPS_MEM"]],',
        ),
    ),
    "what was set is read back": (Change(CONTROL, "        elif answer not in expected:", "        elif False:"),),
    "user's text is made printable": (
        Change(
            UNITS, '    shown = "".join(c if " " <= c <= "~" else "?" for c in text[: limit + 1])', "    return text"
        ),
    ),
    "a verdict's value is one line": (
        Change(VERDICTS, '    return "".join(c if " " <= c <= "~" else "?" for c in text)[:480]', "    return text"),
    ),
    "a user's mistake is not the node's fault": (
        Change(HOOKS, "return self.refuse(error)", "return self.node_fault(str(error))"),
    ),
    # --------------------------------------------------------------------------------------------------- processes
    "the pid file is root's alone to write": (
        Change(CONTROL, "            pipe.protect(name)\n", "            pass\n"),
    ),
    "a pid proves nothing": (
        Change(
            CONTROL,
            "        pid = listener(self.pipe_directory)\n",
            "        with open(f'{self.pipe_directory}/{PID_FILE}') as file:\n"
            "            return identify(int(file.read()))\n"
            "        pid = listener(self.pipe_directory)\n",
        ),
    ),
    "only what survives SIGKILL is a fault": (
        Change(
            CONTROL,
            "        if stuck := _alive(ours):\n",
            "        if stuck := _find_processes(known, server_uid, 2)[daemon]:\n",
        ),
    ),
    "signals follow where asking fails": (
        Change(
            CONTROL,
            "        _end_by_signals(stuck, server_uid, patience)\n",
            '        raise NodeError("it does not quit")\n',
        ),
    ),
    "no file system of a user's is asked": (
        Change(PROCESSES, '_owner_as_cached(f"/proc/{pid}/exe") == 0', 'os.stat(f"/proc/{pid}/exe").st_uid == 0'),
    ),
    "a search can be abandoned": (
        Change(
            CONTROL,
            "lines = processes.in_child(lambda: search_lines(directory, names), timeout_seconds, _SEARCH_BYTES)",
            'lines = "".join(search_lines(directory, names))',
        ),
    ),
    "a process is all of its threads": (
        Change(PROCESSES, 'if state in (b"Z", b"X") and threads <= 1 else', 'if state in (b"Z", b"X") else'),
    ),
    "no line costs more for those before it": (
        Change(
            EVENTS,
            "if found and len(self._without_gpu) == 1:",
            "if found and sum(context in self._waiting.get(one, ()) for one, context in list(self._without_gpu)) == 1:",
        ),
    ),
    "a title is not the kernel's word": (
        Change(
            PROCESSES,
            'if _status(pid, "Uid")[:1] != ["0"] or not program_of(pid).startswith(program):',
            'if _status(pid, "Uid")[1:2] != ["0"]:',
        ),
    ),
    "a process's name is one word": (Change(PROCESSES, '.split("\\n"):', ".splitlines():"),),
    "a reader can be left behind": (Change(READING, "reader.join(max(0.0, end - monotonic()))", "reader.join()"),),
    "a server has root's group": (Change(SEARCH, "if not directory or processes.is_of_roots_making(pid)]", "]"),),
    "what is removed gives its space back": (
        Change(FILES, "            os.ftruncate(fd, 0)\n        except", "            pass\n        except"),
        Change(
            FILES,
            "if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_size:",
            "if False:",
        ),
    ),
    "a user's logs push out nobody else's": (
        Change(LOGS, "by_user.setdefault(logs.user_let_in(name), [])", "by_user.setdefault(None, [])"),
    ),
    "logs are bounded while the job runs": (Change(CONTROL, ", file_limit_bytes=log_limit_bytes", ""),),
    # ------------------------------------------------------------------------------------------------------- order
    "a GPU's ledger is locked": (
        Change(
            ACTIONS,
            "    while True:\n        job.state.ledgers.lock(job.seconds(job.config.deadlines_command))\n",
            "    while True:\n",
        ),
    ),
    "a ledger is read and written at once": (
        Change(
            ACTIONS,
            "        entry = job.state.ledgers.read(self.gpu)\n",
            '        entry = job.state.ledgers.read(self.gpu)\n        __import__("time").sleep(0.3)\n',
        ),
        Change(ACTIONS, "(there := job.gpus.processes(gpu))", "(there := ())"),
    ),
    "the undo is on disk first": (Change(LIFECYCLE, "job.journal.note(*new)", "job.journal.undo += new"),),
    # ------------------------------------------------------------------------------------------------ jobs that share
    "joined jobs are one user's": (Change(JOINED, "if self.way == JOINED and other.uid != self.uid:", "if False:"),),
    "a daemon of all users is root's to enter": (
        Change(JOINED, "place.make(str(daemon.starter), 0o700)", "place.make(str(daemon.starter), 0o755)"),
        Change(JOINED, "            pipe.grant_user(reader)\n", ""),
    ),
    "the logs of all users are root's": (Change(JOINED, "None if self.way == JOINED_ALL else self.uid", "self.uid"),),
    "no script takes a link for a daemon's own": (
        Change(JOINED, 'return f"joined-{number}"', 'return f"gpu-{number}"'),
    ),
    "a joined daemon is known by its process": (
        Change(
            JOINED,
            "        if daemon.stage == OPEN and is_alive(daemon):",
            "        if daemon.stage == OPEN and control_daemon(self.gpu, daemon, job.config).process():",
        ),
    ),
    "joining needs devices that are confined": (
        Change(
            JOINED,
            "def unconfined(slurm_conf: str) -> str:\n",
            'def unconfined(slurm_conf: str) -> str:\n    return ""\n',
        ),
    ),
    # ------------------------------------------------------------------------------------------------------ verify
    "ranks meet in their own user's directory": (
        Change(MEETING, "if (status.st_uid, status.st_dev) == (os.getuid(), place.st_dev) and not", "if not"),
        Change(
            MEETING,
            "os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)\n    except",
            "os.O_RDONLY | os.O_DIRECTORY)\n    except",
        ),
    ),
    "ranks meet on the node's own file system": (
        Change(
            MEETING, "(status.st_uid, status.st_dev) == (os.getuid(), place.st_dev)", "status.st_uid == os.getuid()"
        ),
    ),
    # ------------------------------------------------------------------------------------------------------ plugin
    "what is too long for a variable is taken away": (
        Change("spank/variables.c", "if (result == ESPANK_NOSPACE)", "if (0)"),
    ),
    "only root's file is a verdict": (
        Change(
            VERDICT,
            "S_ISREG(st.st_mode) && st.st_uid == 0 && !(st.st_mode & (S_IWGRP | S_IWOTH))",
            "S_ISREG(st.st_mode)",
        ),
    ),
    "a task's memory limit is one that the driver can use": (
        Change(
            LIMITS,
            "	if (!any || (!own && !other))\n",
            "	if (any)\n",
        ),
    ),
    "a value is copied whole or not at all": (
        Change(VERDICT, "	if (!length || length >= size)\n", "	(void)size;\n	if (!length)\n"),
    ),
    "the mark is no link": (
        Change(JOBDIR, "O_WRONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC", "O_WRONLY | O_CREAT | O_CLOEXEC"),
    ),
    "the probe starts from nothing": (
        Change(
            "spank/spank_mps.c",
            "int slurm_spank_user_init(spank_t sp, int ac, char **av)\n{\n",
            "int slurm_spank_user_init(spank_t sp, int ac, char **av)\n{\n"
            "	char **given = NULL;\n"
            "	(void)spank_get_item(sp, S_JOB_ENV, &given);\n"
            "	while (given && *given)\n"
            "		(void)putenv(strdup(*given++));\n",
        ),
        Change(
            "spank/spank_mps.c",
            "#include <unistd.h>\n",
            "#include <stdlib.h>\n#include <string.h>\n#include <unistd.h>\n",
        ),
        Change(HEALTH, '"-I", "-S", ', ""),
        Change(
            HELPER,
            "#include <signal.h>\n",
            "#include <signal.h>\n#include <stdlib.h>\n",
        ),
        Change(
            HELPER,
            "	(void)execve(argv[0], argv, environment);\n",
            "	for (char *const *own = environment; *own; own++)\n"
            "		(void)putenv(*own);\n"
            "	(void)execve(argv[0], argv, environ);\n",
        ),
    ),
    "the probe has a group of its own": (
        Change(HELPER, "setresgid(HELPER_GID, HELPER_GID, HELPER_GID)", "setresgid(getegid(), getegid(), getegid())"),
    ),
    "the probe's group is nobody's": (Change(HELPER, "HELPER_GID 4294901760", "HELPER_GID 65534"),),
    "what the probe started ends with it": (
        Change(
            HELPER,
            "	(void)kill(-pid, SIGKILL); /* also",
            "	if (!ended)\n		(void)kill(-pid, SIGKILL); /* also",
        ),
    ),
    "the probe keeps nothing of slurmstepd's": (
        Change(HELPER, "	close_others();\n", "	(void)close_others;\n"),
        Change(
            HELPER,
            " || setresuid(uid, uid, uid))\n		return false;\n	return setuid(0) != 0;",
            ")\n		return false;\n	return uid != 0;",
        ),
    ),
}

#: Not walls of their own: they widen a race, so that losing it does not hang on luck.
WIDENED = {"a ledger is read and written at once"}


def attack(wall: str, *, even_without: str | tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """Run a test against the product and without `wall`; give it `works`: whether the attack is to succeed.

    even_without: a wall further out, or several; down in a third run, in which the attack must still fail, and in the
    one in which it is to succeed.
    """
    outer = (even_without,) if isinstance(even_without, str) else even_without
    cases = [pytest.param((), False, id="product")]
    if outer:
        cases.append(pytest.param(outer, False, id="breached"))
    cases.append(pytest.param((*outer, wall), True, id="weakened"))
    return pytest.mark.parametrize(("walls_down", "works"), cases)


def changes(walls: Sequence[str]) -> dict[str, list[Change]]:
    """The changes of some walls by file, none twice."""
    found: dict[str, list[Change]] = {}
    for wall in walls:
        for change in WALLS[wall]:
            here = found.setdefault(change.file, [])
            if change not in here:
                here.append(change)
    return found


def patched(name: str, of_file: Sequence[Change], text: str) -> str:
    for change in of_file:
        text = change.apply(text)
    return text or name


def weaken(machine: Machine, walls: Sequence[str]) -> None:
    """Take walls down in a machine that has the product installed. Nothing outside the machine changes."""
    by_file = changes(walls)
    package = {name: of_file for name, of_file in by_file.items() if name.startswith("slurm_mps/")}
    if package:
        _weaken_package(machine, package)
    if PROLOG_SCRIPT in by_file:
        text = machine.read(PROLOG)
        machine.write(PROLOG, patched(PROLOG, by_file[PROLOG_SCRIPT], text), mode=0o755)
    plugin = {name: of_file for name, of_file in by_file.items() if name.startswith("spank/")}
    if plugin:
        _weaken_plugin(machine, plugin)


def _weaken_package(machine: Machine, by_file: dict[str, list[Change]]) -> None:
    """Copy the installed package, change the copy, and have the scripts run that one."""
    installed = next(line for line in machine.read(PROLOG).splitlines() if line.startswith("package="))[8:]
    machine.run(["sh", "-ec", f"mkdir -p {WEAK_PACKAGE}; cp -r {installed}/. {WEAK_PACKAGE}"]).check()
    for name, of_file in by_file.items():
        place = f"{WEAK_PACKAGE}/{name.partition('/')[2]}"
        machine.write(place, patched(name, of_file, machine.read(place)))
    machine.run(["find", WEAK_PACKAGE, "-name", "__pycache__", "-prune", "-exec", "rm", "-r", "{}", ";"]).check()
    for script in (PROLOG, EPILOG):
        machine.run(["sed", "-i", f"s|^package=.*|package={WEAK_PACKAGE}|", script]).check()


def _weaken_plugin(machine: Machine, by_file: dict[str, list[Change]]) -> None:
    """Build it in the machine, with the headers of the Slurm there."""
    lay_sources(machine.path(WEAK_PLUGIN), by_file)
    line = ["make", "-s", "-C", f"{WEAK_PLUGIN}/spank", f"BUILD={WEAK_PLUGIN}"]
    machine.run(line, timeout=60).check()
    machine.run(["mv", f"{WEAK_PLUGIN}/spank_mps.so", f"{PLUGIN_DIRECTORY}/spank_mps.so"]).check()


def lay_sources(build: Path, by_file: dict[str, list[Change]]) -> Path:
    """Copy the plugin's sources below `build`, with changes if there are any. Returns where they are."""
    copytree(REPOSITORY / "spank", build / "spank", dirs_exist_ok=True)
    for name, of_file in by_file.items():
        place = build / name
        place.write_text(patched(name, of_file, place.read_text()))
    return build / "spank"


def build_plugin(build: Path, by_file: dict[str, list[Change]] | None = None, *make: str) -> Path:
    """Build the plugin below `build` for this machine's Slurm, with changes if there are any."""
    source = lay_sources(build, by_file or {})
    subprocess.run(["make", "-s", "-C", source, f"BUILD={build}", *make], check=True)
    return build / "spank_mps.so"
