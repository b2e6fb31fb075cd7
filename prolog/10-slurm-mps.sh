#!/bin/sh
# Prolog of slurm-mps: gives a job that asked for it its own MPS control daemon. Runs as root on every node of the job.
# A job that did not ask leaves here, unless one that had its id left something. Slurm gives no PATH.
# CUDA_MPS_ACTIVE_THREAD_PERCENTAGE is Slurm's word for the part of a GPU that a job of gres/mps has.
# A file in mps-partitions gives MPS to the jobs of its partition that do not ask.
[ -n "${SPANK_MPS+x}${SPANK_MPS_THREADS+x}${SPANK_MPS_MEM+x}${SPANK_MPS_PRIORITY+x}" ] ||
	[ -n "${CUDA_MPS_ACTIVE_THREAD_PERCENTAGE+x}" ] ||
	[ -e "/run/slurm-mps/jobs/${SLURM_JOB_ID:-none}" ] ||
	[ -e "/etc/slurm/mps-partitions/${SLURM_JOB_PARTITION-}" ] || exit 0
PATH=/usr/sbin:/usr/bin:/sbin:/bin
export PATH
python=/opt/slurm-mps/bin/python3
package=/opt/slurm-mps/lib/python3.11/site-packages/slurm_mps
exec "$python" -I -S "$package/hook.py" prolog
