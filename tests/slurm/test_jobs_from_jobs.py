"""A job that is submitted from inside another is a job of its own, however the environment was cleaned on the way."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from tests.harness.site import PYTHON

if TYPE_CHECKING:
    from tests.harness.site import Site

#: The one it comes from has limits, a low priority, and in its step variables for all of them.
PARENT = ("-wn1", "-n1", "--gres=gpu:1", "--mps-threads=50", "--mps-mem=8G", "--mps-priority=low")
LOWER = "srun --mps-threads=10 --mps-mem=2G --mps-priority=low"
SHOW = "simulated-gpus client; env | grep ^CUDA; echo over"
#: How scripts and their tools clean an environment before they submit from it.
CLEANED = {
    "nothing": "",
    "the job's id": "unset SLURM_JOB_ID SLURM_JOBID",
    "SLURM": "unset ${!SLURM*}",
    "SLURM and SBATCH": "unset ${!SLURM*} ${!SBATCH*}",
    "SPANK": "unset ${!SPANK*} ${!SLURM_SPANK*}",
}
#: And how little they let the new job have.
SUBMITTED = {
    "all": "sbatch",
    "none": "sbatch --export=NONE",
    "some": "sbatch --export=PATH,CUDA_VISIBLE_DEVICES,CUDA_MPS_ACTIVE_THREAD_PERCENTAGE,CUDA_MPS_PIPE_DIRECTORY",
    "env -i": "env -i PATH=$PATH HOME=$HOME CUDA_MPS_PIPE_DIRECTORY=$CUDA_MPS_PIPE_DIRECTORY sbatch",
}


def said_by(site: Site, script: str, *names: str) -> dict[str, str]:
    """Run a script in a step of the parent, and give back what was written to these files of alice's."""
    machine = site.machine
    machine.write("/home/alice/inner.sh", script, user="alice")
    job = site.cluster.sbatch(*PARENT, script=f"{LOWER} bash inner.sh\n")
    info = site.cluster.wait(job)
    said = {}
    for name in names:
        path = machine.path(f"/home/alice/{name}.out")
        said[name] = path.read_text()
        path.unlink()
    assert info.state == "COMPLETED", site.cluster.output(job)
    return said


def wait_for(names: list[str]) -> str:
    return "".join(f"for n in {{1..300}}; do grep -q over {name}.out && break; sleep 0.1; done\n" for name in names)


@pytest.mark.parametrize("cleaned", CLEANED)
def test_a_job_from_inside_another_has_nothing_of_it(site: Site, cleaned: str) -> None:
    """Neither limits nor priority nor daemon, whether it asks for MPS or not. The parent's daemon serves other GPUs."""
    commands = [f"{command} --mps" for command in SUBMITTED.values()] + ["sbatch"]
    names = [f"c{number}" for number in range(len(commands))]
    lines = [
        f"{command} -wn2 -n1 --gres=gpu:1 -o {name}.out --wrap '{SHOW}'"
        for name, command in zip(names, commands, strict=True)
    ]
    found = said_by(site, "\n".join([CLEANED[cleaned], *lines, wait_for(names)]), *names)
    for name, command in zip(names, commands, strict=True):
        said = found[name]
        assert " sms=132 " in said, (command, said)
        assert not [word for word in ("PERCENTAGE", "PINNED", "PRIORITY") if word in said], (command, said)
        assert ("mps=none" in said) is ("CUDA_MPS" not in said) is ("--mps" not in command), (command, said)


SUBMITIT = """
import json, os, pathlib, subprocess, sys
import submitit

def work():
    client = subprocess.run(["simulated-gpus", "client"], capture_output=True, text=True).stdout
    return client + json.dumps([name for name in os.environ if "MPS" in name])

with submitit.helpers.clean_env():
    executor = submitit.SlurmExecutor(folder="submitit", python=sys.executable)
    executor.update_parameters(gres="gpu:1", time=5, additional_parameters={"mps": "per-node", "nodelist": "n2"})
    said = executor.submit(work).result()
pathlib.Path("submitit.out").write_text(said)
"""


def test_submitit_makes_a_job_of_its_own(site: Site) -> None:
    """Its clean_env() takes all SLURM_* away."""
    site.machine.write("/home/alice/submit.py", SUBMITIT, user="alice")
    said = said_by(site, f"{PYTHON} submit.py\n", "submitit")["submitit"]
    client, _, names = said.partition("[")
    assert " sms=132 " in client
    assert "mps=none" not in client
    assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" not in json.loads(f"[{names}")


def test_a_users_own_limit_travels_on(site: Site) -> None:
    """What a script sets for itself is a wish, in its steps and in jobs that it submits."""
    script = (
        "export CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=5\n"
        f"unset ${{!SLURM*}}\nsbatch -wn2 -n1 --gres=gpu:1 --mps -o own.out --wrap '{SHOW}'\n{wait_for(['own'])}"
    )
    assert " sms=8 " in said_by(site, script, "own")["own"]


@pytest.mark.parametrize("cleaned", ["", "unset SLURM_JOB_ID; "])
def test_a_job_from_an_sallocs_shell_has_nothing_of_it(site: Site, cleaned: str) -> None:
    """That shell is in no task: what tells of the job is the request alone, under two kinds of names (22.05)."""
    new, client = "-wn2 -n1 --gres=gpu:1", "simulated-gpus client"
    commands = [f"salloc -Q {new} --mps srun {client}", f"salloc -Q {new} srun {client}"]
    if cleaned:  # or srun would make a step
        commands += [f"srun -Q {new} --mps {client}", f"srun -Q {new} {client}"]
    line = cleaned + "; ".join(commands)
    found = site.cluster.salloc("-Q", "-wn1", "-n1", "--gres=gpu:1", "--mps-threads=10", "bash", "-c", line).check()
    clients = re.findall(r"sms=(\d+) .* mps=(\w+)", found.stdout)
    assert [(sms, mps == "none") for sms, mps in clients] == [("132", n % 2 == 1) for n in range(len(commands))]
