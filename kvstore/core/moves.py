"""Moves that the engine carries out in the background: saving to cold, copying to hot, emptying what was cleared."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterator
from itertools import chain, islice
from typing import NamedTuple

from kvstore.core.block import COLD, HOT, REFUSED, SAVING, WARM, Block, Blocks, Namespace
from kvstore.core.lending import ClassKey
from kvstore.core.reads import Reads
from kvstore.core.residency import BelowRef, Residency
from kvstore.core.slots import Slot, SlotState

# A victim that was saved before it must go costs nothing to drop. The design asks for 5 % of warm; a burst of puts
# that outruns the SSD for half a second needs more, and what is saved early is written once all the same.
SAVE_AHEAD = 0.10

_LEAVE_BLOCKS = 256  # at a time, with the engine's lock held

# Of a walk through what was cleared, for each block that is emptied: one takes 0.1 us, where to empty a block takes 10.
_REAP_STEPS = 16


class Copy(NamedTuple):
    """A copy out of warm that is under way: the slot is pinned until its outcome is told."""

    block: Block
    slot: Slot


class Moves:
    """What to copy between tiers next."""

    def __init__(self, residency: Residency, reads: Reads) -> None:
        self._residency = residency
        self._reads = reads
        self._condemned: deque[dict[bytes, Block]] = deque()
        self._reaping: list[Block] = []  # the way down to the condemned block that goes next
        self._under_way: dict[BelowRef, int] = {}  # saves, with the bytes of the block
        self._under_way_bytes = 0
        self._put_off: dict[Block, None] = {}  # not taken by the cold tier: others go first
        self._promoting: set[Block] = set()

    def wants_saving(self) -> bool:
        """Whether something that leaves warm has to be saved first, or too little is leaving."""
        residency = self._residency
        if not residency.up[COLD] or not residency.dirty:
            return False
        return (
            bool(residency.urgent)
            or residency.leaving_bytes < self._leaving_wanted()
            or any(namespace.leaving_bytes < nbytes for namespace, nbytes in self._leaving_wanted_of())
        )

    def _leaving_wanted(self) -> int:
        """Bytes of warm that should be on their way out."""
        budget = self._residency.budgets[WARM]
        wanted = max(int(SAVE_AHEAD * budget.capacity_bytes), 2 * self._residency.demand_bytes)
        return min(wanted, budget.capacity_bytes // 2) - (budget.capacity_bytes - budget.used_bytes)

    def _leaving_wanted_of(self) -> Iterator[tuple[Namespace, int]]:
        """The same for each namespace that has a limit of its own there."""
        budget = self._residency.budgets[WARM]
        for namespace, limit in budget.namespace_limits.items():
            wanted = max(int(SAVE_AHEAD * limit), 2 * namespace.slot_bytes)
            yield namespace, min(wanted, limit // 2) - (limit - budget.by_namespace.get(namespace, 0))

    def begin_saves(self, count: int, nbytes: int, now_s: float = 0.0, *, newest_first: bool = False) -> list[Copy]:
        """Up to `count` blocks of up to `nbytes` together (at least one), pinned until `saved`.

        There are two orders. In normal operation what is closest to eviction goes first: it must be below before its
        slot is wanted. With `newest_first` (flush, drain) what was used last does, each prefix from its root on: time
        may run out, and after a restart the most valuable blocks should be there, with nothing missing above them.

        None while cleared blocks wait to be emptied: their copies must be deleted before newer ones of the same
        keys are written. For the same reason no key is saved twice at once.
        """
        if self._put_off:
            self._put_off = {block: None for block in self._put_off if block in self._residency.dirty}
        batch: list[Copy] = []
        # No room below, and nothing that may leave: the others must not wait for it.
        crowded: set[ClassKey | Namespace] = set()
        choose = self._newest if newest_first else self._closest_to_leave
        while not self._condemned and len(batch) < count and (found := choose(count - len(batch), crowded)):
            for block in found:
                if batch and nbytes < block.namespace.slot_bytes:
                    return batch
                before = self._residency.admission.mark()
                if not self._admits(block, now_s, newest_first):
                    self._residency.refuse_save(block)
                    continue
                if not self._reserve(COLD, block):
                    self._residency.admission.back_to(before)
                    crowded.add(self._crowd_of(block))
                    continue
                nbytes -= block.namespace.slot_bytes
                batch.append(self._begin_save(block))
        return batch

    def _admits(self, block: Block, now_s: float, wanted: bool) -> bool:
        """Whether to write the block; `wanted`: an operator asked for all to be saved.

        One that hangs on a refused block is refused as well: below it would be worth nothing, and keep the other from
        leaving warm. One that has something below hanging on it is not refused, for it could never leave.
        """
        residency = self._residency
        wanted = wanted or (
            block.below is not None and any(child.marks & SAVING or child.copies & COLD for child in block.children())
        )
        if wanted:
            residency.reconsider(block.parent)
        elif (block.parent is not None and block.parent.spare & REFUSED) or not residency.admits_below(block):
            return False
        return residency.admission.admits(block, block.namespace.block_nbytes, now_s, wanted)

    def _begin_save(self, block: Block) -> Copy:
        slot = block.slot
        assert slot is not None
        block.marks |= SAVING
        slot.pins += 1
        nbytes = self._under_way[_ref(block)] = block.namespace.slot_bytes
        self._under_way_bytes += nbytes
        return Copy(block, slot)

    def _crowd_of(self, block: Block) -> ClassKey | Namespace:
        """Those for whom there is no room where there is none for the block."""
        budget, namespace = self._residency.budgets[COLD], block.namespace
        own = budget.over_namespace_limit(namespace, namespace.block_nbytes)
        return namespace if own else _class_of(block)

    def let_leave(self, nbytes: int, of: Namespace | None = None) -> None:
        """Have the order say what leaves next until `nbytes` do; `of`: one that has a limit of its own.

        Only they are saved, and only they leave, so what is saved is what leaves.
        """
        residency = self._residency
        for _ in range(_LEAVE_BLOCKS):
            if (residency if of is None else of).leaving_bytes >= nbytes:
                return
            if of is None:
                block = residency.orders.oldest(WARM, _is_idle, settled=True)
            else:
                block = residency.orders.own_victim(of, WARM, _is_idle, settled=True)
            if block is None:
                return
            residency.sentence(block)

    def _closest_to_leave(self, count: int, crowded: Container[ClassKey | Namespace]) -> list[Block]:
        """What leaves warm next, in that order. What the cold tier did not take goes last."""
        residency = self._residency
        self.let_leave(self._leaving_wanted())
        for namespace, nbytes in self._leaving_wanted_of():
            self.let_leave(nbytes, namespace)
        fresh = (block for block in residency.urgent if block not in self._put_off)
        again = (block for block in self._put_off if block in residency.urgent)
        # Not one more than is wanted: there may be tens of thousands, and the engine's lock is held.
        leaving = list(islice((block for block in chain(fresh, again) if self._may_save(block, crowded)), count))
        if residency.budgets[COLD].free_bytes < residency.budgets[WARM].capacity_bytes:
            return leaving
        # A leaf is worth nothing after a crash without what it hangs on. As long as there is room for it all.
        found: dict[Block, None] = {}
        for block in leaving:
            path = [block]
            while (above := path[-1].parent) is not None and above not in found and self._may_save(above, crowded):
                path.append(above)
            found.update(dict.fromkeys(reversed(path)))
        return list(islice(found, count))

    def _newest(self, count: int, crowded: Container[ClassKey | Namespace]) -> list[Block]:
        """By last use, each with what is above it and not saved yet, from the root on."""
        found: dict[Block, None] = {}
        seen: set[Block] = set()
        for leaf in reversed(self._residency.dirty):
            path: list[Block] = []
            block: Block | None = leaf
            while block is not None and block not in seen and block in self._residency.dirty:
                seen.add(block)
                path.append(block)
                block = block.parent
            found.update(
                (block, None)
                for block in reversed(path)
                if block not in self._put_off and self._may_save(block, crowded)
            )
            if len(found) >= count:
                break
        if not found and self._put_off:  # all others are saved: perhaps there is room by now
            self._put_off.clear()
            return self._newest(count, crowded)
        return list(islice(found, count))

    def _may_save(self, block: Block, crowded: Container[ClassKey | Namespace]) -> bool:
        slot = block.slot
        return (
            block in self._residency.dirty
            and not block.marks & SAVING
            and slot is not None
            and slot.state is SlotState.READY
            and _ref(block) not in self._under_way
            and _class_of(block) not in crowded
            and block.namespace not in crowded
        )

    def saved(self, copy: Copy, stored_bytes: int | None, lossy: bytes = b"") -> None:
        """The cold tier has answered; None: it did not take the block. `lossy`: the checksum of a lossy copy."""
        residency = self._residency
        block = copy.block
        block.marks &= ~SAVING
        self._under_way_bytes -= self._under_way.pop(_ref(block))
        self._end(COLD, copy)
        residency.admission.settle(block.namespace.block_nbytes, stored_bytes or 0)
        if stored_bytes is None:
            residency.counts[COLD].write_failures += 1
            if block in residency.dirty:  # to the end: the others must not wait for it
                del residency.dirty[block]
                residency.dirty[block] = None
                self._put_off[block] = None
        elif block.slot is not copy.slot:  # dropped meanwhile; if it was stored again, then with bytes of its own
            residency.deletes[COLD].append((block.namespace.digest, block.key))
        else:
            residency.counts[COLD].writes += 1
            block.lossy = lossy
            residency.gain_below(block, COLD, stored_bytes)
            block.lossy = lossy
            self._trim_cold(block.namespace)
            return  # it has been offered
        residency.orders.offer(block)

    def begin_promotions(self, count: int) -> list[Copy]:
        """Up to `count` blocks to copy to hot, pinned until `promoted`."""
        residency = self._residency
        batch: list[Copy] = []
        queue = self._reads.promotions
        while queue and len(batch) < count and not self._condemned:
            block = next(iter(queue))
            del queue[block]
            slot = block.slot
            if block.copies & HOT or block in self._promoting or slot is None or slot.state != SlotState.READY:
                continue
            if residency.up[HOT] and self._reserve(HOT, block):
                self._promoting.add(block)
                slot.pins += 1
                batch.append(Copy(block, slot))
        return batch

    def promoted(self, copy: Copy, stored: bool) -> None:
        """The hot tier has answered."""
        residency = self._residency
        block = copy.block
        lost = block not in self._promoting  # the tier was lost since: who knows which agent took it
        self._promoting.discard(block)
        self._end(HOT, copy)
        if not stored:
            residency.counts[HOT].write_failures += 1
        elif block.slot is not copy.slot or not residency.up[HOT] or lost:
            residency.deletes[HOT].append((block.namespace.digest, block.key))
        else:
            residency.counts[HOT].writes += 1
            residency.counts[HOT].promotions += 1
            residency.gain_below(block, HOT, block.namespace.block_nbytes)
        residency.orders.offer(block)

    def condemn(self, blocks: Blocks) -> None:
        """Take blocks that no lookup can find any more, to be emptied piece by piece."""
        self._condemned.extend(shard for shard in blocks.shards if shard)

    def reap(self, count: int) -> bool:
        """Empty up to `count` condemned blocks; returns whether there are more."""
        path, steps = self._reaping, _REAP_STEPS * count
        while self._condemned and count > 0 and steps > 0:
            blocks = self._condemned[0]
            while (path or blocks) and count > 0 and steps > 0:
                steps -= 1
                block = path.pop() if path else blocks.popitem()[1]
                child = block.first_child
                if child is not None:  # children before their parents, or all would be orphans at once
                    path += (block, child)
                else:  # it may have been emptied before, as a child of one of another shard
                    count -= bool(block.copies)
                    self._residency.forget(block)
            if not path and not blocks:
                self._condemned.popleft()
        return bool(self._condemned)

    def tier_lost(self, tier: int, blocks: list[Block]) -> None:
        """A volatile tier has lost all it had, and what is on its way there."""
        if tier == HOT:
            self._promoting.clear()
        for block in reversed(blocks):
            if block.copies & tier:
                self._residency.drop_below(block, tier, delete=False)
                self._residency.index.lost(block)

    def _reserve(self, tier: int, block: Block) -> bool:
        """Make room for a copy and count it at once, so that a batch cannot take the same room twice."""
        namespace, nbytes = block.namespace, block.namespace.block_nbytes
        if not self._residency.make_room_below(tier, namespace, nbytes, spare_ahead=tier == COLD):
            return False
        self._residency.budgets[tier].add(namespace, nbytes)
        return True

    def _trim_cold(self, namespace: Namespace) -> None:
        """What was stored may take more than its raw bytes, for which there was room."""
        make_room = self._residency.make_room_below
        if self._residency.budgets[COLD].missing(namespace, 0) and not make_room(COLD, namespace, 0, spare_ahead=True):
            make_room(COLD, namespace, 0)

    def _end(self, tier: int, copy: Copy) -> None:
        namespace = copy.block.namespace
        self._residency.slots.unpin(copy.slot)
        self._residency.budgets[tier].remove(namespace, namespace.block_nbytes)


def _is_idle(block: Block) -> bool:
    slot = block.slot
    return slot is not None and not slot.pins


def _ref(block: Block) -> BelowRef:
    return (block.namespace.digest, block.key)


def _class_of(block: Block) -> ClassKey:
    return (block.namespace.tenant, block.namespace.slot_bytes)
