"""A namespace as a worker uses it: make keys, ask, read, store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias

from kvstore.protocol.errors import InternalError, InvalidRequest
from kvstore.protocol.keys import KEY_BYTES, Extra, Keys, chain_keys
from kvstore.protocol.namespace import CHAIN, NamespaceSpec
from kvstore.v1 import kvstore_pb2 as pb
from kvstore.v1 import types_pb2
from kvstore_client._lazy import np
from kvstore_client.benefit import Recompute, checked, worker_costs
from kvstore_client.buffers import BlockBuffers, Wanted, block_buffers
from kvstore_client.claim import Claim
from kvstore_client.connection import Connection
from kvstore_client.device import device as open_device
from kvstore_client.device_buffers import DeviceBuffers, after_of, device_buffers
from kvstore_client.lease import Lease
from kvstore_client.outcomes import NO_MATCH, REJECTED, Match, PutOutcome, RejectReason, withheld_reason
from kvstore_client.put import PutTarget, Storing
from kvstore_client.rpc import ACQUIRE, ADOPT, CLEAR, DELETE, EXISTS, MATCH, PREFETCH
from kvstore_client.session import Session
from kvstore_client.staged import PUT_TIMEOUT_S, StagedBuffers, StagedRange

if TYPE_CHECKING:
    from numpy.typing import NDArray

Mode: TypeAlias = Literal["prefix", "last"]

ASK_TIMEOUT_S = 0.1
"""Default bound of match, acquire, exists and prefetch: they stand in a scheduler's way."""
CHANGE_TIMEOUT_S = 5.0
MAX_KEYS_PER_CALL = 65_536
"""The answer to an acquire has up to 48 bytes a block and must fit a frame of 4 MiB."""

_MODES: dict[str, pb.AcquireMode.ValueType] = {"prefix": pb.ACQUIRE_MODE_PREFIX, "last": pb.ACQUIRE_MODE_LAST}


class Namespace:
    """Made by Client.namespace(). Any thread may use it; it stays good when the client attaches again.

    Attributes:
        spec: what was said of it.
        connection: of its client.
        anchor: keeps its client attached; leases hold it too.
        recompute: seconds to compute a token, as kvstore_client.benefit.checked() gives them.
    """

    def __init__(
        self,
        connection: Connection,
        spec: NamespaceSpec,
        anchor: object,
        recompute: tuple[float, float] = (0.0, 0.0),
        terms: types_pb2.NamespaceTerms | None = None,
    ) -> None:
        self.spec = spec
        self._terms = terms
        self.recompute = recompute
        self.connection = connection
        self.anchor = anchor
        self._block_nbytes = spec.block_nbytes
        self._opened = (0, b"")  # serial of the session that knows it, its digest there
        self._guess = ("", b"")  # tenant, digest: while no daemon has answered yet

    @property
    def digest(self) -> bytes:
        """Its 32-byte id, the root of all keys.

        A fail-open client that has not reached a daemon yet guesses the tenant; keys made then meet nothing.
        """
        if self._opened[0]:
            return self._opened[1]
        tenant = self.connection.tenant
        if self._guess[0] != tenant:
            self._guess = (tenant, self.spec.digest(tenant))
        return self._guess[1]

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block."""
        return self._block_nbytes

    def keys(self, token_ids: object, extra: Iterable[Extra] = ()) -> Keys:
        """Keys of the full blocks of a token sequence.

        Args:
            token_ids: one-dimensional integers in 0..2**32-1: a list, array, numpy array or CPU tensor.
            extra: (token index, bytes) pairs: what else the KV depends on (LoRA, image or audio ids), where it begins.

        Raises:
            InvalidRequest: an argument is not as above.
        """
        return chain_keys(self.digest, token_ids, self.spec.block_tokens, extra)

    # --- asking

    def match(
        self,
        keys: Keys | bytes,
        timeout_s: float = ASK_TIMEOUT_S,
        *,
        recompute_s_per_token: Recompute | None = None,
    ) -> Match:
        """The longest stored prefix of the keys. Pins nothing, so it may be gone a moment later.

        Args:
            keys: in prefix order; `bytes` are 32-byte keys one after the other.
            timeout_s: bound of the call.
            recompute_s_per_token: as in Client.namespace(), for this call; None: as was said there. What would not be
                worth its fetch is in `withheld`.

        Raises:
            Unavailable, DeadlineExceeded: no answer (a fail-open client answers zero blocks).
            InvalidRequest: the keys are no keys, or too many.
        """
        data = packed(keys)
        recompute = self.recompute_or(recompute_s_per_token)
        if not data:
            return NO_MATCH

        def ask(session: Session, deadline_s: float) -> Match:
            worker = worker_costs(recompute, session.copies)
            request = pb.MatchRequest(namespace=self.open_on(session, deadline_s), keys=data, worker=worker)
            reply = session.link.call(MATCH, request, deadline_s)
            by_tier = {"hot": reply.hot_blocks, "warm": reply.warm_blocks, "cold": reply.cold_blocks}
            reason = withheld_reason(reply.withheld, reply.withheld_reason)
            return Match(reply.blocks, reply.tokens, by_tier, reply.withheld, reason)

        return self.connection.run_or(ask, timeout_s, lambda: NO_MATCH)

    def exists(self, keys: Keys | bytes, timeout_s: float = ASK_TIMEOUT_S) -> list[bool]:
        """For every key, whether its block is stored; for namespaces of kind "set". Raises as match() does."""
        data = packed(keys)
        if not data:
            return []

        def ask(session: Session, deadline_s: float) -> list[bool]:
            request = pb.ExistsRequest(namespace=self.open_on(session, deadline_s), keys=data)
            bits = session.link.call(EXISTS, request, deadline_s).bits
            if len(bits) != len(data) // KEY_BYTES:
                raise InternalError(f"the daemon answered {len(bits)} bits for {len(data) // KEY_BYTES} keys")
            return [bit != 0 for bit in bits]

        return self.connection.run_or(ask, timeout_s, lambda: [False] * (len(data) // KEY_BYTES))

    # --- reading

    def acquire(
        self,
        keys: Keys | bytes,
        timeout_s: float = ASK_TIMEOUT_S,
        *,
        exact: bool = False,
        recompute_s_per_token: Recompute | None = None,
    ) -> Lease:
        """Pin the longest stored prefix of the keys and start loading its cold part.

        Args:
            keys: in prefix order.
            timeout_s: bound of this call, not of the loading.
            exact: blocks that are only left as a lossy copy count as absent. Matters in a namespace with a cold_codec.
            recompute_s_per_token: as in Client.namespace(), for this call; None: as was said there. What is not worth
                its fetch is not promised; `Lease.withheld` counts it.

        Returns:
            A lease, of zero blocks if nothing is stored (or worth its fetch). Use it as a context manager.

        Raises:
            Unavailable, DeadlineExceeded: no answer (a fail-open client gets a lease of zero blocks).
            InvalidRequest: the keys are no keys, or too many.
        """
        recompute = self.recompute_or(recompute_s_per_token)
        return acquire_groups(self.connection, [(self, keys, "prefix")], timeout_s, exact=exact, recompute=recompute)

    def adopt(self, token: bytes, timeout_s: float = ASK_TIMEOUT_S) -> Lease:
        """Take over a lease that another session of the tenant handed off; a token works once.

        Raises:
            NotFound: the token was used, has expired, or never existed.
            InvalidRequest: the lease is on other namespaces.
            Unavailable, DeadlineExceeded: no answer (a fail-open client gets a lease of zero blocks).
        """
        if not isinstance(token, bytes) or not token:
            raise InvalidRequest("give the token that Lease.handoff() returned, non-empty bytes")

        def ask(session: Session, deadline_s: float) -> Lease:
            digest = self.open_on(session, deadline_s)
            reply = session.ask_for_lease(ADOPT, pb.AdoptRequest(token=token), deadline_s)
            try:
                specs = [self.connection.spec_of(group.namespace) for group in reply.groups]
                if digest not in [group.namespace for group in reply.groups]:
                    raise InvalidRequest("the lease that was handed off is not on this namespace")
            except InvalidRequest:
                session.release(reply.lease_id, 0)
                raise
            return session.lease(reply, specs, self.anchor, deadline_s)

        return self.connection.run_or(ask, timeout_s, lambda: nothing([self.spec]), is_repeatable=False)

    def prefetch(self, keys: Keys | bytes, timeout_s: float = ASK_TIMEOUT_S) -> int:
        """Ask the daemon to load the cold part of the stored prefix; returns how many blocks it is loading.

        Raises as match() does.
        """
        data = packed(keys)

        def ask(session: Session, deadline_s: float) -> int:
            request = pb.PrefetchRequest(namespace=self.open_on(session, deadline_s), keys=data)
            return session.link.call(PREFETCH, request, deadline_s).loading

        return self.connection.run_or(ask, timeout_s, lambda: 0) if data else 0

    # --- storing

    def put(
        self,
        keys: Keys | bytes,
        blocks: Any,  # noqa: ANN401 - any buffer
        timeout_s: float = PUT_TIMEOUT_S,
        *,
        pin: bool = False,
        after: Any = None,  # noqa: ANN401 - a stream or event of any library
    ) -> list[PutOutcome]:
        """Store blocks.

        Args:
            keys: one a block, in prefix order; the parent of a slice is known by it.
            blocks: one contiguous (n, block_nbytes) uint8 array, or n-D array of the layout's item size whose first
                axis is the block; or n buffers; or n lists of segments, each a buffer or (address, length). Memory of
                one CUDA device too, as in Lease.read_into(); it may be written to again when the call returns.
            timeout_s: bound of the call; blocks whose turn came too late are REJECTED(DEADLINE).
            pin: softly, once all are stored (or were already): no put takes their place, and they leave last, until
                `kvctl unpin` of the last key, or until the daemon ends. In a set each block is pinned by itself.
            after: a CUDA event or stream whose work writes the blocks; None: for tensors of torch its current stream.

        Returns:
            One outcome a block: STORED, EXISTS, or REJECTED(reason). In a chain all blocks after a rejected one are
            REJECTED(NO_PARENT).

        Raises:
            Unavailable, DeadlineExceeded: no answer (for a fail-open client those blocks are REJECTED(UNAVAILABLE)).
            InvalidRequest: keys and blocks do not fit each other or the layout; nothing was sent.
            QuotaExceeded: the session has less staging than one block (for a fail-open client: REJECTED(QUOTA)).
        """
        named = keys if isinstance(keys, Keys) else Keys.from_bytes(keys)
        buffers = self._blocks(blocks, len(named), after)
        if not len(named):
            return []
        tried: list[Storing] = []

        def store(session: Session, deadline_s: float) -> list[PutOutcome]:
            target = replace(self._target(self.open_on(session, deadline_s)), pin=pin)
            if session.lacks_staging_for(self._block_nbytes):
                return [REJECTED(RejectReason.QUOTA)] * len(named)
            pipeline = session.put_pipeline(target, len(named), deadline_s)
            tried.append(pipeline)
            pipeline.run(named, buffers)
            return pipeline.outcomes()

        def unanswered() -> list[PutOutcome]:
            return tried[-1].outcomes() if tried else [REJECTED(RejectReason.UNAVAILABLE)] * len(named)

        return self.connection.run_or(store, timeout_s, unanswered)

    def stage(self, n: int, timeout_s: float = PUT_TIMEOUT_S, *, device: int | None = None) -> StagedBuffers:
        """Room for n blocks in the staging segment, to be filled and then put without a copy.

        Args:
            n: how many blocks.
            timeout_s: bound of the wait for a free range; where none comes, or over TCP, the buffers are private.
            device: number of the CUDA device that is to write there: the whole staging segment is registered with its
                driver, once, so that copies to it run by themselves (`StagedBuffers.is_pinned`).

        Raises:
            InvalidRequest: so many never fit; the message says how many do.
            Unavailable, DeadlineExceeded: no answer (a fail-open client gets private memory).
        """
        if not isinstance(n, int) or n < 1:
            raise InvalidRequest(f"stage({n!r}): give the number of blocks, at least 1")

        def take(session: Session, deadline_s: float) -> tuple[StagedRange | None, NDArray[np.uint8] | None]:
            target = self._target(self.open_on(session, deadline_s))
            session.check_alive()  # the staging may be mapped already, and then nobody would be asked
            if not session.shares_memory or session.lacks_staging_for(self._block_nbytes):
                return None, None
            staging = session.staging(self._block_nbytes, deadline_s)
            if n * target.stride > staging.nbytes:
                fits = staging.nbytes // target.stride
                raise InvalidRequest(f"stage({n}): at most {fits} blocks of {self._block_nbytes} bytes fit at once")
            place = staging.take(n * target.stride, deadline_s)
            if place is None:
                return None, None
            staged = StagedRange(session, staging, target, place)
            return staged, staged.rows(place, n)

        staged, rows = self.connection.run_or(take, timeout_s, lambda: (None, None))
        if rows is None:
            rows = np.empty((n, self._block_nbytes), np.uint8)
        buffers = StagedBuffers(rows, self._put_staged, staged)
        if device is not None:
            buffers.register(device, timeout_s)
        return buffers

    def _blocks(self, blocks: Any, count: int, after: Any) -> BlockBuffers | DeviceBuffers:  # noqa: ANN401
        wanted = Wanted("blocks", count, True, False)
        on_device = device_buffers(blocks, self.spec.layout, wanted)
        if on_device is not None:
            open_device(on_device.ordinal)  # where there is no driver, before anything is sent
            return on_device if after is None else on_device._replace(after=(after_of(after),))
        if after is not None:
            raise InvalidRequest(
                "after is for blocks on a CUDA device; wait for the event before blocks in host memory"
            )
        return block_buffers(blocks, self.spec.layout, wanted)

    def _put_staged(self, buffers: StagedBuffers, keys: Keys, timeout_s: float, pin: bool) -> list[PutOutcome]:
        if len(keys) > len(buffers):
            raise InvalidRequest(f"{len(keys)} keys for {len(buffers)} staged buffers")
        staged = buffers.staged
        if (
            staged is None or not staged.is_usable()
        ):  # the bytes are still there: copy them into the new session's staging
            return self.put(keys, buffers.array[: len(keys)], timeout_s, pin=pin)
        if not len(keys):
            return []

        def store(_session: Session, deadline_s: float) -> list[PutOutcome]:
            return staged.put(keys, deadline_s, pin)

        def unanswered() -> list[PutOutcome]:
            return [REJECTED(RejectReason.UNAVAILABLE)] * len(keys)

        return self.connection.run_or(store, timeout_s, unanswered, is_repeatable=False)

    # --- changing. These raise for a fail-open client too: a clear that did not happen would serve old weights' KV.

    def delete(self, keys: Keys | bytes, timeout_s: float = CHANGE_TIMEOUT_S) -> int:
        """Delete blocks and, in a chain, what hangs on them; returns how many were deleted.

        Raises:
            Unavailable, DeadlineExceeded: no answer, also for a fail-open client.
            InvalidRequest: the keys are no keys, or too many.
        """
        data = packed(keys)

        def ask(session: Session, deadline_s: float) -> int:
            request = pb.DeleteRequest(namespace=self.open_on(session, deadline_s), keys=data)
            return session.link.call(DELETE, request, deadline_s).deleted

        return self.connection.run(ask, timeout_s) if data else 0

    def clear(self, timeout_s: float = CHANGE_TIMEOUT_S) -> int:
        """Forget every block of the namespace, in constant time; returns its new epoch. For updated weights.

        Raises:
            Unavailable, DeadlineExceeded: no answer, also for a fail-open client.
        """

        def ask(session: Session, deadline_s: float) -> int:
            request = pb.ClearRequest(namespace=self.open_on(session, deadline_s))
            return session.link.call(CLEAR, request, deadline_s).epoch

        return self.connection.run(ask, timeout_s)

    # --- inside

    def recompute_or(self, given: Recompute | None) -> tuple[float, float]:
        """The recompute cost of a call that was given one, or None."""
        return self.recompute if given is None else checked(given)

    def open_on(self, session: Session, deadline_s: float) -> bytes:
        """Make sure that the session's daemon knows the namespace; returns its digest there."""
        serial, digest = self._opened
        if serial != session.serial:
            digest = self.spec.digest(session.tenant)
            session.open_namespace(self.spec, digest, deadline_s, self._terms)
            self._terms = None  # said once: the daemon remembers it, and an operator may have said otherwise since
            self._opened = (session.serial, digest)
            self.connection.learn(digest, self.spec)
        return digest

    def _target(self, digest: bytes) -> PutTarget:
        return PutTarget(digest, self._block_nbytes, self.spec.kind == CHAIN)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Namespace belongs to its Client and cannot be pickled; send its arguments instead")

    def __repr__(self) -> str:
        return f"<Namespace {self.spec.model!r} {self.digest.hex()[:12]}>"


def acquire_groups(
    connection: Connection,
    groups: Sequence[tuple[Namespace, Keys | bytes, Mode]],
    timeout_s: float,
    *,
    exact: bool,
    recompute: tuple[float, float] = (0.0, 0.0),
) -> Lease:
    """See Namespace.acquire and Client.acquire."""
    namespaces = [namespace.spec for namespace, _, _ in groups]
    asked = [(namespace, packed(keys), _mode(mode)) for namespace, keys, mode in groups]
    if not all(data for _, data, _ in asked):
        return nothing(namespaces)

    def ask(session: Session, deadline_s: float) -> Lease:
        wanted = [
            pb.AcquireGroup(namespace=namespace.open_on(session, deadline_s), keys=data, mode=mode)
            for namespace, data, mode in asked
        ]
        request = pb.AcquireRequest(groups=wanted, exact=exact, worker=worker_costs(recompute, session.copies))
        reply = session.ask_for_lease(ACQUIRE, request, deadline_s)
        return session.lease(reply, namespaces, groups[0][0].anchor, deadline_s)

    return connection.run_or(ask, timeout_s, lambda: nothing(namespaces))


def nothing(namespaces: Sequence[NamespaceSpec]) -> Lease:
    """A lease on nothing."""
    return Lease(Claim(None, pb.LeaseReply()), 0, namespaces)


def packed(keys: Keys | bytes) -> bytes:
    """The bytes of some keys.

    Raises:
        InvalidRequest: they are not a whole number of keys, or too many for one call.
    """
    data = keys.data if isinstance(keys, Keys) else Keys.from_bytes(keys).data
    if len(data) > MAX_KEYS_PER_CALL * KEY_BYTES:
        raise InvalidRequest(f"{len(data) // KEY_BYTES} keys in one call; the limit is {MAX_KEYS_PER_CALL}")
    return data


def _mode(mode: str) -> pb.AcquireMode.ValueType:
    if mode not in _MODES:
        raise InvalidRequest(f"mode is {mode!r}; it must be 'prefix' or 'last'")
    return _MODES[mode]
