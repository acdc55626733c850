"""The methods of both services as they are over TCP: no shared memory, leases noted for Fetch, Admin for admins."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from google.protobuf.message import Message

from kvstore.protocol.errors import PermissionDenied
from kvstore.protocol.keys import KEY_BYTES
from kvstore.transport.engine import AdminEngine, SessionView
from kvstore.transport.methods import Kind, MethodSpec
from kvstore.transport.remote_sessions import RemoteSession, RemoteSessions
from kvstore.v1 import admin_pb2, types_pb2
from kvstore.v1 import kvstore_pb2 as pb

audit = logging.getLogger("kvstore.audit")

_LEFT_OUT = {"MapSlabs", "Put"}
_SHOWN_CHARS_MAX = 200


def data_methods(methods: Mapping[str, MethodSpec], sessions: RemoteSessions) -> dict[str, MethodSpec]:
    """The data service's methods over TCP."""

    def opening(spec: MethodSpec) -> MethodSpec:
        def handle(request: Message, view: SessionView, deadline_s: float) -> Message:
            reply = cast("pb.OpenNamespaceResponse", spec.handle(request, view, deadline_s))
            kind = cast("pb.OpenNamespaceRequest", request).spec.kind
            sessions.of(view).kinds[reply.namespace] = kind != types_pb2.NAMESPACE_KIND_SET
            return reply

        return replace(spec, handle=handle)

    def leasing(spec: MethodSpec) -> MethodSpec:
        def handle(request: Message, view: SessionView, deadline_s: float) -> Message:
            session = sessions.of(view)
            groups = request.groups if isinstance(request, pb.AcquireRequest) else ()
            session.check_room(sum(len(group.keys) // KEY_BYTES for group in groups))
            reply = cast("pb.LeaseReply", spec.handle(request, view, deadline_s))
            session.keep(reply)
            return _without_places(reply)

        return replace(spec, handle=handle)

    def ending(spec: MethodSpec) -> MethodSpec:
        def handle(request: Message, view: SessionView, deadline_s: float) -> Message:
            reply = spec.handle(request, view, deadline_s)
            if not (isinstance(request, pb.ReleaseRequest) and request.upto):
                sessions.of(view).leases.pop(cast("pb.ReleaseRequest", request).lease_id, None)
            return reply

        return replace(spec, handle=handle)

    def without_slabs(spec: MethodSpec) -> MethodSpec:
        def handle(request: Message, view: SessionView, deadline_s: float) -> Message:
            reply = cast("pb.RenewResponse", spec.handle(request, view, deadline_s))
            return pb.RenewResponse(leases=reply.leases)

        return replace(spec, handle=handle)

    changed = {
        "OpenNamespace": opening,
        "Acquire": leasing,
        "Adopt": leasing,
        "Release": ending,
        "Handoff": ending,
        "Renew": without_slabs,
    }
    kept = {name: spec for name, spec in methods.items() if name not in _LEFT_OUT}
    return {name: changed[name](spec) if name in changed else spec for name, spec in kept.items()}


def _without_places(reply: pb.LeaseReply) -> pb.LeaseReply:
    """What a remote worker is told of its lease: not where it lies, which also says how much others have stored."""
    told = pb.LeaseReply(
        lease_id=reply.lease_id,
        tokens=reply.tokens,
        ready=reply.ready,
        withheld=reply.withheld,
        withheld_reason=reply.withheld_reason,
    )
    for group in reply.groups:
        told.groups.add(
            first_block=group.first_block,
            slab_ids=bytes(len(group.slab_ids)),
            slots=bytes(len(group.slots)),
            generations=bytes(len(group.generations)),
            block_nbytes=group.block_nbytes,
            namespace=group.namespace,
            checksums=group.checksums,
            lossy=group.lossy,
        )
    return told


def admin_methods(
    methods: Mapping[str, MethodSpec], sessions: RemoteSessions, engine: AdminEngine
) -> dict[str, MethodSpec]:
    """The admin service's methods over TCP: each call by an admin, or refused; and an audit line for each."""

    def gated(spec: MethodSpec) -> MethodSpec:
        def handle(request: Message, view: SessionView, deadline_s: float) -> Message:
            session = sessions.of(view)
            if session.identity.is_admin:
                _audit(spec.name, session, "allowed", request)
                return spec.handle(request, view, deadline_s)
            if spec.name == "GetStats":
                return tenant_stats(engine, view)
            _audit(spec.name, session, "refused", request)
            raise PermissionDenied(f"{spec.name} over TCP is for admins; {session.identity.name} is not one of them")

        return replace(spec, handle=handle, kind=Kind.INLINE)

    return {name: gated(spec) for name, spec in methods.items()}


def tenant_stats(engine: AdminEngine, view: SessionView) -> admin_pb2.GetStatsResponse:
    """What of the daemon's figures is the session's own tenant's."""
    whole, namespaces, sessions = engine.stats(), engine.list_namespaces(view), engine.list_sessions(view)
    used = {
        "warm": sum(namespace.warm_bytes for namespace in namespaces),
        "cold": sum(namespace.cold_bytes for namespace in namespaces),
    }
    tiers = [
        admin_pb2.TierStats(name=tier.name, state=tier.state, used_bytes=used.get(tier.name, 0)) for tier in whole.tiers
    ]
    return admin_pb2.GetStatsResponse(
        version=whole.version,
        instance_id=whole.instance_id,
        uptime_ms=whole.uptime_ms,
        health=whole.health,
        tiers=tiers,
        sessions=len(sessions),
        leases=sum(session.leases for session in sessions),
        namespaces=len(namespaces),
        staging_bytes=sum(session.staging_bytes for session in sessions),
    )


def audit_always() -> None:
    """Write audit lines whatever the level of the log is."""
    audit.setLevel(logging.INFO)


def _audit(name: str, session: RemoteSession, verdict: str, request: Message) -> None:
    identity = session.identity
    shown = str(request).replace("\n", " ").strip()[:_SHOWN_CHARS_MAX]
    audit.info(
        "admin call %s over TCP %s: identity=%r tenant=%r session=%d request=%r",
        name,
        verdict,
        identity.name,
        identity.tenant,
        session.view.id,
        shown,
    )
