#!/bin/sh
# Put everything that a package of slurm-mps has below ROOT: stage.sh ROOT PLUGIN_DIRECTORY
#
# The command line and its libraries are a virtual environment of their own in /opt/slurm-mps (docs/decisions/0016);
# nothing is put into /etc, `slurm-mps install` does that. The wheel is the one that a release has: made from a source
# archive, by the TOOLS that `make dev` installs. pip takes the libraries from where it is configured to
# (PIP_INDEX_URL, or PIP_NO_INDEX and PIP_FIND_LINKS where there is no network). Run it at the top of the sources, after
# `make plugin`.
set -eu
root=$1 plugins=$2 units=/usr/lib/systemd/system
base=${PYTHON:-/usr/bin/python3} tools=${TOOLS:-.cache/dev/bin/python3}
prefix=/opt/slurm-mps share=$1/usr/share
umask 022
rm -rf "$root" "$root.dist"
mkdir -p "$root$prefix" "$root$plugins" "$root$units" "$root/usr/bin" "$share/slurm-mps"

"$base" -m venv --without-pip "$root$prefix"
"$tools" -m build --no-isolation --outdir "$root.dist" . >"$root.log" 2>&1 || {
	cat "$root.log" >&2
	exit 1
}
rm -r slurm_mps.egg-info # setuptools leaves it beside what it packs
# With the extra for metrics: nobody can add it to a package later.
"$tools" -m pip --quiet --disable-pip-version-check --python "$root$prefix/bin/python3" \
	install --no-compile "$(ls "$root.dist"/*.whl)[metrics]"
site=$("$root$prefix/bin/python3" -I -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
find "$root$prefix/bin" -type f ! -name slurm-mps -delete
find "$root$prefix/include" -type d -empty -delete
sed -i "s|$root||g" "$root$prefix/pyvenv.cfg"
# The paths in the byte code are those on the node; the prolog starts in a quarter of the time with it.
"$base" -m compileall -q -s "$root" -p / "$site"
ln -s "$prefix/bin/slurm-mps" "$root/usr/bin/slurm-mps"

install -m 644 build/spank/spank_mps.so "$root$plugins/"
find "$root" -name '*.so' -exec strip --strip-unneeded -R .comment -R .note {} +
for unit in etc/*.service etc/*.timer; do # none of them is switched on
	[ ! -e "$unit" ] || sed "s|^ExecStart=[^ ]*/slurm-mps |ExecStart=/usr/bin/slurm-mps |" "$unit" >"$root$units/${unit##*/}"
done

mv "$root$prefix"/share/* "$share/"
gzip -9n "$share"/man/man*/*
mkdir "$root$prefix/share/doc"
ln -s /usr/share/doc/slurm-mps "$root$prefix/share/doc/" # where slurm-mps doctor looks for its page
mkdir "$share/doc/slurm-mps/examples"
for sample in etc/*; do
	case $sample in
	*.service | *.timer | *.sh) ;;
	*) install -m 644 "$sample" "$share/doc/slurm-mps/examples/" ;;
	esac
done
install -m 755 etc/health-check.sh "$share/slurm-mps/"
install -m 644 etc/plugstack.conf "$share/slurm-mps/plugstack.conf"
gzip -9n <CHANGELOG.md >"$share/doc/slurm-mps/changelog.gz"

completion() {
	mkdir -p "${2%/*}"
	"$root$prefix/bin/python3" -I -m slurm_mps.cli.main completion "$1" >"$2"
}
completion bash "$share/bash-completion/completions/slurm-mps"
completion zsh "$share/zsh/vendor-completions/_slurm-mps"
completion fish "$share/fish/vendor_completions.d/slurm-mps.fish"
