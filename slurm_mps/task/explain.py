"""A program that prints one line on why tasks of a step ended badly, where MPS explains it, and nothing otherwise.

The plugin runs it as the job's user (docs/decisions/0012) when a task has ended badly. In a job whose programs can run
without MPS, where such a program ends with status 0, it also runs at the end of the script, and of each step of a
second or more.

Arguments: the job's id; since when the logs of each control daemon count, in seconds since 1970 with commas between;
``step`` or ``script``; a client's memory limit on a GPU in MiB, ``auto`` or ``-``; the step's tasks on this node,
``rank:pid:status`` each with commas between.
The status is wait(2)'s, and empty for a task that runs. The logs count since the step's tasks were forked, or since a
probe of the daemon's server had ended. With a last argument ``explained`` they count since a step of the script
explained a failure.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from slurm_mps.job.verdict import DaemonPlace, Verdict
    from slurm_mps.job_log.events import Event

_LIMIT_BYTES = 4 * 1024**2
_LINE_MAX = 900
#: A sample of a GPU's load covers 0.2 s (O98): one of the step's has nothing of what ran before.
_SAMPLE_SECONDS = 0.3
_WITHOUT_LIMITS = "without limits (in a container, bind /run/slurm-mps)"


def main() -> int:
    sys.path.append(os.path.abspath(f"{__file__}/../../.."))  # last: it may not hide a module
    from slurm_mps.job.verdict_file import read_verdict
    from slurm_mps.job_log.blame import VANISHED, FailedStep, Task, explain, free_since, seen_since, suspect_limit
    from slurm_mps.job_log.read import DaemonLogs, events_of
    from slurm_mps.node.listen import listener
    from slurm_mps.node.processes import job_of

    job_id, begins, kind, memory, listed, *more = sys.argv[1:]
    since = [float(seconds) for seconds in begins.split(",")]
    tasks = tuple(
        Task(int(rank), int(pid), int(status) if status else None)
        for rank, pid, status in (task.split(":") for task in listed.split(","))
    )
    verdict = read_verdict(int(job_id))
    if verdict is None:
        return 0

    def events_on(place: DaemonPlace) -> list[Event]:
        """What its logs say; nothing where they are root's, since jobs of other users are on it, too."""
        if place.joined_directory and not os.access(place.log_directory, os.R_OK):
            return []
        return events_of(DaemonLogs(place.name, place.log_directory), _LIMIT_BYTES)

    gone = [listener(place.pipe_directory) is None for place in verdict.daemons]  # before its last words are read
    events = [events_on(place) for place in verdict.daemons]
    seen = [
        seen_since(
            begin,
            place.gpus,
            gone=went,
            events=read,
            explained="explained" in more,
            joined=bool(place.joined_directory),
        )
        for begin, place, went, read in zip(since, verdict.daemons, gone, events, strict=True)
    ]
    step = FailedStep(tasks, kind == "script", memory)
    pids = {pid for one in seen if one.joined for event in one.events for pid in event.pids}
    jobs = {pid: job for pid in pids if (job := job_of(pid)) and job != int(job_id)}
    found = explain(step, seen, jobs) if any(task.status for task in tasks) else []
    hint = f"; slurm-mps logs {job_id} tells more" if set(found) - {VANISHED} else ""
    words = "; ".join(found) or suspect_limit(step, seen)
    if not words and verdict.unguarded and all(task.status is not None for task in tasks) and not more:
        free = [free_since(read, begin) for begin, read in zip(since, events, strict=True)]
        words = _ran_without_mps(verdict, free, is_job_script=step.is_job_script)
    if words:
        line = f"job {job_id}: {words}"
        sys.stdout.write(f"{line[: _LINE_MAX - len(hint)]}{hint}\n")
    return 0


def _ran_without_mps(verdict: Verdict, free: list[float | None], *, is_job_script: bool) -> str:
    """What to say of a step none of whose programs was a client of a daemon, by the daemons' places.

    No log says whether a program used a GPU. A script is told in any case. A step is told if a GPU of the job's own was
    busy in the last seconds, since many steps have no program for a GPU.
    """
    if is_job_script:
        nobody = f"no program of this job used MPS on this node; any that used a GPU ran {_WITHOUT_LIMITS}"
        return "" if None in free else nobody
    is_shared = verdict.share_percentage is not None or verdict.shards_per_gpu
    places = zip(verdict.daemons, free, strict=True)
    idle = [(gpu, since) for place, since in places if since and not place.joined_directory for gpu in place.gpus]
    busy = [] if is_shared else _busy(idle)
    were = f"{', '.join(busy)} {'was' if len(busy) == 1 else 'were'} busy"
    return f"{were} while no program of this step used MPS there; any that ran did so {_WITHOUT_LIMITS}" if busy else ""


def _busy(since: list[tuple[str, float]]) -> list[str]:
    """Those of these GPUs on which something ran since then; none where NVML does not answer."""
    from slurm_mps.errors import NodeError
    from slurm_mps.node.nvml import Gpus

    gpus = Gpus()
    try:
        return [uuid for uuid, seconds in since if gpus.was_busy(uuid, seconds + _SAMPLE_SECONDS)]
    except NodeError:
        return []


if __name__ == "__main__":
    sys.exit(main())
