"""The simulation can fail: each of these breaks the daemon on purpose, and some seed of a few must tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from kvstore.core.block import COLD
from kvstore.core.cache import BlockCache
from kvstore.core.index import Index
from kvstore.core.leases import LeaseTable
from kvstore.core.moves import Moves
from kvstore.core.puts import Puts
from kvstore.core.reads import Reads
from kvstore.core.residency import Residency
from kvstore.core.slots import SlotState, SlotTable
from kvstore.engine import agent_tier, putting, recovery
from kvstore.engine import store as store_module
from kvstore.engine.agent_tier import AgentTier
from kvstore.engine.inflight import InFlight
from kvstore.engine.mover import Mover
from kvstore.engine.saver import Saver
from kvstore.engine.slab_keeper import SlabKeeper
from kvstore.engine.spokes import Spokes
from kvstore.engine.store import Store
from kvstore.engine.supervisor import AgentSupervisor
from kvstore.tiers.base import Outcome
from simulated import agents
from simulated.simulation import Replacements, Simulation

SEEDS = range(1, 41)  # most are found by the first or second
STEPS = 3000


def generations_stay(simulation: Simulation) -> Replacements:
    """A slot that becomes free can still be read."""
    set_generation = Store._set_generation

    def only_new(self: Store, ref: Any, value: int) -> None:
        if value:
            set_generation(self, ref, value)

    return [(Store, "_set_generation", only_new)]


def filling_slot_freed(simulation: Simulation) -> Replacements:
    """A lease that ends frees the slots that agents are still filling for it."""
    end = LeaseTable._end

    def end_and_free(self: LeaseTable, lease: Any) -> None:
        slots = [slot for part in lease.parts for slot in part.slots]
        end(self, lease)
        for slot in slots:
            if slot.state is SlotState.FILLING and not slot.pins:
                simulation.daemon.cache.slots.abandon(slot)

    return [(LeaseTable, "_end", end_and_free)]


def lease_forgets_a_pin(simulation: Simulation) -> Replacements:
    """The first block of a lease is not pinned."""
    acquire = Reads.acquire

    def loosely(self: Reads, *arguments: Any) -> Any:
        lease = acquire(self, *arguments)
        if lease is not None and lease.parts[0].slots:
            lease.parts[0].slots[0].pins -= 1
        return lease

    return [(Reads, "acquire", loosely)]


def save_forgets_its_pin(simulation: Simulation) -> Replacements:
    """What is being saved may be dropped and its slot filled anew."""
    begin_save = Moves._begin_save

    def loosely(self: Moves, block: Any) -> Any:
        copy = begin_save(self, block)
        copy.slot.pins -= 1
        block.saving = False
        return copy

    def unpinned(self: Moves, tier: int, copy: Any) -> None:
        namespace = copy.block.namespace
        self._residency.budgets[tier].remove(namespace, namespace.block_nbytes)

    return [(Moves, "_begin_save", loosely), (Moves, "_end", unpinned)]


def checksum_skipped(simulation: Simulation) -> Replacements:
    """The agent does not look at the checksum of what it read."""
    return [(agents, "is_intact", lambda data, checksum: True)]


def put_checksum_skipped(simulation: Simulation) -> Replacements:
    """A worker's own checksum is not compared."""
    return [(putting.Source, "expected", lambda self, i: b"")]


def published_after_a_clear(simulation: Simulation) -> Replacements:
    """A put that began before a clear is published after it."""
    finish = Puts.finish

    def anyhow(self: Puts, plan: Any) -> None:
        plan.epoch = plan.namespace.epoch
        finish(self, plan)

    return [(Puts, "finish", anyhow)]


def call_of_before_a_clear(simulation: Simulation) -> Replacements:
    """As the engine was: a put that waits for a slab across a clear begins anew, in the new epoch."""
    carry_out = Store._carry_out

    def as_begun(self: Store, plan: Any, source: Any, deadline_s: float, epoch: int) -> None:
        carry_out(self, plan, source, deadline_s, begun.pop(id(plan)))

    begin, begun = Puts.begin, dict[int, int]()

    def noted(self: Puts, *arguments: Any) -> Any:
        plan = begin(self, *arguments)
        begun[id(plan)] = plan.epoch
        return plan

    return [(Store, "_carry_out", as_begun), (Puts, "begin", noted)]


def published_without_a_copy(simulation: Simulation) -> Replacements:
    """A block whose bytes never came is published all the same."""
    copy_in = putting.copy_in

    def carelessly(items: Any, source: Any, *rest: Any) -> None:
        copy_in(items, source, *rest)
        for i, item in enumerate(items):
            if item.slot is not None and not item.checksum:
                item.checksum = source.expected(i) or bytes(16)

    return [(putting, "copy_in", carelessly), (store_module, "copy_in", carelessly)]


def delete_after_the_write(simulation: Simulation) -> Replacements:
    """The saver writes while deletions of older copies of the same keys are due."""
    begin_save, delete, calls = Saver._begin_save, Saver._delete, count()

    def seldom(self: Saver, tier: int) -> bool:
        return next(calls) % 6 == 0 and delete(self, tier)

    def before_deletes(self: Saver) -> Any:
        deletes = self._cache.residency.deletes
        due, deletes[COLD] = deletes[COLD], []
        try:
            return begin_save(self)
        finally:
            deletes[COLD] = due + deletes[COLD]

    return [(Saver, "_begin_save", before_deletes), (Saver, "_delete", seldom)]


def old_epoch_recovered(simulation: Simulation) -> Replacements:
    """A restart takes what was cleared for present."""
    recover = recovery.recover

    def all_of_it(cache: Any, catalogue: Any, records: Any) -> Any:
        epochs = {digest: entry.epoch for digest, entry in catalogue.entries.items()}
        forged = [replace(record, epoch=epochs.get(record.ref.namespace, record.epoch)) for record in records]
        return recover(cache, catalogue, forged)

    return [(store_module, "recover", all_of_it)]


def lost_agent_answers_ok(simulation: Simulation) -> Replacements:
    """What went with its agent is taken for loaded."""
    failed = Mover._failed

    def hopeful(self: Mover, block: Any, slot: Any, lost_tier: int) -> None:
        if not lost_tier and block.slot is slot and (tier := self._cache.reads.source(block)):
            self._cache.reads.loaded(block, tier)
        else:
            failed(self, block, slot, lost_tier)

    return [(Mover, "_failed", hopeful)]


def agent_not_reaped(simulation: Simulation) -> Replacements:
    """Slots of a late agent are given away while it can still write into them."""
    return [(AgentTier, "_end", lambda self, error: None)]


def unsettled_loads_are_forgotten(simulation: Simulation) -> Replacements:
    """Blocks that went with their agent are never given up."""
    load = Mover._load

    def forgetful(self: Mover, tier: int, batch: Any) -> None:
        failed = Mover._failed
        self._failed = lambda *arguments: None  # type: ignore[method-assign, assignment]
        try:
            load(self, tier, batch)
        finally:
            self._failed = failed.__get__(self)  # type: ignore[method-assign]

    return [(Mover, "_load", forgetful)]


def session_end_keeps_leases(simulation: Simulation) -> Replacements:
    """A session that ends leaves its leases, and nothing ends them."""
    return [(LeaseTable, "end_session", lambda self, session: []), (LeaseTable, "expire", lambda self, now_s: [])]


def leases_expire_early(simulation: Simulation) -> Replacements:
    """A frame does not renew its session's leases."""
    return [(LeaseTable, "renew", lambda self, session, now_s: 0)]


def handoff_to_anybody(simulation: Simulation) -> Replacements:
    """The tenant of who adopts a lease is not looked at."""
    adopt = LeaseTable.adopt

    def anybody(self: LeaseTable, session: int, tenant: str, token: bytes, now_s: float) -> Any:
        lease = self._tokens.get(token)
        return adopt(self, session, tenant if lease is None else lease.tenant, token, now_s)

    return [(LeaseTable, "adopt", anybody)]


def parent_leaves_first(simulation: Simulation) -> Replacements:
    """A lost block is forgotten although children hang on it, which are not made orphans."""

    def carelessly(self: Index, block: Any) -> None:
        if not block.copies and block.below is None:
            self._forget(block)

    return [(Index, "lost", carelessly)]


def hot_is_not_mourned(simulation: Simulation) -> Replacements:
    """What was in hot is still thought to be there after its agent has died."""

    def only_down(self: Store, tier: int) -> None:
        self._cache.residency.up[tier] = False

    return [(Store, "tier_down", only_down)]


def waiters_are_not_told(simulation: Simulation) -> Replacements:
    """Who waits for a block does not hear of it."""
    return [(InFlight, "settle", lambda self, slot: None)]


def quota_ignored(simulation: Simulation) -> Replacements:
    """A save is not counted before its answer."""

    def uncounted(self: Moves, tier: int, block: Any) -> bool:
        self._residency.budgets[tier].add(block.namespace, block.namespace.block_nbytes)
        return True

    return [(Moves, "_reserve", uncounted)]


def slab_dropped_in_use(simulation: Simulation) -> Replacements:
    """An agent is not told of a slab that has gone, nor its number forgotten."""
    return [(AgentSupervisor, "unmap_slab", lambda self, slab_id: None)]


def starved_for_ever(simulation: Simulation) -> Replacements:
    """The slab keeper never finds that a class has been fed."""
    return [(SlabKeeper, "_feed", lambda self, key: True)]


def lock_held_while_copying(simulation: Simulation) -> Replacements:
    """A put copies with the engine's lock held."""
    carry_out = Store._carry_out

    def under_the_lock(self: Store, *arguments: Any) -> None:
        with self._lock:
            carry_out(self, *arguments)

    return [(Store, "_carry_out", under_the_lock)]


def deletes_forgotten(simulation: Simulation) -> Replacements:
    """Deletions that an agent did not confirm are not asked for again."""
    delete = Saver._delete

    def once(self: Saver, tier: int) -> bool:
        done = delete(self, tier)
        if not done and self._cache.residency.up[tier] and not self._may_call(tier):
            self._cache.residency.deletes[tier].clear()
        return done

    return [(Saver, "_delete", once)]


def clear_is_not_durable(simulation: Simulation) -> Replacements:
    """The new epoch is not written before the clear is answered."""
    return [(store_module.Catalogue, "set_epoch", lambda self, digest, epoch: None)]


def missing_means_corrupt_everywhere(simulation: Simulation) -> Replacements:
    """A bad copy in cold is dropped, and the index goes on saying that it is there."""
    drop_below = Residency.drop_below

    def kept(self: Residency, block: Any, tier: int, delete: bool = True) -> None:
        if delete:
            drop_below(self, block, tier, delete)

    return [(Residency, "drop_below", kept)]


def wrong_slot_named(simulation: Simulation) -> Replacements:
    """An agent is told of the slot beside the one that was taken for a block."""
    item_of = Spokes._item

    def beside(self: Spokes, tier: int, block: Any, slot: Any) -> Any:
        item = item_of(self, tier, block, slot)
        if slot.state is not SlotState.FILLING or not slot.index:
            return item
        other = self._pool.range_of(slot.slab_id, slot.index - 1, block.namespace.block_nbytes)
        return item._replace(range=other)

    return [(Spokes, "_item", beside)]


def outcomes_shifted(simulation: Simulation) -> Replacements:
    """The answer to one block is taken for that of the whole call."""
    take = agent_tier._Answers.take

    def early(self: Any, payload: bytes) -> bool:
        take(self, payload)
        if self._settle is not None and self._left:
            self._settle(self._first, [Outcome.OK] * len(self._found))
        return True

    return [(agent_tier._Answers, "take", early)]


def namespace_shared(simulation: Simulation) -> Replacements:
    """Blocks of one namespace are found in another of the same tenant."""
    find = Index.find

    def anywhere(self: Index, namespace: Any, key: bytes) -> Any:
        found = find(self, namespace, key)
        for other in self.namespaces.values() if found is None else ():
            if other.block_nbytes == namespace.block_nbytes and other.tenant == namespace.tenant:
                found = found or find(self, other, key)
        return found

    return [(Index, "find", anywhere)]


def epoch_not_raised(simulation: Simulation) -> Replacements:
    """A clear empties a namespace and does not begin a new epoch."""
    clear = BlockCache.clear

    def same_epoch(self: BlockCache, namespace: Any) -> int:
        epoch = clear(self, namespace)
        namespace.epoch -= 1
        return epoch

    return [(BlockCache, "clear", same_epoch)]


def slot_published_before_its_bytes(simulation: Simulation) -> Replacements:
    """The generation of a slot is set when it is given to its filler."""
    fill = SlotTable.fill

    def eagerly(self: SlotTable, refs: Any, owner: Any) -> Any:
        slots = fill(self, refs, owner)
        for slot in slots:
            self._set_generation(slot.ref, slot.generation)
        return slots

    return [(SlotTable, "fill", eagerly)]


MUTATIONS: list[Callable[[Simulation], Replacements]] = [
    generations_stay, filling_slot_freed, lease_forgets_a_pin, save_forgets_its_pin, checksum_skipped,
    put_checksum_skipped, published_after_a_clear, call_of_before_a_clear, published_without_a_copy,
    delete_after_the_write, old_epoch_recovered, lost_agent_answers_ok, agent_not_reaped,
    unsettled_loads_are_forgotten, session_end_keeps_leases, leases_expire_early, handoff_to_anybody,
    parent_leaves_first, hot_is_not_mourned, waiters_are_not_told,
    quota_ignored, slab_dropped_in_use, starved_for_ever, lock_held_while_copying, deletes_forgotten,
    clear_is_not_durable, missing_means_corrupt_everywhere, wrong_slot_named, outcomes_shifted, namespace_shared,
    epoch_not_raised, slot_published_before_its_bytes,
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_broken_daemon_is_found_out(mutation: Callable[[Simulation], Replacements]) -> None:
    for seed in SEEDS:
        report = Simulation(seed).run(STEPS, mutation)
        if report.failure:
            kind = report.failure.partition(":")[0]
            assert kind not in ("TypeError", "AttributeError", "NameError"), f"the mutation itself is broken: {report}"
            return
    pytest.fail(f"{mutation.__doc__} No seed of {SEEDS} found it.")
