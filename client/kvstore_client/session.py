"""One attachment to the daemon: the connection, its mapped memory and its leases."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from kvstore.protocol import convert
from kvstore.protocol.errors import DeadlineExceeded, InternalError, ProtocolMismatch, QuotaExceeded, Unavailable
from kvstore.protocol.frames import PROTOCOL_VERSION
from kvstore.protocol.namespace import NamespaceSpec
from kvstore.v1 import kvstore_pb2 as pb
from kvstore.v1 import types_pb2
from kvstore_client._lazy import grpc, metadata
from kvstore_client.address import TLS, Address
from kvstore_client.benefit import CopyRate
from kvstore_client.claim import Claim
from kvstore_client.grpc_link import GrpcLink, Metadata, metadata_of, open_channel
from kvstore_client.keeper import Keeper
from kvstore_client.lease import Lease
from kvstore_client.local import LocalLink
from kvstore_client.placement import Placement
from kvstore_client.put import PutPipeline, PutTarget, Storing
from kvstore_client.rpc import HELLO, OPEN_NAMESPACE, OPEN_SESSION, RELEASE, Link, Q, Rpc
from kvstore_client.slabs import SlabCache, SlabSource
from kvstore_client.staging import Staging
from kvstore_client.stream import connect

_log = logging.getLogger(__name__)
_serials = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Options:
    """What a client wants of its sessions.

    Attributes:
        address: of the daemon.
        name: shown by `kvctl sessions`.
        transport: "local", or "grpc" for all calls but those that only the attach socket can do.
        staging_bytes: size of the staging segment; 0 for a client that never puts.
        is_fail_open: a daemon that does not answer is a cache miss.
        tls: how to know the daemon, and be known by it, over TCP.
        token: that says who this client is, over TCP; empty: a certificate does.
    """

    address: Address
    name: str
    transport: str
    staging_bytes: int
    is_fail_open: bool
    tls: TLS | None = None
    token: bytes = field(default=b"", repr=False)


class Attachment(SlabSource, Protocol):
    """What a session lives and ends with: the attach socket, or over TCP the stream of its Hello."""

    @property
    def is_lost(self) -> bool:
        """Whether it has ended."""

    @property
    def has_late(self) -> bool:
        """Whether answers are still to come that nobody waits for any more."""

    def fileno(self) -> int:
        """A descriptor that says by POLLRDHUP when it ends; -1: there is none."""

    def pump(self) -> None:
        """Take in answers that have arrived."""

    def check_peer(self) -> None:
        """Notice now if it has ended."""

    def close(self) -> None:
        """End it; idempotent."""

    def abandon(self) -> None:
        """Leave it alone in a forked child."""


class Session:
    """An attached session; `kvstore_client.remote.RemoteSession` is one over TCP. Any thread may use it.

    Attributes:
        serial: tells sessions of this process apart.
        tenant: given by the daemon; part of every namespace digest.
        instance_id: of the daemon; differs after every start.
        attach: what the session lives and ends with.
        link: carries the calls.
        shares_memory: whether blocks can be read, and written to staging, in place.
        slabs: mapped memory.
        copies: how fast blocks are copied out of it.
    """

    shares_memory: ClassVar[bool] = True
    link: Link

    def __init__(self, options: Options, deadline_s: float) -> None:
        """Attach.

        Raises:
            Unavailable: no daemon answers.
            DeadlineExceeded: not in time.
            PermissionDenied: this user may not attach.
            ProtocolMismatch: the daemon speaks another version.
        """
        self.serial = next(_serials)
        self.is_fail_open = options.is_fail_open
        self.lost_reason: str | None = None
        self._claims: dict[int, weakref.ref[Claim]] = {}
        self._staging: Staging | None = None
        self._staging_lock = threading.Lock()
        self._keeper: Keeper | None = None
        self._keeper_lock = threading.Lock()
        self.copies = CopyRate()
        self.attach = self._connect(options, deadline_s)
        self.slabs = SlabCache(self.attach)
        try:
            self._open(options, deadline_s)
        except BaseException:
            self.close()
            raise

    def _connect(self, options: Options, deadline_s: float) -> Attachment:
        sock = connect(str(options.address.attach_path), deadline_s - time.monotonic())
        self.link = attach = LocalLink(sock, self._on_lost)
        return attach

    def _greet(self, options: Options, deadline_s: float) -> pb.HelloResponse:
        hello = self.link.call(HELLO, hello_of(options.name), deadline_s)
        if options.transport == "grpc":
            on_trouble = self.attach.check_peer
            self.link = GrpcLink(open_channel(hello.grpc_target), metadata_of(hello.token), lambda _: on_trouble())
        return hello

    def _open(self, options: Options, deadline_s: float) -> None:
        hello = self._greet(options, deadline_s)
        if hello.protocol_version != PROTOCOL_VERSION:
            raise ProtocolMismatch(
                f"the daemon speaks protocol {hello.protocol_version}, this client {PROTOCOL_VERSION}"
            )
        self.instance_id = hello.instance_id
        self.token = hello.token
        self.grpc_target = hello.grpc_target
        opened = self._open_session(options, deadline_s)
        self.session_id = opened.session_id
        self.tenant = opened.tenant
        self.staging_bytes = opened.staging_bytes
        self.renew_every_s = max(opened.renew_every_ms, 1) / 1000

    def _open_session(self, options: Options, deadline_s: float) -> pb.OpenSessionResponse:
        request = pb.OpenSessionRequest(staging_bytes=options.staging_bytes)
        try:
            return self.link.call(OPEN_SESSION, request, deadline_s)
        except QuotaExceeded as error:
            if not options.is_fail_open or not options.staging_bytes:
                raise
            _log.warning("attached without staging, so every put will be rejected: %s", error)
            return self.link.call(OPEN_SESSION, pb.OpenSessionRequest(), deadline_s)

    @property
    def is_lost(self) -> bool:
        """Whether the session has ended."""
        return self.lost_reason is not None or self.attach.is_lost

    @contextlib.contextmanager
    def open_grpc(self) -> Iterator[tuple[grpc.Channel, Metadata]]:
        """A gRPC channel to the daemon, and what every call on it needs."""
        with open_channel(self.grpc_target) as channel:
            yield channel, metadata_of(self.token)

    def open_namespace(
        self,
        spec: NamespaceSpec,
        digest: bytes,
        deadline_s: float,
        terms: types_pb2.NamespaceTerms | None = None,
    ) -> None:
        """Make a namespace known to the daemon, and say how to treat it.

        Raises:
            InternalError: the daemon computes another digest, so keys made here would never meet.
        """
        request = pb.OpenNamespaceRequest(spec=convert.to_proto(spec), terms=terms)
        reply = self.link.call(OPEN_NAMESPACE, request, deadline_s)
        if reply.namespace != digest or reply.block_nbytes != spec.block_nbytes:
            raise InternalError(
                f"the daemon names this namespace {reply.namespace.hex()} with blocks of {reply.block_nbytes} bytes, "
                f"this client {digest.hex()} with {spec.block_nbytes}"
            )

    # --- leases

    @property
    def wants_renewal(self) -> bool:
        """Whether a Renew is due when nobody has called for a while."""
        return bool(self._claims)

    def placement(self, group: pb.LeaseGroup, index: int, ready: int) -> Placement:
        """The blocks of a lease's group `index`, of which `ready` were readable when it was given."""
        return Placement(group)

    def check_alive(self) -> None:
        """Raise Unavailable if the daemon has gone, as far as can be told without asking."""
        self.attach.check_peer()
        if self.is_lost:
            raise Unavailable("the daemon closed the connection")

    def ask_for_lease(self, rpc: Rpc[Q, pb.LeaseReply], request: Q, deadline_s: float) -> pb.LeaseReply:
        """Acquire or Adopt. A lease that is granted too late is given back."""
        try:
            return self.link.call(rpc, request, deadline_s, self._give_back)
        except DeadlineExceeded:
            self._start_keeper()  # takes the answer in, though nobody may ever call again
            raise

    def _give_back(self, payload: bytes | None) -> None:
        lease_id = pb.LeaseReply.FromString(payload).lease_id if payload is not None else 0
        if lease_id:
            self.release(lease_id, 0)

    def lease(
        self, reply: pb.LeaseReply, namespaces: Sequence[NamespaceSpec], anchor: object, deadline_s: float
    ) -> Lease:
        """The lease of a reply, its slabs mapped.

        Args:
            reply: from Acquire or Adopt.
            namespaces: one for each group of it.
            anchor: what keeps the client attached.
            deadline_s: on time.monotonic().

        Raises:
            DeadlineExceeded: mapping took too long; the lease has been given back.
            InternalError: the reply makes no sense.
        """
        claim = Claim(self, reply)
        if not claim.lease_id:
            return Lease(claim, 0, namespaces)
        claim.anchor = anchor
        try:
            if len(claim.placements) != len(namespaces):
                raise InternalError(f"{len(claim.placements)} groups were leased of {len(namespaces)} asked for")
            for placement, namespace in zip(claim.placements, namespaces, strict=True):
                placement.find_slabs(self.slabs, namespace.block_nbytes, deadline_s)
            self._hold(claim)
            return Lease(claim, reply.tokens, namespaces)
        except BaseException:
            claim.release()
            raise

    def _hold(self, claim: Claim) -> None:
        self._claims[claim.lease_id] = weakref.ref(claim)
        if self.lost_reason is not None:
            claim.end(self.lost_reason)
        elif self._keeper is None:
            self._start_keeper()

    @property
    def lease_count(self) -> int:
        """Leases held."""
        return len(self._claims)

    def forget(self, lease_id: int) -> None:
        """A lease has ended."""
        self._claims.pop(lease_id, None)

    def release(self, lease_id: int, upto: int) -> None:
        """Give blocks [0, upto) of a lease back, or all of it (0): with the next call, or within some milliseconds."""
        self.link.defer(RELEASE, pb.ReleaseRequest(lease_id=lease_id, upto=upto))
        if self._keeper is None:
            self._start_keeper()
        if self._keeper is not None:
            self._keeper.expect_flush()

    def release_later(self, lease_id: int) -> None:
        """A lease was dropped without release(). Safe to call from a finalizer: takes no lock."""
        self.link.defer(RELEASE, pb.ReleaseRequest(lease_id=lease_id))
        self._claims.pop(lease_id, None)

    # --- storing

    def put_pipeline(self, target: PutTarget, count: int, deadline_s: float) -> Storing:
        """What stores `count` blocks. Raises as staging() does."""
        return PutPipeline(self, target, count, deadline_s)

    def lacks_staging_for(self, block_nbytes: int) -> bool:
        """Whether this is a fail-open client's session whose staging is smaller than one block."""
        return self.is_fail_open and block_nbytes > self.staging_bytes

    def check_staging_for(self, block_nbytes: int) -> None:
        """Raise QuotaExceeded where not one block would fit into the session's staging."""
        if block_nbytes > self.staging_bytes:
            raise QuotaExceeded(
                f"a block of {block_nbytes} bytes does not fit into the {self.staging_bytes} bytes of staging that "
                "this session has; ask for more with Client(staging_bytes=...), or raise the daemon's limit"
            )

    def staging(self, block_nbytes: int, deadline_s: float) -> Staging:
        """The staging segment, mapped on first use.

        Raises:
            QuotaExceeded: there is none, or it is smaller than one block.
        """
        self.check_staging_for(block_nbytes)
        if self._staging is None:
            if not self._staging_lock.acquire(timeout=max(deadline_s - time.monotonic(), 0)):
                raise DeadlineExceeded("another thread of this client is still mapping the staging segment")
            try:
                if self._staging is None:
                    self._staging = Staging(self.slabs.map_staging(self.staging_bytes, deadline_s), self.link.pump)
            finally:
                self._staging_lock.release()
        return self._staging

    # --- the end

    def close(self) -> None:
        """End the session: everything it holds is given back by the daemon. Idempotent."""
        self.attach.close()

    def abandon(self) -> None:
        """In a forked child: close the descriptors and forget everything, without a lock and without a word."""
        self.lost_reason = "this client belongs to the parent process; it does not survive fork()"
        self.attach.abandon()
        if isinstance(self.link, GrpcLink):
            self.link.abandon()
        if self._keeper is not None:
            self._keeper.abandon()
        self._end_all(self.lost_reason)

    def _on_lost(self, reason: str) -> None:
        self.lost_reason = reason
        if isinstance(self.link, GrpcLink):
            self.link.close()
        self._end_all(f"the session ended: {reason}")
        keeper = self._keeper
        if keeper is not None:
            keeper.wake()

    def _end_all(self, reason: str) -> None:
        for reference in list(self._claims.values()):
            claim = reference()
            if claim is not None:
                claim.end(reason)
        self._claims.clear()
        self.slabs.close()
        self._staging = None

    def _start_keeper(self) -> None:
        with self._keeper_lock:
            if self._keeper is None and self.lost_reason is None:
                try:
                    self._keeper = Keeper(self)
                except (
                    OSError,
                    RuntimeError,
                ) as error:  # no descriptor or thread to be had: the next lease tries again
                    _log.warning("leases are not renewed while this client is silent: %s", error)


def hello_of(name: str) -> pb.HelloRequest:
    """How a client of this version and that name introduces itself."""
    return pb.HelloRequest(protocol_version=PROTOCOL_VERSION, client_version=_version(), client_name=name)


@functools.cache
def _version() -> str:
    try:
        return str(metadata.version("kvtier"))
    except (metadata.PackageNotFoundError, OSError):  # OSError: no descriptor left to read it with
        return "unknown"
