#!/bin/sh
# Put everything that a package of slurm-mps has below ROOT: stage.sh ROOT PLUGIN_DIRECTORY UNIT_DIRECTORY
#
# The command line and its libraries are a virtual environment of their own in /opt/slurm-mps (docs/decisions/0016);
# nothing is put into /etc, `slurm-mps install` does that. pip takes the wheels where it is told to (PIP_INDEX_URL, or
# PIP_NO_INDEX and PIP_FIND_LINKS where there is no network). Run at the top of the sources, with build/spank and
# build/docs/man made before.
set -eu
root=$1 plugins=$2 units=$3
base=${PYTHON:-/usr/bin/python3} pip=${PIP:-.cache/dev/bin/python3 -m pip}
prefix=/opt/slurm-mps
umask 022
rm -rf "$root"
mkdir -p "$root$prefix" "$root$plugins" "$root$units" "$root/usr/bin"

"$base" -m venv --without-pip "$root$prefix"
extras=$(sed -n 's/^metrics = .*/[metrics]/p' pyproject.toml) # nobody can add it to a package later
sources=$root.sources # setuptools writes beside what it builds
rm -rf "$sources"
mkdir "$sources"
cp -r slurm_mps spank prolog epilog etc pyproject.toml setup.py README.md docs "$sources"
rm "$sources/docs/conf.py" # the man pages are made already
find "$sources" -name __pycache__ -prune -exec rm -r {} +
$pip --quiet --disable-pip-version-check --python "$root$prefix/bin/python3" install --no-compile "$sources$extras"
rm -r "$sources"
site=$("$root$prefix/bin/python3" -I -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
find "$root$prefix/bin" -type f -delete
cat >"$root$prefix/bin/slurm-mps" <<END
#!$prefix/bin/python3 -I
import sys
from slurm_mps.cli.main import main
sys.exit(main())
END
chmod 755 "$root$prefix/bin/slurm-mps"
sed -i "s|$root||g" "$root$prefix/pyvenv.cfg"
# The paths in the byte code are those on the node; the prolog starts in a quarter of the time with it.
"$base" -m compileall -q -s "$root" -p / "$site"
ln -s "$prefix/bin/slurm-mps" "$root/usr/bin/slurm-mps"

install -m 644 build/spank/spank_mps.so "$root$plugins/"
find "$root" -name '*.so' -exec strip --strip-unneeded {} +
for unit in etc/*.service etc/*.timer; do # none of them is switched on
	[ ! -e "$unit" ] || sed "s|^ExecStart=[^ ]*/slurm-mps |ExecStart=/usr/bin/slurm-mps |" "$unit" >"$root$units/${unit##*/}"
done

share=$root/usr/share
mkdir -p "$share/doc" "$share/slurm-mps"
mv "$root$prefix/share/doc/slurm-mps" "$share/doc/"
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
for section in 1 5 7; do
	for page in build/docs/man/*."$section"; do
		[ -e "$page" ] || continue
		mkdir -p "$share/man/man$section"
		gzip -9n <"$page" >"$share/man/man$section/${page##*/}.gz"
	done
done

completion() {
	mkdir -p "${2%/*}"
	"$root$prefix/bin/python3" -I -m slurm_mps.cli.main completion "$1" >"$2"
}
completion bash "$share/bash-completion/completions/slurm-mps"
completion zsh "$share/zsh/vendor-completions/_slurm-mps"
completion fish "$share/fish/vendor_completions.d/slurm-mps.fish"
