"""Jobs of a real Slurm with this project on this machine's own GPUs, whose settings stay as they are."""
