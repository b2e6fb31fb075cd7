"""The site configuration: SiteConfig, its defaults, and the compiled form that the prolog reads. Pure.

An admin writes TOML (``/etc/slurm/mps.toml``); ``config/file.py`` checks it against the schema and compiles it to
lines of words. The prolog reads only those: tomllib and jsonschema together cost it more than all its work.
"""

from __future__ import annotations

from ..errors import NodeError
from ..record import record
from ..units import parse_memory, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


#: Where the site configuration is, and where slurm-mps keeps its state; both are fixed.
CONFIG_DIRECTORY, CONFIG_NAME = "/etc/slurm", "mps.toml"
CONFIG_PATH = f"{CONFIG_DIRECTORY}/{CONFIG_NAME}"
PARTITIONS_PATH = f"{CONFIG_DIRECTORY}/mps-partitions"  # a file for each whose jobs have MPS without asking
STATE_DIRECTORY = "/run/slurm-mps"
CONFIG_VERSION = 1  # of the compiled form
#: What a site has chosen with it.
ALL_USERS = (
    'gpus.joined_users = "all": users on a GPU share a server that runs as root; each can end the programs of the '
    "others, keep them out, and see what they are called (docs/security.md)"
)


class ConfigError(NodeError):
    """The site configuration is wrong; ``problems`` says everything that is."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


@record
class SiteConfig:
    """Every setting, with its default; names are those of the file with ``_`` for ``.``. Seconds, bytes, percent."""

    gpus_compute_mode: str = "exclusive_process"
    gpus_sharing: str = "refuse"
    gpus_joined_users: str = "same"
    gpus_shards_per_gpu: int = 0
    gpus_client_visible_devices: str = "uuid"
    gpus_clients_max: int = 0
    limits_thread_percentage_default: float = 100.0
    limits_thread_percentage_min: float = 0.1
    limits_thread_percentage_max: float = 100.0
    limits_memory_default: str = "none"
    limits_memory_min: str = "1M"
    limits_memory_max: str = "none"
    limits_memory_of_share: str = "even"
    limits_memory_context_mib: int = 514
    paths_control_program: str = "/usr/bin/nvidia-cuda-mps-control"
    paths_logs: str = "/var/log/slurm-mps"
    deadlines_prolog: float = 7.5
    deadlines_epilog: float = 30.0
    deadlines_daemon_start: float = 4.0
    deadlines_command: float = 3.0
    deadlines_quit: float = 3.0
    deadlines_signal: float = 4.0
    logs_keep: str = "always"
    logs_max_kib: int = 1024
    logs_max_jobs: int = 500
    policy_node_fault: str = "drain"
    metrics_textfile: str = "none"


DEFAULTS = SiteConfig()


def joins_all(config: SiteConfig) -> bool:
    """Whether jobs of all users share a daemon."""
    return config.gpus_sharing == "joined" and config.gpus_joined_users == "all"


def memory_bytes(setting: str) -> int | None:
    """A memory setting in bytes; None for ``none``."""
    return None if setting == "none" else parse_memory(setting)


def from_settings(settings: Mapping[str, object]) -> SiteConfig:
    """Make a SiteConfig of checked settings, named ``limits.memory.max`` and so on. A missing setting has its
    default.
    """
    values = {}
    for name, value in settings.items():
        field = name.replace(".", "_")
        values[field] = type(getattr(DEFAULTS, field))(value)
    return SiteConfig(**values)


def to_lines(config: SiteConfig) -> list[str]:
    """The compiled form: one ``field=value`` a line."""
    return [f"{field}={value}" for field, value in vars(config).items()]


def compile_site(site: Mapping[str, SiteConfig]) -> list[str]:
    """The compiled form of a whole file: the settings of the site's "" partition, then those that differ in a
    partition, as ``partition:field=value``.
    """
    lines = to_lines(site[""])
    return lines + [
        f"{name}:{line}" for name, config in site.items() if name for line in to_lines(config) if line not in lines
    ]


def from_lines(lines: Iterable[str], partition: str = "") -> SiteConfig:
    """Read the compiled form back, for a job in a partition, also one that another version wrote for a job that runs.

    A setting that the other version lacks has its default; one that this version lacks is ignored.
    Raises: NodeError when a setting is of another kind.
    """
    known = vars(DEFAULTS)
    pairs = (line.removeprefix(f"{partition}:").partition("=")[::2] for line in lines)
    try:
        return SiteConfig(**{field: type(known[field])(text) for field, text in pairs if field in known})
    except ValueError as error:
        raise NodeError(f"the compiled configuration: {printable(str(error), 100)}") from None
