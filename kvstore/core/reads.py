"""Reading: match, acquire, and what happens to a lease while its cold part loads."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from itertools import pairwise, repeat
from math import lcm
from operator import attrgetter
from typing import NamedTuple

from kvstore.core.block import COLD, HOT, WARM, Block, Namespace
from kvstore.core.index import KEY_BYTES, Index, split_keys
from kvstore.core.leases import Lease, LeasePart, LeaseTable
from kvstore.core.residency import Residency
from kvstore.core.slots import Slot, SlotState

_SLOT = attrgetter("slot")


class MatchResult(NamedTuple):
    """Longest stored prefix; each block counts for its fastest tier."""

    blocks: int
    tokens: int
    hot: int
    warm: int
    cold: int
    withheld: int = 0  # further blocks that are stored


class AcquireGroup(NamedTuple):
    """Keys of one namespace; `last` asks for the block at the common position only."""

    namespace: Namespace
    keys: bytes
    last: bool = False
    exact: bool = False  # what is only left as a lossy copy counts as absent


class ReadSettings(NamedTuple):
    """What can be set.

    Attributes:
        promote_hits: hits of a block in slower tiers until it earns a place in a faster one.
        prefetch_bytes: of warm, that may hold what was loaded on hints and has not been asked for.
    """

    promote_hits: int = 2
    prefetch_bytes: int = 1 << 62


class Readiness(NamedTuple):
    """How far a lease has come."""

    ready: int  # leading blocks that are readable
    lost: int  # 0, or 1 + the index of the first block that never will be
    pending: Slot | None  # the last slot in range that is still being filled


class Reads:
    """The read side of the core. `loads` are blocks whose slot an agent must fill, in prefix order."""

    def __init__(self, index: Index, residency: Residency, ttl_s: float, settings: ReadSettings) -> None:
        self._index = index
        self._residency = residency
        self._promote_hits = settings.promote_hits
        self._prefetch_bytes = settings.prefetch_bytes
        self.leases = LeaseTable(ttl_s, self._unpin)
        self.loads: deque[Block] = deque()
        self.waiting: dict[Block, int] = {}  # whose slot is to be filled, and from which tier
        self.queued_bytes = {0: 0, HOT: 0, COLD: 0}  # of those, by tier
        self.promotions: dict[Block, None] = {}
        self.short: dict[Namespace, int] = {}  # slots that acquires did not get, since the engine last asked
        self.lookups = 0
        self.hit_blocks = 0
        self.match_lookups = 0
        self.match_hit_blocks = 0

    def peek(self, namespace: Namespace, keys: bytes) -> MatchResult:
        """As match, but changes nothing: safe beside one thread that changes the core, and then only a hint.

        It reads single entries and attributes; what it saw may be gone a moment later, as with any match.
        """
        found = self.stored_prefix(namespace, keys)
        return self._by_tier(namespace, keys, found)

    def match(self, namespace: Namespace, keys: bytes) -> MatchResult:
        """Longest stored prefix of packed keys; pins nothing, and in a chain notes the use."""
        found = self.stored_prefix(namespace, keys)
        self.match_lookups += len(keys) // KEY_BYTES
        self.match_hit_blocks += found
        if found and namespace.chain:  # of a set each block would have to be touched: only a lease does
            self._residency.touch(namespace.blocks[keys[(found - 1) * KEY_BYTES : found * KEY_BYTES]])
        return self._by_tier(namespace, keys, found)

    def _by_tier(self, namespace: Namespace, keys: bytes, found: int) -> MatchResult:
        counts = self._residency.counts
        hot, warm = 0, found
        # Walking every block is only worth its time where the tiers can differ.
        if found and (counts[HOT].blocks or counts[COLD].blocks):
            if namespace.chain:
                block = namespace.blocks.get(keys[(found - 1) * KEY_BYTES : found * KEY_BYTES])
                held = {} if block is None else block.copies_above(found)
            else:
                blocks = map(namespace.blocks.get, split_keys(keys[: found * KEY_BYTES]))
                held = Counter(block.copies for block in blocks if block is not None)
            hot = sum(count for copies, count in held.items() if copies & HOT)
            warm = sum(count for copies, count in held.items() if copies & WARM and not copies & HOT)
        return MatchResult(found, found * namespace.block_tokens, hot, warm, found - hot - warm)

    def stored_prefix(self, namespace: Namespace, keys: bytes) -> int:
        """Blocks of the longest prefix that is stored in tiers that are up."""
        found = self._index.prefix(namespace, keys)
        up = self._residency.up
        if up[COLD] or not self._residency.counts[COLD].blocks:
            return found
        for i in range(found):  # an agent is down: its blocks are misses
            block = namespace.blocks.get(keys[i * KEY_BYTES : (i + 1) * KEY_BYTES])
            if block is None or not self._residency.available(block):
                return i
        return found

    def servable_prefix(self, group: AcquireGroup) -> int:
        """As stored_prefix, up to the first block that is left in a form that the group does not want."""
        found = self.stored_prefix(group.namespace, group.keys)
        if not (group.exact and group.namespace.cold_codec):
            return found
        held = map(group.namespace.blocks.get, split_keys(group.keys[: found * KEY_BYTES]))
        return next((i for i, block in enumerate(held) if block is None or block.degraded), found)

    def exists(self, namespace: Namespace, keys: bytes) -> bytes:
        """One byte per key, 1 where it is stored and its tier is up."""
        residency, index = self._residency, self._index
        found = (index.find(namespace, key) for key in split_keys(keys))
        return bytes(1 if block is not None and residency.available(block) else 0 for block in found)

    def foresee(self, groups: Sequence[AcquireGroup]) -> int | None:
        """Where acquire may begin to look, in tokens; None: at the end of the keys. As safe beside others as peek.

        Of a group that asks for its last block only, every position may have to be tried: 0.1 s for 131,072 keys.
        """
        if not any(group.last for group in groups):
            return None
        return self._position(groups, _unit(groups), None)

    def acquire(
        self, session_id: int, tenant: str, groups: Sequence[AcquireGroup], now_s: float, below: int | None = None
    ) -> Lease | None:
        """Pin the longest position that every group can serve, at most `below` tokens; None where there is none.

        Slots for everything that must be loaded are reserved at once, and the promise is cut to what was reserved.
        """
        self.lookups += sum(len(group.keys) // KEY_BYTES for group in groups)
        unit = _unit(groups)
        tokens = self._position(groups, unit, below)
        while tokens:
            parts = [self._part(group, tokens) for group in groups]
            pinned = [self._pin(part) for part in parts]  # all of them before room is made for one
            served = min(map(self._complete, parts, pinned, groups, repeat(tokens)))
            if served == tokens:
                break
            if len(groups) == 1 and not groups[0].last and served:
                tokens = served
                break
            for part in parts:
                self._unpin(part, 0, len(part.slots))
            tokens = self._position(groups, unit, served)
        if not tokens:
            return None
        for part, group in zip(parts, groups, strict=True):
            start = part.first_block * KEY_BYTES
            self._residency.refer(part.namespace, group.keys[start : start + len(part.blocks) * KEY_BYTES])
            self._touch(part)
            self._note_hits(part.blocks)
            self.hit_blocks += len(part.blocks)
        return self.leases.open(session_id, tenant, parts, tokens, now_s)

    def prefetch(self, namespace: Namespace, keys: bytes) -> int:
        """Start loading the cold part of the longest stored prefix without pinning it; returns blocks that load.

        What was loaded on hints and not asked for since stays within `prefetch_bytes`, so that many waiting requests
        cannot fill warm. It drops only what was last used before the prefix that the hint is about.
        """
        found = self.stored_prefix(namespace, keys)
        room = (self._prefetch_bytes - self._residency.prefetched_bytes) // namespace.slot_bytes
        part = LeasePart(namespace, 0, self._index.prefix_blocks(namespace, keys[: found * KEY_BYTES]), [])
        wanted = [block for block in part.blocks if block.slot is None][: max(0, room)]
        if not wanted:
            return 0
        held = [block.slot for block in part.blocks if block.slot is not None]
        for slot in held:  # room for the end of the prefix must not be made of its beginning
            slot.pins += 1
        slots = self._residency.take(namespace, len(wanted), part, older_than=part.blocks[-1].touched).slots
        for block, slot in zip(wanted, slots, strict=False):
            block.slot = slot
            self._residency.foresee(block)
            self.loads.append(block)
            self._await(block)
        self._touch(part, reused=False)
        for slot in held:
            self._residency.slots.unpin(slot)
        for block in part.blocks:
            self._residency.orders.offer(block)
        return len(slots)

    def readiness(self, lease: Lease, stop: int) -> Readiness:
        """How much of [0, stop) of every part is readable."""
        ready, lost, pending = 1 << 62, 0, None
        for part in lease.parts:
            first = part.first_block
            limit = min(stop - first, len(part.slots))
            found = limit
            for i in range(part.released, limit):
                state = part.slots[i].state
                if state == SlotState.FILLING:
                    found, pending = min(found, i), part.slots[i]
                elif state == SlotState.FREE:
                    found, lost = min(found, i), min(lost or first + i + 1, first + i + 1)
                    break
            ready = min(ready, first + found if found < limit else stop)
        return Readiness(ready, lost, pending)

    def source(self, block: Block) -> int:
        """The tier to load a block from: HOT, COLD, or 0 where none can serve it."""
        for tier in (HOT, COLD):
            if block.copies & tier and self._residency.up[tier]:
                return tier
        return 0

    def loaded(self, block: Block, tier: int) -> None:
        """The agent of `tier` has filled the block's slot, and the checksum held."""
        slot = block.slot
        assert slot is not None
        if block.copies & tier:
            self._residency.counts[tier].hits += 1
            self._settled(block)
            self._residency.gain_warm(block, slot)
            if not block.spare & WARM:
                self._residency.settle_warm(block)
        else:  # deleted, cleared or evicted while it was loading
            self.load_failed(block, 0)

    def load_failed(self, block: Block, lost_tier: int) -> None:
        """The slot was not filled. `lost_tier`: the tier whose copy proved bad or missing, or 0 (try again later)."""
        self._settled(block)
        if lost_tier and block.copies & lost_tier:
            self._residency.drop_below(block, lost_tier, delete=False)
        if self.source(block) and lost_tier:
            self.loads.appendleft(block)  # another copy may be good
            self._await(block)
            return
        slot, block.slot = block.slot, None
        assert slot is not None
        self._residency.fetched(block)
        block.spare &= ~WARM
        self._residency.abandon(slot)
        self._residency.orders.offer(block)
        self._index.lost(block)

    # -- internals --------------------------------------------------------------------------------------------

    def _position(self, groups: Sequence[AcquireGroup], unit: int, below: int | None) -> int:
        """The longest common position in tokens, below `below` where given."""
        limit = (1 << 62) if below is None else below
        for group in groups:
            namespace, keys, last, _ = group
            blocks = len(keys) // KEY_BYTES if last else self.servable_prefix(group)
            limit = min(limit, blocks * namespace.block_tokens)
        tokens = limit - limit % unit
        lasts = [group for group in groups if group.last]
        while tokens and not all(self._has(group, tokens) for group in lasts):
            tokens -= unit
        return tokens

    def _has(self, group: AcquireGroup, tokens: int) -> bool:
        at = tokens // group.namespace.block_tokens - 1
        block = self._index.find(group.namespace, group.keys[at * KEY_BYTES : (at + 1) * KEY_BYTES])
        return block is not None and self._residency.available(block) and not (group.exact and block.degraded)

    def _part(self, group: AcquireGroup, tokens: int) -> LeasePart:
        namespace, stop = group.namespace, tokens // group.namespace.block_tokens
        keys = group.keys[: stop * KEY_BYTES]
        if group.last:
            return LeasePart(namespace, stop - 1, [namespace.blocks[keys[-KEY_BYTES:]]], [])
        return LeasePart(namespace, 0, self._index.prefix_blocks(namespace, keys), [])

    def _touch(self, part: LeasePart, reused: bool = True) -> None:
        """A use of a prefix is one of its last block; in a set nothing hangs on another."""
        for block in part.blocks[-1:] if part.namespace.chain else part.blocks:
            self._residency.touch(block, reused)

    def _pin(self, part: LeasePart) -> list[Slot | None]:
        """Pin the slots that a part's blocks have; returns one entry a block."""
        slots: list[Slot | None] = list(map(_SLOT, part.blocks))
        part.slots = list(filter(None, slots))
        for slot in part.slots:
            slot.pins += 1
        if self._residency.up[HOT] and not part.namespace.cold_codec:  # or hot and cold would have other bytes
            self._count_hits(part.blocks)
        self._residency.counts[WARM].hits += len(part.slots)
        return slots

    def _note_hits(self, blocks: Sequence[Block]) -> None:
        """Hits of blocks that have no place in warm yet: loaded for one use, or on a hint.

        They stand at the end of a prefix, because what they hang on came first.
        """
        residency = self._residency
        for block in reversed(blocks):
            if not block.spare & WARM:
                break
            if block.copies & WARM:  # else it is this very hit that loads it
                self._count_load(block)
        if residency.prefetched_bytes:
            for block in blocks:
                if residency.fetched(block):
                    self._count_load(block)

    def _count_load(self, block: Block) -> None:
        """A hit in a slower tier: with the first ones a block only passes through warm."""
        if block.copies & COLD and not block.reused:
            self._residency.admission.hit()
        block.hits += 1
        earned = block.hits >= self._promote_hits
        self._residency.counts[WARM].promotions += earned and bool(block.copies & COLD)
        if earned and block.copies & WARM:
            self._residency.settle_warm(block)
        else:
            self._residency.set_leaving(block, leaving=not earned)

    def _complete(self, part: LeasePart, slots: list[Slot | None], group: AcquireGroup, tokens: int) -> int:
        """Reserve the slots that a part lacks; returns the tokens it can serve."""
        if len(part.slots) < len(slots):
            self._reserve(part, slots)
            part.slots = [slot for slot in slots if slot is not None]
            del part.blocks[len(part.slots) :]
        if group.last:
            return tokens if part.slots else 0
        return len(part.slots) * part.namespace.block_tokens

    def _count_hits(self, blocks: Sequence[Block]) -> None:
        """Uses count only while there is a faster tier to earn. What has no place in warm earns that first."""
        # Into a full tier it takes more: each that comes drives another out.
        full = bool(blocks) and self._residency.budgets[HOT].free_bytes < blocks[0].namespace.block_nbytes
        needed = 2 * self._promote_hits - 1 if full else self._promote_hits
        for block in blocks:
            if block.copies & WARM and not block.spare & WARM:
                block.hits += 1
                if block.hits >= needed and not block.copies & HOT:
                    block.hits = 0
                    self.promotions[block] = None

    def _reserve(self, part: LeasePart, slots: list[Slot | None]) -> None:
        """Give every missing slot of a part to a load; what finds no room cuts the part there."""
        missing = [i for i, slot in enumerate(slots) if slot is None]
        # A key may have been asked for twice, or by another part that has its slot by now.
        wanted = dict.fromkeys(part.blocks[i] for i in missing if part.blocks[i].slot is None)
        for block, slot in zip(wanted, self._residency.take(part.namespace, len(wanted), part).slots, strict=False):
            block.slot = slot
            self._count_load(block)
            self.loads.append(block)
            self._await(block)
        for i in missing:
            found = slots[i] = part.blocks[i].slot
            if found is None:
                self._unpin_slots([slot for slot in slots[i:] if slot is not None])
                for block in part.blocks[i:]:
                    self._residency.orders.offer(block)
                del slots[i:]
                self._note_short(part.namespace, sum(block.slot is None for block in wanted))
                break
            found.pins += 1

    def _await(self, block: Block) -> None:
        tier = self.waiting[block] = self.source(block)
        self.queued_bytes[tier] += block.namespace.block_nbytes

    def _settled(self, block: Block) -> None:
        self.queued_bytes[self.waiting.pop(block)] -= block.namespace.block_nbytes

    def _note_short(self, namespace: Namespace, slots: int) -> None:
        """Room of other classes would help, unless it is the tenant's own limit that stands in the way."""
        if not self._residency.budgets[WARM].over_limit(namespace, namespace.slot_bytes):
            self.short[namespace] = slots

    def _unpin_slots(self, slots: Sequence[Slot]) -> bool:
        """Give one pin of each back; returns whether all were READY."""
        ready, regular = SlotState.READY, True
        for slot in slots:
            if slot.state is ready:
                slot.pins -= 1
            else:
                regular = False
                self._residency.slots.unpin(slot)
        return regular

    def _unpin(self, part: LeasePart, start: int, stop: int) -> None:
        regular = self._unpin_slots(part.slots[start:stop])
        if stop <= start:
            return
        offer = self._residency.orders.offer
        offer(part.blocks[stop - 1])
        if not part.namespace.chain:
            for block in part.blocks[start:stop]:
                offer(block)
        elif not regular:
            # Only a leaf can have been waiting for its pin to go: the last block, or one whose child has left warm.
            for block, child in pairwise(part.blocks[start:stop]):
                if not child.copies & WARM:
                    offer(block)


def _unit(groups: Sequence[AcquireGroup]) -> int:
    """Positions that all groups have, in tokens, are multiples of this."""
    return lcm(*(group.namespace.block_tokens for group in groups))
