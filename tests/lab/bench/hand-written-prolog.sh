#!/bin/bash
# The prolog that a site writes by hand, which slurm-mps's is measured against. It checks nothing and undoes nothing.
PATH=/usr/sbin:/usr/bin:/sbin:/bin
uuids=$(nvidia-smi --query-gpu=uuid --format=csv,noheader -i "$SLURM_JOB_GPUS")
export CUDA_VISIBLE_DEVICES=${uuids//$'\n'/,}
export CUDA_MPS_PIPE_DIRECTORY=/run/mps-by-hand/$SLURM_JOB_ID/pipe
export CUDA_MPS_LOG_DIRECTORY=/run/mps-by-hand/$SLURM_JOB_ID/log
mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
nvidia-cuda-mps-control -d
echo "set_default_active_thread_percentage $SPANK_MPS_THREADS" | nvidia-cuda-mps-control
echo "set_default_device_pinned_mem_limit 0 $SPANK_MPS_MEM" | nvidia-cuda-mps-control
echo "start_server -uid $SLURM_JOB_UID" | nvidia-cuda-mps-control
