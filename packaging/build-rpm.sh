#!/bin/sh
# Build the RPM for the Slurm of this machine: build-rpm.sh PLUGIN_DIRECTORY. Prints its path. Runs at the top.
set -eu
plugins=$1
top=$PWD/build/rpm
python=${PYTHON:-/usr/bin/python3}
value() { "$python" -I -c "import sys; sys.path.insert(0, '.'); $1"; }
version=$(value 'import slurm_mps; print(slurm_mps.__version__)')
release=$(value "from slurm_mps.slurm.plugin_file import read_plugin
print('.'.join(read_plugin('build/spank/spank_mps.so').slurm_release.split('.')[:2]))")
abi=$(value 'print(f"{sys.version_info[0]}.{sys.version_info[1]}")')
rm -rf "$top"
mkdir -p "$top"
rpmbuild -bb --build-in-place --quiet --nodeps \
	--define "_topdir $top" --define "_rpmdir $top" --define "_build_name_fmt %%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm" \
	--define "slurm_mps_version $version" --define "slurm_release $release" --define "slurm_plugins $plugins" \
	--define "python_abi $abi" --define "_binary_payload w1.gzdio" packaging/slurm-mps.spec >"$top/log" 2>&1 || {
	cat "$top/log" >&2
	exit 1
}
ls -d build/rpm/*.rpm
