#!/bin/bash
# The epilog to hand-written-prolog.sh.
PATH=/usr/sbin:/usr/bin:/sbin:/bin
job=/run/mps-by-hand/$SLURM_JOB_ID
export CUDA_MPS_PIPE_DIRECTORY=$job/pipe
export CUDA_MPS_LOG_DIRECTORY=$job/log
echo "quit -t 2" | nvidia-cuda-mps-control
mkdir -p "/var/log/mps-by-hand/$SLURM_JOB_ID"
cp "$job"/log/*.log "/var/log/mps-by-hand/$SLURM_JOB_ID"
rm -rf "$job"
