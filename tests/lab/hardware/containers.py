"""``python3 -m tests.lab.hardware.containers``: programs in a container on a real GPU, with MPS and without.

One user's jobs, with ranks in Charliecloud's ch-run beside one outside: what each has of the GPU and which server it
has, which pids the control daemon and NVML give, a fault, and a container that lacks the state directory. The image is
a directory of mount points, on which the machine's own /usr, /etc and /opt are bound. Prints a page of docs/hardware in
about a minute; exits 1 when something is not as it should be. The GPUs' compute mode is left alone.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from functools import partial
from typing import TYPE_CHECKING

from tests.harness import bundle
from tests.harness.cluster import SlurmError
from tests.harness.site import PYTHON, STATE_DIRECTORY

from .show import Show, conclude, heading
from .site import NODE, PLACE, RealSite, host_traces

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.harness.cluster import Job

LIMIT_SECONDS = 300
THREADS, MEM_MIB = 25, 4096
OPTIONS = f"-n3 --gres=gpu:1 --mps --mps-threads={THREADS} --mps-mem={MEM_MIB >> 10}G"
VERIFY = "/opt/slurm-mps/bin/slurm-mps verify --timeout 20"
SEEN = ("/usr", "/etc", "/opt")
EMPTY = ("/dev", "/proc", "/sys", "/tmp", "/home", "/root", "/mnt")
STATUS = ("/opt/slurm-mps/bin/slurm-mps", "status")

SCRIPTS = {
    # The state directory is read-only below a mount namespace that ch-run's own is made from.
    "container": """\
#!/bin/sh
# In a container of Charliecloud; with PIDS=own it has pids of its own, and without BIND no /run/slurm-mps.
export AS=$(id -u) BIND=${BIND-/run/slurm-mps}
exec unshare --user --map-root-user --mount ${PIDS:+--pid --fork --kill-child@PROC@} sh -euc '
if [ "$BIND" ]; then
	mount --bind "$BIND" "$BIND"
	mount -o remount,bind,ro "$BIND" || echo "$BIND is not read-only"
fi
exec ch-run -u "$AS" @BINDS@ ${BIND:+-b "$BIND"} ~/image -- "$@"' sh "$@"
""",
    "mixed": """\
#!/bin/sh
# Rank 0 in a container, rank 1 in one that has pids of its own, the others outside.
case $SLURM_PROCID in
0) exec @PLACE@/container "$@" ;;
1) PIDS=own exec @PLACE@/container "$@" ;;
*) exec "$@" ;;
esac
""",
    "rank": """\
#!/bin/sh
# A CUDA program, which does what its standard input says.
echo "rank $SLURM_PROCID: pid $$ of $(readlink /proc/self/ns/pid)"
exec /usr/bin/python3 @PLACE@/tests/contract/cuda_client.py 1
""",
    "loaded.py": """\
import ctypes

ctypes.CDLL("libcuda.so.1")
print(*sorted({line.split()[-1] for line in open("/proc/self/maps") if "libcuda" in line}))
""",
    "told": """\
#!/bin/sh
# Says the word once the job may go on, in twenty seconds at most.
for _ in $(seq 200); do [ -e ~/go.$SLURM_JOB_ID ] && break; sleep 0.1; done
echo "$1"
""",
}

LOOK = f"""
echo "in $(readlink /proc/self/ns/user) $(readlink /proc/self/ns/mnt), uid $(id -u)"
/usr/bin/python3 {PLACE}/loaded.py
echo $(ls /dev | grep nvidia)
grep " {STATE_DIRECTORY} " /proc/self/mountinfo
mkdir {STATE_DIRECTORY}/mine
"""

NVML = """
import pynvml
pynvml.nvmlInit()
for index in range(pynvml.nvmlDeviceGetCount()):
    gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
    for name in ("ComputeRunningProcesses", "MPSComputeRunningProcesses"):
        try:
            said = sorted(one.pid for one in getattr(pynvml, f"nvmlDeviceGet{name}_v3")(gpu))
        except pynvml.NVMLError as error:
            said = error
        print(f"GPU {index}: {name} {said}")
"""


def lay(site: RealSite, *also: str) -> None:
    """Write SCRIPTS, and make alice's image; `also` are directories that a container sees beside those of SEEN."""
    driver = [one for one in bundle.driver_places() if not os.path.realpath(one).startswith(SEEN)]
    seen = [*SEEN, *driver, *also]
    proc = ""  # the simulated driver looks for its programs in the machine's, the real one in the program's own (O97)
    if site.real:
        proc = " --mount-proc"
        # The kernel lets users mount a /proc where they see one that nothing is mounted on.
        site.node(NODE, "mount", "--mkdir", "-t", "proc", "proc", f"{PLACE}/proc").check()
    for name, text in SCRIPTS.items():
        filled = (
            text.replace("@PLACE@", PLACE)
            .replace("@PROC@", proc)
            .replace("@BINDS@", " ".join(f"-b {one}" for one in seen))
        )
        site.machine.write(f"{PLACE}/{name}", filled, mode=0o755)
        print(f"alice$ cat {PLACE}/{name}\n{filled}")
    places = " ".join(one.lstrip("/") for one in (*seen, *EMPTY, STATE_DIRECTORY))
    make = f"mkdir -p ~/image; cd ~/image; mkdir -p {places}; touch etc/resolv.conf etc/hosts etc/passwd etc/group"
    make += "; for one in bin sbin lib lib64; do ln -sfn usr/$one $one; done"
    site.node(NODE, "sh", "-euc", make, user="alice").check()
    print(f"alice$ {make}\n", flush=True)


def _ask(site: RealSite, argv: Sequence[str], *, user: str = "root", text: str = "", pipe: str = "") -> str:
    """Run a command on the node, print it and what came of it; returns the output."""
    environment = {"CUDA_MPS_PIPE_DIRECTORY": pipe} if pipe else {}
    shown = "NVML lists" if argv[0] == PYTHON else shlex.join(argv).replace("/opt/slurm-mps/bin/", "")
    print(f"{user}# {f'echo {text.strip()} | ' if text else ''}{shown}")
    try:
        result = site.machine.run(argv, node=NODE, user=user, env=environment, input=text)
        said = f"{result.stdout}{result.stderr}[exit {result.returncode}]"
    except TimeoutError as error:
        said = str(error)
    print(f"{said}\n", flush=True)
    return said


def _look_at_clients(show: Show, site: RealSite, job: Job) -> None:
    """Which pids the control daemon, NVML and status give; then the job goes on."""
    pipe = f"{STATE_DIRECTORY}/jobs/{job}/pipe"
    listed = _ask(site, ["nvidia-cuda-mps-control"], text="ps\n", pipe=pipe)
    _ask(site, [PYTHON, "-c", NVML])
    said = _ask(site, [*STATUS, "-o", "job,gpu,server,client,inside,task,state"])
    site.cluster.let_go(job)
    show.judge("ps of the control daemon", listed, "(\n *\\d+ .*){3}")
    show.judge("status", said, r"(?=.* - +0\.0 )(?=.* 1 +0\.1 )(?=.* - +0\.2 ).*\[exit 0\]")


def _look_without(show: Show, site: RealSite, job: Job) -> None:
    """What status says of containers that run without MPS; then the job goes on."""
    _ask(site, [PYTHON, "-c", NVML])
    said = _ask(site, [*STATUS, "-o", "job,gpu,server,client,inside,task,state"])
    site.cluster.let_go(job)
    show.judge("status without the bind", said, r"without the job's control daemon.*\[exit 1\]")


def jobs(show: Show, site: RealSite) -> None:
    """Print and judge each part; one that fails does not keep the others from running."""
    mixed, container, rank = (f"{PLACE}/{name}" for name in ("mixed", "container", "rank"))
    on_go = f"{PLACE}/told {{word}} | {{how}} {rank}"

    def step(tasks: int, how: str, word: str = "synchronize", end: str = "") -> str:
        return f"srun -n{tasks} --kill-on-bad-exit=0 sh -c '{on_go.format(word=word, how=how)}{end}'\n"

    same = rf" (?!(\d+)/\1 )(\d+/\d+) +\d+ +{MEM_MIB} .*" + rf" \2 +\d+ +{MEM_MIB} .*" * 2
    clients = "3 ranks, all clients, each GPU's ranks share one server.*COMPLETED"
    fault = "$([ $SLURM_PROCID = 1 ] && echo fault || echo work)"
    parts: dict[str, Callable[[], None]] = {
        "a look around": lambda: show.sbatch(
            "-n1 --gres=gpu:1 --mps",
            f"ch-run --version\nsrun {container} sh -c {shlex.quote(LOOK)}\n",
            "libcuda.*nvidiactl.* ro.*ead-only",
        ),
        "verify": lambda: show.sbatch(OPTIONS, f"srun {mixed} {VERIFY}\n", same + clients),
        "clients": lambda: show.sbatch(
            OPTIONS,
            step(3, mixed),
            r"(?:\n0\b.*){3}COMPLETED",
            lambda said: said.count('"pid"') == 3,
            partial(_look_at_clients, show, site),
        ),
        "a fault": lambda: show.sbatch(
            OPTIONS,
            step(3, mixed, fault, "; [ $SLURM_PROCID != 1 ]") + f"srun {mixed} {VERIFY}\n",
            "(rank 1|process \\d+) hit a GPU fault.*" + clients,
            lambda said: said.count('"pid"') == 3,
            site.cluster.let_go,
        ),
        "verify without the bind": lambda: show.sbatch(
            OPTIONS, f"export BIND=\nsrun {container} {VERIFY}\n", "ranks 0-2 run without MPS.*does not exist.*FAILED"
        ),
        "a program without the bind": lambda: show.sbatch(
            OPTIONS,
            "export BIND=\n" + step(2, container),
            "no program of this (step|job) used MPS",
            lambda said: said.count('"pid"') == 2,
            partial(_look_without, show, site),
        ),
    }
    for name, part in parts.items():
        print(f"## {name}\n")
        try:
            part()
        except (AssertionError, SlurmError, TimeoutError) as error:
            print(f"{type(error).__name__}: {error}\n")
            show.judge(name, "", f"the part to run: {type(error).__name__}")


class TooLongError(Exception):
    """LIMIT_SECONDS have passed."""


def _too_long(_number: int, _frame: object) -> None:
    raise TooLongError(f"not done in {LIMIT_SECONDS} s")


def main() -> int:
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(LIMIT_SECONDS)
    problems: list[str] = []
    on_host = host_traces()
    as_before = False
    try:
        with RealSite() as site:
            before = site.snapshot()
            heading(site, "Containers on real GPUs", "make containers")
            lay(site)
            jobs(Show(site, problems), site)
            as_before = site.snapshot() == before
    except TooLongError as error:
        problems.append(str(error))
    return conclude(as_before, on_host, problems)


if __name__ == "__main__":
    sys.exit(main())
