"""The part of the benchmark that runs inside the simulated node, as one process: it starts each contender and times it.

Run as a script by :mod:`tests.lab.bench.__main__` on the standard library alone: its orders (a Spec as JSON) come on
standard input, all times in milliseconds go to standard output, progress to standard error. A time is from
``posix_spawn`` to the end of the program. The contenders of a round run one after the other, each round begins with
another one, and figures of the same round are compared. A contender that fails ends the benchmark.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from time import perf_counter, sleep
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

CONTROL = "/usr/bin/nvidia-cuda-mps-control"
LATENCY = "latency=observed"
#: docs/decisions/0003 has these.
IMPORTS = ("", "ctypes", "json", "typing", "subprocess", "dataclasses", "pynvml", "jsonschema", "slurm_mps.job.prolog")
PLAIN_RUNS_PER_ROUND = 20
SLEEPING_ROUNDS = 5  # of the sample's prolog, which sleeps for a second
_HUNG_SECONDS = 60
_SERVER_SECONDS = 10
_ERRORS = "/run/bench-errors"

Samples = dict[str, list[float]]


class BrokenError(Exception):
    """Something did not do its work, so that its time means nothing."""


@dataclass(frozen=True)
class Spec:
    """The benchmark's orders. Environments are those of a prolog, without the job's id."""

    rounds: int
    jobs_before: int
    scripts: str  #: directory of the scripts to compare with
    prolog: str
    epilog: str
    plain: dict[str, str]
    asking: dict[str, str]
    gpus: list[str]  #: UUIDs
    prolog_commands: str  #: what slurm-mps tells the control daemon; the floor does the same, in one process
    epilog_commands: str
    python: str
    packages: str
    state_directory: str
    log_directory: str


@dataclass(frozen=True)
class Command:
    """One program to run to its end."""

    argv: list[str]
    environment: dict[str, str]
    text: str = ""


def milliseconds(*commands: Command) -> float:
    """Run programs one after the other; how long they took together."""
    started = []
    for command in commands:
        reader, writer = os.pipe()
        os.write(writer, command.text.encode())
        os.close(writer)
        started.append((command, reader))
    errors = os.open(_ERRORS, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    null = os.open("/dev/null", os.O_WRONLY)
    signal.alarm(_HUNG_SECONDS)  # whatever hangs ends the benchmark
    begin = perf_counter()
    for command, reader in started:
        streams = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate((reader, null, errors))]
        pid = os.posix_spawn(command.argv[0], command.argv, command.environment, file_actions=streams)
        _, status = os.waitpid(pid, 0)
        if status:
            said = os.pread(errors, 4000, 0).decode(errors="replace")
            raise BrokenError(f"{command.argv}: status {os.waitstatus_to_exitcode(status)}\n{said}")
    took = perf_counter() - begin
    signal.alarm(0)
    for fd in (errors, null, *(reader for _, reader in started)):
        os.close(fd)
    return took * 1000


class Contender:
    """One way to bring a job's MPS up and to take it down again."""

    def __init__(self, name: str, job_root: str) -> None:
        self.name = name
        self._job_root = job_root

    def job_directory(self, job_id: int) -> str:
        return f"{self._job_root}/{job_id}"

    def prepare(self, job_id: int) -> None:
        """What is not timed."""

    def prolog(self, job_id: int) -> list[Command]:
        raise NotImplementedError

    def epilog(self, job_id: int) -> list[Command]:
        raise NotImplementedError

    def clean_up(self, job_id: int) -> None:
        """What is not timed either; all that is left of the job is a fault."""
        if os.path.exists(self.job_directory(job_id)):
            raise BrokenError(f"{self.name}: {self.job_directory(job_id)} is still there")

    def control(self, job_id: int, line: str) -> str:
        """Ask the job's control daemon, not timed."""
        done = subprocess.run(
            [CONTROL],
            env={"CUDA_MPS_PIPE_DIRECTORY": f"{self.job_directory(job_id)}/pipe"},
            input=f"{line}\n",
            capture_output=True,
            text=True,
            timeout=_SERVER_SECONDS,
            check=False,
        )
        return done.stdout.strip()

    def await_server(self, job_id: int) -> None:
        """See that the prolog did its work: the job's server comes up."""
        server = self.control(job_id, "get_server_list")
        status = "none"
        for _ in range(50):  # the answer comes at once while it initialises
            status = self.control(job_id, f"get_server_status {server}") if server else "none"
            if status != "INITIALIZING":
                break
            sleep(0.02)
        if status != "ACTIVE":
            raise BrokenError(f"{self.name}: the prolog of job {job_id} succeeded, but its server is: {status}")


class Scripts(Contender):
    """A prolog and an epilog script."""

    def __init__(self, name: str, job_root: str, prolog: str, epilog: str, environment: dict[str, str]) -> None:
        super().__init__(name, job_root)
        self._prolog, self._epilog, self._environment = prolog, epilog, environment

    def _command(self, script: str, job_id: int) -> list[Command]:
        return [Command([script], {**self._environment, "SLURM_JOB_ID": str(job_id)})]

    def prolog(self, job_id: int) -> list[Command]:
        return self._command(self._prolog, job_id)

    def epilog(self, job_id: int) -> list[Command]:
        return self._command(self._epilog, job_id)


class Floor(Contender):
    """What nobody can do without: the control daemon's start, one control process for the commands, one for quit."""

    def __init__(self, spec: Spec) -> None:
        super().__init__("floor", "/run/mps-floor")
        self._prolog_commands, self._epilog_commands = spec.prolog_commands, spec.epilog_commands
        self._gpus = ",".join(spec.gpus)

    def _command(self, job_id: int, text: str = "", *options: str) -> Command:
        here = self.job_directory(job_id)
        environment = {
            "CUDA_VISIBLE_DEVICES": self._gpus,
            "CUDA_MPS_PIPE_DIRECTORY": f"{here}/pipe",
            "CUDA_MPS_LOG_DIRECTORY": f"{here}/log",
        }
        return Command([CONTROL, *options], environment, text)

    def prepare(self, job_id: int) -> None:
        for name in ("pipe", "log"):
            os.makedirs(f"{self.job_directory(job_id)}/{name}")

    def prolog(self, job_id: int) -> list[Command]:
        return [self._command(job_id, "", "-d"), self._command(job_id, self._prolog_commands)]

    def epilog(self, job_id: int) -> list[Command]:
        return [self._command(job_id, self._epilog_commands)]

    def clean_up(self, job_id: int) -> None:
        shutil.rmtree(self.job_directory(job_id))


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def in_turn(names: Sequence[str], round_number: int) -> Iterable[str]:
    """The contenders of a round, each round another one first."""
    first = round_number % len(names)
    return [*names[first:], *names[:first]]


class Bench:
    """The measurements, one method a section; all samples by name, each list in the order of the rounds."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._last_job = 0
        self._ours = Scripts("ours", f"{spec.state_directory}/jobs", spec.prolog, spec.epilog, spec.asking)
        by_hand = (f"{spec.scripts}/hand-written-prolog.sh", f"{spec.scripts}/hand-written-epilog.sh")
        self._by_hand = Scripts("by hand", "/run/mps-by-hand", *by_hand, spec.asking)
        sample = (f"{spec.scripts}/sample-prolog.sh", by_hand[1])
        self._sample = Scripts("sample", "/run/mps-by-hand", *sample, spec.asking)
        self.samples: Samples = {}

    def _add(self, name: str, value: float) -> None:
        self.samples.setdefault(name, []).append(value)

    def plain_jobs(self) -> None:
        """Both scripts with a job that does not ask, beside a script that does nothing."""
        say("a job that does not ask")
        scripts = {
            "plain nothing": f"{self._spec.scripts}/nothing.sh",
            "plain prolog": self._spec.prolog,
            "plain epilog": self._spec.epilog,
        }
        environment = {**self._spec.plain, "SLURM_JOB_ID": "999999"}
        for number in range(self._spec.rounds * PLAIN_RUNS_PER_ROUND):
            for name in in_turn(tuple(scripts), number):
                self._add(name, milliseconds(Command([scripts[name]], environment)))

    def _one_job(self, contender: Contender, label: str = "") -> None:
        """Prolog, the server comes up, epilog; kept as samples under `label`, or not at all."""
        self._last_job += 1
        job_id = self._last_job
        contender.prepare(job_id)
        prolog = milliseconds(*contender.prolog(job_id))
        contender.await_server(job_id)
        epilog = milliseconds(*contender.epilog(job_id))
        contender.clean_up(job_id)
        if label:
            self._add(f"{label} prolog", prolog)
            self._add(f"{label} epilog", epilog)

    def asking_jobs(self) -> None:
        """Jobs that ask: ours, the hand-written scripts, the vendor's floor."""
        contenders = {one.name: one for one in (self._ours, self._by_hand, Floor(self._spec))}
        for contender in contenders.values():
            self._one_job(contender)  # the first job after a boot makes the state directory and compiles the settings
        for number in range(self._spec.rounds):
            say(f"jobs that ask, round {number + 1} of {self._spec.rounds}")
            for name in in_turn(tuple(contenders), number):
                self._one_job(contenders[name], name)
            if number < SLEEPING_ROUNDS:
                self._one_job(self._sample, "sample")

    def grown_node(self) -> None:
        """Ours on a node that has had many jobs, beside the same node with nothing of them left."""
        self._run_many()
        places = (self._spec.state_directory, self._spec.log_directory)
        now = "grown"
        for place in places:
            os.rename(place, f"{place}.grown")
        self._one_job(self._ours)  # makes them anew
        now = "fresh"
        for number in range(self._spec.rounds):
            say(f"after {self._spec.jobs_before} jobs, round {number + 1} of {self._spec.rounds}")
            for name in in_turn(("grown", "fresh"), number):
                if name != now:
                    for place in places:
                        os.rename(place, f"{place}.{now}")
                        os.rename(f"{place}.{name}", place)
                    now = name
                self._one_job(self._ours, name)

    def _run_many(self) -> None:
        """Real jobs, as quickly as they go: the simulated driver answers at once, and two run side by side."""
        subprocess.run(["simulated-gpus", "fault", "--clear"], check=True)
        halves = [{**self._spec.asking, "SLURM_JOB_GPUS": gpu, "CUDA_VISIBLE_DEVICES": gpu} for gpu in ("0", "1")]
        for done in range(0, self._spec.jobs_before, len(halves)):
            if done % 100 == 0:
                say(f"{done} of {self._spec.jobs_before} jobs have run")
            jobs = [{**half, "SLURM_JOB_ID": str(self._last_job + 1 + i)} for i, half in enumerate(halves)]
            self._last_job += len(halves)
            for script in (self._spec.prolog, self._spec.epilog):
                running = [subprocess.Popen([script], env=job, stdout=subprocess.DEVNULL) for job in jobs]
                statuses = [one.wait(_HUNG_SECONDS) for one in running]
                if any(statuses):
                    raise BrokenError(f"{script} failed for one of the jobs {self._last_job - 1} and {self._last_job}")
        subprocess.run(["simulated-gpus", "fault", LATENCY], check=True)

    def imports(self) -> None:
        """What Python's start costs, and what imports add to it."""
        say("imports")
        for number in range(self._spec.rounds):
            for module in in_turn(IMPORTS, number):
                code = f"import sys; sys.path.insert(0, {self._spec.packages!r})"
                code += f"; import {module}" if module else ""
                command = Command([self._spec.python, "-I", "-S", "-c", code], {})
                self._add(f"import {module}".strip(), milliseconds(command))


def main() -> int:
    spec = Spec(**json.load(sys.stdin))
    bench = Bench(spec)
    try:
        bench.plain_jobs()
        bench.asking_jobs()
        bench.imports()
        if spec.jobs_before:
            bench.grown_node()
    except BrokenError as error:
        say(str(error))
        return 1
    json.dump(bench.samples, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
