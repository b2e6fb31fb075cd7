#!/bin/sh
# prepare.sh PACKAGE...: see whether this machine can run throw-away machines, then install the packages it lacks.
#
# Nothing is removed, upgraded, started or enabled. Where that cannot be, one line says what is needed, and nothing has
# changed.
set -eu
export LC_ALL=C DEBIAN_FRONTEND=noninteractive
policy=/usr/sbin/policy-rc.d
here=$(pwd -P)
elsewhere="It works in a container: sudo podman run --rm -it --privileged -v '$here:/src' -w /src debian:12 sh -c 'apt-get update && apt-get install -y make && make demo'"
own_root='Or "make demo SLURM_MPS_RELEASE=24.11" puts a Slurm of Debian into a root of its own below .cache.'

refuse() {
	printf 'make: %s\n' "$@" >&2
	exit 1
}

[ "$(id -u)" = 0 ] ||
	refuse "This needs root: it makes namespaces, devices and users, and a real slurmd runs as root." "$elsewhere"

case $here/ in
/opt/slurm-mps/* | /media/*)
	refuse "A throw-away machine has something else at $here: move this checkout, to /root or /home for example."
	;;
esac

# shellcheck disable=SC2016 # the inner shell's
can_make='mount -t tmpfs none /media && mknod /media/null c 1 3 && : >/media/null && mount -t proc proc /proc'
spaces='--mount --pid --fork --uts --ipc --net --propagation private'
# shellcheck disable=SC2086 # words
if ! said=$(unshare $spaces sh -c "$can_make" 2>&1); then
	refuse "This needs to make namespaces, mounts and devices, and may not: $(echo "$said" | tail -n 1)." "$elsewhere"
fi

listed=$(dpkg-query -W -f '${Package} ${db:Status-Status}\n' "$@" 2>/dev/null || :)
missing=
for package; do
	echo "$listed" | grep -qx "$package installed" || missing="$missing $package"
done
[ "$missing" ] || exit 0

# shellcheck source=/dev/null
release=$(. /etc/os-release && echo "$ID ${VERSION_ID:-}")
case $release in
'debian 12' | 'debian 13') ;;
*) refuse "This needs Debian 12 or 13, which have:$missing." "$elsewhere" ;;
esac

# A Slurm that no package of Debian's brought.
case " $missing " in
*' slurmd '*)
	for program in slurmd slurmctld srun; do
		found=$(PATH=$PATH:/opt/slurm/sbin:/opt/slurm/bin command -v $program) || continue
		dpkg -S "$(readlink -f "$found")" 2>/dev/null | grep -qE '^(slurmd|slurmctld|slurm-client):' ||
			refuse "This machine has a Slurm of its own, $found; the tests need Debian's." "$elsewhere" "$own_root"
	done
	;;
esac

echo "make: asking apt for$missing"
apt-get update -qq
# shellcheck disable=SC2086
plan=$(apt-get install --simulate --no-install-recommends $missing)
removed=$(echo "$plan" | sed -n 's/^Remv \([^ ]*\) \[\([^]]*\)\].*/ \1 \2/p' | paste -s -d,)
upgraded=$(echo "$plan" | sed -n 's/^Inst \([^ ]*\) \[.*/\1/p' | paste -s -d' ')
[ -z "$removed" ] ||
	refuse "The tests need Debian's own Slurm, and this machine has what conflicts with it:$removed." "$elsewhere" "$own_root"
[ -z "$upgraded" ] ||
	refuse "These packages are older than those that the tests need, and nothing is upgraded here: $upgraded." "$elsewhere"

# What starts at boot, by systemd or by init.d.
enabled() {
	find /etc/systemd/system /etc/rc[2-5].d -type l \( -path '*.wants/*' -o -name 'S[0-9]*' \) 2>/dev/null || :
}

disable_new() {
	enabled | while read -r link; do
		! echo "$before" | grep -qxF "$link" || continue
		name=${link##*/}
		case $link in
		*.wants/*) rm -f "$link" ;; # as systemctl disable does; dpkg then leaves it off on upgrades
		*) update-rc.d "${name#S[0-9][0-9]}" disable ;;
		esac
	done
}

before=$(enabled)
log=$(mktemp)
made=
trap 'exit 130' HUP INT TERM
trap 'rm -f "$log" $made; disable_new' EXIT
if [ ! -e "$policy" ]; then
	made=$policy
	printf '#!/bin/sh\nexit 101\n' >"$policy" # Debian's own word for "start nothing"
	chmod 755 "$policy"
fi
echo "make: installing $(echo "$plan" | grep -c '^Inst') packages, in about a minute"
# shellcheck disable=SC2086
if ! apt-get install -qq -y --no-install-recommends --no-remove --no-upgrade -o DPkg::Lock::Timeout=60 $missing \
	>"$log" 2>&1; then
	cat "$log" >&2
	exit 1
fi
