"""Jobs as Slurm knows them: by its processes on this node, or by squeue, which asks the controller.

Prolog and epilog never ask (docs/decisions/0005).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import NodeError
from ..node import processes
from ..record import record
from ..units import printable, small_number
from .programs import find_program

#: States of a job that is over.
OVER = frozenset(
    ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY")
)
_CLIENT = "squeue"
_FORMAT = "%A|%T|%e|%N"
_JOBS_AT_ONCE = 200
_STEP_TITLE = "slurmstepd: ["
_ANCESTORS_MAX = 100
_DIGITS = 12  # of a job's number, or of seconds since 1970


@record
class SlurmJob:
    """A job as Slurm has it: its state in squeue's long form, and where it is.

    `end_seconds` (since 1970) is when it ended or is to end, None where Slurm does not say. `nodes` is a host list; of
    a COMPLETING job only the nodes that it has not left.
    """

    state: str
    end_seconds: int | None
    nodes: str


def jobs_with_steps() -> set[int]:
    """The jobs that a slurmstepd of this machine works for."""
    return {job for pid in processes.pids() if (job := _job_of_slurmstepd(pid)) is not None}


def _job_of_slurmstepd(pid: int) -> int | None:
    """The job that a process works for, by the title that slurmstepd gives itself; None for any other process."""
    title = processes.roots_title(pid, "slurmstepd")
    job, dot, _ = title.removeprefix(_STEP_TITLE).partition(".")
    return small_number(job, _DIGITS) if title.startswith(_STEP_TITLE) and dot else None


def running_job_of(pid: int) -> int | None:
    """The running job of a process, by its cgroup or else by its ancestors; None for no job with a slurmstepd
    here.
    """
    job = processes.job_of(pid)
    if job in jobs_with_steps():
        return job
    for _ in range(_ANCESTORS_MAX):
        if (job := _job_of_slurmstepd(pid)) is not None:
            return job
        pid = processes.parent_of(pid) or 0
    return None


def find_jobs(job_ids: Sequence[int], environment: Mapping[str, str], timeout_seconds: float) -> dict[int, SlurmJob]:
    """These jobs as the controller has them. A job that it does not know is left out.

    Raises: NodeError when it does not answer, or in another way than squeue(1) says; DeadlineError.
    """
    found: dict[int, SlurmJob] = {}
    for start in range(0, len(job_ids), _JOBS_AT_ONCE):
        part = job_ids[start : start + _JOBS_AT_ONCE]
        jobs = ",".join(map(str, (part[0], *part)))  # one alone that is not known is an error to squeue, two are not
        found |= _read(_ask(jobs, _FORMAT, environment, timeout_seconds))
    return found


def number_of(job: str, environment: Mapping[str, str], timeout_seconds: float) -> int:
    """The number of a job that squeue names otherwise: 4711_3 of an array, 4711+1 of a heterogeneous job.

    Raises: NodeError when the controller does not answer, or no longer knows the job; DeadlineError.
    """
    for line in _ask(f"{job},{job}", "%i|%A", environment, timeout_seconds).splitlines():
        name, _, number = line.partition("|")
        if name == job and number.isdecimal():  # squeue gives all components where it is asked for one
            return int(number)
    raise NodeError(f"job {job}: Slurm no longer knows its number", f"sacct -j {job} -X -o JobIDRaw may")


def _ask(jobs: str, columns: str, environment: Mapping[str, str], timeout_seconds: float) -> str:
    program = find_program(_CLIENT, environment.get("PATH", ""))
    if not program:
        raise NodeError(f"{_CLIENT} is not in PATH")
    given = {name: environment[name] for name in ("PATH", "SLURM_CONF") if name in environment}
    argv = [program, "--local", "--noheader", "--states=all", f"--format={columns}", f"--jobs={jobs}"]
    outcome = processes.run(argv, {**given, "SLURM_TIME_FORMAT": "%s"}, timeout_seconds)
    if outcome.status:
        text = printable((outcome.errors.strip() or "no message").splitlines()[-1], 200)
        raise NodeError(f"{program} ended with status {outcome.status}: {text}")
    return outcome.output


def _read(text: str) -> dict[int, SlurmJob]:
    """Raises: NodeError when it is not whole: a job that is missed here would be taken for one that is over."""
    if len(text) >= processes.OUTPUT_LIMIT_BYTES or (text and not text.endswith("\n")):
        raise NodeError(f"{_CLIENT} printed an answer that is too long, or cut short")
    found = {}
    for line in text.splitlines():
        job, *rest = line.split("|")
        number = small_number(job, _DIGITS)
        if number is None or len(rest) != 3:
            raise NodeError(f"{_CLIENT} says {printable(line, 80)!r}")
        state, end, nodes = rest
        found[number] = SlurmJob(state, small_number(end, _DIGITS), nodes)
    return found
