"""Every RPC of both services, over local RPC and gRPC, with messages made from its descriptor."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given

from broken_daemon import DEFECTS, broken
from fuzz_messages import Rpc, fuzzing, payloads, rpcs
from fuzz_target import OTHER_UID, FuzzPeer, Holder, Target, check_answer, running
from kvstore.v1 import admin_pb2, kvstore_pb2

DATA, ADMIN = rpcs(kvstore_pb2, "KVStore"), rpcs(admin_pb2, "Admin")
FOR_TCP = {"Hello", "Fetch", "Store"}  # streams, and no frames
CALLS = [("frames", rpc) for rpc in DATA if rpc.name not in FOR_TCP] + [("grpc", rpc) for rpc in (*DATA, *ADMIN)]
# Takes blocks away whose names nobody has to know. Drain is for good, so it has a daemon of its own.
DROPS, FOR_GOOD = {"Evict"}, {"Drain"}
# What it leaves goes with its time, a second or two, which the next test can wait for as well.
LASTS = {"Handoff", "Adopt"}
EXAMPLES = 40


def named(call: tuple[str, Rpc]) -> str:
    return f"{call[0]}-{call[1].name}"


def staging_for(rpc: Rpc) -> int:
    return 0 if rpc.name == "OpenSession" else 1 << 20  # a session gets its staging once


def fuzz(target: Target, peer: FuzzPeer, rpc: Rpc, examples: int = EXAMPLES, holder: Holder | None = None) -> None:
    """Send what the strategies make; each answer is checked by the peer."""
    messages = payloads(rpc.request, target.known(peer, holder))

    @fuzzing(examples, f"{peer.transport} {peer.tenant} {rpc.name}")
    @given(messages)
    def send(payload: bytes) -> None:
        peer.send(rpc, payload)
        if holder is not None:
            holder.renew()

    try:
        send()
    finally:
        peer.close()


@pytest.mark.parametrize("call", [call for call in CALLS if call[1].name not in FOR_GOOD], ids=named)
def test_any_message_of_an_operator(target: Target, call: tuple[str, Rpc]) -> None:
    transport, rpc = call
    fuzz(target, target.peer(transport, staging_bytes=staging_for(rpc)), rpc)
    target.check_alive()
    target.check_whole(may_be_gone=rpc.name in DROPS)
    if rpc.name not in LASTS:
        target.check_idle()
    target.store()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
@pytest.mark.parametrize("call", CALLS, ids=named)
def test_any_message_of_another_tenant(target: Target, call: tuple[str, Rpc]) -> None:
    """It knows digests, keys and leases of the first one, and changes nothing of it."""
    transport, rpc = call
    with target.holder() as holder:
        fuzz(target, target.peer(transport, OTHER_UID, staging_for(rpc)), rpc, holder=holder)
    target.check_alive()
    target.check_whole()
    if rpc.name not in LASTS:
        target.check_idle()


def test_any_drain_of_an_operator() -> None:
    """For good, so on a daemon of its own: what is stored can still be read."""
    (drain,) = (rpc for rpc in ADMIN if rpc.name in FOR_GOOD)
    with running() as target:
        fuzz(target, target.peer("grpc"), drain)
        target.check_alive()
        target.check_whole()
        target.check_idle()
        assert target.daemon.stats().health == "draining"


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_harness_finds(tmp_path: Path, defect: str) -> None:
    """A break of the daemon: without this nobody knows whether the tests above can fail."""
    name = {"leases that never end": "Handoff", "no look at the tenant": "Delete"}.get(defect, "Renew")
    rpc = next(rpc for rpc in DATA if rpc.name == name)
    if rpc.name == "Delete" and os.geteuid() != 0:
        pytest.skip("only root can be another user")
    with running(broken(tmp_path, defect), in_order=False) as target:
        peer = target.peer("frames", OTHER_UID if rpc.name == "Delete" else None)
        with pytest.raises(AssertionError, match=DEFECTS[defect].found):
            fuzz(target, peer, rpc, 2 * EXAMPLES)
            target.check_alive()
            target.check_whole()
            target.check_idle(timeout_s=3)


@pytest.mark.parametrize(
    ("code", "text", "found"),
    [
        (13, "internal error, see the daemon's log", "was answered with 13"),
        (2, "Exception calling application: 1", "was answered with 2"),
        (3, "cannot open /tmp/kv-1/state/lock", "the error says '/tmp/'"),
        (3, 'File "kvstore/x.py", line 1', "the error says"),
        (3, "", "an error of 0 characters"),
        (3, "x" * 1001, "an error of 1001 characters"),
    ],
)
def test_the_harness_finds_an_answer(code: int, text: str, found: str) -> None:
    with pytest.raises(AssertionError, match=found):
        check_answer(DATA[0], code, text.encode())
    check_answer(DATA[0], 3, b"lease_id is 0")
