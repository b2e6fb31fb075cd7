#!/bin/sh
# Stands in front of the control program for one job, to write down what it is told.
control=/usr/bin/nvidia-cuda-mps-control
[ $# -eq 0 ] || exec $control "$@"
tee -a /run/bench-commands | $control
