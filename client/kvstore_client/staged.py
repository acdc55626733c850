"""Buffers of the caller's in the staging segment: blocks written there need no copy before a put."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from kvstore.protocol.errors import InvalidRequest
from kvstore.protocol.keys import Keys
from kvstore_client._lazy import np
from kvstore_client.device import device as open_device
from kvstore_client.outcomes import PutOutcome, decode
from kvstore_client.put import PutTarget, start_put
from kvstore_client.staging import Range, Staging

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvstore_client.session import Session

PUT_TIMEOUT_S = 5.0


class StagedRange:
    """A range of a session's staging segment that a caller holds until close()."""

    def __init__(self, session: Session, staging: Staging, target: PutTarget, place: Range) -> None:
        self._session = session
        self._staging = staging
        self._target = target
        self._place: Range | None = place

    def rows(self, place: Range, count: int) -> NDArray[np.uint8]:
        """(count, block_nbytes) bytes of it."""
        return self._staging.rows(place, count, self._target.stride, self._target.block_nbytes)

    def pin(self, device: int, timeout_s: float) -> bool:
        """Have the segment registered with a device's driver; whether it is."""
        return open_device(device).pins.await_pinned(self._staging, self._staging.memory, timeout_s)

    def is_usable(self) -> bool:
        """Whether the session it belongs to lives, as far as can be told without asking."""
        self._session.attach.check_peer()
        return not self._session.is_lost

    def put(self, keys: Keys, deadline_s: float, pin: bool) -> list[PutOutcome]:
        """Store the blocks at its front.

        Raises:
            InvalidRequest: an earlier put from it was never answered.
            KVStoreError: what the daemon answered, or no answer in time: then the range is the daemon's.
        """
        place = self._place
        if place is None:
            raise InvalidRequest("an earlier put from these buffers was not answered in time; stage() new ones")
        flight = start_put(self._session, self._staging, replace(self._target, pin=pin), place, keys, deadline_s)
        self._place = None
        try:
            statuses, reasons = flight.take(deadline_s)
        finally:
            if flight.was_answered:
                self._place = place
        return decode(statuses, reasons)

    def close(self) -> None:
        """Give the range back; idempotent."""
        place, self._place = self._place, None
        if place is not None:
            self._staging.give(place)


Putter: TypeAlias = Callable[["StagedBuffers", Keys, float, bool], list[PutOutcome]]


class StagedBuffers:
    """Room for n blocks, to be filled by the caller and stored by put(). A context manager.

    The room lies in the staging segment, so that a GPU's device-to-host copy can go straight there. Where the
    segment has none in time (or a fail-open client no daemon) it is private memory and put() copies.

    Attributes:
        array: (n, block_nbytes) uint8, writable. Each row is contiguous.
        is_pinned: whether it is registered with the driver of the CUDA device that stage() was given.
    """

    def __init__(self, array: NDArray[np.uint8], put: Putter, staged: StagedRange | None) -> None:
        """Made by Namespace.stage()."""
        self.array = array
        self.is_pinned = False
        self.staged = staged
        self._put = put
        self._is_closed = False

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, block: int) -> NDArray[np.uint8]:
        row: NDArray[np.uint8] = self.array[block]
        return row

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        return iter(self.array)

    def register(self, device: int, timeout_s: float) -> None:
        """Register the room with a device's driver where it can be; see Namespace.stage()."""
        self.is_pinned = self.staged is not None and self.staged.pin(device, timeout_s)

    def put(self, keys: Keys | bytes, timeout_s: float = PUT_TIMEOUT_S, *, pin: bool = False) -> list[PutOutcome]:
        """Store the first len(keys) buffers, `pin` as in Namespace.put(). They may be filled and put again afterwards.

        A copy that a device makes to them must have ended, here and before close(): the room is others' from then on.

        Returns:
            One outcome a key: STORED, EXISTS, or REJECTED(reason).

        Raises:
            InvalidRequest: more keys than buffers, or after the context has ended.
            KVStoreError: as Namespace.put() does.
        """
        if self._is_closed:
            raise InvalidRequest("these buffers were given back; call put() inside the stage() context")
        return self._put(self, keys if isinstance(keys, Keys) else Keys.from_bytes(keys), timeout_s, pin)

    def close(self) -> None:
        """Give the room back; idempotent."""
        self._is_closed = True
        if self.staged is not None:
            self.staged.close()

    def __enter__(self) -> StagedBuffers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("StagedBuffers are shared memory of this process and cannot be pickled")
