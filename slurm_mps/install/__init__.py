"""Puts slurm-mps into a node's Slurm and takes it out again (docs/decisions/0016). Prints nothing.

site: what this Slurm is and where its parts are. build: the plugin for exactly that Slurm. changes: what is written,
and how each change is undone. plan: which changes this node needs, and what is left to do by hand.
"""
