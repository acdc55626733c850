"""The admin service: what operators ask of a running daemon. Only over gRPC, with a session's token.

Reading is open to every session (the engine shows a session what its tenant may see); what changes the daemon is
for operators, whom `is_operator(uid)` names: a worker of another user must not be able to drain it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvstore.protocol.errors import InvalidRequest, PermissionDenied
from kvstore.transport import checks
from kvstore.transport.engine import AdminEngine, SessionView
from kvstore.transport.methods import MethodSpec
from kvstore.v1 import admin_pb2 as pb

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AdminHooks:
    """What the admin service needs beside the engine.

    Attributes:
        is_operator: whether a uid may change the daemon.
        set_log_level: sets the level by name and returns the name in force; ValueError for an unknown one.
        on_drain: called once the engine drains.
    """

    is_operator: Callable[[int], bool]
    set_log_level: Callable[[str], str]
    on_drain: Callable[[], None]


class AdminHandlers:
    """Handlers of the admin service."""

    def __init__(self, engine: AdminEngine, hooks: AdminHooks) -> None:
        self._engine = engine
        self._hooks = hooks

    def methods(self) -> dict[str, MethodSpec]:
        """Every method of the service by name."""
        specs = (
            MethodSpec("GetStats", pb.GetStatsRequest, pb.GetStatsResponse, self.get_stats),
            MethodSpec("ListNamespaces", pb.ListNamespacesRequest, pb.ListNamespacesResponse, self.list_namespaces),
            MethodSpec("ListSessions", pb.ListSessionsRequest, pb.ListSessionsResponse, self.list_sessions),
            MethodSpec("InspectBlock", pb.InspectBlockRequest, pb.InspectBlockResponse, self.inspect_block),
            MethodSpec("Evict", pb.EvictRequest, pb.EvictResponse, self.evict),
            MethodSpec("Flush", pb.FlushRequest, pb.FlushResponse, self.flush),
            MethodSpec("Verify", pb.VerifyRequest, pb.VerifyResponse, self.verify),
            MethodSpec("Compact", pb.CompactRequest, pb.CompactResponse, self.compact),
            MethodSpec("Drain", pb.DrainRequest, pb.DrainResponse, self.drain),
            MethodSpec("SetLogLevel", pb.SetLogLevelRequest, pb.SetLogLevelResponse, self.set_log_level),
            MethodSpec("Resize", pb.ResizeRequest, pb.ResizeResponse, self.resize),
            MethodSpec("Record", pb.RecordRequest, pb.RecordResponse, self.record),
            MethodSpec("Pin", pb.PinRequest, pb.PinResponse, self.pin),
            MethodSpec("SetTerms", pb.SetTermsRequest, pb.SetTermsResponse, self.set_terms),
        )
        return {spec.name: spec for spec in specs}

    def get_stats(self, request: pb.GetStatsRequest, session: SessionView, deadline_s: float) -> pb.GetStatsResponse:
        """Everything countable."""
        return self._engine.stats()

    def list_namespaces(
        self, request: pb.ListNamespacesRequest, session: SessionView, deadline_s: float
    ) -> pb.ListNamespacesResponse:
        """Namespaces the session may see."""
        return pb.ListNamespacesResponse(namespaces=self._engine.list_namespaces(session))

    def list_sessions(
        self, request: pb.ListSessionsRequest, session: SessionView, deadline_s: float
    ) -> pb.ListSessionsResponse:
        """Sessions the session may see."""
        return pb.ListSessionsResponse(sessions=self._engine.list_sessions(session))

    def inspect_block(
        self, request: pb.InspectBlockRequest, session: SessionView, deadline_s: float
    ) -> pb.InspectBlockResponse:
        """Where a block is and what holds it."""
        checks.check_block_query(request.key, request.namespace)
        return pb.InspectBlockResponse(blocks=self._engine.inspect(session, request.key, request.namespace))

    def evict(self, request: pb.EvictRequest, session: SessionView, deadline_s: float) -> pb.EvictResponse:
        """Drop unpinned blocks from a tier."""
        self._check_operator("Evict", session)
        checks.check_tier(request.tier)
        blocks, nbytes = self._engine.evict(request.tier, request.bytes)
        return pb.EvictResponse(blocks=blocks, bytes=nbytes)

    def flush(self, request: pb.FlushRequest, session: SessionView, deadline_s: float) -> pb.FlushResponse:
        """Save warm blocks below, for `timeout_ms` at most (0: until the call's deadline)."""
        self._check_operator("Flush", session)
        timeout_s = max(deadline_s - time.monotonic(), 0.0)
        if request.timeout_ms:
            timeout_s = min(timeout_s, request.timeout_ms / 1000)
        saved, unsaved = self._engine.flush(timeout_s)
        return pb.FlushResponse(saved=saved, unsaved=unsaved)

    def verify(self, request: pb.VerifyRequest, session: SessionView, deadline_s: float) -> pb.VerifyResponse:
        """Check every checksum of a tier, of the cold one a page at a time."""
        self._check_operator("Verify", session)
        checks.check_tier(request.tier)
        checks.check_position(request.after)
        return self._engine.verify(request)

    def compact(self, request: pb.CompactRequest, session: SessionView, deadline_s: float) -> pb.CompactResponse:
        """Make the cold tier's files as small as they can be."""
        self._check_operator("Compact", session)
        return self._engine.compact()

    def resize(self, request: pb.ResizeRequest, session: SessionView, deadline_s: float) -> pb.ResizeResponse:
        """Give the hot tier another capacity."""
        self._check_operator("Resize", session)
        checks.check_tier(request.tier)
        checks.check_capacity(request.capacity_bytes)
        return self._engine.resize(request)

    def drain(self, request: pb.DrainRequest, session: SessionView, deadline_s: float) -> pb.DrainResponse:
        """Refuse puts and report NOT_SERVING from now on."""
        self._check_operator("Drain", session)
        self._engine.start_drain()
        self._hooks.on_drain()
        return pb.DrainResponse()

    def set_log_level(
        self, request: pb.SetLogLevelRequest, session: SessionView, deadline_s: float
    ) -> pb.SetLogLevelResponse:
        """Set the daemon's log level."""
        self._check_operator("SetLogLevel", session)
        try:
            level = self._hooks.set_log_level(request.level)
        except ValueError as error:
            raise InvalidRequest(f"level: {error}") from error
        return pb.SetLogLevelResponse(level=level)

    def record(self, request: pb.RecordRequest, session: SessionView, deadline_s: float) -> pb.RecordResponse:
        """What workers ask for; five times a second while it lasts, so only its beginning and end are logged."""
        self._check_operator("Record", session, logged=request.stop or not request.recording)
        return self._engine.record(request)

    def pin(self, request: pb.PinRequest, session: SessionView, deadline_s: float) -> pb.PinResponse:
        """Have a block leave last, or no longer."""
        self._check_operator("Pin", session)
        checks.check_block_query(request.key, request.namespace)
        return self._engine.pin(session, request)

    def set_terms(self, request: pb.SetTermsRequest, session: SessionView, deadline_s: float) -> pb.SetTermsResponse:
        """Treat a namespace differently."""
        self._check_operator("SetTerms", session)
        checks.check_namespace(request.namespace)
        return pb.SetTermsResponse(terms=self._engine.set_terms(session, request))

    def _check_operator(self, name: str, session: SessionView, logged: bool = True) -> None:
        if not self._hooks.is_operator(session.uid):
            raise PermissionDenied(f"{name} is for operators of this daemon; uid {session.uid} is not one of them")
        if logged:
            log.info("admin call %s: session=%d pid=%d uid=%d", name, session.id, session.pid, session.uid)
