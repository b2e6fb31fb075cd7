#!/bin/sh
# Epilog of slurm-mps: takes down what the prolog brought up, from the state on disk. Runs as root on every node.
# A job of which nothing is on disk leaves here. Slurm gives no PATH.
[ -e "/run/slurm-mps/jobs/${SLURM_JOB_ID:-none}" ] || exit 0
PATH=/usr/sbin:/usr/bin:/sbin:/bin
export PATH
python=/opt/slurm-mps/bin/python3
package=/opt/slurm-mps/lib/python3.11/site-packages/slurm_mps
exec "$python" -I -S "$package/hook.py" epilog
