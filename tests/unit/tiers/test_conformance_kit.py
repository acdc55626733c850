"""The kit itself: a tier that breaks one promise fails the check of that promise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from kvstore.tiers import conformance as kit
from kvstore.tiers.base import BlockRef, Outcome, SlabMemory, TierItem, WriteResult
from kvstore.tiers.host import HostMemoryTier
from kvstore.tiers.wrappers import Fault, Faulty, SeededFaults


class _Broken(HostMemoryTier):
    def __init__(self, memory: SlabMemory, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes, memory)


class ForgetsNamespace(_Broken):
    def write(self, items: Sequence[TierItem]) -> list[WriteResult]:
        return super().write([item._replace(ref=BlockRef(bytes(32), item.ref.key)) for item in items])

    def read(self, items: Sequence[TierItem]) -> list[Outcome]:
        return super().read([item._replace(ref=BlockRef(bytes(32), item.ref.key)) for item in items])


class HitsFirst(_Broken):
    def read(self, items: Sequence[TierItem]) -> list[Outcome]:
        return sorted(super().read(items))


class KeepsTheOlder(_Broken):
    def write(self, items: Sequence[TierItem]) -> list[WriteResult]:
        return [
            WriteResult(Outcome.OK, item.range.nbytes) if item.ref in self._held else self._write(item)
            for item in items
        ]


class NeverDeletes(_Broken):
    def delete(self, refs: Sequence[BlockRef]) -> None:
        pass


class HasNoLimit(_Broken):
    def __init__(self, memory: SlabMemory, capacity_bytes: int) -> None:
        super().__init__(memory, 1 << 40)
        self.capacity_bytes, self.said = 1 << 40, capacity_bytes


class ServesUnchecked(_Broken):
    def read(self, items: Sequence[TierItem]) -> list[Outcome]:
        for item in items:
            held = self._held.get(item.ref)
            if held is not None:
                self._held[item.ref] = held._replace(checksum=item.checksum)
        outcomes = super().read(items)
        return [Outcome.OK if outcome is Outcome.CORRUPT else outcome for outcome in outcomes]


class WritesBesideItsRange(_Broken):
    def read(self, items: Sequence[TierItem]) -> list[Outcome]:
        for item in items:
            self._memory.view(item.range._replace(offset=item.range.offset - 1))[0] = 0
        return super().read(items)


class ScribblesOnItsSource(_Broken):
    def write(self, items: Sequence[TierItem]) -> list[WriteResult]:
        results = super().write(items)
        for item in items:
            self._memory.view(item.range)[:1] += 1
        return results


class CountsNothing(_Broken):
    def stats(self) -> Mapping[str, int]:
        return {"blocks": 0, "raw_bytes": 0, "stored_bytes": 0}


class SaysBool(_Broken):
    def read(self, items: Sequence[TierItem]) -> list[Outcome]:
        return [outcome is Outcome.OK for outcome in super().read(items)]  # type: ignore[misc]


class RaisesWhenUnmapped(_Broken):
    def read(self, items: Sequence[TierItem]) -> list[Outcome]:
        for item in items:
            self._memory.view(item.range)
        return super().read(items)


class ServesAfterClose(_Broken):
    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (ForgetsNamespace, kit.check_namespaces_do_not_meet),
        (HitsFirst, kit.check_outcomes_are_in_order),
        (KeepsTheOlder, kit.check_write_replaces),
        (NeverDeletes, kit.check_delete),
        (HasNoLimit, kit.check_full),
        (ServesUnchecked, kit.check_wrong_checksum_is_never_served),
        (WritesBesideItsRange, kit.check_round_trip),
        (ScribblesOnItsSource, kit.check_round_trip),
        (CountsNothing, kit.check_stats),
        (SaysBool, kit.check_unwritten_is_missing),
        (ServesAfterClose, kit.check_close),
    ],
)
def test_a_broken_promise_is_noticed(broken: type[_Broken], check: kit.Check) -> None:
    with pytest.raises(AssertionError):
        check(broken)


def test_an_exception_for_one_item_is_noticed() -> None:
    with pytest.raises(KeyError):
        kit.check_unmapped_slab_is_busy(RaisesWhenUnmapped)


def test_silent_corruption_is_noticed() -> None:
    def flips(memory: SlabMemory, capacity_bytes: int) -> Faulty:
        return Faulty(HostMemoryTier(capacity_bytes, memory), memory, SeededFaults(1, {Fault.FLIP: 1.0}))

    with pytest.raises(AssertionError, match="wrong bytes"):
        kit.check_round_trip(flips)
