"""The daemon's configuration: a TOML file, command-line flags on top of it, defaults from the machine below it.

The only module that reads the environment (`KVSTORE_CONFIG`, `KVSTORE_ADDRESS`, `XDG_RUNTIME_DIR`,
`XDG_STATE_HOME`). A file looks like this; every key may be left out:

```toml
state_dir = "/var/lib/kvstore"
socket = "/run/kvstore/kvstore.sock"
socket_group = "inference"
warm_bytes = "8GiB"
cold_bytes = "64GiB"     # 0 turns the cold tier off

[tenants.search]
uids = [1001]
gids = [1001]
warm_bytes = "4GiB"
```

For workers on other hosts, whose certificate's names say whose they are (or token_file instead, see SECURITY.md):

```toml
listen = "0.0.0.0:7400"
tls_certificate = "/etc/kvstore/server.pem"
tls_key = "/etc/kvstore/server.key"
tls_client_ca = "/etc/kvstore/clients.pem"

[tenants.search]
sans = ["spiffe://example/search"]
admin_sans = ["spiffe://example/search-operator"]
```
"""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path

from kvstore.access import RemoteAccess
from kvstore.machine import Machine, disk_used_bytes, free_disk_bytes
from kvstore.remote_access import describe_remote, load_remote_access
from kvstore.settings import COLD_BYTES_MIN, WARM_BYTES_MIN, ConfigError, Settings, Tenant
from kvstore.sizes import GIB, MIB, Share, format_size

__all__ = [
    "Config",
    "ConfigError",
    "Tenant",
    "child_environment",
    "default_addresses",
    "device_environment",
    "load",
    "prepare_state_dir",
    "quiet_grpc",
]

DEFAULT_TENANT = "default"
SOCKET_NAME = "kvstore.sock"
ATTACH_SUFFIX = ".attach"
SOCKET_PATH_MAX = 107  # sockaddr_un has 108 bytes, the last one for the NUL

_DEVICE_VARIABLES = ("CUDA_DEVICE_ORDER", "CUDA_MPS_PIPE_DIRECTORY", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH")
_SHARE = 4  # a default takes a quarter of what is there: the machine belongs to the inference workers
_COLD_DEFAULT_MAX = 64 * GIB
_HOT_DEFAULT = 2 * GIB
_STAGING_DEFAULT = 256 * MIB
_STAGING_DEFAULT_MIN = 16 * MIB  # a few blocks of any usual size, so that a tiny pool refuses blocks by itself
_STAGING_TOTAL_DEFAULT = 2 * GIB
_LEASE_TTL_S = 30.0
_AGENT_TIMEOUT_S = 30.0
_SYNC_INTERVAL_S = 1.0
_PROMOTE_HITS = 2
_FILE_BYTES_MAX = 64 << 10  # a thousand tenants; the parser takes memory by the square of the longest key
_DRAIN_GRACE_S = 20.0  # below the 30 s that Kubernetes waits before it kills


@dataclass(frozen=True, slots=True)
class Config:
    """Everything the daemon needs to know, settled.

    Sizes are bytes; `cold_bytes` 0 and `hot_device` "off" mean that there is no such tier. Where `hot_permille` is set
    the hot tier takes that share of the device's free memory instead of `hot_bytes`. `socket_group` is a gid.
    `cold_reserve_bytes` 0: what the cold tier itself thinks right for the file system. `notes` are sentences for the
    operator: what was taken from the machine and what looks wrong.
    """

    state_dir: Path
    socket: Path
    socket_mode: int
    socket_group: int | None
    warm_bytes: int
    cold_bytes: int
    hot_bytes: int
    hot_permille: int
    hot_device: str
    log_level: str
    drain_grace_s: float
    lease_ttl_s: float
    agent_timeout_s: float
    reader_threads: int
    codec: str
    codec_kernels: str
    durability: str
    sync_interval_s: float
    cold_reserve_bytes: int
    staging_max_bytes: int
    staging_total_bytes: int
    max_sessions: int
    policy: str
    promote_hits: int
    cold_daily_bytes: int
    tenants: tuple[Tenant, ...]
    notes: tuple[str, ...] = ()
    remote: RemoteAccess | None = None

    @property
    def attach_socket(self) -> Path:
        """Where sessions attach: the socket's path plus ".attach"."""
        return Path(f"{self.socket}{ATTACH_SUFFIX}")

    @property
    def address(self) -> str:
        """What clients are given: unix:/path."""
        return f"unix:{self.socket}"

    def tenant_of(self, uid: int, gids: Iterable[int]) -> str | None:
        """The tenant a peer belongs to: by uid, else by the first of its groups; None: it may not attach."""
        for tenant in self.tenants:
            if uid in tenant.uids:
                return tenant.name
        groups = set(gids)
        return next((tenant.name for tenant in self.tenants if groups.intersection(tenant.gids)), None)

    def _durability(self) -> str:
        if self.durability == "interval":
            return f"synced to disk every {self.sync_interval_s:g} s"
        return {"none": "synced when the kernel likes", "commit": "synced before a block counts as saved"}[
            self.durability
        ]

    def describe(self) -> list[str]:
        """The settled values in words, one line each, then the notes."""
        share = f"{self.hot_permille / 10:g}% of free memory" if self.hot_permille else format_size(self.hot_bytes)
        hot = "off" if self.hot_device == "off" else f"{self.hot_device} {share}"
        cold = f"{format_size(self.cold_bytes)} in {self.state_dir}" if self.cold_bytes else "off"
        group = "" if self.socket_group is None else f" group {self.socket_group}"
        return [
            f"socket {self.socket} mode {self.socket_mode:04o}{group}",
            f"hot {hot}; warm {format_size(self.warm_bytes)}; cold {cold}",
            f"staging at most {format_size(self.staging_max_bytes)} a session, {format_size(self.staging_total_bytes)} "
            f"in all; at most {self.max_sessions} sessions",
            f"codec {self.codec}, {self.reader_threads} reader threads, {self._durability()}; drains for "
            f"{self.drain_grace_s:g} s",
            f"order {self.policy}; a place in a faster tier after {self.promote_hits} hits below; at most "
            f"{format_size(self.cold_daily_bytes) if self.cold_daily_bytes else 'any number of bytes'} a day to cold",
            f"a lease ends {self.lease_ttl_s:g} s after its session's last sign of life; an agent that does not answer "
            f"for {self.agent_timeout_s:g} s is replaced",
            *(_describe_tenant(tenant) for tenant in self.tenants),
            *describe_remote(self.remote),
            *self.notes,
        ]


def load(
    flags: Mapping[str, object],
    config_file: str | Path | None = None,
    environ: Mapping[str, str] = os.environ,
    machine: Machine | None = None,
) -> Config:
    """Settle the configuration.

    Args:
        flags: what the command line said, by key; None: not said.
        config_file: path of the TOML file; None: `$KVSTORE_CONFIG`, or none.
        environ: the environment.
        machine: where the defaults come from; None: this machine.

    Raises:
        ConfigError: the message is meant for the operator.
    """
    asked = Settings.parse(flags, lambda key: "--" + key.replace("_", "-"))
    path = config_file or environ.get("KVSTORE_CONFIG")
    if path:
        asked = asked.over(_read_file(Path(path)))
    return _Settling(asked, machine or Machine(), environ).config()


def prepare_state_dir(folder: Path) -> None:
    """Make the state directory (mode 0700), or check that nobody else can change what is in it.

    Raises:
        ConfigError: it belongs to another user, others may write to it, or it cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise ConfigError(f"state directory {folder} cannot be used: {error.strerror}") from error
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid != os.geteuid():
        raise ConfigError(
            f"state directory {folder} belongs to uid {found.st_uid}, this daemon runs as uid {os.geteuid()}; "
            "give it a directory of its own with --state-dir, or change the owner"
        )
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        who = "everybody" if mode & stat.S_IWOTH else f"group {found.st_gid}"
        raise ConfigError(
            f"state directory {folder} has mode {mode:04o}: {who} may write to it; run chmod 0700 {folder}"
        )


def default_addresses(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Where a daemon is looked for: `$KVSTORE_ADDRESS` alone, else the user's runtime folder, then /run."""
    named = environ.get("KVSTORE_ADDRESS")
    return [named] if named else [f"unix:{folder / SOCKET_NAME}" for folder in _runtime_folders(environ)]


def quiet_grpc(environ: MutableMapping[str, str] = os.environ) -> None:
    """Have gRPC log errors only, unless GRPC_VERBOSITY says otherwise; before it is imported.

    It writes a line for every handshake that fails, so that anybody who reaches a port could fill the log.
    """
    environ.setdefault("GRPC_VERBOSITY", "ERROR")


def child_environment(changes: Mapping[str, str], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment for a child process: this one's with `changes`."""
    return {**environ, **changes}


def device_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a process needs of this one's environment to find a CUDA driver and the same devices by the same numbers."""
    return {name: environ[name] for name in _DEVICE_VARIABLES if name in environ}


def _runtime_folders(environ: Mapping[str, str]) -> list[Path]:
    own = environ.get("XDG_RUNTIME_DIR")
    return ([Path(own) / "kvstore"] if own else []) + [Path("/run/kvstore")]


def _read_file(path: Path) -> Settings:
    try:
        with path.open("rb") as file:
            data = file.read(_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error.strerror}") from error
    if len(data) > _FILE_BYTES_MAX:
        raise ConfigError(f"{path} has more than {format_size(_FILE_BYTES_MAX)}, which no configuration file needs")
    try:
        raw = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # not only TOML's own: of numbers with thousands of digits, too
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    return Settings.parse(raw, lambda key: f"{path}: {key:.100}")


def _describe_tenant(tenant: Tenant) -> str:
    quotas = (("warm", tenant.warm_bytes), ("cold", tenant.cold_bytes))
    limits = [f", {name} at most {format_size(size)}" for name, size in quotas if size is not None]
    return f"tenant {tenant.name}: uids {list(tenant.uids)}, gids {list(tenant.gids)}{''.join(limits)}"


class _Settling:
    """Fills in what was left out. One object so that every choice can leave a note."""

    def __init__(self, asked: Settings, machine: Machine, environ: Mapping[str, str]) -> None:
        self._asked = asked
        self._machine = machine
        self._environ = environ
        self._notes: list[str] = []

    def config(self) -> Config:
        asked = self._asked
        state_dir = asked.state_dir or self._default_state_dir()
        socket_mode = asked.socket_mode
        if socket_mode is None:
            socket_mode = 0o600 if asked.socket_group is None else 0o660
        warm_bytes = self._warm_bytes()
        cold_bytes = self._cold_bytes(state_dir)
        hot_device, hot_bytes, hot_permille = self._hot()
        staging_max_bytes = asked.staging_max_bytes or max(_STAGING_DEFAULT_MIN, min(_STAGING_DEFAULT, warm_bytes // 4))
        config = Config(
            state_dir=state_dir,
            socket=asked.socket or _runtime_folders(self._environ)[0] / SOCKET_NAME,
            socket_mode=socket_mode,
            socket_group=asked.socket_group,
            warm_bytes=warm_bytes,
            cold_bytes=cold_bytes,
            hot_bytes=hot_bytes,
            hot_permille=hot_permille,
            hot_device=hot_device,
            log_level=asked.log_level or "info",
            drain_grace_s=_DRAIN_GRACE_S if asked.drain_grace_s is None else asked.drain_grace_s,
            lease_ttl_s=asked.lease_ttl_s or _LEASE_TTL_S,
            agent_timeout_s=asked.agent_timeout_s or _AGENT_TIMEOUT_S,
            reader_threads=asked.reader_threads or min(4, os.cpu_count() or 1),
            codec=asked.codec or "auto",
            codec_kernels=asked.codec_kernels or "auto",
            durability=asked.durability or "interval",
            sync_interval_s=asked.sync_interval_s or _SYNC_INTERVAL_S,
            cold_reserve_bytes=asked.cold_reserve_bytes or 0,
            staging_max_bytes=staging_max_bytes,
            staging_total_bytes=asked.staging_total_bytes
            or max(staging_max_bytes, min(_STAGING_TOTAL_DEFAULT, 4 * staging_max_bytes)),
            max_sessions=asked.max_sessions or 256,
            policy=asked.policy or "adaptive",
            promote_hits=asked.promote_hits or _PROMOTE_HITS,
            cold_daily_bytes=asked.cold_daily_bytes or 0,
            tenants=self._tenants(warm_bytes, cold_bytes),
            notes=tuple(self._notes),
            remote=load_remote_access(asked, asked.tenants or ()),
        )
        _check_socket(config)
        return config

    def _default_state_dir(self) -> Path:
        if os.geteuid() == 0:
            return Path("/var/lib/kvstore")
        base = self._environ.get("XDG_STATE_HOME")
        try:
            return (Path(base) if base else Path.home() / ".local/state") / "kvstore"
        except RuntimeError as error:  # a container's user without an entry in passwd
            raise ConfigError("no home folder to put the state directory in; give one with --state-dir") from error

    def _warm_bytes(self) -> int:
        available = self._machine.available_bytes()
        asked = self._asked.warm_bytes
        if asked is None:
            size = max(WARM_BYTES_MIN, available // _SHARE // MIB * MIB)
            self._notes.append(
                f"warm_bytes not set: {format_size(size)}, a quarter of {format_size(available)} available memory"
            )
            return size
        if asked > available:
            self._notes.append(
                f"warm_bytes {format_size(asked)} is more than the {format_size(available)} of memory available now; "
                "the pool grows only as far as memory allows"
            )
        return asked

    def _cold_bytes(self, state_dir: Path) -> int:
        # What the cold tier holds already counts as free: the default would otherwise shrink with every restart.
        try:
            free = free_disk_bytes(state_dir) + disk_used_bytes(state_dir)
        except OSError as error:  # of a name that no file system takes, for one
            raise ConfigError(f"state directory {state_dir!s:.200} cannot be used: {error.strerror}") from error
        asked = self._asked.cold_bytes
        if asked is None:
            size = min(_COLD_DEFAULT_MAX, free // _SHARE // MIB * MIB)
            if size < COLD_BYTES_MIN:
                self._notes.append(f"cold tier off: only {format_size(free)} free on the disk of {state_dir}")
                return 0
            self._notes.append(
                f"cold_bytes not set: {format_size(size)}, a quarter of {format_size(free)} free disk, at most "
                f"{format_size(_COLD_DEFAULT_MAX)}"
            )
            return size
        if asked > free:
            self._notes.append(
                f"cold_bytes {format_size(asked)} is more than the {format_size(free)} free on the disk of {state_dir}"
            )
        return asked

    def _hot(self) -> tuple[str, int, int]:
        """The device, its bytes, and the share of its free memory in thousandths; one of the two is 0."""
        device, asked = self._asked.hot_device or "auto", self._asked.hot_bytes
        permille = asked.permille if isinstance(asked, Share) else 0
        size = asked if isinstance(asked, int) else _HOT_DEFAULT
        if device == "auto" and self._machine.cuda_devices():
            device = "cuda:0"
            self._notes.append("hot_device auto: cuda:0, the first device")
        elif device == "auto":
            if asked:
                self._notes.append("hot_bytes is set but there is no CUDA device, hot tier off")
            device = "off"
        if device == "cpu":
            if permille:
                raise ConfigError("hot_bytes is a share, which only a CUDA device has; give a size for hot_device cpu")
            self._notes.append("hot_device cpu is a stand-in in host memory for tests: it makes nothing faster")
        if device == "off" or not (size or permille):
            return "off", 0, 0
        return (device, 0, permille) if permille else (device, size, 0)

    def _tenants(self, warm_bytes: int, cold_bytes: int) -> tuple[Tenant, ...]:
        asked = self._asked.tenants or ()
        for tenant in asked:
            for key, quota, whole in (
                ("warm_bytes", tenant.warm_bytes, warm_bytes),
                ("cold_bytes", tenant.cold_bytes, cold_bytes),
            ):
                if quota is not None and quota > whole:
                    sizes = f"{format_size(quota)} is more than the tier's {format_size(whole)}"
                    raise ConfigError(f"tenants.{tenant.name}.{key}: {sizes}")
        own, group = os.geteuid(), self._asked.socket_group
        if not asked:
            return (Tenant(DEFAULT_TENANT, (own,), () if group is None else (group,)),)
        if any(own in tenant.uids for tenant in asked):
            return asked
        # The operator's kvctl, run as the daemon's own user, must get in whatever the table says.
        default = next((tenant for tenant in asked if tenant.name == DEFAULT_TENANT), Tenant(DEFAULT_TENANT))
        others = tuple(tenant for tenant in asked if tenant.name != DEFAULT_TENANT)
        return (*others, replace(default, uids=(*default.uids, own)))


def _check_socket(config: Config) -> None:
    length = len(os.fsencode(config.attach_socket))
    if length > SOCKET_PATH_MAX:
        raise ConfigError(
            f"socket path {config.socket} is too long: with {ATTACH_SUFFIX!r} it takes {length} bytes, "
            f"the kernel allows {SOCKET_PATH_MAX}; choose a shorter --socket"
        )
