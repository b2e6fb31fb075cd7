"""``slurm-mps doctor``: checks this host for whatever keeps jobs from MPS.

Reads, asks and changes nothing. Prints nothing: ``examine()`` gives findings, ``slurm_mps/cli/doctor.py`` prints them.
"""
