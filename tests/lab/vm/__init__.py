"""A whole machine with systemd and cgroup v2, for what a throw-away machine of namespaces cannot show."""
