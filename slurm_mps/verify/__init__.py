"""``slurm-mps verify``: every rank of a step finds out what it really has, and each node says what is wrong there.

It runs as the user, in the user's own step; prolog and epilog never import it. ``look`` asks the driver, the control
daemons and the machine; ``meeting`` brings the reports of one node together; ``judge`` and ``table`` are pure.
"""
