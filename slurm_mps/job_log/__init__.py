"""The logs of a job's control daemons and servers: what they say happened to whom. Prints nothing.

What is read here was written by NVIDIA's programs, one of which runs as the job's user: it is bounded when it is read
and made printable where it is shown. The words are those of driver 580 (docs/observations.md, O30 to O35, O63 to O67);
a line that is not known is left out.
"""
