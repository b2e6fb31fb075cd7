#!/bin/bash
# The shape of the prolog that comes with Slurm as an example: a daemon, a second's sleep in place of a look, a server.
PATH=/usr/sbin:/usr/bin:/sbin:/bin
export CUDA_VISIBLE_DEVICES=$SLURM_JOB_GPUS
export CUDA_MPS_PIPE_DIRECTORY=/run/mps-by-hand/$SLURM_JOB_ID/pipe
export CUDA_MPS_LOG_DIRECTORY=/run/mps-by-hand/$SLURM_JOB_ID/log
mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
nvidia-cuda-mps-control -d && sleep 1
echo "start_server -uid $SLURM_JOB_UID" | nvidia-cuda-mps-control
