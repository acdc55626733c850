"""Range checks of requests: each says which field, what it is, and what it must be.

Sizes are uint64 on the wire (a varint above uint32 would be truncated silently), so the limits are here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvstore.core.benefit import WorkerCosts
from kvstore.protocol.errors import InvalidRequest
from kvstore.protocol.frames import MAX_FDS_PER_MESSAGE
from kvstore.protocol.keys import KEY_BYTES
from kvstore.v1 import kvstore_pb2, types_pb2

NAMESPACE_BYTES = 32
CHECKSUM_BYTES = 16
MAX_GROUPS = 64
MAX_TOKEN_BYTES = 256
MIN_KEY_PREFIX_BYTES = 4
MAX_CAPACITY_BYTES = 1 << 48
MAX_OFFSET_BYTES = 1 << 48  # far above any segment, far below where Python's sums would need care elsewhere

_MODES = (kvstore_pb2.ACQUIRE_MODE_UNSPECIFIED, kvstore_pb2.ACQUIRE_MODE_PREFIX, kvstore_pb2.ACQUIRE_MODE_LAST)
_TIERS = (types_pb2.TIER_HOT, types_pb2.TIER_WARM, types_pb2.TIER_COLD)


def check_namespace(namespace: bytes) -> None:
    """A digest of 32 bytes."""
    if len(namespace) != NAMESPACE_BYTES:
        raise InvalidRequest(f"namespace has {len(namespace)} bytes; it must be the {NAMESPACE_BYTES} of OpenNamespace")


def check_keys(namespace: bytes, keys: bytes) -> None:
    """A namespace and whole keys in it."""
    if len(namespace) != NAMESPACE_BYTES:
        check_namespace(namespace)
    if len(keys) % KEY_BYTES:
        raise InvalidRequest(f"keys has {len(keys)} bytes; it must be a multiple of {KEY_BYTES}")


def check_lease_id(lease_id: int) -> None:
    """Not the 0 that means `no lease`."""
    if not lease_id:
        raise InvalidRequest("lease_id is 0, which means no lease; nothing was stored when it was acquired")


def check_token(token: bytes) -> None:
    """A handoff token of plausible size."""
    if not 0 < len(token) <= MAX_TOKEN_BYTES:
        raise InvalidRequest(f"token has {len(token)} bytes; it must be one that Handoff gave")


def check_slab_ids(ids: Sequence[int]) -> None:
    """As many as fit one message with their descriptors."""
    if not 0 < len(ids) <= MAX_FDS_PER_MESSAGE:
        raise InvalidRequest(f"slab_ids names {len(ids)} slabs; it must name 1 to {MAX_FDS_PER_MESSAGE} a call")


def check_groups(request: kvstore_pb2.AcquireRequest) -> list[tuple[bytes, bytes, int]]:
    """The groups of an acquire as the engine takes them."""
    groups: list[tuple[bytes, bytes, int]] = [(group.namespace, group.keys, group.mode) for group in request.groups]
    if not 0 < len(groups) <= MAX_GROUPS:
        raise InvalidRequest(f"groups has {len(groups)} entries; it must have 1 to {MAX_GROUPS}")
    for namespace, keys, mode in groups:
        check_keys(namespace, keys)
        if mode not in _MODES:
            raise InvalidRequest(f"mode is {mode}; it must be 1 (prefix) or 2 (last)")
    return groups


def check_worker(request: kvstore_pb2.MatchRequest | kvstore_pb2.AcquireRequest) -> WorkerCosts | None:
    """What the worker said of itself; None where it did not say what recomputing takes."""
    if not request.HasField("worker"):
        return None
    costs = request.worker
    for name in ("recompute_ns_per_token", "recompute_ns_per_token2", "copy_bytes_per_s"):
        value = getattr(costs, name)
        if not (math.isfinite(value) and value >= 0):
            raise InvalidRequest(f"{name} is {value}; it must be a finite number, 0 or more")
    if not (costs.recompute_ns_per_token or costs.recompute_ns_per_token2):
        return None
    copy_s_per_byte = 1 / costs.copy_bytes_per_s if costs.copy_bytes_per_s >= 1 else 0.0
    return WorkerCosts(costs.recompute_ns_per_token / 1e9, costs.recompute_ns_per_token2 / 1e9, copy_s_per_byte)


def check_put(request: kvstore_pb2.PutRequest) -> None:
    """All of a put that can be judged without the session's staging segment."""
    check_keys(request.namespace, request.keys)
    count = len(request.keys) // KEY_BYTES
    if len(request.parent) not in (0, KEY_BYTES):
        raise InvalidRequest(f"parent has {len(request.parent)} bytes; it must have {KEY_BYTES}, or 0 for the root")
    if request.checksums and len(request.checksums) != count * CHECKSUM_BYTES:
        raise InvalidRequest(
            f"checksums has {len(request.checksums)} bytes for {count} keys; it must have {CHECKSUM_BYTES} a key or 0"
        )
    if not request.block_nbytes:
        raise InvalidRequest("block_nbytes is 0; it must be the namespace's")
    if 0 < request.staging_stride < request.block_nbytes:
        raise InvalidRequest(
            f"staging_stride is {request.staging_stride}, less than block_nbytes {request.block_nbytes}: blocks overlap"
        )
    stride = request.staging_stride or request.block_nbytes
    end = request.staging_offset + stride * max(count - 1, 0) + request.block_nbytes
    if end > MAX_OFFSET_BYTES:
        raise InvalidRequest(f"the blocks end at byte {end} of the staging segment, which no segment has")


def check_tier(tier: int) -> None:
    """A tier that exists."""
    if tier not in _TIERS:
        raise InvalidRequest(f"tier is {tier}; it must be 1 (hot), 2 (warm) or 3 (cold)")


def check_capacity(nbytes: int) -> None:
    """A size that a tier can have."""
    if not 1 <= nbytes <= MAX_CAPACITY_BYTES:
        raise InvalidRequest(f"capacity_bytes is {nbytes}; it must be within 1..{MAX_CAPACITY_BYTES}")


def check_block_query(key: bytes, namespace: bytes) -> None:
    """A key or a long enough beginning of one."""
    if not MIN_KEY_PREFIX_BYTES <= len(key) <= KEY_BYTES:
        raise InvalidRequest(f"key has {len(key)} bytes; it must have {MIN_KEY_PREFIX_BYTES} to {KEY_BYTES}")
    if namespace:
        check_namespace(namespace)


def check_position(after: bytes) -> None:
    """Where a page of blocks begins: behind this namespace and key, or at the start."""
    if len(after) not in (0, NAMESPACE_BYTES + KEY_BYTES):
        raise InvalidRequest(
            f"after has {len(after)} bytes; it must be empty, or the {NAMESPACE_BYTES + KEY_BYTES} of a reply's last"
        )
