"""Reads the logs of a job's control daemons and servers, and explains failures by them. Prints nothing.

NVIDIA's programs write these logs, and the server runs as the job's user: each read is bounded, and the text is made
printable where it is shown. The words are those of driver 580 (docs/observations.md, O30 to O35, O63 to O67); a line
that is not known is left out.
"""
