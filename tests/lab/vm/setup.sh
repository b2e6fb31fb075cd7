#!/bin/sh
# Inside the virtual machine, once: users, a simulated NVIDIA driver that comes with each boot, Slurm's configuration.
# $1: the directory of what was carried in.
set -eu
useradd --create-home --shell /bin/bash alice
cp -a "$1/simulator/bin/." /usr/bin/
cp -a "$1/simulator/lib/." /usr/lib/x86_64-linux-gnu/
ldconfig
mkdir -p /etc/slurm /var/spool/slurmctld
chown slurm /var/spool/slurmctld
cp "$1"/conf/* /etc/slurm/
cat >/etc/systemd/system/simulated-driver.service <<END
[Unit]
Description=Simulated NVIDIA driver with two GPUs
Before=nvidia-persistenced.service slurm-mps-reconcile.service slurmd.service slurmctld.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -ec 'for minor in 0 1 255; do mknod -m 666 /dev/nvidia\$\${minor#255} c 195 \$\$minor; done'
ExecStart=/bin/mv /dev/nvidia /dev/nvidiactl
ExecStart=/usr/bin/simulated-gpus create 2
# No loopback address: slurmctld resolves names with AI_ADDRCONFIG.
ExecStart=/bin/ip link set lo up
ExecStart=/bin/ip address add 10.213.0.1/32 dev lo
[Install]
WantedBy=multi-user.target
END
systemctl daemon-reload
systemctl enable --now simulated-driver
systemctl enable munge slurmctld slurmd
systemctl restart munge slurmctld slurmd
