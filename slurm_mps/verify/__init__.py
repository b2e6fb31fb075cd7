"""``slurm-mps verify``: every rank of a step finds out what it really has, and rank 0 says what is wrong.

Runs as the user, in the user's own step; nothing of it is on the way of prolog and epilog. ``look`` asks the driver,
the control daemon and the machine; ``link`` and ``mpi`` bring the reports together; ``step``, ``report``, ``judge``,
``table`` and ``hostlist`` are pure.
"""
