"""A job's journal: the job's identity, and the undo of each action, on disk before the action runs.

slurm-mps journal 1
job id=4711 uid=20001 run=5d41402a boot=<boot id> node=n1 ready=yes
undo release_gpu gpu=GPU-...
undo quit_daemons names=pipe
"""

from __future__ import annotations

from ..config.settings import CONFIG_VERSION, from_lines, to_lines
from ..errors import NodeError
from ..node.wordfile import DamagedFileError, decode, encode, fields, with_fields
from ..record import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..config.settings import SiteConfig
    from ..node.files import Directory
    from .verdict import Verdict

JOURNAL_VERSION = 1
FILE = "journal"


class Journal:
    """One job on this node: its identity, and the undos of the actions that ran for it."""

    def __init__(self, directory: Directory, job_id: int, uid: int, run: str, boot_id: str, node: str = "") -> None:
        self.directory = directory
        self.job_id = job_id
        self.uid = uid
        self.run = run  #: which run of the job (request.run_of_job)
        self.boot_id = boot_id
        self.node = node  #: what Slurm calls this node
        self.undo: list[str] = []
        self.ready = False
        self.claims = False  #: whether a GPU may have been claimed, so that undoing it asks NVML
        self.waited = ""  #: what the job had to wait for that other jobs do; being late is then no fault of the node

    def write(self) -> None:
        """Put the journal on disk as it stands."""
        who = {
            "id": str(self.job_id),
            "uid": str(self.uid),
            "run": self.run,
            "boot": self.boot_id,
            "node": self.node,
            "ready": "yes" if self.ready else "no",
        }
        lines = [with_fields("job", who), *(f"undo {line}" for line in self.undo)]
        self.directory.write(FILE, encode("journal", JOURNAL_VERSION, lines))

    def note(self, *undos: str) -> None:
        """Put the undos of the next actions on disk. The last undo of the journal runs first."""
        self.undo += undos
        self.write()

    def write_verdict(self, verdict: Verdict) -> None:
        self.directory.write("verdict", replace(verdict, uid=self.uid).encode(), mode=0o644)

    def tell_tasks(self, verdict: Verdict) -> None:
        """Leave the verdict of a job without MPS. Without ACLs the directory is opened to all: there is no daemon in
        it.

        Raises: NodeError; then there is no verdict at all.
        """
        try:
            try:
                self.directory.grant_user(self.uid)
            except NodeError:
                self.directory.open_to_all()
            self.write_verdict(verdict)
        except NodeError:
            self.directory.unlink("verdict")
            raise

    def write_config(self, config: SiteConfig) -> None:
        self.directory.write("config", encode("config", CONFIG_VERSION, to_lines(config)))

    def read_config(self) -> SiteConfig | None:
        """The configuration of the job's bring-up; None when the prolog ended before writing it."""
        try:
            return from_lines(decode(self.directory.read("config"), "config", CONFIG_VERSION))
        except FileNotFoundError:
            return None


def read_journal(directory: Directory) -> Journal:
    """Read the journal of a job's directory.

    Raises: FileNotFoundError; DamagedFileError, NewerFileError, NodeError.
    """
    lines = decode(directory.read(FILE), "journal", JOURNAL_VERSION)
    try:
        name, *words = lines[0].split(" ")
        who = fields(words)
        journal = Journal(directory, int(who["id"]), int(who["uid"]), who["run"], who["boot"], who["node"])
        journal.ready = who["ready"] == "yes"
    except (IndexError, KeyError, ValueError):
        raise DamagedFileError(f"{directory.path}/journal does not name its job") from None
    undo = [line.partition(" ")[::2] for line in lines[1:]]
    if name != "job" or any(key != "undo" for key, _ in undo):
        raise DamagedFileError(f"{directory.path}/journal has lines of another kind")
    journal.undo = [line for _, line in undo]
    return journal
