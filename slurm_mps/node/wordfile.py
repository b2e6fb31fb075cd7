"""The one format of every file that slurm-mps keeps: lines of words, with a first line that says what and an end.

    slurm-mps journal 1
    job id=4711 uid=20001
    end 5d41402a

Read by Python (all of it) and by the plugin in C (verdicts); written whole and renamed into place. JSON would cost
the prolog as much time as Python takes to start (docs/decisions/0003).

Promise: a file that is cut short, changed, of another kind or of a newer version is never taken for a good one.
"""

from __future__ import annotations

from binascii import crc32

from ..errors import NodeError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_MAGIC = "slurm-mps"
_SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._:,+@=-")


class DamagedFileError(NodeError):
    """A file of ours is not what was written: cut short, changed, or something else."""


class NewerFileError(NodeError):
    """A file of ours was written by a newer slurm-mps; it is left as it is."""


def quote(text: str) -> str:
    """Make one word of any text: bytes outside a safe set become ``%XX``, nothing becomes ``%``."""
    if _SAFE.issuperset(text):
        return text or "%"
    return "".join(
        c if c in _SAFE else "".join(f"%{byte:02X}" for byte in c.encode("utf-8", "surrogateescape")) for c in text
    )


def unquote(word: str) -> str:
    """Undo quote().

    Raises: DamagedFileError for a word that quote() cannot have made.
    """
    if "%" not in word:
        return word
    if word == "%":
        return ""
    first, *rest = word.split("%")
    try:
        data = first.encode() + b"".join(bytes([int(part[:2], 16)]) + part[2:].encode() for part in rest)
    except ValueError:
        raise DamagedFileError(f"bad word {word[:40]!r}") from None
    return data.decode("utf-8", "surrogateescape")


def fields(words: Iterable[str]) -> dict[str, str]:
    """Read ``key=value`` words.

    Raises: DamagedFileError when a word is none.
    """
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise DamagedFileError(f"{word[:40]!r} is not key=value")
        found[key] = unquote(value)
    return found


def with_fields(name: str, values: dict[str, str]) -> str:
    """Write a line of a name and ``key=value`` words."""
    return " ".join([name, *(f"{key}={quote(value)}" for key, value in values.items())])


def encode(kind: str, version: int, lines: Iterable[str]) -> bytes:
    """Make a whole file of lines (without line ends) of one kind and version."""
    body = "".join(f"{line}\n" for line in (f"{_MAGIC} {kind} {version}", *lines)).encode("ascii")
    return body + f"end {crc32(body):08x}\n".encode()


def decode(data: bytes, kind: str, version: int) -> list[str]:
    """Give back the lines of a file of this version.

    Raises: NewerFileError for the same kind in a later version; DamagedFileError for anything else unexpected.
    """
    body, _, end = data.rpartition(b"end ")
    header = data.partition(b"\n")[0].decode("ascii", "replace").split(" ")
    number = header[2] if len(header) == 3 and header[:2] == [_MAGIC, kind] else ""
    found = int(number) if number.isascii() and number.isdigit() and len(number) < 10 else 0
    if found > version:
        raise NewerFileError(f"{kind} version {found} is newer than version {version}")
    whole = body.isascii() and body.endswith(b"\n") and end == f"{crc32(body):08x}\n".encode()
    if str(found) != number or not whole or found < version:
        raise DamagedFileError(f"not a whole {kind} of version {version}")
    return body.decode("ascii").splitlines()[1:]
