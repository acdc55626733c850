"""Which slabs a session may map, and the descriptors to do it with."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from kvstore.core.slabs import SlabAllocator, SlabState
from kvstore.engine.sessions import Session
from kvstore.protocol.errors import QuotaExceeded
from kvstore.tiers.warm import SlabInfo, WarmPool


class Doorkeeper:
    """Hands out descriptors of slabs."""

    def __init__(self, lock: threading.Lock, allocator: SlabAllocator, pool: WarmPool) -> None:
        """`lock` is the engine's."""
        self._lock = lock
        self._allocator = allocator
        self._pool = pool

    def open(self, session: Session, ids: Sequence[int]) -> list[tuple[SlabInfo, int]]:
        """Geometry and a descriptor (the caller's to close) of the slabs that live and that the session may see.

        0 is the session's staging. Duplicated under the lock: the number of a descriptor that was closed meanwhile
        could by then name another tenant's slab.
        """
        found: list[tuple[SlabInfo, int]] = []
        try:
            with self._lock:
                for slab_id in dict.fromkeys(ids):
                    info = self._info(session, slab_id)
                    if info is not None:
                        found.append((info[0], os.dup(info[1])))
        except OSError as error:
            for _, fd in found:
                os.close(fd)
            raise QuotaExceeded(f"no descriptor for a slab: {error.strerror}") from error
        return found

    def _info(self, session: Session, slab_id: int) -> tuple[SlabInfo, int] | None:
        staging = session.staging
        if slab_id == 0:
            return None if staging is None else (SlabInfo(0, staging.nbytes, staging.nbytes, 1, 0), staging.fd)
        return self._pool.info(slab_id) if self._owned(slab_id, session.tenant) else None

    def _owned(self, slab_id: int, tenant: str) -> bool:
        """Whether the slab may be passed to the tenant; one that retires is closed without the lock."""
        try:
            slab = self._allocator.slab(slab_id)
        except KeyError:
            return False
        return slab.tenant == tenant and slab.state is SlabState.LIVE
