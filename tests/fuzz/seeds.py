"""What libFuzzer begins with: inputs of each target, by what is odd about them. The targets' files tell the parts."""

from __future__ import annotations

A, B = "GPU-51000000-99a9-0495-d04f-b3afe1238f{:02}", "GPU-51000000-fc4b-2381-c253-bcc1859953{:02}"
PIPE, LOG = "/run/slurm-mps/jobs/4711", "/var/log/slurm-mps/4711"
HEAD, END = "slurm-mps verdict 1", "end 00000000\n"
PROBE = "/opt/slurm-mps/bin/python3 /opt/slurm-mps/lib/slurm_mps/task/probe.py"
GOOD = {
    "status": "ready",
    "daemon": f"{PIPE}/pipe {LOG} 8G",
    "thread_percentage": "25",
    "thread_percentage_min": "0.1",
    "memory_min": "1M",
    "context_mib": "514",
    "probe": PROBE,
    "explain": "/opt/slurm-mps/lib/slurm_mps/task/explain.py",
    "clients_per_gpu": "48",
    "visible_devices": "uuid",
}
_OPTIONS = ("daemons", "threads", "mem", "priority")
_VARIABLES = (
    *("visible", "pipe", "log", "own_threads", "own_mem", "own_priority", "connections", "set_by_us", "node_fault"),
    *("gpus_on_node", "ntasks", "per_node", "tasks_per_node", "shards"),
)
PARSERS = ("verdict", *_OPTIONS, "visible", "own_threads", "own_mem", "tasks_on")
STEP = ("verdict", *_OPTIONS, *_VARIABLES, "said", "bytes")
#: What lies in a verdict's place, in file.c's order.
KINDS = ("plain", "hole", "link", "link-to-itself", "fifo", "directory", "socket", "device", "nothing", "below-a-file")


def gpus(count: int, memory: str = "80000 81559") -> list[str]:
    return [f"{number} {number} {(A, B)[number % 2].format(number)} {memory}" for number in range(count)]


def verdict(head: str = HEAD, /, **other: str | list[str]) -> str:
    """A good verdict of two GPUs with other values, several for a key that stands so often."""
    lines = {**GOOD, "gpu": gpus(2), **other}
    several = [(key, [given] if isinstance(given, str) else given) for key, given in lines.items()]
    return "\n".join([head, *(f"{key} {value}" for key, values in several for value in values), END])


def short(status: str, message: str = "") -> str:
    return "\n".join([HEAD, f"status {status}", *([f"message {message}"] if message else []), END])


def daemons(*limits: str) -> list[str]:
    return [f"{PIPE}/gpu-{number} {LOG}/gpu-{number} {limit}" for number, limit in enumerate(limits)]


def _input(names: tuple[str, ...], given: dict[str, str]) -> bytes:
    assert given.keys() <= set(names)
    parts = [given.get(name, "") for name in names]
    return "\0".join(parts).rstrip("\0").encode("latin-1")


def parsers(text: str = "", **parts: str) -> bytes:
    return _input(PARSERS, {"verdict": text or verdict(), **parts})


def step(text: str = "", **parts: str) -> bytes:
    return _input(STEP, {"verdict": text or verdict(), "visible": "0", "gpus_on_node": "1", **parts})


AUTO: dict[str, str | list[str]] = {"thread_percentage": "100", "auto": ["threads", "memory"]}
PER_GPU: dict[str, str | list[str]] = {"daemons": "per-gpu", "daemon": daemons("8G", "8G")}
ONE_LIMIT: dict[str, str | list[str]] = {"daemons": "per-gpu", "daemon": daemons("8G", "-")}
NO_LIMIT = f"{PIPE}/pipe {LOG} -"
LISTS_64 = ",".join(f"{gpu}:1G" for gpu in range(64))

SEEDS: dict[str, dict[str, bytes]] = {
    "parsers": {
        "after-the-end": parsers(verdict() + "status ready\n"),
        "another-kind": b"slurm-mps journal 1\nstatus ready\nend 0\n",
        "auto": parsers(verdict(daemon=NO_LIMIT, **AUTO), visible="0,1", tasks_on="\4\7"),
        "auto-many": parsers(verdict(**AUTO), visible="0,1", tasks_on="01"),
        "auto-no-memory": parsers(
            verdict(thread_percentage="100", auto="memory", gpu=gpus(1, "0 81559")), tasks_on="\1"
        ),
        "auto-per-gpu": parsers(
            verdict(thread_percentage="100", auto="memory", daemons="per-gpu", daemon=daemons("-", "4G")),
            visible="1",
            own_mem="0=1G",
            tasks_on="\2\3",
        ),
        "auto-step": parsers(threads="auto", mem="auto", visible="0,1", tasks_on="\4\7"),
        "big-numbers": parsers(
            verdict(
                context_mib=["514", "99999999"],
                clients_per_gpu=["48", "99999"],
                gpu=[f"{'9' * 20} 4294967296 {A.format(0)} {'9' * 20} 1", f"1 1 {B.format(1)} 1 1"],
            ),
            threads="999.9",
            mem="999999999T",
        ),
        "comma-in-uuid": parsers(
            verdict(gpu=[f"{number} {number} GPU-{number},{number} 80000 81559" for number in range(3)]),
            mem="4G",
            visible="0,1,2",
            own_mem="0=1G,4=2G,5=1G",
        ),
        "cut": parsers(verdict()[:150]),
        "daemons-65": parsers(verdict(daemons="per-gpu", daemon=[f"{PIPE}/gpu-{n} {LOG} -" for n in range(65)])),
        "gpu-64": parsers(verdict(**PER_GPU), mem="64:8G,99:1G"),
        "gpu-of-no-memory": parsers(verdict(gpu=gpus(2, "80000 0")), mem="50G"),
        "long-directory": parsers(verdict(daemon=f"/{'x' * 120} {LOG} 8G")),
        "long-program": parsers(verdict(probe=[PROBE, f"/{'x' * 300} /probe.py"])),
        "long-uuid": parsers(verdict(gpu=f"0 0 GPU-{'9' * 200} 80000 81559")),
        "long-value": parsers(short("refused", "x" * 4000)),
        "many-digits": parsers(threads="0000000025", mem="99999999999999G"),
        "many-visible": parsers(verdict(gpu=gpus(64)), visible="0," * 300, tasks_on="\2" * 64),
        "newer": parsers(verdict("slurm-mps verdict 2")),
        "no-limit-word": parsers(verdict(daemon=f"{PIPE}/pipe {LOG}")),
        "one-daemon-too-few": parsers(verdict(daemons="per-gpu", daemon=daemons("-", "-"), gpu=gpus(3))),
        "one-word-too-many": parsers(verdict(daemon=f"{PIPE}/pipe {LOG} 8G 4G")),
        "own-mem-higher": parsers(mem="2G", visible="0,1", own_mem="0=20G,1=1G"),
        "own-with-unit-of-b": parsers(visible="0,1", own_threads="12.34", own_mem="0=1GB,1=512MiB"),
        "per-gpu": parsers(verdict(**ONE_LIMIT), daemons="per-gpu", mem="0:2G,1:4G", visible="1", tasks_on="\1\1"),
        "per-gpu-asked-per-node": parsers(verdict(**PER_GPU), daemons="per-node"),
        "per-gpu-not": parsers(daemons="(null)", mem="0:2G,1:4G"),
        "per-gpu-too-far": parsers(verdict(**PER_GPU), mem="0:2G,63:4G"),
        "per-gpu-twice": parsers(verdict(**PER_GPU), mem="0:2G,0:4G"),
        "other-keys": parsers(verdict(daemon=[], pipe_directory=f"{PIPE}/pipe", log_directory=LOG, memory_limit="8G")),
        "ready-64-daemons": parsers(
            verdict(daemons="per-gpu", daemon=daemons(*["8G"] * 64), gpu=gpus(64)),
            mem=LISTS_64,
            visible="63",
            tasks_on="\1" * 64,
        ),
        "ready-64-gpus": parsers(verdict(gpu=gpus(64)), visible="0"),
        "ready-65-gpus": parsers(verdict(gpu=gpus(65))),
        "ready-by-uuid": parsers(visible=A.format(0), own_mem=f"{A.format(0)}=512M"),
        "ready-duplicates": parsers(visible=",", own_mem="0=1G,0=2G,=,"),
        "ready-junk-variables": parsers(visible="0", own_threads="junk", own_mem="junk"),
        "ready-low": parsers(verdict(client_priority="1"), priority="normal"),
        "ready-no-limit": parsers(verdict(daemon=NO_LIMIT), mem="1G"),
        "ready-one-of-two": parsers(visible="1", own_threads="50", own_mem="1=1G"),
        "ready-ordinals": parsers(verdict(visible_devices="ordinal"), visible="1"),
        "ready-plain": parsers(),
        "ready-step": parsers(
            threads="12.5",
            mem="2G",
            priority="low",
            visible="0,1",
            own_threads="10",
            own_mem="0=1G,1=512M",
        ),
        "refused": parsers(short("refused", "no")),
        "refused-without-words": parsers(short("refused")),
        "step-below-the-least": parsers(
            verdict(memory_min=["1M", "4G"], thread_percentage_min=["0.1", "10"]), threads="5", mem="1G"
        ),
        "step-mem-higher": parsers(mem="50G"),
        "step-threads-higher": parsers(threads="50"),
        "two-daemons-for-all": parsers(verdict(daemon=[GOOD["daemon"]] * 2)),
        "unbound": parsers(tasks_on="\1\1"),
        "without": parsers(short("without", "this node cannot give it MPS")),
    },
    "step": {
        "explained": step(
            said="job 4711: rank 0 hit \x1b[2J\xff an illegal address\nmore\n",
            bytes="\1\4\0" + "\3" * 30 + "\t\0" + "\1\0\t\0" * 59 + "\1",
        ),
        "health": step(verdict(visible_devices="ordinal"), bytes="\0" + "\5\6\1\1" * 8 + "\7\1\2\3\4" * 20),
        "joined": step(
            verdict(
                **ONE_LIMIT,
                share="12.5",
                share_memory="even",
                joined=[f"/run/slurm-mps/daemons/{uuid}" for uuid in (A.format(0), B.format(1))],
            ),
            visible="1",
            bytes="\0" + "\1" * 40,
        ),
        "long-all": step(**dict.fromkeys(_VARIABLES[:13], "9" * 4000)),
        "long-memory": step(own_mem=f"0={'9' * 4000}"),
        "many-tasks": step(
            said="x" * 3000,
            bytes="\1\4\0" + "\xc8" * 80 + "\0" + "\0".join(["".join(map(chr, range(1, 256)))] * 8),
        ),
        "of-another-job": step(
            pipe="/run/slurm-mps/jobs/12/pipe",
            log="/l",
            own_mem="0=1024M",
            node_fault="x",
            set_by_us="CUDA_MPS_PINNED_DEVICE_MEM_LIMIT=0=1024M CUDA_MPS_LOG_DIRECTORY=/l",
        ),
        "own-limits": step(own_threads="12.55", own_mem="0=2GB", own_priority="1"),
        "per-gpu": step(verdict(**ONE_LIMIT), visible="1", bytes="\0" + "\1" * 40),
        "plain": step(),
        "script-auto": step(
            verdict(daemon=NO_LIMIT, **AUTO),
            threads="auto",
            mem="auto",
            visible="0,1",
            gpus_on_node="2",
            ntasks="8",
            tasks_per_node="4(x2),1",
            bytes="\0" * 14 + "\10\1\t\t\t\t",
        ),
        "script-many": step(
            verdict(daemon=NO_LIMIT, **AUTO),
            threads="auto",
            visible="0,1",
            gpus_on_node="2",
            ntasks="8",
            tasks_per_node="4294967295",
            bytes="\1\10\1\t\t\t\t",
        ),
        "shards": step(verdict(shards_per_gpu="4", share_memory="even"), shards="1"),
        "slices": step(
            verdict(**PER_GPU, gpu=[one.replace("GPU-", "MIG-") for one in gpus(2)]),
            visible="0,1",
            gpus_on_node="2",
            bytes="\2",
        ),
        "without": step(
            short("without", "this node cannot give it MPS"), own_threads="5", own_mem="0=1G", gpus_on_node=""
        ),
    },
    "file": {
        name: f"{head}{text}".encode("latin-1")
        for name, head, text in (
            *((kind, f"{chr(number)}$\0\10", verdict()) for number, kind in enumerate(KINDS)),
            *(("a-users", "\0$\1\0", verdict()), ("writable", "\0006\0\0", verdict())),
            *(("cut", "\0$\0\0", verdict()[:-9]), ("long", "\1$\0\xff", verdict())),
        )
    },
}
