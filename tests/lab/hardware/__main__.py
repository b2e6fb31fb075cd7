"""``python3 -m tests.lab.hardware``: jobs on real GPUs, from sbatch to nothing left, as their users see them.

The demo's job, automatic limits, a daemon per GPU, faults and killed steps; tasks confined to their GPUs, ranks that
MPI started. As root, on a machine with an NVIDIA driver and Slurm, or with a bundle (tests/harness/bundle.py). Prints a
page of docs/hardware, with what is left at the end; exits 1 when anything is, or the demo's job is not as it should be.
The GPUs' compute mode is left alone.
"""

from __future__ import annotations

import sys

from tests.lab.demo import Demo, run_job

from .show import Show, conclude, heading
from .site import PLACE, RealSite, host_traces

CLIENT = f"/usr/bin/python3 {PLACE}/client.py"
VERIFY = "/opt/slurm-mps/bin/slurm-mps verify"
MPI = "--mpi=pmi2 "


def _jobs(show: Show, site: RealSite, gpus: int) -> None:
    """One after another; `gpus` of each node, two ranks on each where there are faults."""
    clients = "8 ranks, all clients, each GPU's ranks share one server.*\\[exit 0"
    for number in sorted({1, gpus}):
        show.srun(f"{MPI}-n8 --gres=gpu:{number} --mps-threads=auto --mps-mem=auto", VERIFY, clients)
    per_gpu = f"-n{4 * gpus} --ntasks-per-gpu=4 --mps=per-gpu --mps-threads=25 --mps-mem=0:8G"
    show.srun(MPI + per_gpu, VERIFY, clients.replace("8 ranks", f"{4 * gpus} ranks"))
    filled = "(filled.*: error 0.*){8}(ended with error 0.*){8}\\[exit 0"
    show.srun("-n8 --gres=gpu:1 --mps-threads=auto --mps-mem=auto", f"{CLIENT} fill 4", filled)
    show.srun("-n50 -O --gres=gpu:1 --mps", "echo ran", "^(?!.*ran\n).*50 tasks of this step.*takes 48.*\\[exit 80")
    next_step = f"srun -n{gpus} --gpus-per-task=1 {CLIENT} hold\n"
    next_works = f"Killed.*(ended with error 0.*){{{gpus}}}\\[COMPLETED"
    spin = f"srun -n{gpus} --gpus-per-task=1 {CLIENT} spin\n{next_step}"
    for mode in ("--mps", "--mps=per-gpu"):
        options = f"-n{gpus} --gres=gpu:{gpus} {mode}"
        show.sbatch(options, spin, next_works, lambda said: said.count("launched") == gpus)
    crowd = f"srun -n4 {CLIENT} spin\nsrun -n4 {CLIENT} hold\n"
    crowd_works = "Killed.*(ended with error 0.*){4}\\[COMPLETED"
    show.sbatch("-n4 --gres=gpu:1 --mps", crowd, crowd_works, lambda said: said.count("launched") == 4)
    ranks = 2 * gpus
    for mode in ("--mps", "--mps=per-gpu"):
        meeting = f"{site.meeting()}/all {ranks}"  # the one that faults waits until the others are there to be hit
        fault = f"[ $SLURM_PROCID = 0 ] && exec {CLIENT} fault 0 {meeting}; exec {CLIENT} hold 3 {meeting}"
        step = f"srun -n{ranks} --ntasks-per-gpu=2 --kill-on-bad-exit=0 sh -c '{fault}'\n"
        spared = f"(ended with error 0.*){{{ranks - 2}}}" if gpus > 1 else ""
        contained = f"(?=.*rank 0 hit a GPU fault.*took rank).*{spared}(ended with error 0.*){{{gpus}}}\\[COMPLETED"
        show.sbatch(f"-n{ranks} --gres=gpu:{gpus} {mode}", step + next_step, contained)
    site.end_meetings()


def main() -> int:
    demo = Demo()
    on_host = host_traces()
    with RealSite() as site:
        before = site.snapshot()
        heading(site, "Jobs on real GPUs", "make hardware")
        run_job(demo, site, site.gpus_per_node, exclusive=False)
        _jobs(Show(site, demo.problems), site, site.gpus_per_node)
        after = site.snapshot()
    return conclude(after == before, on_host, demo.problems)


if __name__ == "__main__":
    sys.exit(main())
