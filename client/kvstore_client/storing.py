"""Storing over TCP: blocks as a stream of chunks, outcomes for each as the answer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from kvstore.protocol.chunks import CHUNK_BYTES_MAX, STORE_DATA_FIELD, join
from kvstore.protocol.errors import DeadlineExceeded, InternalError, InvalidRequest, QuotaExceeded
from kvstore.protocol.keys import Keys
from kvstore.v1 import kvstore_pb2 as pb
from kvstore_client._lazy import xxhash
from kvstore_client.buffers import BlockBuffers
from kvstore_client.device_buffers import DeviceBuffers
from kvstore_client.outcomes import PutOutcome, PutStatus, RejectReason, decode
from kvstore_client.put import PutTarget

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kvstore_client.remote import RemoteSession

STORE_BYTES_MAX = 64 << 20
"""Of one Store: what is answered is known, whatever becomes of the next."""
STORE_KEYS_MAX = 16_384
_BUSY_PAUSE_S = 0.01


class StorePipeline:
    """A `kvstore_client.put.Storing` over TCP."""

    def __init__(self, session: RemoteSession, target: PutTarget, count: int, deadline_s: float) -> None:
        """Prepare a put of `count` blocks; until a block is answered its outcome is REJECTED(UNAVAILABLE)."""
        self._session = session
        self._target = target
        self._deadline_s = deadline_s
        self._count = count
        self._statuses = bytearray([PutStatus.REJECTED]) * count
        self._reasons = bytearray([RejectReason.UNAVAILABLE]) * count

    def run(self, keys: Keys, blocks: BlockBuffers | DeviceBuffers) -> None:
        """Store the blocks, which must be in host memory; see Storing."""
        if isinstance(blocks, DeviceBuffers):
            raise InvalidRequest("a put over TCP takes blocks from host memory; copy them there first")
        self._session.check_staging_for(self._target.block_nbytes)  # no wait would help
        step = min(max(1, STORE_BYTES_MAX // self._target.block_nbytes), STORE_KEYS_MAX)
        for first in range(0, self._count, step):
            part = range(first, min(first + step, self._count))
            if time.monotonic() >= self._deadline_s:
                self._reject(first, RejectReason.DEADLINE)
                return
            reply = self._store(keys, blocks, part)
            if len(reply.statuses) != len(part) or len(reply.reasons) != len(part):
                raise InternalError(f"the daemon answered {len(reply.statuses)} outcomes for {len(part)} blocks")
            self._statuses[part.start : part.stop] = reply.statuses
            self._reasons[part.start : part.stop] = reply.reasons
            if self._target.is_chain and PutStatus.REJECTED in reply.statuses:
                self._reject(part.stop, RejectReason.NO_PARENT)
                return

    def outcomes(self) -> list[PutOutcome]:
        """What became of every block."""
        return decode(bytes(self._statuses), bytes(self._reasons))

    def _reject(self, first: int, reason: RejectReason) -> None:
        self._reasons[first:] = bytes([reason]) * (self._count - first)

    def _store(self, keys: Keys, blocks: BlockBuffers, part: range) -> pb.PutResponse:
        # In a chain the last block holds all others: a put that ends early is not pinned.
        pin = self._target.pin and (part.stop == self._count or not self._target.is_chain)
        target = replace(self._target, pin=pin)
        put = _put_of(target, keys[part.start : part.stop], [_pieces(blocks, i) for i in part])
        while True:
            try:
                return self._session.store(_messages(put, blocks, part), self._deadline_s)
            except QuotaExceeded:
                if time.monotonic() + _BUSY_PAUSE_S >= self._deadline_s:
                    raise
                time.sleep(_BUSY_PAUSE_S)
            except DeadlineExceeded as error:
                raise DeadlineExceeded("Store: no answer by the deadline; part of it may be stored") from error


def _put_of(target: PutTarget, keys: Keys, rows: list[list[NDArray[np.uint8]]]) -> pb.PutRequest:
    checksums = []
    for pieces in rows:
        hasher = xxhash.xxh3_128()
        for piece in pieces:
            hasher.update(piece.data)
        checksums.append(hasher.digest())
    return pb.PutRequest(
        namespace=target.namespace,
        parent=keys.parent,
        keys=keys.data,
        checksums=b"".join(checksums),
        block_nbytes=target.block_nbytes,
        pin=target.pin,
    )


def _pieces(blocks: BlockBuffers, i: int) -> list[NDArray[np.uint8]]:
    return [blocks.whole[i]] if blocks.whole is not None else list(blocks.pieces[i])


def _messages(put: pb.PutRequest, blocks: BlockBuffers, part: range) -> Iterator[bytes]:
    """Serialized StoreChunks; each is made when gRPC takes it, on a thread of gRPC's."""
    yield pb.StoreChunk(put=put).SerializeToString()
    for i in part:
        for piece in _pieces(blocks, i):
            for at in range(0, len(piece), CHUNK_BYTES_MAX):
                yield join(b"", STORE_DATA_FIELD, piece[at : at + CHUNK_BYTES_MAX].data)
