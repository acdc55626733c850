"""What a configuration file or a command line asks for, checked one value at a time.

Nothing here looks at the machine; `kvstore.config` fills in what was left out.
"""

from __future__ import annotations

import difflib
import grp
import pwd
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from kvstore.sizes import MIB, Share, format_size, parse_share, parse_size

LOG_LEVELS = ("debug", "info", "warning", "error")
CODECS = ("auto", "raw", "exphuf")
KERNELS = ("auto", "numpy", "numba")
POLICIES = ("adaptive", "leaf-lru")
DURABILITIES = ("none", "interval", "commit")
WARM_BYTES_MIN = MIB  # a pool that cannot hold one block of any real model only looks like a broken one
COLD_BYTES_MIN = 16 * MIB
STAGING_BYTES_MIN = MIB
LEASE_TTL_S_MIN = 1.0  # a worker that waits for a scheduler's time slice must not lose its blocks
SYNC_INTERVAL_S_MIN = 0.05  # a sync of nothing still is a request to the disk
COLD_RESERVE_BYTES_MIN = MIB  # a file system without a byte left takes no log and no recovery either
AGENT_TIMEOUT_S_MIN = 1.0  # an SSD that is merely busy answers within that
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)
_ID_MAX = (1 << 32) - 2  # 2**32 - 1 means "no id" to the kernel


class ConfigError(ValueError):
    """The configuration cannot be used; the message says where, what, and what would be right."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who belongs to a tenant, and how much it may use (None: as much as there is)."""

    name: str
    uids: tuple[int, ...] = ()
    gids: tuple[int, ...] = ()
    warm_bytes: int | None = None
    cold_bytes: int | None = None
    sans: tuple[str, ...] = ()
    admin_sans: tuple[str, ...] = ()
    token_file: Path | None = None
    admin_token_file: Path | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """Values as asked for; None: not asked for."""

    state_dir: Path | None = None
    socket: Path | None = None
    socket_mode: int | None = None
    socket_group: int | None = None
    warm_bytes: int | None = None
    cold_bytes: int | None = None
    hot_bytes: int | Share | None = None
    hot_device: str | None = None
    log_level: str | None = None
    drain_grace_s: float | None = None
    lease_ttl_s: float | None = None
    agent_timeout_s: float | None = None
    reader_threads: int | None = None
    codec: str | None = None
    codec_kernels: str | None = None
    durability: str | None = None
    sync_interval_s: float | None = None
    cold_reserve_bytes: int | None = None
    staging_max_bytes: int | None = None
    staging_total_bytes: int | None = None
    max_sessions: int | None = None
    policy: str | None = None
    promote_hits: int | None = None
    cold_daily_bytes: int | None = None
    tenants: tuple[Tenant, ...] | None = None
    listen: tuple[str, int] | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None

    @classmethod
    def parse(cls, raw: Mapping[str, object], label: Callable[[str], str]) -> Settings:
        """Check raw values.

        Args:
            raw: key to value; None values count as left out.
            label: how a key is called where it was written ("--warm-bytes", "file.toml: warm_bytes").

        Raises:
            ConfigError: an unknown key, or a value that cannot be.
        """
        check_keys(raw, _PARSERS, label)
        return cls(
            **{key: _parsed(_PARSERS[key], value, label(key)) for key, value in raw.items() if value is not None}
        )

    def over(self, below: Settings) -> Settings:
        """These settings, with what they leave out taken from `below`."""
        asked = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return replace(below, **asked)


def check_keys(raw: Iterable[str], known: Iterable[str], label: Callable[[str], str]) -> None:
    """Refuse a key that means nothing, with the nearest one that does.

    Raises:
        ConfigError: the first such key.
    """
    names = list(known)
    for key in raw:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(names)}"
            raise ConfigError(f"{label(key)}: unknown key; {hint}")


def _parsed(parser: Callable[[object], Any], value: object, label: str) -> Any:  # noqa: ANN401 (one type per key)
    try:
        return parser(value)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{label}: {error!s:.500}") from error  # it repeats the value, however long that is


def _path(value: object) -> Path:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError(f"{value!r} is not a path")
    if "\0" in str(value):
        raise ValueError("a path cannot hold a NUL byte")
    try:
        return Path(str(value).removeprefix("unix:")).expanduser().absolute()
    except RuntimeError as error:  # ~name of nobody
        raise ValueError(str(error)) from error


def _size(value: object) -> int:
    if isinstance(value, str):
        return parse_size(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f'{value!r} is not a size; write for example "8GiB" or a number of bytes')
    return parse_size(str(value))


def _size_from(least: int, *, zero: str = "") -> Callable[[object], int]:
    def parse(value: object) -> int:
        size = _size(value)
        if size < least and not (zero and size == 0):
            off = f", and 0 turns {zero} off" if zero else ""
            raise ValueError(f"{format_size(size)} is too small; the least is {format_size(least)}{off}")
        return size

    return parse


def _hot_size(value: object) -> int | Share:
    if isinstance(value, str) and value.strip().endswith("%"):
        return parse_share(value)
    return _size_from(MIB, zero="the hot tier")(value)


def _whole(least: int, most: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"{value!r} is not a whole number from {least} to {most}")
        return value

    return parse


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 3600:
        raise ValueError(f"{value!r} is not a number of seconds from 0 to 3600")
    return float(value)


def _seconds_from(least: float) -> Callable[[object], float]:
    def parse(value: object) -> float:
        seconds = _seconds(value)
        if seconds < least:
            raise ValueError(f"{seconds:g} s is too short; the least is {least:g} s")
        return seconds

    return parse


def _choice(*choices: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if not isinstance(value, str) or value.lower() not in choices:
            raise ValueError(f"{value!r} is none of {', '.join(choices)}")
        return value.lower()

    return parse


def _mode(value: object) -> int:
    if isinstance(value, str) and re.fullmatch(r"(0o?)?[0-7]{3}", value):
        value = int(value.removeprefix("0o"), 8)
    if isinstance(value, bool) or not isinstance(value, int) or value & 0o600 != 0o600 or value & ~0o666:
        raise ValueError(f'{value!r} is not a socket mode; write "0600", or "0660" together with socket_group')
    return value


def _device(value: object) -> str:
    text = str(value).lower()
    if text not in ("auto", "off", "cpu") and not re.fullmatch(r"cuda:\d{1,3}", text, re.ASCII):
        raise ValueError(f"{value!r} is none of auto, off, cpu, cuda:0, cuda:1, …")
    return text


def _id(value: object, lookup: Callable[[str], int], kind: str) -> int:
    if isinstance(value, str) and not value.isdecimal():
        try:
            return lookup(value)
        except KeyError:
            raise ValueError(f"there is no {kind} named {value!r} on this machine") from None
    number = int(value) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= _ID_MAX:
        raise ValueError(f"{value!r} is neither the name nor the number of a {kind}")
    return number


def _user(value: object) -> int:
    return _id(value, lambda name: pwd.getpwnam(name).pw_uid, "user")


def _group(value: object) -> int:
    return _id(value, lambda name: grp.getgrnam(name).gr_gid, "group")


def _listen(value: object) -> tuple[str, int]:
    found = re.fullmatch(r"\[([0-9a-fA-F:.]+)\]:(\d{1,5})|([^\s:/]+):(\d{1,5})", str(value), re.ASCII)
    if not found or int(found[2] or found[4]) > 65535:
        raise ValueError(f'{value!r} is not HOST:PORT; write for example "127.0.0.1:7400" or "[::]:7400"')
    return found[1] or found[3], int(found[2] or found[4])


def _san(value: object) -> str:
    if not isinstance(value, str) or not value or len(value) > 1024:
        raise ValueError(f"{value!r} is not a subject alternative name, as worker-1.example or spiffe://example/worker")
    return value


def _each(parser: Callable[[object], Any]) -> Callable[[object], tuple[Any, ...]]:
    def parse(value: object) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{value!r} is not a list")
        return tuple(parser(item) for item in value)

    return parse


def _tenants(value: object) -> tuple[Tenant, ...]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{value!r} is not a table; write [tenants.NAME]")
    tenants = tuple(_tenant(str(name), table) for name, table in value.items())
    for what in ("uids", "gids"):
        owner: dict[int, str] = {}
        for tenant in tenants:
            for number in getattr(tenant, what):
                first = owner.setdefault(number, tenant.name)
                if first != tenant.name:
                    raise ValueError(f"{what[:-1]} {number} is in {first!r} and in {tenant.name!r}; leave it in one")
    return tenants


def _tenant(name: str, table: object) -> Tenant:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a tenant's name; write letters, digits, '_', '.', '-', at most 64")
    if not isinstance(table, Mapping):
        raise ValueError(f"{name!r} is not a table; write [tenants.{name}]")

    def label(key: str) -> str:
        return f"tenants.{name}.{key}"

    check_keys(table, _TENANT_PARSERS, label)
    found = Tenant(name, **{key: _parsed(_TENANT_PARSERS[key], value, label(key)) for key, value in table.items()})
    if not any((found.uids, found.gids, found.sans, found.admin_sans, found.token_file, found.admin_token_file)):
        raise ValueError(f"tenant {name!r} has no uids, gids, sans or token_file, so nobody could be it")
    return found


_TENANT_PARSERS: dict[str, Callable[[object], Any]] = {
    "uids": _each(_user),
    "gids": _each(_group),
    "warm_bytes": _size_from(WARM_BYTES_MIN),
    "cold_bytes": _size,
    "sans": _each(_san),
    "admin_sans": _each(_san),
    "token_file": _path,
    "admin_token_file": _path,
}
_PARSERS: dict[str, Callable[[object], Any]] = {
    "state_dir": _path,
    "socket": _path,
    "socket_mode": _mode,
    "socket_group": _group,
    "warm_bytes": _size_from(WARM_BYTES_MIN),
    "cold_bytes": _size_from(COLD_BYTES_MIN, zero="the cold tier"),
    "hot_bytes": _hot_size,
    "hot_device": _device,
    "log_level": _choice(*LOG_LEVELS),
    "drain_grace_s": _seconds,
    "lease_ttl_s": _seconds_from(LEASE_TTL_S_MIN),
    "agent_timeout_s": _seconds_from(AGENT_TIMEOUT_S_MIN),
    "reader_threads": _whole(1, 64),
    "codec": _choice(*CODECS),
    "codec_kernels": _choice(*KERNELS),
    "durability": _choice(*DURABILITIES),
    "sync_interval_s": _seconds_from(SYNC_INTERVAL_S_MIN),
    "cold_reserve_bytes": _size_from(COLD_RESERVE_BYTES_MIN),
    "staging_max_bytes": _size_from(STAGING_BYTES_MIN),
    "staging_total_bytes": _size_from(STAGING_BYTES_MIN),
    "max_sessions": _whole(1, 4096),
    "policy": _choice(*POLICIES),
    "promote_hits": _whole(1, 1000),
    "cold_daily_bytes": _size_from(MIB, zero="the limit"),
    "tenants": _tenants,
    "listen": _listen,
    "tls_certificate": _path,
    "tls_key": _path,
    "tls_client_ca": _path,
}
