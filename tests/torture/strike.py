"""The kill matrix: every hook, struck at every call by which it changes something, and then repaired in each way.

Scenarios say what is struck, faults how, repairs who comes next. Whatever the combination, the node is then as before.
"""

from __future__ import annotations

import errno
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.harness.gpunode import EPILOG, PROLOG, asked, job_environment
from tests.harness.site import PYTHON, STATE_DIRECTORY

from .node import MistreatedNode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.harness.machine import Result

#: As the command that users type starts it; that one takes LD_PRELOAD, and the library, away.
RECONCILE = (PYTHON, "-I", "-c", "import sys; from slurm_mps.cli.main import main; sys.exit(main())", "reconcile")
LOGS = "/var/log/slurm-mps"
LIBRARY, LOG = "/run/strike.so", "/run/strike.log"
CAN_FAIL = "mkdirat unlinkat linkat renameat fsetxattr fchmod ftruncate futimens fsync write posix_spawn fork openat"
CHANGES = f"{CAN_FAIL} killpg pidfd_send_signal"
CAN_DIE = f"{CHANGES} poll"  # in the first wait for a child, too: started, and not done
FAULTS = {"SIGKILL": 0, **{name: getattr(errno, name) for name in ("ENOSPC", "EIO", "EMFILE", "EACCES")}}
JOB, ANOTHER, A_THIRD = 4711, 4712, 4713
KINDS = ("per-node", "per-gpu")
PATIENCE = "[deadlines]\nquit = 0.5\nsignal = 0.5\n"
JOINED = f'{PATIENCE}[gpus]\nsharing = "joined"\n'
ALL_USERS = f'{JOINED}joined_users = "all"\n[limits.memory]\nmax = "40G"\n'
BOBS = 4714


def build_library(directory: Path) -> Path:
    """Compile the library that strikes."""
    built = directory / "strike.so"
    source = Path(__file__).with_name("strike.c")
    command = ["gcc", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-o", str(built), str(source), "-ldl"]
    subprocess.run(command, check=True, timeout=60)
    return built


class StruckNode(MistreatedNode):
    """A node with the library in it, and something to put back: GPU 0 is found PROHIBITED."""

    def __init__(self, library: Path, *, gpus: int = 4) -> None:
        super().__init__(gpus=gpus)
        self._library = library

    def prepare(self) -> None:
        shutil.copy(self._library, self.machine.path(LIBRARY))
        self.set_compute_modes(2)
        self.configure(PATIENCE)
        self.confine_devices()
        self.slurm_says({})
        self.prolog(1).check()  # makes the state directory and compiles the configuration
        self.epilog(1).check()
        self.before = self.snapshot()

    def struck(self, argv: tuple[str, ...], environment: dict[str, str], on: str, **settings: int) -> Result:
        self.machine.path(LOG).unlink(missing_ok=True)
        words = [f"LD_PRELOAD={LIBRARY}", f"STRIKE_LOG={LOG}", f"STRIKE_ON={on}"]
        words += [f"STRIKE_{name.upper()}={value}" for name, value in settings.items()]
        return self.run("env", *words, *argv, env=environment)

    def noted(self) -> list[str]:
        """The calls that counted in the last run, in order."""
        log = self.machine.path(LOG)
        return log.read_text().split() if log.exists() else []

    def left(self) -> str:
        """What is not as before, once a program that commanded a daemon has seen it go; empty when all is as before."""
        now = self.settled(self.before)
        ours = {"config", "daemons", "gpus", "jobs", "last-fault", "lock"}
        root = set(self.run("ls", "-A", STATE_DIRECTORY).stdout.split()) - ours
        root |= set(self.run("ls", "-A", f"{STATE_DIRECTORY}/daemons").stdout.split())
        return "" if now == self.before and not root else f"{now} {sorted(root)}"

    def reset(self) -> None:
        """Make it as before by force, so that one failure is not the next one's."""
        self.kill(*self.mps_processes())
        places = " ".join(f"{STATE_DIRECTORY}/{name}" for name in ("jobs/*", "gpus/*", "daemons/*", ".*.new"))
        self.run("sh", "-c", f"rm -rf {places} {LOGS}/GPU-*")
        self.set_compute_modes(2, 0, 0, 0)


@dataclass(frozen=True)
class Scenario:
    """Something that is run to be struck, what was before it, and who may come after it."""

    name: str
    prepare: Callable[[StruckNode], None]
    argv: tuple[str, ...]
    environment: dict[str, str]
    repairs: tuple[str, ...]

    def calls(self, node: StruckNode, on: str) -> list[str]:
        """What an undisturbed run calls, in order."""
        self.prepare(node)
        node.struck(self.argv, self.environment, on).check()
        found = node.noted()
        repair(node, "epilog", self)
        end_quietly(node)
        assert not node.left(), self.name
        assert found, f"{self.name}: the library in front of libc saw nothing"
        return found


def environment_of(job: int, kind: str, gpus: str = "0,1") -> dict[str, str]:
    return job_environment(job, gpus=gpus, **{**asked("25", "8G"), "SPANK_MPS": kind})


def scenarios() -> Iterator[Scenario]:
    """Prolog, epilog and reconcile, of a job with one daemon and of one with a daemon for each of its two GPUs."""
    for kind in KINDS:
        environment = environment_of(JOB, kind)

        def nothing(node: StruckNode) -> None:
            configure(node, PATIENCE)

        def new_configuration(node: StruckNode) -> None:
            configure(node, PATIENCE)
            node.configure(node.machine.read("/etc/slurm/mps.toml"))  # compiled again

        def a_job(node: StruckNode, environment: dict[str, str] = environment) -> None:
            configure(node, PATIENCE)
            node.run(PROLOG, env=environment).check()

        def wreckage(node: StruckNode, kind: str = kind) -> None:
            """A whole job, a ledger without a job, processes without a journal, a log that is too long."""
            configure(node, PATIENCE)
            for job, gpus in ((JOB, "0,1"), (ANOTHER, "2"), (A_THIRD, "3")):
                node.run(PROLOG, env=environment_of(job, kind, gpus)).check()
            of_another = [p for p in node.mps_processes() if f"/{ANOTHER}/" in node.environment_of(p)]
            node.kill(*of_another)
            jobs = f"{STATE_DIRECTORY}/jobs"
            node.run("rm", "-r", f"{jobs}/{ANOTHER}", f"{jobs}/{A_THIRD}/journal").check()
            node.machine.write("/var/log/slurm-mps/3/server.log", "x" * 1_100_000)

        yield Scenario(f"prolog {kind}", nothing, (PROLOG,), environment, ("epilog", "reconcile", "prolog"))
        if kind == "per-node":
            first = "prolog after a change of mps.toml"
            yield Scenario(first, new_configuration, (PROLOG,), environment, ("reconcile", "prolog"))
        yield Scenario(f"epilog {kind}", a_job, (EPILOG,), environment, ("epilog", "reconcile", "prolog"))
        yield Scenario(f"reconcile {kind}", wreckage, RECONCILE, {}, ("reconcile",))


def joined_scenarios() -> Iterator[Scenario]:
    """The same of jobs that have a daemon in common, of one user or of all: the first, one beside others, the last."""
    environment = environment_of(JOB, "per-gpu")

    def alone(node: StruckNode) -> None:
        configure(node, JOINED)

    def beside(node: StruckNode) -> None:
        configure(node, JOINED)
        node.run(PROLOG, env=environment_of(ANOTHER, "per-node", "1")).check()

    def beside_anothers(node: StruckNode) -> None:
        configure(node, ALL_USERS)
        node.run(PROLOG, env=job_environment(BOBS, user="bob", gpus="1", **asked("25", "8G"))).check()

    def not_last_of_all(node: StruckNode) -> None:
        beside_anothers(node)
        node.run(PROLOG, env=environment).check()

    def dead(node: StruckNode) -> None:
        """Its daemon has died, and a third job's is well."""
        beside(node)
        node.kill(*node.mps_processes())
        node.run(PROLOG, env=environment_of(A_THIRD, "per-node", "2")).check()

    def last(node: StruckNode) -> None:
        configure(node, JOINED)
        node.run(PROLOG, env=environment).check()

    def not_last(node: StruckNode) -> None:
        beside(node)
        node.run(PROLOG, env=environment).check()

    def wreckage(node: StruckNode) -> None:
        """Two jobs on a GPU, one of them without a journal; a ledger without a job; a daemon without a ledger."""
        not_last(node)
        node.run(PROLOG, env=environment_of(A_THIRD, "per-node", "2")).check()
        uuids = node.uuids
        node.run("rm", "-r", f"{STATE_DIRECTORY}/jobs/{ANOTHER}", f"{STATE_DIRECTORY}/jobs/{A_THIRD}").check()
        node.run("rm", f"{STATE_DIRECTORY}/gpus/{uuids[2]}").check()
        node.set_compute_modes(3, 3, 0)  # what a lost ledger knew is lost

    every = ("epilog", "reconcile", "prolog")
    yield Scenario("prolog joined, first", alone, (PROLOG,), environment, every)
    yield Scenario("prolog joined, beside", beside, (PROLOG,), environment, every)
    yield Scenario("prolog joined, all users", beside_anothers, (PROLOG,), environment, every)
    yield Scenario("epilog joined, all users", not_last_of_all, (EPILOG,), environment, every)
    yield Scenario("prolog joined, dead", dead, (PROLOG,), environment, ("epilog", "reconcile"))  # a prolog says it
    yield Scenario("epilog joined, last", last, (EPILOG,), environment, every)
    yield Scenario("epilog joined, not last", not_last, (EPILOG,), environment, every)
    yield Scenario("reconcile joined", wreckage, RECONCILE, {}, ("reconcile",))


def configure(node: StruckNode, text: str) -> None:
    if node.machine.read("/etc/slurm/mps.toml") != text:
        node.configure(text)
        node.run(PROLOG, env=environment_of(1, "per-gpu", "3")).check()  # compiles it
        node.run(EPILOG, env=environment_of(1, "per-gpu", "3")).check()


def end_others(node: StruckNode) -> list[str]:
    """The jobs beside the one that was struck: their programs work, and their epilogs too. Returns what was wrong."""
    wrong = []
    for job in (ANOTHER, A_THIRD, BOBS):
        if not node.machine.path(f"{STATE_DIRECTORY}/jobs/{job}").exists():
            continue
        place = f"{STATE_DIRECTORY}/jobs/{job}/joined-0"
        said = node.client(None, user="bob" if job == BOBS else "alice", CUDA_MPS_PIPE_DIRECTORY=place).stdout
        if "mps=" not in said or "mps=none" in said:
            wrong.append(f"drained job {job} of its server: {said}")
        result = node.run(EPILOG, env=job_environment(job))
        if result.returncode or result.stderr:
            wrong.append(f"drained by epilog of job {job}: {result.returncode} {result.stderr}")
    return wrong


def end_quietly(node: StruckNode) -> list[str]:
    """End the jobs beside the one that was struck, whose daemon may be gone."""
    for job in (ANOTHER, A_THIRD, BOBS):
        node.run(EPILOG, env=job_environment(job)).check()
    return []


def repair(node: StruckNode, how: str, scenario: Scenario) -> list[str]:
    """Have the next one come. Returns what it did wrong; a hook that fails now would drain the node for nothing."""
    wrong = []
    if how == "reconcile":
        result = node.reconcile()
        if result.returncode:
            wrong.append(f"reconcile: {result.returncode} {result.stdout}{result.stderr}")
        return wrong
    environment = scenario.environment or job_environment(JOB)
    if how == "prolog":
        result = node.run(PROLOG, env=environment)
        if result.returncode or result.stderr or node.verdict(JOB).get("status") != "ready":
            wrong.append(f"drained by prolog: {result.returncode} {result.stderr} {node.verdict(JOB)}")
    result = node.run(EPILOG, env=environment)
    if result.returncode or result.stderr:
        wrong.append(f"drained by epilog: {result.returncode} {result.stderr}")
    return wrong


def strike(node: StruckNode, scenario: Scenario, fault: str, at: int, how: str) -> list[str]:
    """One point of the matrix. Returns everything that was wrong with it."""
    scenario.prepare(node)
    on = CAN_FAIL if FAULTS[fault] else CAN_DIE
    result = node.struck(scenario.argv, scenario.environment, on, at=at, error=FAULTS[fault])
    calls = node.noted()
    where = f"{scenario.name}: {fault} at {at}, {calls[at - 1] if at <= len(calls) else 'not reached'}, then {how}"
    wrong = []
    if fault == "SIGKILL" and at <= len(calls) and result.returncode != -signal.SIGKILL:
        wrong.append(f"ended with {result.returncode}")
    if "Traceback" in result.stderr or "a bug" in result.stderr or "a bug" in result.stdout:
        wrong.append(f"a bug: {result.stderr}{result.stdout}")
    if result.returncode == 0 and PROLOG in scenario.argv and node.verdict(JOB).get("status") != "ready":
        wrong.append(f"exit 0, and the verdict {node.verdict(JOB)}")
    wrong += repair(node, how, scenario)
    if "joined" in scenario.name:
        wrong += end_others(node) if "dead" not in scenario.name else end_quietly(node)
    if left := node.left():
        wrong.append(f"left: {left}")
    if wrong:
        node.reset()
    return [f"{where}: {what}" for what in wrong]
