"""The gRPC service: tokens, the same answers as on the attach socket, admin, health, reflection."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeAlias

import grpc
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvstore.protocol.frames import MAX_PAYLOAD_BYTES, Method
from kvstore.transport.admin import AdminHandlers, AdminHooks
from kvstore.v1 import admin_pb2, admin_pb2_grpc, kvstore_pb2_grpc, types_pb2
from kvstore.v1 import kvstore_pb2 as pb
from transport_double import BOUND_S, Setup, eventually

Make: TypeAlias = Callable[..., Setup]

NS = bytes(32)


class Caller:
    """Stubs that send a session's token."""

    def __init__(self, setup: Setup) -> None:
        self.peer = setup.attach()
        channel = setup.channel()
        self.data = kvstore_pb2_grpc.KVStoreStub(channel)
        self.admin = admin_pb2_grpc.AdminStub(channel)
        self.metadata = (("kvstore-token", self.peer.hello_reply.token.hex()),)

    def __call__(self, method: Callable[..., Any], request: Message, timeout: float | None = BOUND_S) -> Any:
        return method(request, metadata=self.metadata, timeout=timeout)


def code_of(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


def key(i: int) -> bytes:
    return i.to_bytes(32, "little")


def test_the_data_service_answers_as_on_the_attach_socket(setup: Setup) -> None:
    caller = Caller(setup)
    data = caller.data
    assert caller(data.OpenSession, pb.OpenSessionRequest(staging_bytes=4096)).staging_bytes == 4096
    assert caller(data.Put, pb.PutRequest(namespace=NS, keys=key(1), block_nbytes=64)).statuses == b"\x01"
    assert caller(data.Match, pb.MatchRequest(namespace=NS, keys=key(1) + key(2))).blocks == 1
    assert caller(data.Exists, pb.ExistsRequest(namespace=NS, keys=key(1) + key(2))).bits == b"\x01\x00"
    assert caller(data.Acquire, pb.AcquireRequest(groups=[pb.AcquireGroup(namespace=NS, keys=key(1))])).lease_id == 7
    assert caller(data.Wait, pb.WaitRequest(lease_id=7, stop=1)).ready == 10
    assert caller(data.Renew, pb.RenewRequest()).leases == 1
    assert caller(data.Handoff, pb.HandoffRequest(lease_id=7)).token
    assert caller(data.Clear, pb.ClearRequest(namespace=NS)).epoch == 2
    assert caller(data.Release, pb.ReleaseRequest(lease_id=7)) == pb.ReleaseResponse()
    assert setup.session().touches == 10


@pytest.mark.parametrize("metadata", [(), (("kvstore-token", "00" * 32),), (("kvstore-token", "no hex"),)])
def test_without_a_token_of_this_daemon_nothing_is_answered(
    setup: Setup, metadata: tuple[tuple[str, str], ...]
) -> None:
    setup.attach()
    channel = setup.channel()
    for method, request in (
        (kvstore_pb2_grpc.KVStoreStub(channel).Renew, pb.RenewRequest()),
        (admin_pb2_grpc.AdminStub(channel).GetStats, admin_pb2.GetStatsRequest()),
        (admin_pb2_grpc.AdminStub(channel).Drain, admin_pb2.DrainRequest()),
    ):
        code, details = code_of(lambda: method(request, metadata=metadata, timeout=BOUND_S))  # noqa: B023
        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert "token" in details
    assert not setup.engine.drained


def test_a_token_is_worth_nothing_after_its_session(setup: Setup) -> None:
    caller = Caller(setup)
    caller(caller.data.Renew, pb.RenewRequest())
    caller.peer.close()
    assert setup.session().closed.wait(BOUND_S)
    assert code_of(lambda: caller(caller.data.Renew, pb.RenewRequest()))[0] is grpc.StatusCode.UNAUTHENTICATED


def test_errors_have_their_status(setup: Setup) -> None:
    caller = Caller(setup)
    assert code_of(lambda: caller(caller.data.Match, pb.MatchRequest(namespace=b"x")))[0] is (
        grpc.StatusCode.INVALID_ARGUMENT
    )
    assert code_of(lambda: caller(caller.data.Release, pb.ReleaseRequest(lease_id=8)))[0] is grpc.StatusCode.NOT_FOUND
    setup.engine.fail_with = ZeroDivisionError("secret detail")
    code, details = code_of(lambda: caller(caller.data.Match, pb.MatchRequest(namespace=NS)))
    assert (code, details) == (grpc.StatusCode.INTERNAL, "internal error, see the daemon's log")


def test_bytes_that_are_no_request_are_an_invalid_argument(setup: Setup) -> None:
    caller = Caller(setup)
    raw = setup.channel().unary_unary("/kvstore.v1.KVStore/Match")
    code, details = code_of(lambda: raw(b"\xff\xff", metadata=caller.metadata, timeout=BOUND_S))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "MatchRequest" in details


def test_map_slabs_says_where_it_works(setup: Setup) -> None:
    caller = Caller(setup)
    code, details = code_of(lambda: caller(caller.data.MapSlabs, pb.MapSlabsRequest(slab_ids=[0])))
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert str(setup.config.attach_path) in details


def test_a_message_above_the_limit_is_refused_and_the_largest_is_not(setup: Setup) -> None:
    caller = Caller(setup)
    fits = bytes((MAX_PAYLOAD_BYTES - 128) // 32 * 32)
    assert len(caller(caller.data.Exists, pb.ExistsRequest(namespace=NS, keys=fits)).bits) == len(fits) // 32
    too_long = pb.ExistsRequest(namespace=NS, keys=bytes(MAX_PAYLOAD_BYTES + (1 << 20)))
    assert code_of(lambda: caller(caller.data.Exists, too_long))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_puts_of_both_transports_share_the_sessions_lane(setup: Setup) -> None:
    caller = Caller(setup)
    setup.engine.gate.clear()
    caller.peer.send(Method.PUT, pb.PutRequest(namespace=NS, keys=key(1), block_nbytes=64))
    eventually(lambda: setup.session().touches == 1)
    later = caller.data.Put.future(
        pb.PutRequest(namespace=NS, keys=key(2), block_nbytes=64), metadata=caller.metadata, timeout=BOUND_S
    )
    eventually(lambda: setup.session().touches == 2)
    setup.engine.gate.set()
    assert later.result(BOUND_S).statuses == b"\x01"
    assert setup.engine.put_order == [key(1), key(2)]


def test_a_put_that_is_not_answered_in_time_is_a_missed_deadline(setup: Setup) -> None:
    caller = Caller(setup)
    setup.engine.gate.clear()
    request = pb.PutRequest(namespace=NS, keys=key(1), block_nbytes=64)
    code, _ = code_of(lambda: caller(caller.data.Put, request, timeout=0.2))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_wait_without_a_deadline_gets_the_default_one(make: Make) -> None:
    setup = make(limits={"default_deadline_s": 0.2})
    setup.engine.set_ready(1)
    caller = Caller(setup)
    assert caller(caller.data.Wait, pb.WaitRequest(lease_id=7, stop=5), timeout=None).ready == 1


def test_a_wait_answers_before_its_deadline(setup: Setup) -> None:
    setup.engine.set_ready(1)
    caller = Caller(setup)
    assert caller(caller.data.Wait, pb.WaitRequest(lease_id=7, stop=5), timeout=1.0).ready == 1


def test_a_cancelled_wait_gives_its_thread_back(setup: Setup) -> None:
    setup.engine.set_ready(0)
    caller = Caller(setup)
    waiting = caller.data.Wait.future(pb.WaitRequest(lease_id=7, stop=5), metadata=caller.metadata, timeout=300)
    eventually(lambda: setup.engine.waiting == 1)
    waiting.cancel()
    eventually(lambda: setup.engine.waiting == 0)


def test_waits_leave_room_for_other_calls(make: Make) -> None:
    setup = make(limits={"grpc_rpcs": 6, "grpc_waits": 3})
    setup.engine.set_ready(0)
    caller = Caller(setup)
    request = pb.WaitRequest(lease_id=7, stop=5)
    waits = [caller.data.Wait.future(request, metadata=caller.metadata, timeout=300) for _ in range(3)]
    eventually(lambda: setup.engine.waiting == 3)
    code, details = code_of(lambda: caller(caller.data.Wait, request))
    assert (code, "3 Wait" in details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
    caller(caller.data.Renew, pb.RenewRequest())
    setup.engine.set_ready(5)
    assert {wait.result(BOUND_S).ready for wait in waits} == {5}


def test_health_needs_no_token_and_says_when_the_daemon_drains(setup: Setup) -> None:
    stub = health_pb2_grpc.HealthStub(setup.channel())
    for service in ("", "kvstore.v1.KVStore", "kvstore.v1.Admin"):
        request = health_pb2.HealthCheckRequest(service=service)
        assert stub.Check(request, timeout=BOUND_S).status == health_pb2.HealthCheckResponse.SERVING
    setup.transport.set_draining()
    for service in ("", "kvstore.v1.KVStore"):
        request = health_pb2.HealthCheckRequest(service=service)
        assert stub.Check(request, timeout=BOUND_S).status == health_pb2.HealthCheckResponse.NOT_SERVING


def test_health_can_be_watched(setup: Setup) -> None:
    stub = health_pb2_grpc.HealthStub(setup.channel())
    stream = stub.Watch(health_pb2.HealthCheckRequest(), timeout=BOUND_S)
    assert next(stream).status == health_pb2.HealthCheckResponse.SERVING
    setup.transport.set_draining()
    assert next(stream).status == health_pb2.HealthCheckResponse.NOT_SERVING
    stream.cancel()


def test_open_watches_leave_room_for_calls(make: Make) -> None:
    setup = make(limits={"grpc_rpcs": 8, "grpc_public_streams": 2})
    stub = health_pb2_grpc.HealthStub(setup.channel())
    streams = [stub.Watch(health_pb2.HealthCheckRequest(), timeout=60) for _ in range(2)]
    for stream in streams:
        next(stream)
    code, _ = code_of(lambda: next(stub.Watch(health_pb2.HealthCheckRequest(), timeout=BOUND_S)))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    stub.Check(health_pb2.HealthCheckRequest(), timeout=BOUND_S)
    for stream in streams:
        stream.cancel()

    def free_again() -> bool:
        try:
            with_place = stub.Watch(health_pb2.HealthCheckRequest(), timeout=BOUND_S)
            next(with_place)
        except grpc.RpcError:
            return False
        with_place.cancel()
        return True

    eventually(free_again)


def test_reflection_needs_no_token(setup: Setup) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(setup.channel())
    replies = stub.ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=BOUND_S
    )
    names = {service.name for service in next(iter(replies)).list_services_response.service}
    assert {"kvstore.v1.KVStore", "kvstore.v1.Admin", "grpc.health.v1.Health"} <= names


def test_the_admin_service_answers(setup: Setup) -> None:
    caller = Caller(setup)
    admin = caller.admin
    assert caller(admin.GetStats, admin_pb2.GetStatsRequest()).sessions == 1
    assert caller(admin.ListNamespaces, admin_pb2.ListNamespacesRequest()).namespaces[0].tenant == "tenant-a"
    assert caller(admin.ListSessions, admin_pb2.ListSessionsRequest()).sessions[0].session_id == 1
    assert caller(admin.InspectBlock, admin_pb2.InspectBlockRequest(key=b"abcd")).blocks[0].key == b"abcd"
    assert caller(admin.Evict, admin_pb2.EvictRequest(tier=2, bytes=5)).bytes == 5  # type: ignore[arg-type]
    assert caller(admin.Flush, admin_pb2.FlushRequest(timeout_ms=700)).unsaved == 700
    assert caller(admin.Verify, admin_pb2.VerifyRequest(tier=3)).checked == 4  # type: ignore[arg-type]
    assert caller(admin.SetLogLevel, admin_pb2.SetLogLevelRequest(level="debug")).level == "debug"
    assert caller(admin.Record, admin_pb2.RecordRequest(recording=7)).recording == 7
    assert caller(admin.Pin, admin_pb2.PinRequest(key=b"abcd")).key == b"abcd"
    terms = types_pb2.NamespaceTerms(ttl_ms=5)
    assert caller(admin.SetTerms, admin_pb2.SetTermsRequest(namespace=bytes(32), terms=terms)).terms == terms
    assert setup.levels == ["debug"]


def test_admin_requests_are_checked(setup: Setup) -> None:
    caller = Caller(setup)
    admin = caller.admin
    for method, request in (
        (admin.Evict, admin_pb2.EvictRequest(bytes=5)),
        (admin.Verify, admin_pb2.VerifyRequest()),
        (admin.InspectBlock, admin_pb2.InspectBlockRequest(key=b"abc")),
        (admin.SetLogLevel, admin_pb2.SetLogLevelRequest(level="loud")),
        (admin.Pin, admin_pb2.PinRequest(key=b"abc")),
        (admin.SetTerms, admin_pb2.SetTermsRequest(namespace=bytes(31))),
    ):
        assert code_of(lambda: caller(method, request))[0] is grpc.StatusCode.INVALID_ARGUMENT  # noqa: B023


def test_the_tables_cover_the_admin_service() -> None:
    hooks = AdminHooks(lambda uid: True, str, lambda: None)
    methods = AdminHandlers(None, hooks).methods()  # type: ignore[arg-type]
    declared = admin_pb2.DESCRIPTOR.services_by_name["Admin"].methods
    assert [method.name for method in declared] == list(methods)
    for method in declared:
        assert methods[method.name].request.DESCRIPTOR is method.input_type
        assert methods[method.name].response.DESCRIPTOR is method.output_type


def test_what_changes_the_daemon_is_for_operators(setup: Setup) -> None:
    setup.operators = False
    caller = Caller(setup)
    admin = caller.admin
    for method, request in (
        (admin.Evict, admin_pb2.EvictRequest(tier=2)),  # type: ignore[arg-type]
        (admin.Flush, admin_pb2.FlushRequest()),
        (admin.Verify, admin_pb2.VerifyRequest(tier=2)),  # type: ignore[arg-type]
        (admin.Drain, admin_pb2.DrainRequest()),
        (admin.SetLogLevel, admin_pb2.SetLogLevelRequest(level="debug")),
        (admin.Record, admin_pb2.RecordRequest()),
        (admin.Record, admin_pb2.RecordRequest(recording=1)),
        (admin.Pin, admin_pb2.PinRequest(key=b"abcd")),
        (admin.SetTerms, admin_pb2.SetTermsRequest(namespace=bytes(32))),
    ):
        assert code_of(lambda: caller(method, request))[0] is grpc.StatusCode.PERMISSION_DENIED  # noqa: B023
    assert not setup.engine.drained
    caller(admin.GetStats, admin_pb2.GetStatsRequest())


def test_drain_turns_health_off_and_still_answers(setup: Setup) -> None:
    caller = Caller(setup)
    caller(caller.admin.Drain, admin_pb2.DrainRequest())
    assert setup.engine.drained
    stub = health_pb2_grpc.HealthStub(setup.channel())
    status = stub.Check(health_pb2.HealthCheckRequest(), timeout=BOUND_S).status
    assert status == health_pb2.HealthCheckResponse.NOT_SERVING
    caller(caller.data.Renew, pb.RenewRequest())


def test_more_rpcs_than_the_limit_are_refused_with_resource_exhausted(make: Make) -> None:
    setup = make(limits={"grpc_rpcs": 2, "grpc_waits": 2})
    setup.engine.set_ready(0)
    caller = Caller(setup)
    request = pb.WaitRequest(lease_id=7, stop=5)
    waits = [caller.data.Wait.future(request, metadata=caller.metadata, timeout=300) for _ in range(2)]
    eventually(lambda: setup.engine.waiting == 2)
    code, _ = code_of(lambda: caller(caller.data.Renew, pb.RenewRequest()))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    setup.engine.set_ready(5)
    for wait in waits:
        wait.result(BOUND_S)


def test_stop_lets_an_rpc_finish(setup: Setup) -> None:
    setup.engine.set_ready(0)
    caller = Caller(setup)
    wait = caller.data.Wait.future(pb.WaitRequest(lease_id=7, stop=5), metadata=caller.metadata, timeout=BOUND_S)
    eventually(lambda: setup.engine.waiting == 1)
    stopping = threading.Thread(target=setup.transport.stop, args=(BOUND_S,))
    stopping.start()
    setup.engine.set_ready(5)
    assert wait.result(BOUND_S).ready == 5
    stopping.join(BOUND_S)
    assert not stopping.is_alive()
