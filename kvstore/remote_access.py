"""What the configuration says of the TCP listener, checked and read: it opens only if it can know its clients."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvstore.access import TOKEN_BYTES_MAX, TOKEN_BYTES_MIN, Identity, RemoteAccess
from kvstore.settings import ConfigError, Settings, Tenant

_FILE_BYTES_MAX = 1 << 20
_NO_IDENTITY = (
    "listen: a TCP listener needs to know its clients, on loopback too: set tls_certificate, tls_key, tls_client_ca "
    "and sans in [tenants.NAME]; or token_file in [tenants.NAME]"
)


def load_remote_access(asked: Settings, tenants: Sequence[Tenant]) -> RemoteAccess | None:
    """The listener that was asked for, its files read; None where none was.

    Raises:
        ConfigError: it would be open, nobody could come in, or a file cannot be used.
    """
    if asked.listen is None:
        return None
    _check(asked, tenants)
    host, port = asked.listen
    return RemoteAccess(
        host,
        port,
        certificate=_pem(asked.tls_certificate, "tls_certificate"),
        key=_pem(asked.tls_key, "tls_key", secret=True),
        client_ca=_pem(asked.tls_client_ca, "tls_client_ca"),
        sans=dict(_sans(tenants)),
        tokens=tuple(_tokens(tenants)),
    )


def describe_remote(access: RemoteAccess | None) -> list[str]:
    """The listener in words, without its secrets."""
    if access is None:
        return []
    known = f"{len(access.sans)} names of certificates" if access.client_ca else f"{len(access.tokens)} tokens"
    tls = "mutual TLS" if access.client_ca else "TLS" if access.certificate else "no TLS (loopback)"
    return [f"listens on tcp {access.address}: {tls}, {known}"]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it. A name other than localhost may mean anything tomorrow."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check(asked: Settings, tenants: Sequence[Tenant]) -> None:
    assert asked.listen is not None
    host = asked.listen[0]
    with_tokens = any(tenant.token_file or tenant.admin_token_file for tenant in tenants)
    with_sans = any(tenant.sans or tenant.admin_sans for tenant in tenants)
    if (asked.tls_certificate is None) != (asked.tls_key is None):
        raise ConfigError("tls_certificate and tls_key belong together; set both")
    if asked.tls_client_ca is not None and asked.tls_certificate is None:
        raise ConfigError("tls_client_ca needs a server certificate too; set tls_certificate and tls_key")
    if asked.tls_client_ca is not None and with_tokens:
        raise ConfigError("clients are known by certificates or by tokens: leave out tls_client_ca or every token_file")
    if not with_tokens and asked.tls_client_ca is None:
        raise ConfigError(_NO_IDENTITY)
    if not with_tokens and not with_sans:
        raise ConfigError(
            "tls_client_ca is set and no tenant has sans, so nobody could come in; add them to [tenants.NAME]"
        )
    if with_tokens and with_sans:
        raise ConfigError("sans say nothing without tls_client_ca; leave them out, or the token_file")
    if asked.tls_certificate is None and not is_loopback(host):
        raise ConfigError(
            f"listen {host}: tokens would cross the network in the clear; set tls_certificate and tls_key, "
            "or listen on 127.0.0.1"
        )


def _sans(tenants: Sequence[Tenant]) -> Iterator[tuple[str, Identity]]:
    owner: dict[str, str] = {}
    for tenant in tenants:
        for names, is_admin in ((tenant.sans, False), (tenant.admin_sans, True)):
            for name in names:
                first = owner.setdefault(name, tenant.name)
                if first != tenant.name or (not is_admin and name in tenant.admin_sans):
                    raise ConfigError(
                        f"san {name!r} is listed twice, in {first!r} and {tenant.name!r}; leave it in one"
                    )
                yield name, Identity(name, tenant.name, is_admin)


def _tokens(tenants: Sequence[Tenant]) -> Iterator[tuple[bytes, Identity]]:
    seen: dict[bytes, str] = {}
    for tenant in tenants:
        for path, key, is_admin in (
            (tenant.token_file, "token_file", False),
            (tenant.admin_token_file, "admin_token_file", True),
        ):
            if path is None:
                continue
            label = f"tenants.{tenant.name}.{key}"
            token = _read(path, label, secret=True).strip()
            if not TOKEN_BYTES_MIN <= len(token) <= TOKEN_BYTES_MAX:
                raise ConfigError(
                    f"{label}: {path} holds {len(token)} bytes; a token has {TOKEN_BYTES_MIN} to {TOKEN_BYTES_MAX}: "
                    "make one with `openssl rand -hex 32`"
                )
            if token in seen:
                raise ConfigError(f"{label}: the same token is in {seen[token]}; make another")
            seen[token] = label
            yield hashlib.sha256(token).digest(), Identity(label.removeprefix("tenants."), tenant.name, is_admin)


def _pem(path: Path | None, label: str, secret: bool = False) -> bytes:
    if path is None:
        return b""
    content = _read(path, label, secret)
    if b"-----BEGIN " not in content:
        raise ConfigError(f"{label}: {path} is not in PEM form (-----BEGIN …)")
    return content


def _read(path: Path, label: str, secret: bool) -> bytes:
    """A small file; a secret must be out of others' reach.

    Raises:
        ConfigError: it cannot be read, or others can.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"{label}: {path} cannot be read: {error.strerror}") from error
    if len(content) > _FILE_BYTES_MAX:
        raise ConfigError(f"{label}: {path} has more than {_FILE_BYTES_MAX} bytes; name the right file")
    if secret and mode & (stat.S_IRWXO | stat.S_IWGRP):
        raise ConfigError(f"{label}: {path} has mode {mode:04o}, so others can use it; run chmod 0600 {path}")
    return content
