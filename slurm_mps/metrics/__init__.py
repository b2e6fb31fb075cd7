"""Metrics for Prometheus, by way of node_exporter's textfile collector; off unless the site wants them.

Prolog and epilog note a line each; ``slurm-mps metrics``, from a timer, counts these and the faults in the jobs' logs,
looks at the node as ``status`` does, and writes the file. Prints nothing.
"""
