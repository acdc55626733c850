"""Calls on an attached session: order, limits, deadlines, errors."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeAlias

import pytest
from google.protobuf.message import Message

from kvstore.protocol.errors import (
    InternalError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    ProtocolMismatch,
    QuotaExceeded,
)
from kvstore.protocol.frames import MAX_CALLS_IN_FLIGHT, Method
from kvstore.transport.handlers import Handlers, by_frame_method
from kvstore.v1 import kvstore_pb2 as pb
from transport_double import Setup, error_of, eventually, packed

Make: TypeAlias = Callable[..., Setup]

NS = bytes(32)


def key(i: int) -> bytes:
    return i.to_bytes(32, "little")


def put_request(i: int) -> pb.PutRequest:
    return pb.PutRequest(namespace=NS, keys=key(i), block_nbytes=64)


def wait_request(stop: int) -> pb.WaitRequest:
    return pb.WaitRequest(lease_id=7, stop=stop)


LAYOUT = [{"name": "kv", "dtype": "uint8", "shape": [16, 4], "axes": "token dim"}]
SPEC = {"model": "m", "revision": "r", "block_tokens": 16, "kind": 1, "layout": LAYOUT, "hash_algorithm": "sha256"}


@pytest.mark.parametrize("name", ["warm_bytes", "cold_bytes"])
def test_limits_are_not_for_workers_to_say(setup: Setup, name: str) -> None:
    request = pb.OpenNamespaceRequest(spec=SPEC, terms={name: 1 << 30})  # type: ignore[arg-type]
    with pytest.raises(PermissionDenied, match="kvctl set"):
        setup.attach().call(Method.OPEN_NAMESPACE, request)


def test_a_namespace_of_any_size_is_not_remembered(setup: Setup) -> None:
    spec = {**SPEC, "identity": {f"key {i}": "x" * 1000 for i in range(140)}}
    with pytest.raises(InvalidRequest, match="it may take 131072"):
        setup.attach().call(Method.OPEN_NAMESPACE, pb.OpenNamespaceRequest(spec=spec))  # type: ignore[arg-type]


def test_every_method_answers(setup: Setup) -> None:
    peer = setup.attach()
    peer.call(Method.OPEN_SESSION, pb.OpenSessionRequest(staging_bytes=4096))
    opened = pb.OpenNamespaceResponse.FromString(
        peer.call(Method.OPEN_NAMESPACE, pb.OpenNamespaceRequest(spec=SPEC))  # type: ignore[arg-type]
    )
    assert (len(opened.namespace), opened.block_nbytes, opened.epoch) == (32, 64, 1)
    put = pb.PutResponse.FromString(peer.call(Method.PUT, put_request(0)))
    assert (put.statuses, put.reasons) == (b"\x01", b"\x00")
    match = pb.MatchResponse.FromString(peer.call(Method.MATCH, pb.MatchRequest(namespace=NS, keys=key(0) + key(1))))
    assert (match.blocks, match.tokens, match.warm_blocks) == (1, 16, 1)
    exists = pb.ExistsResponse.FromString(
        peer.call(Method.EXISTS, pb.ExistsRequest(namespace=NS, keys=key(0) + key(1)))
    )
    assert exists.bits == b"\x01\x00"
    groups = [pb.AcquireGroup(namespace=NS, keys=key(0), mode=pb.ACQUIRE_MODE_PREFIX)]
    assert pb.LeaseReply.FromString(peer.call(Method.ACQUIRE, pb.AcquireRequest(groups=groups))).lease_id == 7
    assert pb.WaitResponse.FromString(peer.call(Method.WAIT, wait_request(3))).ready == 10
    renewed = pb.RenewResponse.FromString(peer.call(Method.RENEW))
    assert (renewed.leases, list(renewed.retired_slab_ids)) == (1, [3])
    token = pb.HandoffResponse.FromString(peer.call(Method.HANDOFF, pb.HandoffRequest(lease_id=7))).token
    assert pb.LeaseReply.FromString(peer.call(Method.ADOPT, pb.AdoptRequest(token=token))).lease_id == 7
    peer.call(Method.RELEASE, pb.ReleaseRequest(lease_id=7))
    keys = {"namespace": NS, "keys": key(0)}
    assert pb.PrefetchResponse.FromString(peer.call(Method.PREFETCH, pb.PrefetchRequest(**keys))).loading == 2
    assert pb.DeleteResponse.FromString(peer.call(Method.DELETE, pb.DeleteRequest(**keys))).deleted == 1
    assert pb.ClearResponse.FromString(peer.call(Method.CLEAR, pb.ClearRequest(namespace=NS))).epoch == 2


def test_what_a_worker_says_of_itself_reaches_the_engine(setup: Setup) -> None:
    peer = setup.attach()
    setup.engine.withheld = 3
    groups = [pb.AcquireGroup(namespace=NS, keys=key(0))]
    worker = pb.WorkerCosts(recompute_ns_per_token=2e4, recompute_ns_per_token2=0.5, copy_bytes_per_s=1e9)
    for said in (worker, None, pb.WorkerCosts(copy_bytes_per_s=1e9)):
        reply = peer.call(Method.MATCH, pb.MatchRequest(namespace=NS, keys=key(0), worker=said))
        peer.call(Method.ACQUIRE, pb.AcquireRequest(groups=groups, worker=said))
    match = pb.MatchResponse.FromString(reply)
    assert (match.withheld, match.withheld_reason) == (3, pb.WITHHELD_REASON_NOT_WORTH)
    told = setup.engine.workers
    assert told[0] == told[1] == pytest.approx((2e-5, 5e-10, 1e-9))
    assert told[2:] == [None] * 4, "without what recomputing takes there is nothing to compare with"


@pytest.mark.parametrize("field", ["recompute_ns_per_token", "recompute_ns_per_token2", "copy_bytes_per_s"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_workers_costs_are_finite_and_not_negative(setup: Setup, field: str, value: float) -> None:
    peer = setup.attach()
    request = pb.MatchRequest(namespace=NS, keys=key(0), worker=pb.WorkerCosts(**{field: value}))
    with pytest.raises(InvalidRequest, match=f"{field} is {value}"):
        peer.call(Method.MATCH, request)


ONLY_OVER_TCP = ("Hello", "Fetch", "Store")


def test_the_tables_cover_the_service(setup: Setup) -> None:
    methods = Handlers(setup.engine).methods()
    service = pb.DESCRIPTOR.services_by_name["KVStore"]
    declared = [method for method in service.methods if method.name not in ONLY_OVER_TCP]
    assert [method.name for method in declared] == list(methods)
    for method in declared:
        assert methods[method.name].request.DESCRIPTOR is method.input_type
        assert methods[method.name].response.DESCRIPTOR is method.output_type
    frames = by_frame_method(methods)
    assert sorted(frames) == sorted(int(method) for method in Method if method is not Method.HELLO)
    assert frames[Method.OPEN_NAMESPACE].name == "OpenNamespace"


def test_every_frame_touches_the_session(setup: Setup) -> None:
    peer = setup.attach()
    for _ in range(3):
        peer.call(Method.RENEW)
    with pytest.raises(NotFound):
        peer.call(Method.RELEASE, pb.ReleaseRequest(lease_id=8))
    assert setup.session().touches == 4


BAD = [
    (Method.MATCH, pb.MatchRequest(namespace=b"x", keys=key(0)), "namespace"),
    (Method.MATCH, pb.MatchRequest(namespace=NS, keys=b"x" * 33), "33"),
    (Method.EXISTS, pb.ExistsRequest(namespace=NS, keys=b"x"), "multiple of 32"),
    (Method.PREFETCH, pb.PrefetchRequest(namespace=NS, keys=b"x"), "keys"),
    (Method.DELETE, pb.DeleteRequest(keys=key(0)), "namespace"),
    (Method.CLEAR, pb.ClearRequest(), "namespace"),
    (Method.ACQUIRE, pb.AcquireRequest(), "groups"),
    (Method.ACQUIRE, pb.AcquireRequest(groups=[pb.AcquireGroup(namespace=NS, keys=key(0))] * 65), "64"),
    (Method.ACQUIRE, pb.AcquireRequest(groups=[pb.AcquireGroup(namespace=NS, mode=9)]), "mode"),  # type: ignore[arg-type]
    (Method.WAIT, pb.WaitRequest(), "lease_id"),
    (Method.RELEASE, pb.ReleaseRequest(), "lease_id"),
    (Method.HANDOFF, pb.HandoffRequest(), "lease_id"),
    (Method.ADOPT, pb.AdoptRequest(), "token"),
    (Method.MAP_SLABS, pb.MapSlabsRequest(), "slab_ids"),
    (Method.MAP_SLABS, pb.MapSlabsRequest(slab_ids=range(251)), "250"),
    (Method.PUT, pb.PutRequest(namespace=NS, keys=key(0)), "block_nbytes"),
    (Method.PUT, pb.PutRequest(namespace=NS, keys=key(0), block_nbytes=64, parent=b"x"), "parent"),
    (Method.PUT, pb.PutRequest(namespace=NS, keys=key(0), block_nbytes=64, checksums=b"x"), "checksums"),
    (Method.PUT, pb.PutRequest(namespace=NS, keys=key(0) * 2, block_nbytes=64, staging_stride=63), "overlap"),
    (Method.PUT, pb.PutRequest(namespace=NS, keys=key(0), block_nbytes=64, staging_offset=(1 << 64) - 1), "segment"),
    (Method.OPEN_NAMESPACE, pb.OpenNamespaceRequest(), "kind"),
    (Method.MATCH, b"\xff\xff", "MatchRequest"),
    (Method.WAIT, b"\xff\xff", "WaitRequest"),
    (Method.PUT, b"\xff\xff", "PutRequest"),
    (Method.MAP_SLABS, b"\xff\xff", "MapSlabsRequest"),
]


@pytest.mark.parametrize(("method", "request_", "said"), BAD)
def test_what_can_never_work_is_refused_by_name_and_the_session_goes_on(
    setup: Setup, method: int, request_: Message | bytes, said: str
) -> None:
    peer = setup.attach()
    error = error_of(lambda: peer.call(method, request_))
    assert type(error) is InvalidRequest
    assert said in str(error)
    peer.call(Method.RENEW)


def test_an_unknown_method_is_answered_and_the_session_goes_on(setup: Setup) -> None:
    peer = setup.attach()
    error = error_of(lambda: peer.call(999))
    assert isinstance(error, ProtocolMismatch)
    assert "999" in str(error)
    peer.call(Method.RENEW)


def test_a_second_hello_is_refused(setup: Setup) -> None:
    peer = setup.attach()
    assert isinstance(error_of(peer.hello), InvalidRequest)


def test_a_request_with_a_status_is_refused(setup: Setup) -> None:
    peer = setup.attach()
    peer.frames.send(5, Method.RENEW, b"", status=3)
    reply = peer.recv()
    assert (reply.call_id, reply.status) == (5, InvalidRequest.code)


def test_a_defect_is_logged_with_its_traceback_and_not_shown_to_the_peer(
    setup: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    peer = setup.attach()
    setup.engine.fail_with = ZeroDivisionError("secret detail")
    with caplog.at_level(logging.ERROR, "kvstore"):
        error = error_of(lambda: peer.call(Method.MATCH, pb.MatchRequest(namespace=NS)))
    assert isinstance(error, InternalError)
    assert str(error) == "internal error, see the daemon's log"
    assert "secret detail" in caplog.text
    setup.engine.fail_with = None
    peer.call(Method.MATCH, pb.MatchRequest(namespace=NS))


def test_the_65th_call_in_flight_is_refused_and_the_next_after_a_reply_is_not(setup: Setup) -> None:
    setup.engine.set_ready(0)
    peer = setup.attach()
    ids = {peer.send(Method.WAIT, wait_request(1), deadline_ms=60_000) for _ in range(MAX_CALLS_IN_FLIGHT)}
    refused = peer.send(Method.WAIT, wait_request(1))
    reply = peer.recv()
    assert (reply.call_id, reply.status) == (refused, QuotaExceeded.code)
    assert "64" in reply.payload.decode()
    setup.engine.set_ready(1)
    replies = [peer.recv() for _ in ids]
    assert {reply.call_id for reply in replies} == ids
    assert {reply.status for reply in replies} == {0}
    peer.call(Method.RENEW)


def test_a_call_id_that_is_in_flight_is_refused(setup: Setup) -> None:
    setup.engine.set_ready(0)
    peer = setup.attach()
    peer.send(Method.WAIT, wait_request(1), call_id=5, deadline_ms=60_000)
    peer.send(Method.WAIT, wait_request(1), call_id=5, deadline_ms=60_000)
    reply = peer.recv()
    assert (reply.call_id, reply.status) == (5, InvalidRequest.code)
    setup.engine.set_ready(1)
    assert (peer.recv().call_id, peer.frames.has_buffered_frame()) == (5, False)


def test_a_wait_answers_after_calls_that_came_later(setup: Setup) -> None:
    setup.engine.set_ready(0)
    peer = setup.attach()
    waiting = peer.send(Method.WAIT, wait_request(2), deadline_ms=60_000)
    renewing = peer.send(Method.RENEW)
    assert peer.recv().call_id == renewing
    setup.engine.set_ready(2)
    reply = peer.recv()
    assert (reply.call_id, pb.WaitResponse.FromString(reply.payload).ready) == (waiting, 2)


def test_a_wait_answers_what_is_ready_at_its_deadline(setup: Setup) -> None:
    setup.engine.set_ready(1)
    reply = setup.attach().call(Method.WAIT, wait_request(5), deadline_ms=50)
    assert pb.WaitResponse.FromString(reply).ready == 1


def test_a_wait_for_an_unknown_lease_is_refused(setup: Setup) -> None:
    with pytest.raises(NotFound):
        setup.attach().call(Method.WAIT, pb.WaitRequest(lease_id=99, stop=1))


def test_one_sessions_waits_leave_threads_for_anothers(make: Make) -> None:
    setup = make(limits={"wait_threads": 4, "waits_per_session": 2})
    setup.engine.set_ready(0)
    greedy, modest = setup.attach(), setup.attach()
    ids = {greedy.send(Method.WAIT, wait_request(1), deadline_ms=60_000) for _ in range(20)}
    eventually(lambda: setup.engine.waiting >= 2)
    assert pb.WaitResponse.FromString(modest.call(Method.WAIT, wait_request(1), deadline_ms=50)).ready == 0
    setup.engine.set_ready(1)
    assert {greedy.recv().call_id for _ in ids} == ids


def test_puts_are_done_in_the_order_they_came_and_hold_nobody_up(setup: Setup) -> None:
    setup.engine.gate.clear()
    peer = setup.attach()
    ids = [peer.send(Method.PUT, put_request(i)) for i in range(30)]
    peer.call(Method.RENEW)
    setup.engine.gate.set()
    assert [peer.recv().call_id for _ in ids] == ids
    assert setup.engine.put_order == [key(i) for i in range(30)]


def test_a_put_knows_its_deadline_from_its_arrival(setup: Setup) -> None:
    peer = setup.attach()
    before_s = time.monotonic()
    peer.call(Method.PUT, put_request(0), deadline_ms=700)
    peer.call(Method.PUT, put_request(1))
    after_s = time.monotonic()
    first_s, second_s = setup.engine.put_deadlines_s
    assert before_s + 0.7 <= first_s <= after_s + 0.7
    assert before_s + 5.0 <= second_s <= after_s + 5.0


def test_frames_that_arrive_together_or_in_pieces_are_all_answered(setup: Setup) -> None:
    peer = setup.attach()
    frames = b"".join(packed(b"", call_id=i, method=Method.RENEW) for i in range(1, 41))
    for start in range(0, len(frames), 7):
        peer.send_raw(frames[start : start + 7])
    assert [peer.recv().call_id for _ in range(40)] == list(range(1, 41))
    peer.send_raw(frames)
    assert [peer.recv().call_id for _ in range(40)] == list(range(1, 41))


@pytest.mark.parametrize("spin_s", [0.0, 50e-6])
def test_calls_closely_one_after_the_other_are_right_with_and_without_polling(make: Make, spin_s: float) -> None:
    setup = make(limits={"spin_s": spin_s})
    peer = setup.attach()
    peer.call(Method.PUT, put_request(1))
    for i in range(1000):
        reply = peer.call(Method.EXISTS, pb.ExistsRequest(namespace=NS, keys=key(i % 3)))
        assert pb.ExistsResponse.FromString(reply).bits == bytes([i % 3 == 1])
