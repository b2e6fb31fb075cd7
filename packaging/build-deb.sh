#!/bin/sh
# Build the Debian package for the Slurm of this machine: build-deb.sh PLUGIN_DIRECTORY. Prints its path.
#
# dpkg-deb and no debhelper: the package is a tree that stage.sh makes, one plugin that needs the C library alone, and
# no service that is enabled. Its version and its dependency name the release of Slurm that the plugin was built for;
# the dependency is on the package that has Slurm's own plugins, Debian's or SchedMD's. dpkg without apt lets the
# dependency of another package break; by Conflicts (Breaks keeps nothing from being unpacked) it leaves out each part
# of a newer Slurm, which this plugin would stop.
set -eu
plugins=$1
here=${0%/*} top=build/deb
"$here/stage.sh" "$PWD/$top/root" "$plugins"
cd "$top"

value() { root/opt/slurm-mps/bin/python3 -I -c "$1"; }
version=$(value 'import slurm_mps; print(slurm_mps.__version__)')
release=$(value "from slurm_mps.slurm.plugin_file import read_plugin
print('.'.join(read_plugin('root$plugins/spank_mps.so').slurm_release.split('.')[:2]))")
python=$(value 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1]}")')
after=$(value 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1] + 1}")')
slurm=$(for one in "$plugins"/proctrack_*.so; do dpkg -S "$one"; done | sed 's/:.*//' | sort -u | head -n 1)
newer=$(printf '%s\n' slurm-wlm-basic-plugins slurmd slurmctld slurm-client slurm-smd slurm-smd-slurmd \
	slurm-smd-slurmctld slurm-smd-client | sed "s/.*/& (>= $release.99)/" | paste -sd, | sed 's/,/, /g')
architecture=$(dpkg --print-architecture)
# Who builds a package answers for it. No mail reaches an address in .invalid (RFC 2606).
maintainer="${DEBFULLNAME:-The slurm-mps authors} <${DEBEMAIL:-nobody@slurm-mps.invalid}>"
libc=$(objdump -T "root$plugins/spank_mps.so" | grep -o 'GLIBC_[0-9.]*' | sort -uV | tail -n 1)

mkdir -p root/DEBIAN
cat >root/DEBIAN/control <<END
Package: slurm-mps
Version: $version-1+slurm$release
Architecture: $architecture
Maintainer: $maintainer
Section: admin
Priority: optional
Installed-Size: $(du -sk root | cut -f1)
Depends: python3 (>= $python), python3 (<< $after), libc6 (>= ${libc#GLIBC_}), $slurm (>= $release), $slurm (<< $release.99)
Conflicts: $newer
Suggests: bash-completion
Description: CUDA MPS as an option of Slurm (for Slurm $release)
 sbatch --mps-threads=25 --mps-mem=8G: each job gets its own MPS control daemon
 and enforced limits. When it ends, the daemon is gone and the GPUs are back in
 their original compute mode.
 .
 The package changes nothing in Slurm's configuration: slurm-mps install turns
 it on, and slurm-mps uninstall turns it off. Removing the package turns it off
 first, and fails while jobs with MPS run.
END
gzip -9n >root/usr/share/doc/slurm-mps/changelog.Debian.gz <<END
slurm-mps ($version-1+slurm$release) unstable; urgency=medium

  * What changed: changelog.gz.

 -- $maintainer  $(date -R -r ../../CHANGELOG.md)
END
install -m 644 "../../$here/copyright" root/usr/share/doc/slurm-mps/
install -D -m 644 "../../$here/lintian-overrides" root/usr/share/lintian/overrides/slurm-mps
for script in postinst prerm postrm; do
	install -m 755 "../../$here/scripts/$script" root/DEBIAN/
done
(cd root && find . -path ./DEBIAN -prune -o -type f -print0 | LC_ALL=C sort -z | xargs -0 md5sum | sed 's|\./||' >DEBIAN/md5sums)
package=slurm-mps_$version-1+slurm${release}_$architecture.deb
rm -f slurm-mps_*.deb
dpkg-deb --root-owner-group -Zgzip -z1 --build root "$package" >/dev/null
echo "$top/$package"
