"""Who may come in over TCP, and as whom."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from kvstore.protocol.errors import PermissionDenied, Unauthenticated

TOKEN_BYTES_MIN = 32
TOKEN_BYTES_MAX = 1024


class Identity(NamedTuple):
    """What a peer proved to be.

    Attributes:
        name: for the log: the SAN, or whose token it was; never the token.
        tenant: whose blocks it may see.
        is_admin: whether it may call what changes or lists the daemon.
    """

    name: str
    tenant: str
    is_admin: bool = False


@dataclass(frozen=True, slots=True)
class RemoteAccess:
    """The TCP listener, and what opens it: client certificates where `client_ca` is set, else tokens.

    Attributes:
        host: an address or name to listen on.
        port: 0 lets the kernel choose.
        certificate: of the server, with its chain, PEM; empty: no TLS (on loopback, with tokens).
        key: of it, PEM.
        client_ca: PEM; a client must show a certificate of it.
        sans: identity by a subject alternative name of the client's certificate.
        tokens: identity by the SHA-256 of a token.
    """

    host: str
    port: int
    certificate: bytes = b""
    key: bytes = field(default=b"", repr=False)
    client_ca: bytes = b""
    sans: Mapping[str, Identity] = field(default_factory=dict)
    tokens: tuple[tuple[bytes, Identity], ...] = field(default=(), repr=False)

    @property
    def address(self) -> str:
        """HOST:PORT as asked for."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def tenants(self) -> set[str]:
        """Whose workers may come in."""
        return {identity.tenant for identity in (*self.sans.values(), *(identity for _, identity in self.tokens))}

    def by_certificate(self, names: Iterable[bytes]) -> Identity:
        """Whose certificate has these subject alternative names.

        Raises:
            PermissionDenied: nobody's, or that of two different ones.
        """
        texts = [name.decode(errors="replace") for name in names]
        found = {identity for text in texts if (identity := self.sans.get(text))}
        if len({(identity.tenant, identity.is_admin) for identity in found}) == 1:
            return min(found)
        listed = ", ".join(texts) or "none"
        if found:
            raise PermissionDenied(f"the certificate's names ({listed}) belong to several identities; use one for each")
        raise PermissionDenied(
            f"the certificate's names ({listed}) belong to no tenant of this daemon; add one to a tenant's sans"
        )

    def by_token(self, token: bytes | None) -> Identity:
        """Whose token it is. Every token is compared, whole, so that the time says nothing of any.

        Raises:
            Unauthenticated: nobody's, or there is none.
        """
        if not token:
            raise Unauthenticated("no access token: send the tenant's as metadata kvstore-access-bin")
        shown = hashlib.sha256(token).digest()  # of one size, so that not even the length shows
        matches = [identity for known, identity in self.tokens if hmac.compare_digest(known, shown)]
        if not matches:
            raise Unauthenticated("the access token is none of this daemon's")
        return matches[0]
