"""What the transports need from the engine.

The real engine is `kvstore.engine.store.Store`; it satisfies `Engine` by its shape alone. Every method may be
called from any thread and raises errors of `kvstore.protocol.errors`. Call sequence of a session:

    open_session -> attach_staging -> everything else, any order, any thread -> close_session

A session is opaque to the transports but for the attributes of `SessionView`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, TypeAlias

from kvstore.core.benefit import WorkerCosts
from kvstore.protocol.namespace import NamespaceSpec
from kvstore.v1 import admin_pb2, kvstore_pb2, types_pb2

# A method that takes the engine's own classes does not satisfy one that promises to take every SessionView or
# Peer, so as parameters they go unchecked.
SessionHandle: TypeAlias = Any
PeerHandle: TypeAlias = Any


class Peer(NamedTuple):
    """Who sits at the other end of an attach socket, as the kernel says (SO_PEERCRED, SO_PEERGROUPS)."""

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...] = ()  # further ones; not those of a user database, which a container has its own of


class SessionView(Protocol):
    """What the transports read of a session."""

    @property
    def id(self) -> int:
        """Number of the session, never reused by this daemon."""

    @property
    def token(self) -> bytes:
        """32 random bytes that stand for the session in gRPC metadata."""

    @property
    def pid(self) -> int:
        """Process that attached."""

    @property
    def uid(self) -> int:
        """User that attached."""

    @property
    def tenant(self) -> str:
        """Whose blocks the session may see."""


class NamespaceView(Protocol):
    """An open namespace."""

    @property
    def digest(self) -> bytes:
        """32 bytes, the namespace's id."""

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block."""

    @property
    def epoch(self) -> int:
        """Raised by every clear."""


class SlabView(Protocol):
    """Geometry of a slab; bytes but for `slab_id` and `slots`."""

    @property
    def slab_id(self) -> int:
        """Number of the slab; 0 is the session's own staging segment."""

    @property
    def segment_bytes(self) -> int:
        """Size of the whole segment."""

    @property
    def slot_bytes(self) -> int:
        """Size of one slot."""

    @property
    def slots(self) -> int:
        """How many slots."""

    @property
    def data_offset(self) -> int:
        """Where slot 0 begins."""


class MatchView(Protocol):
    """Longest stored prefix: its length in blocks and tokens, and the fastest tier of its blocks."""

    @property
    def blocks(self) -> int:
        """Length of the prefix."""

    @property
    def tokens(self) -> int:
        """The same in tokens."""

    @property
    def hot(self) -> int:
        """Blocks of it that are in the hot tier."""

    @property
    def warm(self) -> int:
        """Blocks whose fastest tier is warm."""

    @property
    def cold(self) -> int:
        """Blocks whose fastest tier is cold."""

    @property
    def withheld(self) -> int:
        """Further blocks that are stored, and not worth their fetch."""


class DataEngine(Protocol):
    """What a worker's calls need."""

    def bulk(self, nbytes: int) -> AbstractContextManager[object]:
        """What to hold while a message of `nbytes` is parsed and answered: long ones come one at a time."""

    def open_session(self, peer: PeerHandle, name: str, tenant: str) -> SessionView:
        """Begin a session for `peer` (pid, uid, gid) that calls itself `name`."""

    def attach_staging(self, session: SessionHandle, staging_bytes: int) -> int:
        """Make the session's staging segment; returns the bytes given (0 if 0 were asked)."""

    def close_session(self, session: SessionHandle) -> None:
        """End a session with its leases and its staging; idempotent."""

    def touch(self, session: SessionHandle) -> None:
        """Note a frame of the session, which renews its leases. Called for every call: must be quick."""

    def open_namespace(
        self, session: SessionHandle, spec: NamespaceSpec, terms: types_pb2.NamespaceTerms | None = None
    ) -> NamespaceView:
        """Open, or find, the session's tenant's namespace of this specification, and treat it as `terms` say."""

    def map_slabs(self, session: SessionHandle, ids: Sequence[int]) -> Sequence[tuple[SlabView, int]]:
        """Those of the slabs that still live, each with a descriptor that is the caller's to close."""

    def match(
        self, session: SessionHandle, namespace: bytes, keys: bytes, worker: WorkerCosts | None = None
    ) -> MatchView:
        """Longest stored prefix of `keys` (n * 32 bytes), with `worker` the part that is worth its fetch."""

    def exists(self, session: SessionHandle, namespace: bytes, keys: bytes) -> bytes:
        """One byte a key, 0 or 1."""

    def acquire(
        self,
        session: SessionHandle,
        groups: Sequence[tuple[bytes, bytes, int]],
        exact: bool = False,
        worker: WorkerCosts | None = None,
    ) -> kvstore_pb2.LeaseReply:
        """Lease what is stored of the groups (namespace, keys, mode); never waits for loading.

        Of a single prefix, with `worker`, only what is worth its fetch.
        """

    def wait(self, session: SessionHandle, lease_id: int, stop: int, timeout_s: float) -> tuple[int, int]:
        """(ready, lost) once blocks [0, stop) are readable or lost, or at the time-out; 0 does not block."""

    def renew(self, session: SessionHandle) -> tuple[int, Sequence[int]]:
        """(leases held, slabs that were retired and should be unmapped)."""

    def release(self, session: SessionHandle, lease_id: int, upto: int) -> None:
        """Give blocks [0, upto) of a lease back; 0: all."""

    def handoff(self, session: SessionHandle, lease_id: int) -> bytes:
        """A single-use token for the lease."""

    def adopt(self, session: SessionHandle, token: bytes) -> kvstore_pb2.LeaseReply:
        """Take over the lease that a token stands for."""

    def put(self, session: SessionHandle, request: kvstore_pb2.PutRequest, deadline_s: float) -> tuple[bytes, bytes]:
        """(statuses, reasons), a byte a key; blocks past `deadline_s` (time.monotonic) are rejected."""

    def prefetch(self, session: SessionHandle, namespace: bytes, keys: bytes) -> int:
        """Start loading; returns how many blocks are on their way."""

    def delete(self, session: SessionHandle, namespace: bytes, keys: bytes) -> int:
        """Drop blocks and what hangs on them; returns how many."""

    def clear(self, session: SessionHandle, namespace: bytes) -> int:
        """Drop a namespace's blocks; returns the new epoch."""


class AdminEngine(Protocol):
    """What an operator's calls need."""

    def stats(self) -> admin_pb2.GetStatsResponse:
        """Everything countable."""

    def list_namespaces(self, session: SessionHandle) -> Sequence[admin_pb2.NamespaceInfo]:
        """Namespaces the session may see."""

    def list_sessions(self, session: SessionHandle) -> Sequence[admin_pb2.SessionInfo]:
        """Sessions the session may see."""

    def inspect(self, session: SessionHandle, key: bytes, namespace: bytes) -> Sequence[admin_pb2.BlockInfo]:
        """Blocks whose key begins with `key`, in one namespace or (empty) in any."""

    def evict(self, tier: int, nbytes: int) -> tuple[int, int]:
        """Drop unpinned blocks from a tier; returns (blocks, bytes)."""

    def flush(self, timeout_s: float) -> tuple[int, int]:
        """Save warm blocks below; returns (saved, still unsaved)."""

    def verify(self, request: admin_pb2.VerifyRequest) -> admin_pb2.VerifyResponse:
        """Check the checksums of a tier, of the cold one a page at a time."""

    def compact(self) -> admin_pb2.CompactResponse:
        """Give the file system back what the cold tier does not need."""

    def resize(self, request: admin_pb2.ResizeRequest) -> admin_pb2.ResizeResponse:
        """Give the hot tier another capacity."""

    def record(self, request: admin_pb2.RecordRequest) -> admin_pb2.RecordResponse:
        """What workers have asked for since the call before; the first call begins."""

    def pin(self, session: SessionHandle, request: admin_pb2.PinRequest) -> admin_pb2.PinResponse:
        """Have a block of the session's tenant leave last, or no longer."""

    def set_terms(self, session: SessionHandle, request: admin_pb2.SetTermsRequest) -> types_pb2.NamespaceTerms:
        """Treat a namespace of the session's tenant differently; returns all terms that hold."""

    def start_drain(self) -> None:
        """Refuse puts from now on."""

    @property
    def draining(self) -> bool:
        """Whether start_drain was called."""


class Engine(DataEngine, AdminEngine, Protocol):
    """The whole engine."""
