"""What runs as root touches files by descriptor, and processes by proof: the unsafe call cannot be written.

runc forbids ``os.Create`` by a lint for the same reason; the NVIDIA Container Toolkit met the same class of bug four
times in two years. node/files.py and node/processes.py are the doors; they are short and are read, the rest is checked.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES, PROCESSES, SEARCH = (f"slurm_mps/node/{name}.py" for name in ("files", "processes", "search"))
ENTRIES = ["slurm_mps/hook.py", "slurm_mps/job/reconcile.py"]
SOCKETS = {"slurm_mps/node/messages.py": "socket", "slurm_mps/node/listen.py": "_socket"}

#: Modules that work by path, start programs through a shell, or run what they read.
NEVER_IMPORTED = frozenset(
    {"subprocess", "shutil", "tempfile", "pathlib", "glob", "fileinput", "pickle", "marshal", "shelve", "socketserver"}
    | {"multiprocessing", "importlib", "runpy", "logging", "urllib", "http", "pty", "distutils", "zipfile"}
)
#: Functions of os that change something or look something up by path, and where each may be called.
EFFECTS = frozenset(
    {"open", "mkdir", "makedirs", "mkfifo", "mknod", "unlink", "remove", "rmdir", "removedirs", "rename", "renames"}
    | {"replace", "truncate", "link", "symlink", "chmod", "lchmod", "chown", "lchown", "utime", "setxattr", "chroot"}
    | {"fchmod", "fchown", "ftruncate", "listxattr", "removexattr", "access", "readlink", "scandir", "walk", "fwalk"}
    | {"system", "popen", "kill", "killpg", "fork", "forkpty", "posix_spawn", "posix_spawnp", "abort", "putenv"}
    | {"execl", "execle", "execlp", "execv", "execve", "execvp", "execvpe", "spawnl", "spawnv", "spawnve", "startfile"}
    | {"setuid", "seteuid", "setresuid", "setgid", "setgroups", "setns", "unshare", "stat", "lstat", "listdir"}
)
ALLOWED = {
    FILES: {"open", "mkdir", "unlink", "rmdir", "rename", "link", "setxattr", "fchmod", "ftruncate", "utime"}
    | {"stat", "listdir"},
    PROCESSES: {"posix_spawn", "fork", "killpg", "readlink", "listdir"},
    SEARCH: {"readlink", "stat"},
    "slurm_mps/config/load.py": {"stat"},
    "slurm_mps/slurm/programs.py": {"access"},
}
#: A call by path whose answer is only compared: whether a process sees the directory /run that we see.
COMPARED = {(SEARCH, "os.stat(f'/proc/{pid}/root/run')"), (SEARCH, "os.stat('/run')")}
#: Where a file system may be asked that a user chose: of root's processes, in a child that can be left behind; without
#: a question to the file system; and what is our own.
THROUGH_A_PROCESS = {
    (SEARCH, "/proc/{}/root/run", "os.stat"),
    (PROCESSES, "/proc/{}/exe", "os.readlink"),
    (PROCESSES, "/proc/{}/exe", "_owner_as_cached"),
    (PROCESSES, "/proc/self/fd", "os.listdir"),
}
#: What takes a name must be told which directory it is in.
BY_DIRECTORY = {
    "open": {"dir_fd"},
    "mkdir": {"dir_fd"},
    "unlink": {"dir_fd"},
    "rmdir": {"dir_fd"},
    "stat": {"dir_fd"},
    "rename": {"src_dir_fd", "dst_dir_fd"},
    "link": {"src_dir_fd", "dst_dir_fd"},
}
BUILTINS = {"eval", "exec", "compile", "__import__", "getattr", "setattr", "input", "breakpoint"}
#: Where a name of ours, a C function's or a field's, is looked up by its text.
DYNAMIC = {
    "slurm_mps/node/nvml.py": {"getattr"},
    "slurm_mps/config/settings.py": {"getattr"},
    "slurm_mps/record.py": {"getattr", "setattr"},
}


def dotted(node: ast.expr) -> str:
    """``os.path.join`` of the expression that says so; empty for anything else."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return node.id if isinstance(node, ast.Name) else ""


def source_of(module: str) -> str | None:
    """The file of one of our modules."""
    for name in (f"{module.replace('.', '/')}.py", f"{module.replace('.', '/')}/__init__.py"):
        if (ROOT / name).is_file():
            return name
    return None


def imported(name: str, tree: ast.AST) -> set[str]:
    """All modules that a file of ours names in an import, absolute, wherever in the file; not for type checkers."""
    package = name.removesuffix("/__init__.py").removesuffix(".py").split("/")
    package = package if name.endswith("__init__.py") else package[:-1]
    found: set[str] = set()
    for node in runtime_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            base = base if node.level else node.module or ""
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def runtime_nodes(tree: ast.AST) -> list[ast.AST]:
    """Every node but those below ``if TYPE_CHECKING:``."""
    found, left = [], [tree]
    while left:
        node = left.pop()
        found.append(node)
        if isinstance(node, ast.If) and dotted(node.test) == "TYPE_CHECKING":
            left += node.orelse
        else:
            left += ast.iter_child_nodes(node)
    return found


def privileged() -> dict[str, ast.Module]:
    """Every file of ours that prolog, epilog and reconcile can come to import, from their entries on."""
    found: dict[str, ast.Module] = {}
    left = [*ENTRIES]
    while left:
        name = left.pop()
        if name in found:
            continue
        found[name] = ast.parse((ROOT / name).read_text())
        ours = (source_of(module) for module in imported(name, found[name]) if module.startswith("slurm_mps"))
        left += [source for source in ours if source]
    return found


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(dotted(node.func), node) for node in runtime_nodes(tree) if isinstance(node, ast.Call)]


def import_problems(name: str, tree: ast.AST) -> list[str]:
    problems = [
        f"imports {top}" for top in sorted({m.partition(".")[0] for m in imported(name, tree)} & NEVER_IMPORTED)
    ]
    sockets = {"socket", "_socket"} & imported(name, tree)
    problems += [f"imports {module}" for module in sockets - {SOCKETS.get(name)}]
    for node in runtime_nodes(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "posix", "builtins"):
            problems.append(f"imports from {node.module}, which hides what is called")
        if isinstance(node, ast.Import):
            problems += [f"renames {a.name}" for a in node.names if a.asname or a.name in ("posix", "builtins")]
    return problems


def is_proc(node: ast.expr) -> bool:
    """Whether a path is a literal below /proc: the kernel's word, in which nobody plants anything."""
    first = node.values[0] if isinstance(node, ast.JoinedStr) and node.values else node
    return isinstance(first, ast.Constant) and str(first.value).startswith("/proc/")


def open_problems(name: str, call: ast.Call) -> list[str]:
    """The built-in open(): of a descriptor, or to read below /proc."""
    target = call.args[0]
    mode = ast.unparse(call.args[1]) if len(call.args) > 1 else "'r'"
    if name == FILES and isinstance(target, ast.Name) and target.id == "fd":
        return []
    if name == PROCESSES and is_proc(target) and set(mode) <= set("'rb"):
        return []
    if (name, ast.unparse(call)) == (PROCESSES, "open('/proc/self/oom_score_adj', 'r+b', buffering=0)"):
        return []
    if (name, ast.unparse(call)) == (PROCESSES, "open(program, 'rb')"):  # to say why root could not run it
        return []
    if (name, ast.unparse(call)) == (FILES, "open(path, 'rb')"):  # slurmd, too, reads slurm.conf by path
        return []
    return [f"open({ast.unparse(target)}, {mode}) by path"]


def directory_problems(function: str, call: ast.Call) -> list[str]:
    """A call that takes a name is told the directory; what is opened is no link, and what is made is new."""
    text = ast.unparse(call)
    if (function, ast.unparse(call.args[0])) == ("open", "'/'") or is_proc(call.args[0]):
        return []
    given = {keyword.arg for keyword in call.keywords}
    problems = [f"{text} without {what}" for what in sorted(BY_DIRECTORY.get(function, set()) - given)]
    if function == "open" and "O_NOFOLLOW" not in text and "_DIRECTORY" not in text:
        problems.append(f"{text} follows links")
    if function == "open" and "O_CREAT" in text and "O_EXCL" not in text and not text.startswith("os.open('lock'"):
        problems.append(f"{text} opens what somebody may have put there")
    return problems


def through_a_process(name: str, tree: ast.AST) -> list[str]:
    """Paths that lead into a file system of a process's choice, which may never answer: not even SIGKILL ends who asks.

    A link alone is read without asking anybody; its owner is looked at as the kernel has it.
    """
    called = {id(arg): dotted(call.func) for _, call in calls(tree) for arg in call.args}
    problems = []
    for node in runtime_nodes(tree):
        if isinstance(node, ast.JoinedStr | ast.Constant):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            path = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
            function = called.get(id(node), "")
            if re.match(r"/proc/[^/ ]+/(exe|root|cwd|fd|task/[^/]+/(exe|root|cwd|fd))\b", path) and (
                (name, path, function) not in THROUGH_A_PROCESS
            ):
                problems.append(f"{function}({path})")
    return problems


def problems_of(name: str, tree: ast.AST) -> list[str]:
    """What a privileged file does that it may not."""
    problems = import_problems(name, tree)
    for function, call in calls(tree):
        if function in BUILTINS - DYNAMIC.get(name, set()):
            problems.append(f"{function}()")
        if function == "open":
            problems += open_problems(name, call)
        if not function.startswith("os.") or function.count(".") > 1:
            continue
        short = function.removeprefix("os.")
        if short in EFFECTS and short not in ALLOWED.get(name, set()):
            problems.append(function)
        elif short in BY_DIRECTORY and (name, ast.unparse(call)) not in COMPARED:
            problems += directory_problems(short, call)
    return problems


PRIVILEGED = privileged()


def test_the_privileged_code_is_the_room_of_the_job_and_what_it_stands_on() -> None:
    """All of job/, but for what only looks; of the other rooms no more than is listed here."""
    job = {str(path.relative_to(ROOT)) for path in (ROOT / "slurm_mps/job").glob("*.py")}
    assert job - PRIVILEGED.keys() == {"slurm_mps/job/preview.py", "slurm_mps/job/verdict_file.py"}
    others = (
        *("__init__", "config/load", "config/settings", "errors", "hook", "record", "units"),
        *("node/__init__", "node/control", "node/files", "node/listen", "node/messages", "node/nvml"),
        *("node/processes", "node/search", "node/wordfile"),
        *("slurm/__init__", "slurm/hostlist", "slurm/jobs", "slurm/programs"),
    )
    assert PRIVILEGED.keys() - job == {f"slurm_mps/{name}.py" for name in others}


@pytest.mark.parametrize("name", sorted(PRIVILEGED))
def test_root_works_by_descriptor(name: str) -> None:
    """Nothing outside the two doors changes files or processes, and the doors themselves go by descriptor."""
    assert problems_of(name, PRIVILEGED[name]) == []


@pytest.mark.parametrize("name", sorted(str(path.relative_to(ROOT)) for path in (ROOT / "slurm_mps").rglob("*.py")))
def test_no_file_system_of_a_users_choice_is_asked(name: str) -> None:
    """Also not by what root runs by hand: doctor, status, metrics."""
    assert through_a_process(name, ast.parse((ROOT / name).read_text())) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("import os\nos.stat(f'/proc/{pid}/exe')", "os.stat(/proc/{}/exe)"),
        ("import os\nplace = f'/proc/{pid}/root/run'\nos.stat(place)", "(/proc/{}/root/run)"),
        ("open(f'/proc/{pid}/fd/{number}')", "open(/proc/{}/fd/{})"),
        ("import os\nos.listdir(f'/proc/{pid}/task/{pid}/cwd')", "os.listdir(/proc/{}/task/{}/cwd)"),
    ],
)
def test_the_lint_sees_a_planted_question(text: str, problem: str) -> None:
    assert through_a_process(PROCESSES, ast.parse(text)) == [problem]


PLANTED = [
    ("slurm_mps/job/state.py", "import os\nos.chown('/run/x', 1, 1)", "os.chown"),
    ("slurm_mps/job/state.py", "import os\nos.chmod('/run/x', 0o777)", "os.chmod"),
    ("slurm_mps/job/state.py", "import os\nos.makedirs('/run/x')", "os.makedirs"),
    ("slurm_mps/job/prolog.py", "import os\nos.system('rm -r /run/x')", "os.system"),
    ("slurm_mps/config/load.py", "import os\nos.stat('/run/x')", "os.stat('/run/x') without dir_fd"),
    ("slurm_mps/job/prolog.py", "def f():\n    import shutil\n    shutil.rmtree('/run/x')", "imports shutil"),
    ("slurm_mps/job/prolog.py", "import subprocess", "imports subprocess"),
    ("slurm_mps/job/prolog.py", "from os import chmod", "imports from os, which hides what is called"),
    ("slurm_mps/job/prolog.py", "import os as o\no.chmod('/x', 1)", "renames os"),
    ("slurm_mps/job/prolog.py", "import os\ngetattr(os, 'chmod')('/x', 1)", "getattr()"),
    ("slurm_mps/job/prolog.py", "open('/run/x', 'w')", "open('/run/x', 'w') by path"),
    ("slurm_mps/job/prolog.py", "open('/run/x')", "open('/run/x', 'r') by path"),
    (PROCESSES, "open('/proc/1/oom_score_adj', 'w')", "open('/proc/1/oom_score_adj', 'w') by path"),
    (PROCESSES, "import os\nos.kill(1, 9)", "os.kill"),
    (PROCESSES, "import os\nos.stat('/run/x')", "os.stat"),
    (FILES, "import os\nos.mkdir('/run/x')", "os.mkdir('/run/x') without dir_fd"),
    (FILES, "import os\nos.rename('a', 'b', src_dir_fd=3)", "os.rename('a', 'b', src_dir_fd=3) without dst_dir_fd"),
    (FILES, "import os\nos.open('a', os.O_RDONLY, dir_fd=3)", "os.open('a', os.O_RDONLY, dir_fd=3) follows links"),
    (
        FILES,
        "import os\nos.open('a', os.O_CREAT | os.O_NOFOLLOW, dir_fd=3)",
        "os.open('a', os.O_CREAT | os.O_NOFOLLOW, dir_fd=3) opens what somebody may have put there",
    ),
    (FILES, "open('/run/x', 'rb')", "open('/run/x', 'rb') by path"),
]


@pytest.mark.parametrize(("name", "text", "problem"), PLANTED, ids=[problem[:40] for *_, problem in PLANTED])
def test_the_lint_sees_a_planted_line(name: str, text: str, problem: str) -> None:
    assert problem in problems_of(name, ast.parse(text))


def test_the_lint_sees_a_line_planted_in_the_real_file() -> None:
    """The whole way: a line more in a file that the hooks import is found."""
    text = (ROOT / "slurm_mps/job/lifecycle.py").read_text()
    planted = f"{text}\n\ndef tidy() -> None:\n    import os\n\n    os.rename('/run/a', '/run/b')\n"
    assert problems_of("slurm_mps/job/lifecycle.py", ast.parse(planted)) == ["os.rename"]


# ------------------------------------------------------------------------------------------------------- the plugin

UNSAFE_C = re.compile(
    r"\b(strcpy|strcat|sprintf|vsprintf|gets|alloca|system|popen|strtok|tmpnam|mktemp|chown|chmod)\s*\("
)


def c_problems(text: str) -> list[str]:
    """Functions without a bound, and a file that is opened to be inherited, unless it is /dev/null."""
    code = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    problems = [match[1] for match in UNSAFE_C.finditer(code)]
    opened = re.findall(r"\b(?:open|openat|socket)\((?:[^()]|\([^()]*\))*\)", code)
    return problems + [call for call in opened if "_CLOEXEC" not in call and '"/dev/null"' not in call]


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "spank").glob("*.[ch]")))
def test_the_plugin_calls_nothing_without_a_bound(name: str) -> None:
    assert c_problems((ROOT / "spank" / name).read_text()) == []


def test_the_lint_of_the_plugin_sees_a_planted_line() -> None:
    assert c_problems("fd = open(path, O_RDONLY);\nstrcpy(a, b);") == ["strcpy", "open(path, O_RDONLY)"]
    assert c_problems("fd = openat(d, MARK, O_WRONLY | O_CREAT, 0600);") == [
        "openat(d, MARK, O_WRONLY | O_CREAT, 0600)"
    ]
