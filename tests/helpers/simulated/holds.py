"""What must hold while a simulation runs, and once everything has come to rest."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

from core_checks import check, live_blocks
from kvstore.core.block import COLD, HOT, WARM, Block
from kvstore.core.slabs import SlotRef
from kvstore.core.slots import Slot, SlotState
from kvstore.engine.checking import Scratch
from kvstore.tiers.base import BlockRef
from simulated.content import Content, Contents
from simulated.daemon import Daemon, Disk, Saving
from simulated.stage import SimulationError

LOAD_STEPS_MAX = 8_000  # of a simulation, for a slot to be filled or given up


class _Generations:
    """The generations in the slabs' headers, by slot."""

    def __init__(self, daemon: Daemon) -> None:
        self._slabs = daemon.pool._slabs

    def get(self, ref: SlotRef, default: int = 0) -> int:
        return self._slabs[ref.slab_id].generations[ref.slot]

    def items(self) -> Iterator[tuple[SlotRef, int]]:
        for slab_id, slab in self._slabs.items():
            for slot, generation in enumerate(slab.generations):
                if generation:
                    yield SlotRef(slab_id, slot), generation


class _Bytes:
    """Whose bytes lie in a slot."""

    def __init__(self, daemon: Daemon, contents: Contents) -> None:
        self._daemon = daemon
        self._contents = contents

    def __getitem__(self, ref: SlotRef) -> Content:
        block = self._daemon.cache.slots._by_slab[ref.slab_id][ref.slot].owner  # type: ignore[union-attr]
        assert isinstance(block, Block)
        found = self._contents.owner(warm_bytes(self._daemon, block))
        assert found is not None, "a warm copy is nobody's bytes"
        return found


class _Memory(NamedTuple):
    generations: Any
    contents: Any


class _Item(NamedTuple):
    slot: Slot


class _Looked(NamedTuple):
    """Slots that checks of a tier have taken to read a block into."""

    items: list[_Item]
    held: Slot | None = None


class _Load(NamedTuple):
    block: Block
    slot: Slot


class View:
    """A daemon as core_checks.check sees one."""

    def __init__(self, daemon: Daemon, disk: Disk, contents: Contents) -> None:
        self.cache = daemon.cache
        self.memory = _Memory(_Generations(daemon), _Bytes(daemon, contents))
        self.media = {tier: medium.records for tier, medium in disk.media.items()}
        self._daemon = daemon

    @property
    def plans(self) -> list[Any]:
        table, allocator = self.cache.slots, self.cache.allocator
        slots = [slot for slab in allocator.slabs() for slot in table.in_slab(slab.slab_id)]
        scratch = [_Item(slot) for slot in slots if isinstance(slot.owner, Scratch) and slot.state is SlotState.FILLING]
        return [*self._daemon.plans, _Looked(scratch)]

    @property
    def loads(self) -> list[_Load]:
        queued = set(self.cache.reads.loads)
        return [_Load(b, b.slot) for b in self.cache.reads.waiting if b not in queued]  # type: ignore[arg-type]

    @property
    def saves(self) -> list[Saving]:
        return self._daemon.savings


class Holds:
    """Checks one life of a daemon."""

    def __init__(self, daemon: Daemon, disk: Disk, contents: Contents, versions: dict[bytes, int]) -> None:
        """`versions` of each namespace's content, by digest."""
        self._daemon = daemon
        self._disk = disk
        self._contents = contents
        self._versions = versions
        self._view = View(daemon, disk, contents)
        self._loading: dict[Block, tuple[Slot | None, int]] = {}

    def cheaply(self) -> None:
        """What is checked after every step."""
        residency, allocator = self._daemon.cache.residency, self._daemon.cache.allocator
        need(not self._daemon.store._lock.held, "the engine's lock is held across a wait")  # type: ignore[attr-defined]
        need(allocator.used_bytes == residency.budgets[WARM].used_bytes, "slots and the warm budget differ")
        need(allocator.planned_bytes <= allocator.capacity_bytes, "more slabs than the warm tier may have")
        for tier, budget in residency.budgets.items():
            need(0 <= budget.used_bytes <= budget.capacity_bytes, f"the budget of tier {tier} is exceeded")
        need(sum(map(len, self._plan_slots())) <= self._daemon.cache.slots.filling, "a FILLING slot was freed")

    def _plan_slots(self) -> Iterator[list[Slot]]:
        for plan in self._daemon.plans:
            yield [item.slot for item in plan.items if item.slot is not None]

    def fully(self) -> None:
        """Everything that adds up in the core, the slabs' headers and bytes, and the media."""
        try:
            check(self._view)  # type: ignore[arg-type]
        except AssertionError as error:
            raise SimulationError(f"the books do not balance: {str(error) or _condition(error)}") from error
        self._prefixes_are_whole()
        self._copies_below_are_there()
        self._warm_bytes_are_right()
        self._loads_come_to_an_end()
        waited_for = self._daemon.mover.inflight._waiters
        need(
            all(slot.state is SlotState.FILLING for slot in waited_for),
            "a block has come, and its waiters were not told",
        )

    def _prefixes_are_whole(self) -> None:
        for block in live_blocks(self._view):  # type: ignore[arg-type]
            above: Block | None = block
            while above is not None and above.present and above.parent is not None:
                need(above.parent.present, "a stored prefix has a hole that is not counted")
                above = above.parent

    def _copies_below_are_there(self) -> None:
        for block in live_blocks(self._view):  # type: ignore[arg-type]
            ref = BlockRef(block.namespace.digest, block.key)
            for tier in (HOT, COLD):
                medium = self._disk.media[tier]
                if not block.copies & tier or ref in medium.damaged:
                    continue
                if tier == HOT and self._daemon.agents[HOT].process is None:
                    continue  # its loss has not been told yet
                record = medium.records.get(ref)
                need(record is not None, f"the index says tier {tier} has a block that it has not")
                expected = block.lossy if tier == COLD and block.lossy else block.checksum
                need(record.checksum == expected, f"tier {tier} has another content of a block")  # type: ignore[union-attr]
                self._is_current(block, record.data, f"tier {tier}")  # type: ignore[union-attr]

    def _warm_bytes_are_right(self) -> None:
        for block in live_blocks(self._view):  # type: ignore[arg-type]
            if block.copies & WARM:
                self._is_current(block, warm_bytes(self._daemon, block), "warm")

    def _is_current(self, block: Block, data: bytes, where: str) -> None:
        owner, version = self._contents.owner(data), self._versions[block.namespace.digest]
        need(
            owner is not None and (owner.digest, owner.key) == (block.namespace.digest, block.key),
            f"{where} has foreign bytes under a key",
        )
        need(owner.version == version, f"{where} has bytes of before a clear (version {owner.version} of {version})")  # type: ignore[union-attr]

    def _loads_come_to_an_end(self) -> None:
        now = self._daemon.stage.steps
        waiting = self._daemon.cache.reads.waiting
        before, self._loading = self._loading, {}
        for block in waiting:
            slot, since = before.get(block, (None, now))
            self._loading[block] = (block.slot, since if slot is block.slot else now)
            need(now - self._loading[block][1] < LOAD_STEPS_MAX, "a load never ends")

    # -- at rest --------------------------------------------------------------------------------------------------

    def is_at_rest(self) -> bool:
        """Whether nothing is on its way."""
        daemon, cache = self._daemon, self._daemon.cache
        residency, moves = cache.residency, cache.moves
        due = any(residency.deletes[tier] for tier in daemon.agents)
        agents = all(agent.tier._life is not None and not agent.can_work() for agent in daemon.agents.values())
        moving = cache.reads.waiting or cache.reads.promotions or daemon.savings or moves._condemned
        return agents and not (due or moving or daemon.plans or daemon.keeper._starving or daemon.keeper._unpopulated)

    def at_rest(self) -> None:
        """After quiescence: nothing is pinned or being filled, and the index is what the media hold."""
        self.fully()
        daemon, cache = self._daemon, self._daemon.cache
        need(len(cache.reads.leases) == 0, "a lease is left")
        need(not cache.reads.leases._tokens, "an offer of a lease is left")
        need(cache.slots.filling == 0, "a slot is still being filled")
        slots = [slot for slab in cache.allocator.slabs() for slot in cache.slots.in_slab(slab.slab_id)]
        need(all(slot.pins == 0 for slot in slots), "a pin is left")
        need(all(slot.state is SlotState.READY for slot in slots), "a slot is neither free nor ready")
        need(not daemon.mover.inflight._waiters, "somebody still waits for a slot")
        need(len(daemon.store._sessions) == 0 and daemon.store._sessions.staging_bytes == 0, "staging is left")
        need(sum(cache.reads.queued_bytes.values()) == 0, "bytes are still counted as queued")
        for tier, agent in daemon.agents.items():
            self._index_is_medium(tier)
            need(agent.process is not None, "an agent is not there")
            known = agent.process.slab_ids | set(agent.tier._slabs)  # type: ignore[union-attr]
            need(known <= set(daemon.pool.slab_ids()), "an agent has a slab that has gone")

    def _index_is_medium(self, tier: int) -> None:
        medium = self._disk.media[tier]
        known = {
            BlockRef(b.namespace.digest, b.key)
            for b in live_blocks(self._view)  # type: ignore[arg-type]
            if b.copies & tier
        }
        need(known - medium.damaged <= medium.records.keys(), f"tier {tier} lacks blocks that the index has")
        strays = medium.records.keys() - known
        # Of a write whose answer went with the agent nobody knows whether it is there: the next save, or restart, does.
        need(strays <= medium.unheard | medium.damaged, f"tier {tier} has blocks that the index does not know")
        self._daemon.stage.count(f"strays in tier {tier} at rest", len(strays))


def _condition(error: AssertionError) -> str:
    """The line of an assertion without a message."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.name}: {last.line}"


def warm_bytes(daemon: Daemon, block: Block) -> bytes:
    """The bytes of a block's warm copy."""
    slot = block.slot
    assert slot is not None
    return daemon.pool.view(daemon.pool.range_of(slot.slab_id, slot.index, block.namespace.block_nbytes)).tobytes()


def need(holds: object, what: str) -> None:
    """Raise where something does not hold."""
    if not holds:
        raise SimulationError(what)
