"""The client: one attachment to a daemon, shared by all threads of a worker."""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, NoReturn, Required, TypeAlias, TypedDict, Unpack

from kvstore.protocol.errors import InvalidRequest
from kvstore.protocol.keys import Keys
from kvstore.protocol.namespace import KVLayout, NamespaceSpec
from kvstore.v1 import kvstore_pb2 as pb
from kvstore_client import forks
from kvstore_client.address import TLS, Address, resolve
from kvstore_client.benefit import Recompute, checked
from kvstore_client.connection import FAIL_OPEN_ERRORS, Connection
from kvstore_client.lease import Lease
from kvstore_client.namespace import ASK_TIMEOUT_S, Mode, Namespace, acquire_groups
from kvstore_client.rpc import RENEW
from kvstore_client.session import Options, Session
from kvstore_client.stats import get_stats
from kvstore_client.terms import Priority, checked_terms

ATTACH_TIMEOUT_S = 5.0
STATS_TIMEOUT_S = 5.0
PING_TIMEOUT_S = 1.0
DEFAULT_STAGING_BYTES = 64 << 20
REMOTE_STAGING_BYTES = 16 << 20
MIN_TOKEN_BYTES = 32
MAX_NAME_BYTES = 128
TRANSPORTS = ("auto", "local", "grpc")

Transport: TypeAlias = Literal["auto", "local", "grpc"]


class NamespaceFields(TypedDict, total=False):
    """Arguments of Client.namespace(): the fields of a NamespaceSpec."""

    model: Required[str]
    revision: Required[str]
    block_tokens: Required[int]
    layout: Required[KVLayout]
    kind: Literal["chain", "set"]
    shard: Mapping[str, tuple[int, int]] | Literal["all"]
    identity: Mapping[str, str]
    salt: str
    hash_algorithm: str
    cold_codec: str


class RemoteFields(TypedDict, total=False):
    """Arguments of Client() for a daemon over TCP."""

    tls: TLS | None
    token: bytes | str | None


class Anchor:
    """Whoever holds it keeps the client attached; when nobody does, it detaches."""


class Client:
    """A client of the daemon on this machine, or of one over TCP.

    Any thread may use it; close() it, or use it as a context manager. It attaches at once, and again by itself after
    the daemon was restarted. Every call has a deadline. A child of fork() cannot use it and has to make its own.
    """

    def __init__(
        self,
        address: str | os.PathLike[str] | None = None,
        *,
        fail_open: bool = False,
        transport: Transport = "auto",
        name: str = "",
        staging_bytes: int | None = None,
        **remote: Unpack[RemoteFields],
    ) -> None:
        """Attach to the daemon.

        Args:
            address: "unix:/path/to.sock" or the path, or "tcp://host:port". None: $KVSTORE_ADDRESS, then
                $XDG_RUNTIME_DIR/kvstore/kvstore.sock, then /run/kvstore/kvstore.sock.
            fail_open: a daemon that is gone or late is a miss: lookups find nothing, puts are REJECTED(UNAVAILABLE).
                After a few failures in a row the daemon is not asked again until it answers a probe made in the
                background. Mistakes of the caller still raise, and so do delete(), clear(), stats() and ping().
            transport: "auto" and "local": the local RPC on the attach socket. "grpc": the public gRPC API, for all but
                the hello and the mapping of shared memory.
            name: shown by `kvctl sessions`; at most 128 bytes. Empty: the process id.
            staging_bytes: memory that the daemon sets aside for this client's puts; 0 for a client that only reads.
                None: 64 MiB, over TCP 16 MiB.
            **remote: for tcp:// only. tls (a kvstore_client.TLS): how to know the daemon and, by a certificate, to be
                known by it. token (bytes or str, 32 or more): says who this client is where the daemon wants no
                certificate. Over TCP blocks are copied with read_into() and put(); view() and tensors() raise.

        Raises:
            InvalidRequest: an argument is wrong.
            Unavailable, DeadlineExceeded: no daemon answers (not raised by a fail-open client).
            PermissionDenied: this user may not attach.
            ProtocolMismatch: the daemon speaks another version of the protocol.
        """
        where = resolve(address)
        tls, token = _checked_remote(where, transport, remote)
        if staging_bytes is None:
            staging_bytes = REMOTE_STAGING_BYTES if where.is_tcp else DEFAULT_STAGING_BYTES
        options = Options(
            address=where,
            name=_checked_name(name or f"pid {os.getpid()}"),
            transport="grpc" if _checked_transport(transport) == "grpc" else "local",
            staging_bytes=_checked_staging(staging_bytes),
            is_fail_open=fail_open,
            tls=tls,
            token=token,
        )
        self._connection = Connection(options)
        # Held by everything that the user may still have when the Client itself is gone.
        self._anchor = Anchor()
        self._finalizer = weakref.finalize(self._anchor, self._connection.close)
        forks.register(self._connection)
        with contextlib.suppress(*(FAIL_OPEN_ERRORS if fail_open else ())):
            self._connection.run(lambda session, deadline_s: None, ATTACH_TIMEOUT_S)

    def namespace(
        self,
        *,
        recompute_s_per_token: Recompute = 0.0,
        priority: Priority | None = None,
        ttl_s: float | None = None,
        **fields: Unpack[NamespaceFields],
    ) -> Namespace:
        """A namespace: all that must agree for two workers to share blocks.

        Args:
            recompute_s_per_token: what this worker needs to compute a token's KV, in seconds; or (a, b), where token t
                of a prompt takes a + b * t. Then match() and acquire() promise only what is fetched quicker than that.
                0: everything that is stored.
            priority: "low", "normal" or "high": of one tenant's blocks those of lower priority leave first.
            ttl_s: blocks are dropped that nobody used for so many seconds; 0: never. Both are the namespace's, not this
                client's, and remembered by the daemon; None: as somebody else, or `kvctl set`, said.
            **fields: model (id) and revision; block_tokens (1..65536); layout (KVLayout of one block);
                kind: "chain" (default: prefixes) or "set" (independent blocks);
                shard: axis -> (rank, size) for tp, pp, dcp, …, or "all" (default);
                identity: whatever else must agree, string -> string: weight quantisation, kv dtype and scales, rope
                overrides, page layout, producer format; salt; hash_algorithm ("sha256");
                cold_codec: "" (default: blocks come back bit for bit) or "int8kv": K and V lose precision where only
                the SSD has them, for half the space; see Lease.lossy.

        Raises:
            InvalidRequest: a field is out of its limits; the message names it.
            Unavailable, DeadlineExceeded: no answer (not raised by a fail-open client).
        """
        fields.setdefault("kind", "chain")
        try:
            spec = NamespaceSpec(**fields)
        except TypeError as error:
            raise InvalidRequest(f"namespace(): {str(error).removeprefix('NamespaceSpec.__init__() ')}") from error
        terms = checked_terms(priority, ttl_s)
        namespace = Namespace(self._connection, spec, self._anchor, checked(recompute_s_per_token), terms)

        def open_it(session: Session, deadline_s: float) -> None:
            namespace.open_on(session, deadline_s)

        self._connection.run_or(open_it, ATTACH_TIMEOUT_S, lambda: None)
        return namespace

    def acquire(
        self,
        groups: Sequence[tuple[Namespace, Keys | bytes, Mode]],
        timeout_s: float = ASK_TIMEOUT_S,
        *,
        exact: bool = False,
    ) -> Lease:
        """One lease on several namespaces: the longest position that all of them can serve, or nothing.

        What recomputing takes does not count here: all that is stored is promised.

        Args:
            groups: (namespace, keys, mode) for each: "prefix" leases all blocks up to the position, "last" only the
                one that ends there (a state checkpoint, a sliding window).
            timeout_s: bound of this call, not of the loading.
            exact: blocks that are only left as a lossy copy count as absent.

        Returns:
            A lease; `lease.groups` has one entry for each group, in order.

        Raises:
            As Namespace.acquire() does.
        """
        if not groups:
            raise InvalidRequest("acquire() needs at least one (namespace, keys, mode)")
        for namespace, _, _ in groups:
            if namespace.connection is not self._connection:
                raise InvalidRequest("every namespace must be of this client")
        return acquire_groups(self._connection, groups, timeout_s, exact=exact)

    def stats(self, timeout_s: float = STATS_TIMEOUT_S) -> dict[str, Any]:
        """The daemon's counters, named as in kvstore/v1/admin.proto; `tiers` by name. Goes over gRPC.

        Raises:
            Unavailable, DeadlineExceeded: no answer, also for a fail-open client.
        """
        return self._connection.run(get_stats, timeout_s)

    def ping(self, timeout_s: float = PING_TIMEOUT_S) -> float:
        """Seconds of one round trip.

        Raises:
            Unavailable, DeadlineExceeded: no answer, also for a fail-open client.
        """

        def ask(session: Session, deadline_s: float) -> float:
            begin_s = time.perf_counter()
            session.link.call(RENEW, pb.RenewRequest(), deadline_s)
            return time.perf_counter() - begin_s

        return self._connection.run(ask, timeout_s)

    def close(self) -> None:
        """Detach: leases end and mapped memory goes. Idempotent; later calls raise InvalidRequest."""
        self._finalizer()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Client is an attachment of this process and cannot be pickled; make one in each process")

    def __repr__(self) -> str:
        return f"<Client {self._connection.options.address}>"


def _checked_name(name: str) -> str:
    if not isinstance(name, str) or len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES:
        raise InvalidRequest(f"name is {name!r:.60}; it must be a string of at most {MAX_NAME_BYTES} bytes")
    return name


def _checked_transport(transport: str) -> str:
    if transport not in TRANSPORTS:
        raise InvalidRequest(f"transport is {transport!r}; it must be one of {', '.join(TRANSPORTS)}")
    return transport


def _checked_remote(where: Address, transport: str, remote: RemoteFields) -> tuple[TLS | None, bytes]:
    tls, token = remote.get("tls"), remote.get("token") or b""
    if not where.is_tcp:
        if tls is not None or token:
            raise InvalidRequest(f"tls and token are for tcp://host:port; {where} is a socket of this machine")
        return None, b""
    if transport == "local":
        raise InvalidRequest(f"transport 'local' needs a socket of this machine; {where} is none")
    token = token.encode() if isinstance(token, str) else token
    if token and len(token) < MIN_TOKEN_BYTES:
        raise InvalidRequest(f"token has {len(token)} bytes; it must have {MIN_TOKEN_BYTES} or more")
    if tls is None and not where.is_loopback:
        raise InvalidRequest(
            f"{where} is another host: give tls=TLS(ca=...), or everything crosses the network in the clear"
        )
    if not token and (tls is None or tls.certificate is None):
        raise InvalidRequest("over TCP the daemon must know who calls: give a token, or tls with certificate and key")
    return tls, token


def _checked_staging(staging_bytes: int) -> int:
    if not isinstance(staging_bytes, int) or staging_bytes < 0:
        raise InvalidRequest(f"staging_bytes is {staging_bytes!r}; it must be a number of bytes, 0 or more")
    return staging_bytes
