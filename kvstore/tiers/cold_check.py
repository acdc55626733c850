"""Verifying the cold tier: every stored block is read and decoded, into a buffer that nobody sees."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvstore.tiers.base import CheckPage, Outcome, SlabRange, TierItem
from kvstore.tiers.cold_read import ColdReader, Found
from kvstore.tiers.cold_records import entry_ref

_BLOCK_BYTES_MAX = 1 << 30  # a record that claims more is damaged, whatever its own checksum says
_OTHER_SLAB = -1


class Checker:
    """One step of a check: blocks of some entries, one after the other, with one buffer for all."""

    def __init__(self, reader: ColdReader, *, repair: bool) -> None:
        """`repair`: have the bad ones forgotten."""
        self._reader = reader
        self._repair = repair
        self._out: NDArray[np.uint8] = np.empty(0, dtype=np.uint8)
        self._checked = self._corrupt = self._missing = self._repaired = 0

    def run(self, entries: list[bytes], *, more: bool) -> CheckPage:
        """Check blocks in order; `more`: there are others behind them.

        Raises:
            OSError: a repair was not confirmed, or the store cannot be used any more.
        """
        for entry, found in zip(entries, self._reader.look_up(entries), strict=True):
            if found is not None:  # else it was deleted meanwhile
                self._check(entry, found)
        last = entry_ref(entries[-1]) if more and entries else None
        return CheckPage(last, self._checked, self._corrupt, self._missing, self._repaired)

    def _check(self, entry: bytes, found: Found) -> None:
        outcome = self._outcome(entry, found)
        self._checked += 1
        if outcome not in (Outcome.CORRUPT, Outcome.MISSING) or not self._is_still_there(entry, found):
            return
        self._corrupt += outcome is Outcome.CORRUPT
        self._missing += outcome is Outcome.MISSING
        if self._repair:
            if self._reader.drop(entry, found) is Outcome.BUSY:
                raise OSError("the cold tier did not confirm a repair")
            self._repaired += 1

    def _outcome(self, entry: bytes, found: Found) -> Outcome:
        record = found.record
        if record is None or record.nbytes > _BLOCK_BYTES_MAX:
            return Outcome.CORRUPT
        if self._out.nbytes < record.nbytes:
            self._out = np.empty(record.nbytes, dtype=np.uint8)
        item = TierItem(
            entry_ref(entry), SlabRange(_OTHER_SLAB, 0, record.nbytes), record.checksum, record.parent, record.epoch
        )
        outcome = self._reader.fetch(item, found, self._out[: record.nbytes])
        # Of a format that this build does not know: whole, and for another build.
        return Outcome.OK if outcome is Outcome.MISSING and self._reader.has_payload(entry) else outcome

    def _is_still_there(self, entry: bytes, found: Found) -> bool:
        """Whether what looked bad is still what is stored, and not a copy that was replaced or deleted meanwhile."""
        (now,) = self._reader.look_up([entry])
        return now is not None and now.data == found.data
