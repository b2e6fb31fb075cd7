"""What strace saw of a hook, to hold against the calls that the library in front of libc counted."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_HARMLESS = """
access arch_prctl brk chdir clock_nanosleep close connect dup dup2 epoll_create1 execve exit exit_group faccessat2
fadvise64 fcntl fgetxattr fstat fstatfs futex getcwd getdents64 getegid geteuid getgid getpgrp getpid getppid getrandom
getsockopt gettid getuid ioctl lgetxattr lseek madvise mmap mprotect mremap munmap newfstatat openat pidfd_open pipe2
poll prctl pread64 prlimit64 read readlink readlinkat restart_syscall rseq rt_sigaction rt_sigprocmask rt_sigreturn
sched_getaffinity sched_yield set_robust_list set_tid_address socket stat statfs statx sysinfo umask uname wait4
"""
#: What changes nothing but the process itself, and says nothing to anybody; a lock goes with the process.
HARMLESS = frozenset(_HARMLESS.split())
_FILES = ("mkdirat", "unlinkat", "linkat", "renameat", "fsetxattr", "fchmod", "ftruncate", "fsync", "write", "openat")
#: What the library counts, by the system call that it comes to.
COUNTED = {**{name: name for name in _FILES}, "clone3": "posix_spawn", "vfork": "posix_spawn", "kill": "killpg"} | {
    "pidfd_send_signal": "pidfd_send_signal",
    "utimensat": "futimens",
    "clone": "fork",
}
_SIGNALS = ("kill", "pidfd_send_signal")
_LINE = re.compile(r"(\d+) +(?:<\.\.\. (\w+) resumed>|(\w+)\()(.*)")
_THREAD = re.compile(r"parent_tid=\[(\d+)\]")


def _every_call(text: str) -> Iterator[tuple[str, str, str, str]]:
    """Thread, name, arguments and result of each call, put together where another thread's came between."""
    begun: dict[str, str] = {}
    for line in text.splitlines():
        if parsed := _LINE.match(line):
            thread, resumed, name, rest = parsed.groups()
            if rest.endswith("<unfinished ...>"):
                begun[thread] = rest.removesuffix("<unfinished ...>")
            else:
                arguments, _, result = ((begun.pop(thread) if resumed else "") + rest).rpartition(" = ")
                yield thread, name or resumed, arguments, result


def _calls(text: str) -> Iterator[tuple[str, str, str]]:
    """The calls of the traced process and its threads, not of its children."""
    every = list(_every_call(text))
    threads = {every[0][0]}
    for _, _, arguments, result in every:  # only the traced process makes threads: it is left alone once it execs
        if "CLONE_THREAD" in arguments:
            threads.update(_THREAD.findall(f"{arguments} = {result}"))
    for thread, name, arguments, result in every:
        if thread in threads and "CLONE_THREAD" not in arguments:
            yield name, arguments, result


def _changes(name: str, arguments: str, was_there: tuple[str, ...]) -> bool:
    """Whether a call that succeeded changed something outside the process."""
    if name == "openat":
        makes = "O_CREAT" in arguments or "O_TRUNC" in arguments
        return makes and not any(f'"{path}"' in arguments for path in was_there)
    if name == "write":  # to a file; a pipe or a socket is somebody's standard input, and 1 and 2 are its own streams
        return bool(re.match(r"(?![012]<)\d+</[^>]*>", arguments))
    if name in _SIGNALS:
        return not re.match(r"[^,]*, 0[,)]", arguments)
    return name not in HARMLESS


def changes(text: str, log: str, was_there: tuple[str, ...] = ()) -> tuple[Counter[str], list[str]]:
    """What a traced hook changed, by the library's names, and the calls that can change something and are not counted.

    `log` is the library's own file; `was_there` are files that opening does not make.
    """
    found: Counter[str] = Counter()
    unknown = []
    for name, arguments, result in _calls(text):
        failed = result.startswith(("-1", "?")) and name not in _SIGNALS  # one that comes too late counts, too
        if failed or log in arguments or not _changes(name, arguments, was_there):
            continue
        if name in COUNTED:
            found[COUNTED[name]] += 1
        else:
            unknown.append(f"{name}({arguments} = {result}")
    return found, unknown
