#!/bin/sh
# Epilog of slurm-mps: takes down what the prolog brought up, from the state on disk. Runs as root on every node.
# A job of which nothing is on disk leaves here. Slurm gives no PATH.
job=/run/slurm-mps/jobs/${SLURM_JOB_ID:-none}
[ -e "$job" ] || exit 0
PATH=/usr/sbin:/usr/bin:/sbin:/bin
export PATH
python=/opt/slurm-mps/bin/python3
package=/opt/slurm-mps/lib/python3.11/site-packages/slurm_mps
# The daemons get quit while Python starts, which then proves which processes are there, and ends those that stay.
control='' asked=''
[ ! -r "$job/config" ] || while IFS='=' read -r name value; do
	[ "$name" != paths_control_program ] || control=$value
done <"$job/config"
for pipe in "$job"/pipe "$job"/gpu-*; do
	if [ -n "$control" ] && [ -S "$pipe/control" ]; then
		echo "quit -t 2" | CUDA_MPS_PIPE_DIRECTORY=$pipe "$control" >/dev/null 2>&1 &
		asked=asked
	fi
done
exec "$python" -I -S "$package/hook.py" epilog $asked
