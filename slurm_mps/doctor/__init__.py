"""``slurm-mps doctor``: what this place allows, and what is wrong with it.

Reads, asks and changes nothing. Prints nothing: ``examine()`` gives findings, ``slurm_mps/cli/doctor.py`` prints them.
"""
