"""The data service: one handler per method, behind the attach socket and gRPC alike.

A handler takes (request, session, deadline) and returns the response; it checks sizes and asks the engine. It
knows neither frames nor gRPC.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from kvstore.protocol import convert
from kvstore.protocol.errors import DeadlineExceeded, InvalidRequest, PermissionDenied
from kvstore.protocol.frames import Method
from kvstore.transport import checks
from kvstore.transport.engine import DataEngine, SessionView
from kvstore.transport.methods import Kind, MethodSpec
from kvstore.v1 import kvstore_pb2 as pb

LEASE_TTL_S = 30.0
# A renewal every 5 s of 30: a lease outlives five that were lost or late.
_RENEWALS_PER_TTL = 6
# A wait is cut into slices so that one whose caller has gone (gRPC cancel, session end) gives its thread back soon.
WAIT_SLICE_S = 0.25
# A wait answers this much before its deadline, or the answer "not all of it" would itself come too late.
WAIT_MARGIN_S = 0.005
SPEC_BYTES_MAX = 128 << 10
"""Of an OpenNamespace: what it says is remembered for good."""


def _always() -> bool:
    return True


class Handlers:
    """Handlers of the data service over one engine."""

    def __init__(self, engine: DataEngine, lease_ttl_s: float = LEASE_TTL_S) -> None:
        """`lease_ttl_s` is the engine's: clients are told it, and how often to give a sign of life."""
        self._engine = engine
        self._lease_ttl_ms = round(lease_ttl_s * 1000)
        self._renew_every_ms = round(lease_ttl_s * 1000 / _RENEWALS_PER_TTL)

    def methods(self) -> dict[str, MethodSpec]:
        """Every method of the service by name."""
        gate = self._engine.bulk
        specs = (
            MethodSpec("OpenSession", pb.OpenSessionRequest, pb.OpenSessionResponse, self.open_session),
            MethodSpec("OpenNamespace", pb.OpenNamespaceRequest, pb.OpenNamespaceResponse, self.open_namespace),
            MethodSpec("MapSlabs", pb.MapSlabsRequest, pb.MapSlabsResponse, self._map_slabs_reply, Kind.DESCRIPTORS),
            MethodSpec("Match", pb.MatchRequest, pb.MatchResponse, self.match, gate=gate),
            MethodSpec("Exists", pb.ExistsRequest, pb.ExistsResponse, self.exists, gate=gate),
            MethodSpec("Acquire", pb.AcquireRequest, pb.LeaseReply, self.acquire, gate=gate),
            MethodSpec("Wait", pb.WaitRequest, pb.WaitResponse, self.wait, Kind.WAIT),
            MethodSpec("Renew", pb.RenewRequest, pb.RenewResponse, self.renew),
            MethodSpec("Release", pb.ReleaseRequest, pb.ReleaseResponse, self.release),
            MethodSpec("Handoff", pb.HandoffRequest, pb.HandoffResponse, self.handoff),
            MethodSpec("Adopt", pb.AdoptRequest, pb.LeaseReply, self.adopt),
            MethodSpec("Put", pb.PutRequest, pb.PutResponse, self.put, Kind.PUT),
            MethodSpec("Prefetch", pb.PrefetchRequest, pb.PrefetchResponse, self.prefetch, gate=gate),
            MethodSpec("Delete", pb.DeleteRequest, pb.DeleteResponse, self.delete, gate=gate),
            MethodSpec("Clear", pb.ClearRequest, pb.ClearResponse, self.clear),
        )
        return {spec.name: spec for spec in specs}

    def open_session(
        self, request: pb.OpenSessionRequest, session: SessionView, deadline_s: float
    ) -> pb.OpenSessionResponse:
        """Make the staging segment and say how to keep leases alive."""
        return pb.OpenSessionResponse(
            session_id=session.id,
            staging_bytes=self._engine.attach_staging(session, request.staging_bytes),
            lease_ttl_ms=self._lease_ttl_ms,
            renew_every_ms=self._renew_every_ms,
            tenant=session.tenant,
        )

    def open_namespace(
        self, request: pb.OpenNamespaceRequest, session: SessionView, deadline_s: float
    ) -> pb.OpenNamespaceResponse:
        """Open a namespace of the session's tenant."""
        if request.ByteSize() > SPEC_BYTES_MAX:
            raise InvalidRequest(f"the namespace takes {request.ByteSize()} bytes; it may take {SPEC_BYTES_MAX}")
        terms = request.terms if request.HasField("terms") else None
        if terms is not None and (terms.HasField("warm_bytes") or terms.HasField("cold_bytes")):
            raise PermissionDenied("what a namespace may hold is for operators to say: kvctl set")
        state = self._engine.open_namespace(session, convert.from_proto(request.spec), terms)
        return pb.OpenNamespaceResponse(namespace=state.digest, block_nbytes=state.block_nbytes, epoch=state.epoch)

    def map_slabs(self, request: pb.MapSlabsRequest, session: SessionView) -> tuple[pb.MapSlabsResponse, list[int]]:
        """The reply, and the descriptors that go with it in the order of its slabs; the caller closes them."""
        checks.check_slab_ids(request.slab_ids)
        found = self._engine.map_slabs(session, list(request.slab_ids))
        infos = [
            pb.SlabInfo(
                slab_id=slab.slab_id,
                segment_bytes=slab.segment_bytes,
                slot_bytes=slab.slot_bytes,
                slots=slab.slots,
                data_offset=slab.data_offset,
            )
            for slab, _ in found
        ]
        return pb.MapSlabsResponse(slabs=infos), [fd for _, fd in found]

    def _map_slabs_reply(
        self, request: pb.MapSlabsRequest, session: SessionView, deadline_s: float
    ) -> pb.MapSlabsResponse:
        return self.map_slabs(request, session)[0]

    def match(self, request: pb.MatchRequest, session: SessionView, deadline_s: float) -> pb.MatchResponse:
        """Longest stored prefix."""
        namespace, keys = request.namespace, request.keys
        checks.check_keys(namespace, keys)
        found = self._engine.match(session, namespace, keys, checks.check_worker(request))
        return pb.MatchResponse(
            blocks=found.blocks,
            tokens=found.tokens,
            hot_blocks=found.hot,
            warm_blocks=found.warm,
            cold_blocks=found.cold,
            withheld=found.withheld,
            withheld_reason=pb.WITHHELD_REASON_NOT_WORTH if found.withheld else pb.WITHHELD_REASON_UNSPECIFIED,
        )

    def exists(self, request: pb.ExistsRequest, session: SessionView, deadline_s: float) -> pb.ExistsResponse:
        """Which keys are stored."""
        namespace, keys = request.namespace, request.keys
        checks.check_keys(namespace, keys)
        return pb.ExistsResponse(bits=self._engine.exists(session, namespace, keys))

    def acquire(self, request: pb.AcquireRequest, session: SessionView, deadline_s: float) -> pb.LeaseReply:
        """Lease what is stored."""
        groups = checks.check_groups(request)
        return self._engine.acquire(session, groups, request.exact, checks.check_worker(request))

    def poll_wait(self, request: pb.WaitRequest, session: SessionView) -> pb.WaitResponse:
        """How far a lease is readable now."""
        checks.check_lease_id(request.lease_id)
        ready, lost = self._engine.wait(session, request.lease_id, request.stop, 0.0)
        return pb.WaitResponse(ready=ready, lost=lost)

    def wait(
        self,
        request: pb.WaitRequest,
        session: SessionView,
        deadline_s: float,
        active: Callable[[], bool] = _always,
    ) -> pb.WaitResponse:
        """Wait for blocks; answers what is readable once all are, one is lost, or the deadline is near.

        Gives up early when `active` says that nobody waits for the answer any more.
        """
        checks.check_lease_id(request.lease_id)
        until_s = deadline_s - WAIT_MARGIN_S
        while True:
            slice_s = min(max(until_s - time.monotonic(), 0.0), WAIT_SLICE_S)
            ready, lost = self._engine.wait(session, request.lease_id, request.stop, slice_s)
            if lost or ready >= request.stop or time.monotonic() >= until_s or not active():
                return pb.WaitResponse(ready=ready, lost=lost)

    def renew(self, request: pb.RenewRequest, session: SessionView, deadline_s: float) -> pb.RenewResponse:
        """Keep the session's leases (any call does) and learn which slabs are gone."""
        leases, retired = self._engine.renew(session)
        return pb.RenewResponse(leases=leases, retired_slab_ids=retired)

    def release(self, request: pb.ReleaseRequest, session: SessionView, deadline_s: float) -> pb.ReleaseResponse:
        """Give leased blocks back."""
        checks.check_lease_id(request.lease_id)
        self._engine.release(session, request.lease_id, request.upto)
        return pb.ReleaseResponse()

    def handoff(self, request: pb.HandoffRequest, session: SessionView, deadline_s: float) -> pb.HandoffResponse:
        """Make a lease ready for another session."""
        checks.check_lease_id(request.lease_id)
        return pb.HandoffResponse(token=self._engine.handoff(session, request.lease_id))

    def adopt(self, request: pb.AdoptRequest, session: SessionView, deadline_s: float) -> pb.LeaseReply:
        """Take a lease over."""
        checks.check_token(request.token)
        return self._engine.adopt(session, request.token)

    def put(self, request: pb.PutRequest, session: SessionView, deadline_s: float) -> pb.PutResponse:
        """Store blocks from the session's staging segment."""
        checks.check_put(request)
        statuses, reasons = self._engine.put(session, request, deadline_s)
        return pb.PutResponse(statuses=statuses, reasons=reasons)

    def prefetch(self, request: pb.PrefetchRequest, session: SessionView, deadline_s: float) -> pb.PrefetchResponse:
        """Start loading."""
        namespace, keys = request.namespace, request.keys
        checks.check_keys(namespace, keys)
        return pb.PrefetchResponse(loading=self._engine.prefetch(session, namespace, keys))

    def delete(self, request: pb.DeleteRequest, session: SessionView, deadline_s: float) -> pb.DeleteResponse:
        """Drop blocks."""
        namespace, keys = request.namespace, request.keys
        checks.check_keys(namespace, keys)
        return pb.DeleteResponse(deleted=self._engine.delete(session, namespace, keys))

    def clear(self, request: pb.ClearRequest, session: SessionView, deadline_s: float) -> pb.ClearResponse:
        """Drop a namespace's blocks."""
        checks.check_namespace(request.namespace)
        return pb.ClearResponse(epoch=self._engine.clear(session, request.namespace))


def by_frame_method(methods: dict[str, MethodSpec]) -> dict[int, MethodSpec]:
    """The data service's methods by their number on the attach socket (OPEN_SESSION is OpenSession, and so on)."""
    return {
        int(method): methods[method.name.title().replace("_", "")] for method in Method if method is not Method.HELLO
    }


def check_deadline(name: str, deadline_s: float) -> None:
    """Refuse to begin what nobody waits for any more.

    Raises:
        DeadlineExceeded: `deadline_s` (time.monotonic) has passed.
    """
    if time.monotonic() >= deadline_s:
        raise DeadlineExceeded(f"{name}: the deadline passed before the call's turn came")
