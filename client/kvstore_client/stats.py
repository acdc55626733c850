"""The daemon's counters as plain Python values."""

from __future__ import annotations

import time
from typing import Any

from google.protobuf.message import Message

from kvstore.protocol.errors import DeadlineExceeded
from kvstore_client._lazy import admin_pb2, admin_pb2_grpc, grpc
from kvstore_client.grpc_link import error_of
from kvstore_client.session import Session


def get_stats(session: Session, deadline_s: float) -> dict[str, Any]:
    """Ask for GetStats, over a gRPC channel of its own: it is rare, and the local RPC has no admin calls.

    Raises:
        KVStoreError: no answer, or an error as answer.
    """
    remaining_s = deadline_s - time.monotonic()
    if remaining_s <= 0:
        raise DeadlineExceeded("no time was left to ask the daemon")
    with session.open_grpc() as (channel, metadata):
        stub = admin_pb2_grpc.AdminStub(channel)
        try:
            reply = stub.GetStats(admin_pb2.GetStatsRequest(), timeout=remaining_s, metadata=metadata)
        except grpc.RpcError as error:
            raise error_of(error) from error
    stats = _plain(reply)
    stats["tiers"] = {tier["name"]: tier for tier in stats["tiers"]}
    return stats


def _plain(message: Message) -> dict[str, Any]:
    """Every field of a message, set or not; messages, lists and maps become dictionaries and lists."""
    plain: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            plain[field.name] = dict(value)
        elif field.message_type is not None:
            plain[field.name] = [_plain(item) for item in value]
        else:
            plain[field.name] = value
    return plain
