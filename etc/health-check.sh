#!/bin/sh
# health-check.sh - HealthCheckProgram of slurm.conf: tells slurmctld why a prolog or epilog of slurm-mps drained a node.
#
# Slurm's own reason is "Prolog error" or "Epilog error", and a prolog must not call slurmctld. slurmd runs this one
# between jobs, and it calls slurmctld only after a fault; then `sinfo -R` shows what happened.
fault=/run/slurm-mps/last-fault
reported=/run/slurm-mps/last-fault-reported
[ -e "$fault" ] || exit 0
PATH=/usr/local/bin:/usr/bin:/bin
export PATH
[ ! -e "$reported" ] || [ -n "$(find "$fault" -newer "$reported")" ] || exit 0
node=${SLURMD_NODENAME:-$(uname -n)}
case $(scontrol -o show node "$node") in
*" Reason=Prolog error "* | *" Reason=Epilog error "*)
	read -r _ message <"$fault"
	scontrol update NodeName="$node" Reason="slurm-mps: $(printf %.200s "$message")" || exit 0
	;;
*) # not drained yet, or not for this fault
	[ -z "$(find "$fault" -mmin -5)" ] || exit 0
	;;
esac
: >"$reported"
