"""A real Slurm cluster inside a throw-away machine: munged, slurmctld and one slurmd for each node.

It runs on the repository's own sample files in ``etc/``; ``Cluster.replacements`` is the whole list of what
is put in their place. Promises: every wait is bounded and is for a state, never for a time; when one fails,
the error carries the tails of all daemon logs. A drained node stays drained until a test resumes it.

A job that :meth:`Cluster.wait` has seen end has had its epilog on all its nodes, since Slurm calls it
COMPLETING until then.
"""

from __future__ import annotations

import re
import secrets
import shlex
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .machine import ADDRESS, HOSTNAME, UNIFIED, Machine, Result, Throwaway
from .release import chosen

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .release import Release

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLES = REPOSITORY / "etc"
LOG_DIRECTORY = "/var/log/slurm"
NODE_NAME_PREFIX = "n"
CPUS_PER_NODE = 16
CONTROLLER_PORT = 17000
DEFAULT_USER = "alice"

TERMINAL_STATES = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL"}
    | {"DEADLINE"}
)
_POLL_SECONDS = 0.05
_START_TIMEOUT_SECONDS = 45.0
_STOP_TIMEOUT_SECONDS = 5.0
_LOG_TAIL_LINES = 60

Value = TypeVar("Value")


@dataclass(frozen=True)
class Job:
    """A submitted job."""

    id: int
    user: str

    def __str__(self) -> str:
        return str(self.id)


@dataclass(frozen=True)
class JobInfo:
    """A job as ``scontrol show job`` tells it; `fields` holds every field by Slurm's name."""

    id: int
    state: str
    exit_code: int
    signal: int
    reason: str
    nodes: str
    fields: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True)
class FoundGpu:
    """A GPU or MIG slice as AutoDetect=nvml finds it, acted by Slurm's own fake_gpus.conf; `uuid` is empty for a GPU
    that Slurm names by index."""

    type: str
    files: tuple[str, ...]
    uuid: str = ""


@dataclass(frozen=True)
class NodeState:
    """A node as ``scontrol show node`` tells it: flags joined by ``+``, such as ``IDLE+DRAIN``."""

    state: str
    reason: str

    @property
    def drained(self) -> bool:
        """Whether the node takes no further jobs."""
        return "DRAIN" in self.state


class SlurmError(AssertionError):
    """Slurm did not do what a test needs; the message ends with the daemons' logs."""


def waits_for(word: str = "go") -> str:
    """A line of a job's script that waits until the test lets the job go on: :meth:`Cluster.let_go`."""
    return f"while [ ! -e ~/{word}.$SLURM_JOB_ID ]; do sleep 0.1; done"


class Cluster(Throwaway):
    """A running cluster, one to a machine; use it as a context manager.

    constrain_devices: confine tasks to their GPUs with cgroups, as cgroup.conf does (needs cgroups on the
    host). shards_per_node, mps_per_node: parts of GPUs that jobs can ask for as gres/shard or gres/mps.
    extra_slurm_conf: lines put in place of those with the same key, or added. autodetect: gres.conf's AutoDetect;
    empty for none. plugstack: the whole text of plugstack.conf; empty for no plugin, None for the sample as it is.
    prolog, epilog: paths inside the machine; None for none.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        nodes: int = 2,
        gpus_per_node: int = 4,
        shards_per_node: int = 0,
        mps_per_node: int = 0,
        cpus_per_node: int = CPUS_PER_NODE,
        constrain_devices: bool = False,
        extra_slurm_conf: str = "",
        autodetect: str = "",
        plugstack: str | None = "",
        prolog: str | None = None,
        epilog: str | None = None,
        prolog_flags: str | None = "Alloc",
        release: Release | None = None,
    ) -> None:
        self.machine = machine
        self.release = release or chosen()
        self.node_names = tuple(f"{NODE_NAME_PREFIX}{number}" for number in range(1, nodes + 1))
        self._gpus_per_node = gpus_per_node
        self._parts = {"shard": shards_per_node, "mps": mps_per_node}
        self._cpus_per_node = cpus_per_node
        self._constrain_devices = constrain_devices
        self._extra = dict(_setting(line) for line in extra_slurm_conf.splitlines() if line.strip())
        self._autodetect = f"AutoDetect={autodetect}\n" if autodetect else ""
        self._plugstack = plugstack
        self._scripts = {"Prolog": prolog, "Epilog": epilog, "PrologFlags": prolog_flags}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.found_gpus: Sequence[FoundGpu] = ()
        """What Slurm finds on each node, instead of what gres.conf lists."""

    # ------------------------------------------------------------------------------------------ configuration

    @property
    def replacements(self) -> dict[str, str | None]:
        """What this machine puts in place of the sample's slurm.conf lines; None takes the line out."""
        confined = self._constrain_devices
        return {
            "ClusterName": "mpstest",
            "SlurmctldHost": f"{HOSTNAME}({ADDRESS})",
            "SlurmctldPort": str(CONTROLLER_PORT),
            "SlurmdPort": None,  # each node has its own
            "SlurmdSpoolDir": "/var/spool/slurmd-%n",
            "SlurmdPidFile": "/run/slurmd-%n.pid",
            "SlurmdLogFile": f"{LOG_DIRECTORY}/slurmd-%n.log",
            "SlurmctldDebug": "verbose",
            "SlurmdDebug": "verbose",
            # Where the machine has no cgroups to give; a confined cluster keeps the sample's lines.
            **({} if confined else {"ProctrackType": "proctrack/linuxproc", "TaskPlugin": "task/none"}),
            # Nodes with more processors than this machine, and quick decisions
            "SlurmdParameters": "config_overrides",
            "SchedulerParameters": "sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0",
            "KillWait": "5",
            "GresTypes": ",".join(["gpu", *self._shared_gres]),
            "PlugStackConfig": "/etc/slurm/plugstack.conf",
            **self._scripts,
            **self._extra,
        }

    @property
    def _shared_gres(self) -> dict[str, int]:
        return {name: count for name, count in self._parts.items() if count}

    def _machine_lines(self) -> str:
        """The node and partition lines: every node is this host, at a port of its own."""
        parts = "".join(f",{name}:{count}" for name, count in self._shared_gres.items())
        types = Counter(gpu.type for gpu in self.found_gpus)
        gpus = ",".join(f"gpu:{name}:{count}" for name, count in types.items()) or f"gpu:{self._gpus_per_node}"
        lines = [
            f"NodeName={name} NodeHostname={HOSTNAME} NodeAddr={ADDRESS} Port={CONTROLLER_PORT + number}"
            f" Gres={gpus}{parts} CPUs={self._cpus_per_node} RealMemory=16000 State=UNKNOWN"
            for number, name in enumerate(self.node_names, start=1)
        ]
        return "\n".join([*lines, "PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP", ""])

    def configure(self) -> None:
        """Write /etc/slurm from the samples."""
        write = self.machine.write
        sample = (SAMPLES / "slurm.conf").read_text()
        write("/etc/slurm/slurm.conf", localise(sample, self.replacements) + self._machine_lines())
        gpus = (SAMPLES / "gres.conf").read_text().replace("gpu[01-02]", ",".join(self.node_names))
        gpus = gpus.replace("nvidia[0-3]", f"nvidia[0-{self._gpus_per_node - 1}]")
        several = " Flags=all_sharing" if self._gpus_per_node > 1 else ""
        parts = [
            f"NodeName={','.join(self.node_names)} Name={one[0]} Count={one[1]}{several}\n"
            for one in self._shared_gres.items()
        ]
        lines = (gpus if self._gpus_per_node and not self.found_gpus else "") + "".join(parts)
        cpus = self._cpus_per_node
        found = [
            f"{gpu.type}|{cpus}|0-{cpus - 1}|(null)|{','.join(gpu.files)}|{gpu.uuid or '(null)'}|nvidia_gpu_env\n"
            for gpu in self.found_gpus
        ]
        if found:
            write("/etc/slurm/fake_gpus.conf", "".join(found))
        write("/etc/slurm/gres.conf", self._autodetect + lines)
        write(
            "/etc/slurm/cgroup.conf",
            localise((SAMPLES / "cgroup.conf").read_text(), self._cgroup_replacements()),
        )
        plugstack = self._plugstack if self._plugstack is not None else (SAMPLES / "plugstack.conf").read_text()
        write("/etc/slurm/plugstack.conf", plugstack)

    def _cgroup_replacements(self) -> dict[str, str | None]:
        """Only devices are confined: of cgroup v1 the machine has no controllers but `devices` and `freezer`."""
        unified = UNIFIED in self.machine.cgroups
        return {
            "CgroupPlugin": "cgroup/v2" if unified else "cgroup/v1",
            **({"IgnoreSystemd": "yes"} if unified else {}),
            "CgroupMountpoint": "/sys/fs/cgroup",
            "ConstrainCores": "no",
            "ConstrainRAMSpace": "no",
            "ConstrainDevices": "yes" if self._constrain_devices else "no",
        }

    # -------------------------------------------------------------------------------------------- start, stop

    def begin(self) -> None:
        """Bring the cluster up; on return every node is IDLE."""
        have = set(self.machine.cgroups)
        if self._constrain_devices and UNIFIED not in have and not have >= {"devices", "freezer"}:
            raise SlurmError("constrain_devices needs cgroup v2, or the v1 controllers devices and freezer")
        self._make_directories()
        self.configure()
        for name in self.node_names:
            if name not in self.machine.nodes:
                self.machine.add_node(name)
        self._start_munged()
        self.start_controller()
        for name in self.node_names:
            self.start_node(name)
        self.until("all nodes IDLE", self._all_idle, _START_TIMEOUT_SECONDS)

    def _make_directories(self) -> None:
        make = self.machine.make_directory
        for directory in ("/run/munge", "/var/log/munge", "/var/lib/munge"):
            make(directory, user="munge")
        make("/etc/munge", user="munge", mode=0o700)
        make(LOG_DIRECTORY, user="slurm")
        make("/var/spool/slurmctld", user="slurm")

    def _start_munged(self) -> None:
        """A key of its own, and munged in the foreground until its socket is there."""
        self.machine.write("/etc/munge/munge.key", secrets.token_hex(64), mode=0o400, user="munge")
        self._daemons["munged"] = self.machine.popen(["/usr/sbin/munged", "--foreground"], user="munge")
        socket = self.machine.path("/run/munge/munge.socket.2")
        self.until("munged's socket", lambda: socket.exists() or None, _START_TIMEOUT_SECONDS, "munged")

    def start_controller(self) -> None:
        """Start slurmctld and wait until it answers (also after :meth:`stop_daemon`)."""
        self._daemon("slurmctld", ["/usr/sbin/slurmctld", "-D"])
        self.until("slurmctld answers", self._controller_answers, _START_TIMEOUT_SECONDS, "slurmctld")

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node, inside the node's own mount namespace."""
        self._daemon(f"slurmd-{name}", ["/usr/sbin/slurmd", "-D", "-N", name], node=name)

    def _daemon(self, name: str, argv: Sequence[str], node: str | None = None) -> None:
        """Start a daemon in the foreground; what it says before its log is open goes to NAME.out."""
        with self.machine.path(f"{LOG_DIRECTORY}/{name}.out").open("ab") as out:
            self._daemons[name] = self.machine.popen(argv, node=node, stdout=subprocess.DEVNULL, stderr=out)

    def stop_daemon(self, name: str, number: int = signal.SIGTERM) -> None:
        """End one daemon (``slurmctld``, ``slurmd-n1``) and wait until it is gone."""
        daemon = self._daemons.pop(name)
        for last in (False, False, True):  # slurmd misses a signal that comes while it reads slurm.conf again
            self.machine.signal(daemon, number)
            try:
                daemon.wait(_STOP_TIMEOUT_SECONDS)
                break
            except subprocess.TimeoutExpired:
                if last:
                    raise

    def close(self) -> None:
        """Kill the daemons: nothing of them is wanted any more."""
        daemons, self._daemons = self._daemons, {}
        for daemon in daemons.values():
            self.machine.signal(daemon, signal.SIGKILL)
            daemon.wait(_STOP_TIMEOUT_SECONDS)

    def _controller_answers(self) -> bool | None:
        return "UP" in self.machine.run(["scontrol", "ping"]).stdout.split() or None

    def _all_idle(self) -> bool | None:
        states = self.node_states()
        return all(states[name].state == "IDLE" for name in self.node_names) or None if states else None

    # ------------------------------------------------------------------------------------------------ waiting

    def until(self, what: str, look: Callable[[], Value | None], timeout: float, daemon: str | None = None) -> Value:
        """Look again and again until there is an answer; give up at `timeout`, or when `daemon` has ended."""
        deadline = time.monotonic() + timeout
        while True:
            found = look()
            if found is not None:
                return found
            if daemon is not None and self._daemons[daemon].poll() is not None:
                raise SlurmError(f"{daemon} ended while waiting for: {what}\n{self.logs()}")
            if time.monotonic() > deadline:
                raise SlurmError(f"not within {timeout} s: {what}\nnodes: {self.node_states()}\n{self.logs()}")
            time.sleep(_POLL_SECONDS)

    def wait(self, job: Job, timeout: float = 60, *, states: frozenset[str] = TERMINAL_STATES) -> JobInfo:
        """Wait until a job has ended and its epilogs have run (or until it is in one of `states`)."""

        def look() -> JobInfo | None:
            info = self.job_info(job)
            return info if info.state in states else None

        return self.until(f"job {job} in {'/'.join(sorted(states))}", look, timeout)

    def wait_running(self, job: Job, timeout: float = 30) -> JobInfo:
        """Wait until a job runs."""
        return self.wait(job, timeout, states=TERMINAL_STATES | {"RUNNING"})

    def wait_idle(self, timeout: float = 30) -> None:
        """Wait until no job is left that waits, runs or completes, and no node is busy."""

        def look() -> bool | None:
            if self.machine.run(["squeue", "--noheader"]).stdout.strip():
                return None
            busy = ("ALLOCATED", "MIXED", "COMPLETING", "UNKNOWN")  # unknown: the controller has just started
            return not any(word in one.state for one in self.node_states().values() for word in busy) or None

        self.until("no job and no node busy", look, timeout)

    # --------------------------------------------------------------------------------------------------- jobs

    def _as_user(
        self,
        argv: Sequence[str],
        user: str,
        timeout: float,
        env: Mapping[str, str] | None,
        text: str | None = None,
    ) -> Result:
        """Run a client command as a user, in their home, with an environment built from nothing."""
        home = "/root" if user == "root" else f"/home/{user}"
        return self.machine.run(argv, user=user, env=env, cwd=home, timeout=timeout, input=text)

    def try_sbatch(
        self, *args: str, script: str, user: str = DEFAULT_USER, env: Mapping[str, str] | None = None
    ) -> Result:
        """Submit a script, under ``#!/bin/bash`` where it names no interpreter, whatever comes of it."""
        text = script if script.startswith("#!") else f"#!/bin/bash\n{script}\n"
        return self._as_user(["sbatch", "--parsable", *args], user, 30, env, text)

    def sbatch(
        self,
        *args: str,
        script: str,
        user: str = DEFAULT_USER,
        env: Mapping[str, str] | None = None,
        until: str = "",
    ) -> Job:
        """Submit a script that must be accepted; its output goes to the user's home. Returns when `until` is in it."""
        result = self.try_sbatch(*args, script=script, user=user, env=env)
        if result.returncode != 0:
            raise SlurmError(f"sbatch {shlex.join(args)}: {result}\n{self.logs()}")
        job = Job(int(result.stdout.strip().splitlines()[-1].split(";")[0]), user)
        if until:
            self.until_output(job, until)
        return job

    def run_batch(
        self, *args: str, script: str, env: Mapping[str, str] | None = None, state: str | None = "COMPLETED"
    ) -> str:
        """Run a script to its end, which must be `state`, whatever it is for None. Returns its output."""
        job = self.sbatch(*args, script=script, env=env)
        ended, output = self.wait(job).state, self.output(job)
        assert state in (ended, None), f"{ended}: {output}"
        return output

    def let_go(self, job: Job, word: str = "go") -> None:
        """Let a job's script come past its waits_for(word)."""
        self.machine.write(f"/home/{job.user}/{word}.{job}", "")

    def srun(
        self, *args: str, user: str = DEFAULT_USER, timeout: float = 60, env: Mapping[str, str] | None = None
    ) -> Result:
        """Run ``srun`` with all of `args`, options and command; the caller judges the result."""
        return self._bounded("srun", args, user, timeout, env)

    def salloc(
        self, *args: str, user: str = DEFAULT_USER, timeout: float = 60, env: Mapping[str, str] | None = None
    ) -> Result:
        """Run ``salloc`` with all of `args`, options and command; the caller judges the result."""
        return self._bounded("salloc", args, user, timeout, env)

    def _bounded(
        self, program: str, args: Sequence[str], user: str, timeout: float, env: Mapping[str, str] | None
    ) -> Result:
        """Run a client that may wait for the cluster; when it waits too long, show the daemons' logs."""
        try:
            return self._as_user([program, *args], user, timeout, env)
        except TimeoutError as error:
            raise SlurmError(f"{error}\n{self.logs()}") from error

    def scancel(self, job: Job, *args: str) -> None:
        """Cancel a job as its own user."""
        self._as_user(["scancel", *args, str(job)], job.user, 30, None).check()

    def job_info(self, job: Job) -> JobInfo:
        """How a job stands now (the first record, for an array)."""
        text = self.machine.run(["scontrol", "-o", "show", "job", str(job)]).check().stdout
        fields = parse_fields(text.splitlines()[0])
        code, _, number = fields["ExitCode"].partition(":")
        return JobInfo(
            id=int(fields["JobId"]),
            state=fields["JobState"],
            exit_code=int(code),
            signal=int(number),
            reason=fields["Reason"],
            nodes=fields["NodeList"],
            fields=fields,
        )

    def output(self, job: Job) -> str:
        """The text of a batch job's output file; empty when it was never made."""
        path = self.machine.path(self.job_info(job).fields["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def until_output(self, job: Job, text: str, timeout: float = 20, *, times: int = 1) -> str:
        """Wait until a job's output holds `text`; returns all of it. A job that runs may still be in its prolog."""

        def look() -> str | None:
            output = self.output(job)
            return output if output.count(text) >= times else None

        return self.until(f"{text!r} in the output of job {job}", look, timeout)

    def gpus_of(self, job: Job) -> dict[str, list[int]]:
        """The GPUs that the controller gave a running job, by node and index (``GRES=gpu:3(IDX:0,2-3)``)."""
        text = self.machine.run(["scontrol", "-d", "show", "job", str(job)]).check().stdout
        found = re.findall(r"^ +Nodes=(\S+) .*\(IDX:([\d,-]+)\)", text, re.MULTILINE)
        return {node: _numbers(ranges) for node, ranges in found}

    # -------------------------------------------------------------------------------------------------- nodes

    def node_states(self) -> dict[str, NodeState]:
        """How each node stands now; empty while the controller does not answer."""
        lines = self.machine.run(["scontrol", "-o", "show", "node"]).stdout.splitlines()
        records = [parse_fields(line) for line in lines if line.startswith("NodeName=")]
        return {one["NodeName"]: NodeState(one["State"], one.get("Reason", "")) for one in records}

    def resume(self, node: str) -> None:
        """Take a drained node back into service and wait until it is."""
        self.machine.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"]).check()
        self.until(f"{node} back", lambda: not self.node_states()[node].drained or None, 10)

    # --------------------------------------------------------------------------------------------------- logs

    def said(self, output: str) -> list[tuple[str, str]]:
        """What our plugin told a job's user from its nodes: node and words, without the node's name in them."""
        found = (re.search(self.release.said_on_a_node, line) for line in output.splitlines())
        return [(one["node"], one["first"] + one["last"]) for one in found if one]

    def logs(self, lines: int = _LOG_TAIL_LINES) -> str:
        """The tails of all daemon logs, for the message of a failed test."""
        places = [self.machine.path(directory) for directory in (LOG_DIRECTORY, "/var/log/munge")]
        found = sorted(path for place in places if place.is_dir() for path in place.iterdir() if path.is_file())
        return "\n".join(
            f"==> {path.name} <==\n" + "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
            for path in found
            if path.stat().st_size and not (path.suffix == ".out" and path.with_suffix(".log").exists())
        )


def _setting(line: str) -> tuple[str, str | None]:
    """Split ``Key=value``."""
    key, _, value = line.strip().partition("=")
    return key, value


def _numbers(ranges: str) -> list[int]:
    """Read a list of numbers such as ``0,2-3``."""
    ends = [one.partition("-") for one in ranges.split(",")]
    return [number for low, _, high in ends for number in range(int(low), int(high or low) + 1)]


def localise(sample: str, replacements: Mapping[str, str | None]) -> str:
    """Put this machine's values into a sample file; a key that the sample has not is added at the end.

    The sample's node and partition lines go: they are always a machine's own.
    """
    left = dict(replacements)
    lines = []
    for line in sample.splitlines():
        key = line.partition("=")[0]
        if key in ("NodeName", "PartitionName"):
            continue
        if key not in replacements:
            lines.append(line)
            continue
        value = left.pop(key, None)
        if value is not None:
            lines.append(f"{key}={value}")
    lines += [f"{key}={value}" for key, value in left.items() if value is not None]
    return "\n".join(lines) + "\n"


def parse_fields(record: str) -> dict[str, str]:
    """Read one line of ``scontrol -o``: values may hold blanks, keys do not."""
    return dict(re.findall(r"(\S+?)=(.*?)(?=\s+[A-Za-z][\w/:]*=|\s*$)", record))
