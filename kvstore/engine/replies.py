"""What a worker is told of its lease, as packed arrays: a field of its own for each block would cost milliseconds."""

from __future__ import annotations

import sys
from array import array

from kvstore.core.leases import Lease, LeasePart
from kvstore.core.slots import SlotState
from kvstore.v1 import kvstore_pb2


def lease_reply(lease: Lease) -> kvstore_pb2.LeaseReply:
    """Where a lease's blocks lie. Outside the lock: what is read here does not change while the slots are pinned."""
    first = lease.parts[0]
    filling = SlotState.FILLING
    ready = next((i for i, slot in enumerate(first.slots) if slot.state is filling), len(first.slots))
    groups = [_group(part) for part in lease.parts]
    return kvstore_pb2.LeaseReply(lease_id=lease.lease_id, groups=groups, tokens=lease.tokens, ready=ready)


def _group(part: LeasePart) -> kvstore_pb2.LeaseGroup:
    slots = part.slots
    slab_ids = array("I", [slot.slab_id for slot in slots])
    indices = array("I", [slot.index for slot in slots])
    generations = array("Q", [slot.generation for slot in slots])
    if sys.byteorder == "big":
        for numbers in (slab_ids, indices, generations):
            numbers.byteswap()
    return kvstore_pb2.LeaseGroup(
        first_block=part.first_block,
        slab_ids=slab_ids.tobytes(),
        slots=indices.tobytes(),
        generations=generations.tobytes(),
        block_nbytes=part.namespace.block_nbytes,
        namespace=part.namespace.digest,
        checksums=b"".join([block.checksum for block in part.blocks]),
    )
