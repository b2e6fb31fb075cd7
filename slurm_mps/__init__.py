"""CUDA MPS for Slurm jobs: prolog, epilog and the tools around them."""

__version__ = "0.1.0"
