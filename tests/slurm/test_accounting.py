"""What Slurm's database keeps of MPS jobs: slurmdbd on MariaDB, and the queries of docs/accounting.md."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.harness.cluster import REPOSITORY
from tests.harness.release import chosen
from tests.harness.runtime import MOUNT_POINT
from tests.harness.site import MarkedSite

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.cluster import Job
    from tests.harness.machine import Machine

SPARE = "comment" if chosen().name == "22.05" else "extra"  # what else Slurm keeps of a job
DATA = "/var/lib/accounting"
SOCKET = "/run/mysqld/mysqld.sock"
SLURM_CONF = f"""AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStorageTRES=gres/gpu
AccountingStoreFlags=job_{SPARE}
"""
DBD_CONF = """AuthType=auth/munge
DbdHost=localhost
DbdAddr=localhost
SlurmUser=slurm
LogFile=/var/log/slurm/slurmdbd.log
PidFile=/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageUser=slurm
StorageLoc=slurm_acct_db
"""
USERS = "create database slurm_acct_db; create user slurm@localhost identified via unix_socket; \
grant all on slurm_acct_db.* to slurm@localhost"
_SECONDS = 30.0


class AccountedSite(MarkedSite):
    """A marked site whose jobs are in a database of its own."""

    def start_accounting(self) -> None:
        """MariaDB, slurmdbd, then slurmctld again, which needs both at its first start with them."""
        machine = self.machine
        for directory in (DATA, "/run/mysqld"):
            machine.make_directory(directory, user="mysql")
        how = ["--user=mysql", f"--datadir={DATA}", "--skip-test-db", "--auth-root-authentication-method=socket"]
        machine.run(["mariadb-install-db", *how], timeout=_SECONDS).check()
        network = ["--skip-networking", f"--socket={SOCKET}"]
        machine.popen(["mariadbd", "--user=mysql", f"--datadir={DATA}", *network], stderr=subprocess.DEVNULL)
        socket = machine.path(SOCKET)
        self.cluster.until("MariaDB's socket", lambda: socket.exists() or None, _SECONDS)
        machine.run(["mariadb", "-e", USERS]).check()
        machine.write("/etc/slurm/slurmdbd.conf", DBD_CONF, mode=0o600, user="slurm")
        self.start_slurmdbd()
        conf = machine.read("/etc/slurm/slurm.conf")
        lines = [line for line in conf.splitlines() if not line.startswith("AccountingStorage")]
        machine.write("/etc/slurm/slurm.conf", "\n".join([*lines, SLURM_CONF]))
        self.cluster.until(
            "slurmdbd knows the cluster",
            lambda: machine.run(["sacctmgr", "-i", "add", "cluster", "mpstest"]).returncode == 0 or None,
            _SECONDS,
        )
        self.cluster.stop_daemon("slurmctld")
        machine.run(["rm", "/var/spool/slurmctld/clustername"]).check()  # the database gives the cluster another id
        self.cluster.start_controller()

    def start_slurmdbd(self) -> None:
        self.slurmdbd = self.machine.popen(["/usr/sbin/slurmdbd", "-D"], user="slurm", stderr=subprocess.DEVNULL)

    def kept(self, job: Job, state: str = "COMPLETED", field: str = "AdminComment") -> str:
        """A job's AdminComment in the database, or another field, once the job's end is there."""
        ask = ["sacct", "-XnPo", f"State,End,{field}", "-j", str(job)]

        def look() -> str | None:
            words = self.machine.run(ask).stdout.strip().split("|")
            return words[2] if words[0] == state and words[1] != "Unknown" else None

        return self.cluster.until(f"job {job} {state} in sacct", look, _SECONDS)


def _has_database(machine: Machine) -> bool:
    return all(machine.path(f"/usr/sbin/{name}").exists() for name in ("slurmdbd", "mariadbd"))


@pytest.fixture(scope="module")
def accounted() -> Iterator[AccountedSite]:
    with AccountedSite() as site:
        if not _has_database(site.machine):
            pytest.skip("slurmdbd and mariadbd are not installed; `make test-accounting` installs them")
        site.start_accounting()
        yield site


def _queries() -> list[str]:
    """The commands of docs/accounting.md."""
    text = (REPOSITORY / "docs/accounting.md").read_text()
    return re.findall(r"```sh\n(.*?)```", text, re.DOTALL)


def test_sacct_shows_what_each_job_asked(accounted: AccountedSite) -> None:
    """In AdminComment, for good, and nothing of a job that did not ask."""
    run = accounted.cluster.sbatch
    jobs = [
        run("--gres=gpu:1", "--mps-threads=25", "--mps-mem=8G", script="true"),
        run("--gres=gpu:2", "--mps=per-gpu", script="true"),
        run("--gres=gpu:1", script="true"),
    ]
    assert [accounted.kept(job) for job in jobs] == ["mps:threads=25,mem=8G", "mps:per-gpu", ""]


def test_the_mark_survives_a_tool_that_rewrites_it(accounted: AccountedSite) -> None:
    """In the second field that a site lets be marked, before what the job's user wrote there."""
    path, machine = "/etc/slurm/job_submit.lua", accounted.machine
    script = machine.read(path)
    machine.write(path, script.replace('{ "admin_comment" }', f'{{ "admin_comment", "{SPARE}" }}'))
    job = accounted.cluster.sbatch("--gres=gpu:1", "--mps", f"--{SPARE}=own", script="true")
    machine.write(path, script)
    assert accounted.kept(job) == "mps"
    machine.run(["sacctmgr", "-i", "modify", "job", f"jobid={job}", "set", "AdminComment=other"]).check()
    assert [accounted.kept(job, field=field) for field in ("AdminComment", SPARE)] == ["other", "mps;own"]


def test_a_database_that_is_down_keeps_no_job_waiting(accounted: AccountedSite) -> None:
    """Slurm keeps the records until slurmdbd is there again; no hook of ours asks for it."""
    accounted.machine.signal(accounted.slurmdbd, 15)
    accounted.slurmdbd.wait(_SECONDS)
    job = accounted.cluster.sbatch("--gres=gpu:1", "--mps", script="true")
    state = accounted.cluster.wait(job).state
    accounted.start_slurmdbd()
    assert state == "COMPLETED"
    assert accounted.kept(job) == "mps"


def test_the_queries_of_the_page_answer(accounted: AccountedSite) -> None:
    """Each as it stands there, on jobs of which one has a fault that crosses ranks and three are refused."""
    run, machine = accounted.cluster.sbatch, accounted.machine
    jobs = [
        run("--gres=gpu:2", "--mps-threads=25", script="sleep 2", user="carol"),
        run("--gres=gpu:1", script="sleep 2", user="bob"),
    ]
    rank_1_faults = "[ $SLURM_PROCID = 1 ] && echo --hold 1 --fault || echo --hold 2"
    faulty = f"srun sh -c 'simulated-gpus client $({rank_1_faults})' || true"
    jobs.append(run("-wn1", "-n2", "--gres=gpu:1", "--mps", script=faulty, user="carol"))
    refused = run("--gres=gpu:1", "--mps-mem=500G", script="true", user="carol")
    for job in jobs:
        accounted.kept(job)
    accounted.kept(refused, "FAILED")
    assert machine.run(["srun", "--gres=gpu:1", "--mps-mem=500G", "true"], user="carol").returncode == 83
    assert machine.run(["salloc", "--mps", "srun", "true"], user="carol").returncode == 81
    hours, why, asked, crossed = _queries()

    def in_a_weeks_list() -> str | None:
        said = machine.run(["sh", "-c", why]).check().stdout
        return said if len(said.split()) == 4 and said.startswith("2") else None

    said = accounted.cluster.until("all that was refused in the week's list", in_a_weeks_list, _SECONDS)
    assert said.splitlines() == ["2 memory", "1 no_gpu"]
    hours, asked = (machine.run(["sh", "-c", query]).check().stdout for query in (hours, asked))
    assert re.search(r"^carol\t\d+\.\d GPU hours\t100 % with MPS$", hours, re.MULTILINE)
    assert re.search(r"^bob\t\d+\.\d GPU hours\t0 % with MPS$", hours, re.MULTILINE)
    assert re.search(r"^ *1 mps:threads=25$", asked, re.MULTILINE)
    (fault,) = accounted.node("n1", "sh", "-c", f"PATH=$PATH:{MOUNT_POINT}/bin; {crossed}").check().stdout.splitlines()
    assert re.match(rf"job {jobs[2]}: .* GPU FAULT on .* by client \d+ and took client \d+ along", fault)
