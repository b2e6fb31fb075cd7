"""Privileged work on files: what is trusted, what is written whole, and what removal leaves alone."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from slurm_mps.errors import DeadlineError, NodeError
from slurm_mps.node import files
from slurm_mps.node.files import Directory, LockFile, make_trusted, open_trusted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ALICE, BOB = 20001, 20002


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory of root's in /tmp that every user may enter."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.fixture
def directory(place: Path) -> Iterator[Directory]:
    with open_trusted(str(place)) as opened:
        yield opened


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def as_user(uid: int, *argv: str | Path) -> int:
    return subprocess.run(argv, user=uid, group=uid, extra_groups=[], capture_output=True, check=False).returncode


# ------------------------------------------------------------------------------------------------ what is trusted

UNTRUSTED: dict[str, Callable[[Path], object]] = {
    "group-writable": lambda path: path.chmod(0o775),
    "world-writable": lambda path: path.chmod(0o757),
    "a user's": lambda path: os.chown(path, ALICE, ALICE),
}


@pytest.mark.parametrize("spoil", UNTRUSTED.values(), ids=UNTRUSTED)
@pytest.mark.parametrize("depth", [1, 2])
def test_a_directory_that_others_may_write_is_refused(place: Path, spoil: Callable[[Path], object], depth: int) -> None:
    """A trusted directory and every one above it is root's and can be written by nobody else."""
    (place / "one/two").mkdir(parents=True)
    spoil(place / "one" if depth == 1 else place / "one/two")
    with pytest.raises(NodeError, match="can be written by others than root"):
        open_trusted(f"{place}/one/two")


def test_a_sticky_directory_is_trusted(place: Path) -> None:
    """In /tmp others can write, and not touch what is root's."""
    (place / "tmp/mine").mkdir(parents=True)
    (place / "tmp").chmod(0o1777)
    open_trusted(f"{place}/tmp/mine").close()


def test_a_link_on_the_way_is_refused(place: Path) -> None:
    """No component of a trusted path is a symbolic link, wherever it leads."""
    (place / "real/inner").mkdir(parents=True)
    (place / "link").symlink_to(place / "real")
    for path in (f"{place}/link", f"{place}/link/inner"):
        with pytest.raises(NodeError, match="link"):
            open_trusted(path)
    with pytest.raises(NodeError, match="link"):
        make_trusted(f"{place}/link", 0o700)


def test_a_directory_that_is_not_there(place: Path) -> None:
    """The caller can tell absence from distrust."""
    with pytest.raises(FileNotFoundError):
        open_trusted(f"{place}/none")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc", "../x", "nul\0"])
def test_a_name_cannot_leave_the_directory(directory: Directory, name: str) -> None:
    """Names are single components; anything else is refused before it reaches the kernel."""
    actions: list[Callable[[], object]] = [
        lambda: directory.read(name),
        lambda: directory.read_tail(name, 10),
        lambda: directory.write(name, b""),
        lambda: directory.unlink(name),
        lambda: directory.make(name, 0o700),
        lambda: directory.subdirectory(name),
        lambda: directory.remove_tree(name),
    ]
    for action in actions:
        with pytest.raises(NodeError, match="is no name"):
            action()


def test_make_gives_exactly_the_mode_whatever_the_umask(place: Path, directory: Directory) -> None:
    """A directory is never, not even for a moment, open to more than was asked, and has all that was asked."""
    before = os.umask(0o077)
    try:
        directory.make("open", 0o755).close()
        os.umask(0)
        directory.make("shut", 0o700).close()
        assert os.umask(0) == 0, "the umask is put back"
    finally:
        os.umask(before)
    assert (mode(place / "open"), mode(place / "shut")) == (0o755, 0o700)


def test_make_opens_what_is_there(place: Path, directory: Directory) -> None:
    """Making a directory twice is fine; a file or a link in its place is not."""
    directory.make("twice", 0o700).close()
    directory.make("twice", 0o700).close()
    (place / "file").touch()
    (place / "link").symlink_to(place / "twice")
    for name in ("file", "link"):
        with pytest.raises(NodeError):
            directory.make(name, 0o700)


# -------------------------------------------------------------------------------------------------------- reading


def replace_by(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        path.unlink()
        make(path)

    return spoil


STRANGE: dict[str, Callable[[Path], object]] = {
    "symlink": replace_by(lambda path: os.symlink("/etc/hostname", path)),
    "hard link": lambda path: os.link(path, path.with_name("second")),
    "fifo": replace_by(os.mkfifo),
    "device": replace_by(lambda path: os.mknod(path, 0o20600, os.makedev(1, 3))),
    "directory": replace_by(os.mkdir),
    "group-writable": lambda path: path.chmod(0o660),
    "world-writable": lambda path: path.chmod(0o602),
    "a user's": lambda path: os.chown(path, ALICE, ALICE),
    "too long": lambda path: path.write_bytes(b"x" * 101),
}


@pytest.mark.parametrize("spoil", STRANGE.values(), ids=STRANGE)
def test_only_a_plain_file_of_roots_is_read(place: Path, directory: Directory, spoil: Callable[[Path], object]) -> None:
    """Links, fifos, devices, directories and files that others may write are refused, and never waited for."""
    path = place / "file"
    path.write_bytes(b"x" * 100)
    assert directory.read("file", 100) == b"x" * 100
    spoil(path)
    with pytest.raises(NodeError):
        directory.read("file", 100)


def test_a_file_that_is_replaced_all_the_time_is_read_whole(place: Path, directory: Directory) -> None:
    """A ledger that other jobs write: between open and fstat it may have lost its name."""
    (place / "file").write_text("x" * 100)
    replace = "import os\nwhile True:\n    open('new', 'w').write('x' * 100)\n    os.rename('new', 'file')\n"
    with subprocess.Popen([sys.executable, "-c", replace], cwd=place) as other:
        try:
            first = directory.stamp("file")
            while directory.stamp("file") == first:
                assert other.poll() is None
            read = {directory.read("file") for _ in range(20_000)}
        finally:
            other.kill()
    assert read == {b"x" * 100}


def test_a_log_is_read_from_its_end(place: Path, directory: Directory) -> None:
    """read_tail() gives at most the last bytes of a file of root's, and nothing of anything else."""
    (place / "log").write_bytes(b"0123456789")
    assert directory.read_tail("log", 4) == b"6789"
    assert directory.read_tail("log", 40) == b"0123456789"
    with pytest.raises(FileNotFoundError):
        directory.read_tail("none", 4)
    for name in ("symlink", "hard link", "fifo", "device", "a user's"):
        (place / "file").write_bytes(b"secret")
        STRANGE[name](place / "file")
        with pytest.raises((NodeError, OSError)):
            directory.read_tail("file", 4)
        directory.unlink("file")
        directory.unlink("second")


def test_a_file_that_all_may_write_is_made_roots_own(place: Path, directory: Directory) -> None:
    """protect() takes the right to write from all but root; the content, and what a link leads to, stay as they are."""
    path = place / "file"
    path.write_bytes(b"as it was")
    path.chmod(0o666)
    directory.protect("file")
    assert (mode(path), path.read_bytes()) == (0o644, b"as it was")
    directory.protect("none")
    for name in ("symlink", "hard link", "fifo", "device", "directory", "a user's"):
        victim = place / name
        victim.write_bytes(b"")
        STRANGE[name](victim)
        before = mode(Path("/etc/hostname")), mode(victim)
        with pytest.raises(NodeError):
            directory.protect(name)
        assert (mode(Path("/etc/hostname")), mode(victim)) == before
        directory.unlink("second")


# -------------------------------------------------------------------------------------------------------- writing


def test_a_file_is_written_with_its_mode_and_nothing_beside_it(place: Path, directory: Directory) -> None:
    """Root alone reads what is written, unless said otherwise; a second write replaces the first."""
    directory.write("file", b"first")
    directory.write("open", b"first", mode=0o644)
    directory.write("file", b"second")
    assert (place / "file").read_bytes() == b"second"
    assert (mode(place / "file"), mode(place / "open")) == (0o600, 0o644)
    assert directory.names() == ["file", "open"]


def test_a_file_in_a_readers_hands_does_not_change(place: Path, directory: Directory) -> None:
    """Writing makes a new file: whoever has the old one open reads all of the old one."""
    directory.write("file", b"first")
    with (place / "file").open("rb") as reader:
        directory.write("file", b"second")
        assert reader.read() == b"first"


@pytest.mark.parametrize("left", ["file", "link", "directory"])
def test_a_write_is_not_misled_by_what_a_crash_left(place: Path, directory: Directory, left: str) -> None:
    """A temporary file from before is replaced, a link in its place is not followed, a directory is said."""
    (place / "target").write_bytes(b"untouched")
    temporary = place / ".file.new"
    if left == "file":
        temporary.write_bytes(b"x" * 1000)
    elif left == "link":
        temporary.symlink_to(place / "target")
    else:
        temporary.mkdir()
        with pytest.raises(NodeError):
            directory.write("file", b"whole")
        return
    directory.write("file", b"whole")
    assert (place / "file").read_bytes() == b"whole"
    assert (place / "target").read_bytes() == b"untouched"
    assert directory.names() == ["file", "target"]


def test_a_write_that_runs_out_of_room_leaves_the_old_file(place: Path, directory: Directory) -> None:
    """When the disk takes only a part, the file of before is whole, the error names it, and nothing is beside it."""
    directory.write("file", b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(NodeError, match=f"{place}/file: File too large"):
            directory.write("file", b"x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (place / "file").read_bytes() == b"before"
    assert directory.names() == ["file"]


@pytest.mark.parametrize("call", ["fsync", "rename", "fchmod"])
def test_a_write_that_fails_late_leaves_the_old_file(
    place: Path, directory: Directory, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The new content is in place only when it is on disk, with its mode; until then the old one is."""

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    directory.write("file", b"before")
    monkeypatch.setattr(os, call, fails)
    with pytest.raises(NodeError, match="No space left on device"):
        directory.write("file", b"after")
    monkeypatch.undo()
    assert (place / "file").read_bytes() == b"before"
    assert directory.names() == ["file"]


# -------------------------------------------------------------------------------------------------------- removing


def test_a_tree_is_removed_and_a_second_time_is_fine(place: Path, directory: Directory) -> None:
    """Files, sockets' and fifos' names and directories go; none there is fine."""
    (place / "tree/a/b").mkdir(parents=True)
    (place / "tree/a/file").touch()
    os.mkfifo(place / "tree/a/b/fifo")
    directory.remove_tree("tree")
    directory.remove_tree("tree")
    directory.unlink("tree")
    assert directory.names() == []


def test_removal_follows_no_link(place: Path, directory: Directory) -> None:
    """A link in a tree is removed as a link; what it leads to stays. A tree that is a link is refused."""
    (place / "precious").mkdir()
    (place / "precious/file").touch()
    (place / "tree").mkdir()
    (place / "tree/link").symlink_to(place / "precious")
    (place / "tree/file").symlink_to(place / "precious/file")
    directory.remove_tree("tree")
    assert directory.names() == ["precious"]
    (place / "tree").symlink_to(place / "precious")
    with pytest.raises(NodeError):
        directory.remove_tree("tree")
    assert (place / "precious/file").exists()


def test_removal_leaves_another_file_system_alone(place: Path) -> None:
    """Something that is mounted in a tree is neither emptied nor passed over in silence."""
    program = f"""
import os, subprocess
from slurm_mps.errors import NodeError
from slurm_mps.node.files import open_trusted
os.makedirs("{place}/tree/mounted")
subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=700", "none", "{place}/tree/mounted"], check=True)
open("{place}/tree/mounted/file", "w").close()
try:
    open_trusted("{place}").remove_tree("tree")
except NodeError as error:
    print(error)
print(os.listdir("{place}/tree/mounted"))
"""
    command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", program]
    root = Path(__file__).parents[2]
    shown = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=20, check=True).stdout
    assert shown == "mounted lies on another file system and is left alone\n['file']\n"


@pytest.mark.parametrize("shape", ["deep", "wide"])
def test_removal_gives_up_on_what_is_not_of_our_making(
    place: Path, directory: Directory, monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    """A tree deeper or larger than slurm-mps ever makes is left for the admin, in bounded time."""
    monkeypatch.setattr(files, "_REMOVE_LIMIT_ENTRIES", 20)
    names = ["/".join("abcdefghij")] if shape == "deep" else [f"{number}" for number in range(21)]
    for name in names:
        (place / "tree" / name).mkdir(parents=True)
    with pytest.raises(NodeError, match="more than slurm-mps ever makes"):
        directory.remove_tree("tree")


# ------------------------------------------------------------------------------------------------- access and locks


def test_a_granted_user_may_enter_and_list_and_no_more(place: Path, directory: Directory) -> None:
    """The ACL lets one user look, and neither that user change anything nor another one in (O24)."""
    with directory.make("job", 0o700) as job:
        job.grant_user(ALICE)
        job.write("verdict", b"ready\n", mode=0o644)
    inside = place / "job/verdict"
    assert as_user(ALICE, "ls", place / "job") == 0
    assert as_user(ALICE, "cat", inside) == 0
    assert as_user(ALICE, "touch", place / "job/new") != 0
    assert as_user(ALICE, "rm", "-f", inside) != 0
    assert as_user(BOB, "ls", place / "job") != 0
    assert as_user(BOB, "cat", inside) != 0
    open_trusted(str(place / "job")).close()


def test_who_was_let_in_is_let_out_again(place: Path, directory: Directory) -> None:
    with directory.make("logs", 0o700) as logs:
        logs.grant_user(ALICE)
        logs.grant_user(None)
    assert as_user(ALICE, "ls", place / "logs") != 0
    assert directory.user_let_in("logs") is None


def test_a_lock_is_waited_for_and_ends_with_its_process(directory: Directory) -> None:
    """A lock that another process keeps is an error after the time; its end, however it comes, gives it free."""
    program = (
        "import sys, time; from slurm_mps.node.files import LockFile, open_trusted; "
        f"d = open_trusted('{directory.path}'); lock = LockFile(d); lock.acquire(7, 1); "
        "print('held', flush=True); time.sleep(60)"
    )
    root = Path(__file__).parents[2]
    other = subprocess.Popen([sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    lock = LockFile(directory)
    lock.acquire(8, 1)  # another number is another lock
    with pytest.raises(DeadlineError, match=r"/lock: another slurm-mps has kept lock 7 for 0\.05 s"):
        lock.acquire(7, 0.05)
    threading.Timer(0.05, other.kill).start()
    lock.acquire(7, 5)
    lock.release(7)
    other.wait()
    other.stdout.close()
    lock.close()


def test_a_lock_is_not_inherited(directory: Directory) -> None:
    """A daemon that a hook starts does not keep the hook's locks, nor the file they are on."""
    lock = LockFile(directory)
    lock.acquire(1, 1)
    held = subprocess.run(["ls", "-l", "/proc/self/fd"], close_fds=False, capture_output=True, text=True, check=True)
    assert "/lock" not in held.stdout
    child = os.fork()
    if child == 0:
        try:
            LockFile(directory).acquire(1, 0.05)
        except DeadlineError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    lock.close()


def test_the_lock_file_is_not_opened_through_a_link(place: Path, directory: Directory) -> None:
    """A link in the lock file's place is not followed."""
    (place / "lock").symlink_to(place / "elsewhere")
    with pytest.raises((NodeError, OSError)):
        LockFile(directory)
    assert not (place / "elsewhere").exists()
