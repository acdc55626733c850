"""Every RPC of both services, over local RPC and gRPC, with messages made from its descriptor."""

from __future__ import annotations

import os

import pytest
from hypothesis import given

from fuzz_messages import Rpc, fuzzing, payloads, rpcs
from fuzz_target import OTHER_UID, FuzzPeer, Target
from kvstore.v1 import admin_pb2, kvstore_pb2

DATA, ADMIN = rpcs(kvstore_pb2, "KVStore"), rpcs(admin_pb2, "Admin")
CALLS = [("frames", rpc) for rpc in DATA] + [("grpc", rpc) for rpc in (*DATA, *ADMIN)]
# An operator's verbs that take blocks away on purpose; Drain is for good, so it has a daemon of its own.
DROPS = {"Evict", "Clear", "Delete", "SetTerms", "OpenNamespace", "Verify"}
FOR_GOOD = {"Drain"}
EXAMPLES = 30


def named(call: tuple[str, Rpc]) -> str:
    return f"{call[0]}-{call[1].name}"


def staging_for(rpc: Rpc) -> int:
    return 0 if rpc.name == "OpenSession" else 1 << 20  # a session gets its staging once


def fuzz(target: Target, peer: FuzzPeer, rpc: Rpc, examples: int = EXAMPLES) -> None:
    """Send what the strategies make; each answer is checked by the peer."""
    messages = payloads(rpc.request, target.known(peer))

    @fuzzing(examples, f"{peer.transport} {peer.tenant} {rpc.name}")
    @given(messages)
    def send(payload: bytes) -> None:
        peer.send(rpc, payload)

    try:
        send()
    finally:
        peer.close()


@pytest.mark.parametrize("call", [call for call in CALLS if call[1].name not in FOR_GOOD], ids=named)
def test_any_message_of_an_operator(target: Target, call: tuple[str, Rpc]) -> None:
    transport, rpc = call
    fuzz(target, target.peer(transport, staging_bytes=staging_for(rpc)), rpc)
    target.alive()
    target.whole(may_be_gone=rpc.name in DROPS)
    target.idle()
    target.store()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
@pytest.mark.parametrize("call", CALLS, ids=named)
def test_any_message_of_another_tenant(target: Target, call: tuple[str, Rpc]) -> None:
    """It knows digests, keys and leases of the first one, and changes nothing of it."""
    transport, rpc = call
    fuzz(target, target.peer(transport, OTHER_UID, staging_for(rpc)), rpc, EXAMPLES // 2)
    target.alive()
    target.whole()
    target.idle()
