"""What docs/programs.md promises of a job's script, of a shell that ssh opened, and of a job that is entered."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tests.harness.cluster import waits_for

if TYPE_CHECKING:
    from tests.harness.site import Site

LINES = (Path(__file__).parents[2] / "docs/programs.md").read_text().splitlines()
CLIENT = "simulated-gpus client"


def line_of_page(start: str) -> str:
    return next(line for line in LINES if line.startswith(start))


def test_the_lines_of_the_page_work(any_site: Site) -> None:
    site, asked = any_site, ("-wn1", "--gres=gpu:2", "--mps-threads=25", "--mps-mem=8G")
    fraction, integers = line_of_page("f=$("), line_of_page("export CUDA_VISIBLE_DEVICES=").replace("0,1", "1")
    script = f"{fraction}; echo fraction $f; {integers}\n{CLIENT}; echo told; {waits_for()}"
    job = site.cluster.sbatch(*asked, script=script, until="told")
    by_ssh = site.machine.run(CLIENT.split(), user="alice", node="n1")
    name, _, pipe = line_of_page("export CUDA_MPS_PIPE_DIRECTORY=").removeprefix("export ").partition("=")
    daemon = {name: pipe.split()[0].replace("4711", str(job))}
    by_address = site.machine.run(CLIENT.split(), user="alice", node="n1", env=daemon).stdout
    entered = site.cluster.srun("--overlap", f"--jobid={job}", *CLIENT.split()).stdout
    output = site.cluster.output(job)
    site.cluster.let_go(job)
    site.cluster.wait(job)

    first, second = (gpu["uuid"] for gpu in site.gpus("n1")[:2])
    assert "fraction 0.054\n" in output
    assert f"uuid={second} sms=32 free=8047 " in output
    assert by_ssh.stdout == "FAILED context 46 CUDA_ERROR_DEVICE_UNAVAILABLE\n"
    assert f"uuid={first} sms=32 free=8047 " in by_address
    assert entered == by_address
