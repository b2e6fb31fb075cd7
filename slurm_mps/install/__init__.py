"""Puts slurm-mps into a node's Slurm and takes it out again (docs/decisions/0016). Prints nothing.

wanted: which files this node needs. build: the plugin for exactly this Slurm. changes: the files are written, noted and
removed. by_hand: what is left to the admin. actions: the whole way, both ways.
"""
