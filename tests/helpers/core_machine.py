"""The core under any order of events, against dictionaries that know every byte, every copy and every reader.

The machine plays the engine, its agents, its workers and its accidents. After each step everything that must hold is
checked, and above all: a reader that follows what its lease told it, however late, sees its own bytes or none.
"""

from __future__ import annotations

from collections import Counter
from itertools import count

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from core_checks import check, check_nothing_left, live_blocks
from core_world import PAGE, TTL_S, Answer, Load, Promise, World, key, packed, promises
from kvstore.core.benefit import WINDOW, WorkerCosts
from kvstore.core.block import COLD, HIGH, HOT, LOW, NORMAL, WARM, Block, Namespace
from kvstore.core.leases import Lease
from kvstore.core.puts import PutPlan
from kvstore.core.reads import AcquireGroup
from kvstore.core.slots import SlotState
from kvstore.core.terms import Terms
from kvstore.core.terms import pin as set_pinned

SLABS, SLOTS = 3, 4
REMEMBERED_PROMISES = 300
SPACES = ("chain", "wide", "set", "other")

spaces = st.sampled_from(SPACES)
chains = st.sampled_from(["chain", "wide", "other"])
paths = st.text("ab", min_size=1, max_size=6)
choice = st.integers(0, 10**6)
sessions = st.integers(1, 3)
few = st.integers(1, 8)
tiers_below = st.sampled_from([HOT, COLD])
tiers = st.sampled_from([HOT, WARM, COLD])


def keys_of(path: str) -> list[bytes]:
    """A path in a tree of two branches a node; each of its beginnings is the parent of the next."""
    return [key(path[: i + 1]) for i in range(len(path))]


def name_of(block: Block) -> tuple[bytes, bytes]:
    """What media call a block."""
    return block.namespace.digest, block.key


class CacheMachine(RuleBasedStateMachine):
    """One daemon, its media, three sessions of one tenant and one of another."""

    @initialize(
        cold_blocks=st.sampled_from([0, 3, 8, 40]), hot_blocks=st.sampled_from([0, 0, 3]), limited=st.booleans()
    )
    def start(self, cold_blocks: int, hot_blocks: int, limited: bool) -> None:
        limits = {WARM: {"u": 3 * PAGE}, COLD: {"u": 2 * PAGE}} if limited else {}
        self.world = World(
            warm_bytes=SLABS * (PAGE + SLOTS * PAGE),
            cold_bytes=cold_blocks * PAGE,
            hot_bytes=hot_blocks * PAGE,
            tenant_bytes=limits,
            slab_bytes=SLOTS * PAGE,
            promote_hits=1,
        )
        self.spaces: dict[str, Namespace] = {}
        self.open_all()
        self.variants = count(1)
        self.tokens = count(1)
        self.told: list[Promise] = []
        self.offered: list[bytes] = []
        self.retiring: list[int] = []
        self.damaged: set[tuple[int, tuple[bytes, bytes]]] = set()  # tier, name: the core does not know it yet
        self.seen: Counter[str] = Counter()

    def see(self, what: str) -> None:
        """Count what the walks reach, so that one that reaches nothing is noticed."""
        self.seen[what] += 1

    def open_all(self) -> None:
        world = self.world
        self.spaces = {
            "chain": world.open("chain", "t"),
            "wide": world.open("wide", "t", nbytes=2 * PAGE, block_tokens=32),
            "set": world.open("set", "t", chain=False),
            "other": world.open("other", "u", cold_codec="int8kv"),
        }

    # -- what the dictionaries say ----------------------------------------------------------------------------

    def block(self, space: Namespace, path: str) -> Block | None:
        return space.blocks.get(key(path))

    def stored(self, space: Namespace, path: str) -> bool:
        block = self.block(space, path)
        whole = not space.chain or len(path) == 1 or self.stored(space, path[:-1])
        return block is not None and block.copies != 0 and whole

    def served(self, space: Namespace, path: str) -> bool:
        """Stored, with its prefix, and in a tier that is up."""
        block, up = self.block(space, path), self.world.cache.residency.up
        return self.stored(space, path) and any(block.copies & tier and up[tier] for tier in up)  # type: ignore[union-attr]

    def expected_prefix(self, space: Namespace, path: str) -> int:
        return next((i for i in range(len(path)) if not self.served(space, path[: i + 1])), len(path))

    def leases(self) -> list[Lease]:
        return list(self.world.cache.reads.leases)

    def remember(self, lease: Lease | None) -> None:
        if lease is not None:
            self.told = (self.told + promises(lease))[-REMEMBERED_PROMISES:]

    # -- puts -------------------------------------------------------------------------------------------------

    @rule(name=spaces, path=paths, start=st.integers(0, 5))
    def put_begin(self, name: str, path: str, start: int) -> None:
        start = min(start, len(path) - 1)
        self.world.begin(self.spaces[name], keys_of(path)[start:], key(path[:start]) if start else b"")

    @rule(which=choice, step=st.sampled_from(["copy", "copy", "finish", "cancel"]), stop=st.integers(1, 6))
    def put_step(self, which: int, step: str, stop: int) -> None:
        if not self.world.plans:
            return
        plan = self.world.plans[which % len(self.world.plans)]
        if step == "copy":
            self.world.copy(plan, next(self.variants), stop)
        elif step == "finish":
            self.finish(plan)
        else:
            self.world.cancel(plan)

    @rule(name=spaces, path=paths)
    def put(self, name: str, path: str) -> None:
        plan = self.world.begin(self.spaces[name], keys_of(path))
        self.world.copy(plan, next(self.variants))
        self.finish(plan)

    @rule(name=spaces, path=paths)
    def cool(self, name: str, path: str) -> None:
        """Store a path and leave it in cold only, as far as it goes."""
        self.put(name, path)
        self.save_everything()
        for i in reversed(range(len(path))):
            block = self.block(self.spaces[name], path[: i + 1])
            if block is not None and block.copies & COLD and block.copies & WARM and not block.slot.pins:  # type: ignore[union-attr]
                self.world.cache.residency.evict_warm(block)

    def finish(self, plan: PutPlan) -> None:
        cleared = plan.epoch != plan.namespace.epoch
        answers = self.world.finish(plan)
        if cleared:
            assert "STORED" not in answers
            return
        refused = False
        for item, answer in zip(plan.items, answers, strict=True):
            self.see(f"put {answer}")
            if answer == "STORED":
                assert not (refused and plan.namespace.chain), "a block was stored after one that was not"
                block = self.world.cache.index.find(plan.namespace, item.key)
                assert block is not None and block.copies & WARM
            refused = refused or answer not in ("STORED", "EXISTS")

    # -- reads ------------------------------------------------------------------------------------------------

    @rule(name=spaces, path=paths, start=st.integers(0, 5))
    def match(self, name: str, path: str, start: int) -> None:
        space, start = self.spaces[name], min(start, len(path) - 1)
        keys = packed(keys_of(path)[start:])
        reads = self.world.cache.reads
        found = reads.peek(space, keys)
        assert found == reads.match(space, keys)
        if start == 0 or not space.chain:
            served = [self.served(space, path[: i + 1]) for i in range(start, len(path))]
            assert found.blocks == (served.index(False) if False in served else len(served))
        assert found.hot + found.warm + found.cold == found.blocks
        bits = [bool(bit) for bit in reads.exists(space, keys)]
        assert bits == [self.served(space, path[: i + 1]) for i in range(start, len(path))]

    @rule(name=spaces, path=paths, session=sessions)
    def acquire(self, name: str, path: str, session: int) -> None:
        space = self.spaces[name]
        expected = self.expected_prefix(space, path)
        at_hand = [block is not None and block.slot is not None for block in map(space.blocks.get, keys_of(path))]
        lease = self.world.acquire(space, keys_of(path), session)
        self.remember(lease)
        got = 0 if lease is None else len(lease.parts[0].slots)
        assert got <= expected
        assert got >= min(expected, at_hand.index(False) if False in at_hand else len(path)), "what is there is given"
        assert lease is None or lease.tokens == got * space.block_tokens
        self.see(f"acquire {'all' if got == expected else 'cut'}")

    @rule(tier=tiers_below, load_s=st.sampled_from([1e-3, 1.0]))
    def learn(self, tier: int, load_s: float) -> None:
        """Loads of one block took so long; long enough ago for a probe."""
        costs, then_s = self.world.cache.gate.costs, self.world.now_s - 100.0
        for _ in range(WINDOW):
            costs.began(tier, then_s)
            costs.came(tier, PAGE, then_s + load_s)
            costs.ended(tier)

    @rule(name=spaces, path=paths, session=sessions, recompute_s=st.sampled_from([1e-4, 1e-1]))
    def acquire_gated(self, name: str, path: str, session: int, recompute_s: float) -> None:
        space, cache = self.spaces[name], self.world.cache
        group, worker = AcquireGroup(space, packed(keys_of(path))), WorkerCosts(recompute_s)
        expected = self.expected_prefix(space, path)
        verdict = cache.gate.judge(group, worker, self.world.now_s)
        assert verdict.blocks + verdict.withheld == expected
        below = verdict.blocks * space.block_tokens
        lease = cache.reads.acquire(session, space.tenant, [group], self.world.now_s, below)
        cache.gate.note(group, verdict, worker, self.world.now_s)
        self.remember(lease)
        assert (0 if lease is None else len(lease.parts[0].slots)) <= verdict.blocks
        self.see(f"gated {'all' if not verdict.withheld else 'none' if not verdict.blocks else 'cut'}")
        self.see(f"probes {bool(cache.gate.probes)}")

    @rule(left=chains, right=spaces, path=paths, other=paths, last=st.booleans(), session=sessions)
    def acquire_two(self, left: str, right: str, path: str, other: str, last: bool, session: int) -> None:
        first, second = self.spaces[left], self.spaces[right]
        if first.tenant != second.tenant:
            return
        groups = [AcquireGroup(first, packed(keys_of(path))), AcquireGroup(second, packed(keys_of(other)), last)]
        lease = self.world.acquire_all(groups, session)
        self.remember(lease)
        if lease is not None:
            self.see("acquire two")
            assert 0 < lease.tokens <= self.expected_prefix(first, path) * first.block_tokens
            for part in lease.parts:
                stop = lease.tokens // part.namespace.block_tokens
                assert part.first_block + len(part.slots) == stop

    @rule(name=spaces, path=paths)
    def prefetch(self, name: str, path: str) -> None:
        self.world.cache.reads.prefetch(self.spaces[name], packed(keys_of(path)))

    @rule(which=choice, upto=st.integers(0, 6))
    def release(self, which: int, upto: int) -> None:
        if not self.leases():
            return
        self.world.release(self.leases()[which % len(self.leases())], upto)

    @rule(which=choice)
    def hand_off(self, which: int) -> None:
        if not self.leases():
            return
        lease, token = self.leases()[which % len(self.leases())], key(("token", next(self.tokens)))
        self.world.cache.reads.leases.offer_handoff(lease, token)
        self.offered.append(token)

    @rule(which=choice, session=sessions)
    def adopt(self, which: int, session: int) -> None:
        if not self.offered:
            return
        token = self.offered.pop(which % len(self.offered))
        leases = self.world.cache.reads.leases
        lease = next((lease for lease in leases if lease.handoff == token), None)
        if lease is not None:
            pinned = lease.pinned
            assert leases.adopt(session, lease.tenant, token, self.world.now_s) is lease
            assert (lease.session_id, lease.pinned) == (session, pinned)
            self.see("adopted")

    @rule(session=sessions)
    def end_session(self, session: int) -> None:
        kept = [lease for lease in self.leases() if lease.session_id == session and lease.handoff]
        self.world.cache.reads.leases.end_session(session)
        assert [lease for lease in self.leases() if lease.session_id == session] == kept

    @rule(session=sessions, passed_s=st.sampled_from([1.0, TTL_S / 2, 2 * TTL_S]))
    def time_passes(self, session: int, passed_s: float) -> None:
        self.world.now_s += passed_s
        self.world.cache.reads.leases.renew(session, self.world.now_s)
        for lease in self.world.cache.reads.leases.expire(self.world.now_s):
            assert lease.session_id != session, "its session has just sent a frame"
        expired = self.world.keep_terms()
        if expired:
            self.see("expired")

    @rule(name=spaces, level=st.sampled_from([LOW, NORMAL, HIGH]), ttl_s=st.sampled_from([0, 0, 1.0]), limit=few)
    def treat(self, name: str, level: int, ttl_s: float, limit: int) -> None:
        space, free = self.spaces[name], limit > 4
        limits = {} if free else {WARM: limit * space.slot_bytes, COLD: limit * space.block_nbytes}
        self.world.cache.terms.set(space, Terms(level, ttl_s, limits))

    @rule(name=spaces, path=paths, pinned=st.booleans())
    def pin(self, name: str, path: str, pinned: bool) -> None:
        if self.stored(self.spaces[name], path):
            set_pinned(self.world.cache.residency, self.spaces[name].blocks[key(path)], pinned)

    # -- deleting ---------------------------------------------------------------------------------------------

    @rule(name=spaces, path=paths)
    def delete(self, name: str, path: str) -> None:
        space = self.spaces[name]
        self.world.cache.delete(space, key(path))
        assert not self.stored(space, path)

    @rule(name=spaces, sure=st.sampled_from([True, False, False]))
    def clear(self, name: str, sure: bool) -> None:
        if not sure:
            return
        space = self.spaces[name]
        epoch = space.epoch
        assert self.world.cache.clear(space) == epoch + 1
        assert not space.blocks

    @rule(limit=few)
    def reap(self, limit: int) -> None:
        self.world.cache.moves.reap(limit)

    @rule(tier=tiers, blocks=few)
    def evict(self, tier: int, blocks: int) -> None:
        orphans = self.world.cache.index.orphans
        self.world.cache.evict(tier, blocks * PAGE)
        assert self.world.cache.index.orphans <= orphans, "a parent was evicted before its child"

    # -- agents -----------------------------------------------------------------------------------------------

    @rule(limit=few)
    def load_begin(self, limit: int) -> None:
        for _ in range(min(limit, len(self.world.cache.reads.loads))):
            self.world.start_load()

    @rule(which=choice, answer=st.sampled_from([Answer.GOOD, Answer.GOOD, *Answer]))
    def load_end(self, which: int, answer: Answer) -> None:
        if self.world.loads:
            self.end_load(self.world.loads[which % len(self.world.loads)], answer)

    @rule()
    def load_everything(self) -> None:
        while self.world.cache.reads.loads:
            self.world.start_load()
        for load in list(self.world.loads):
            self.end_load(load, Answer.GOOD)

    def end_load(self, load: Load, answer: Answer) -> None:
        name = name_of(load.block)
        record = self.world.media[load.tier].get(name)
        self.world.end_load(load, answer)
        if record is not None and name not in self.world.media[load.tier]:
            # A load that began before a delete or clear may cost a newer copy of the same key: a miss, later.
            self.damaged.add((load.tier, name))
        self.see(f"load {answer.name} {load.slot.state.name}")

    @rule(limit=few, tier=st.sampled_from([COLD, COLD, HOT]))
    def save_begin(self, limit: int, tier: int) -> None:
        if self.world.saves:  # there is one saver
            return
        if tier == HOT:
            self.world.start_promotions(limit)
        elif self.world.cache.residency.up[COLD]:
            self.world.start_saves(limit)

    @rule(takes=st.sampled_from([0.6, 1.0, 1.0, 1.05, None]))
    def save_end(self, takes: float | None) -> None:
        if not self.world.saves:
            return
        save = self.world.saves[0]
        nbytes = save.copy.block.namespace.block_nbytes
        taken = takes is not None and self.world.cache.residency.up[save.tier]
        self.world.end_save(save, int((takes or 0) * nbytes) if taken else None)
        if taken:
            self.damaged.discard((save.tier, name_of(save.copy.block)))
        self.see(f"save tier {save.tier} {'done' if taken else 'failed'}")

    @rule()
    def save_everything(self) -> None:
        """Whatever cold can take; it must come to an end, and with it every delete has been carried out."""
        if self.world.cache.residency.up[COLD] and not self.world.saves:
            for _ in range(100):
                if not self.world.start_saves():
                    break
                while self.world.saves:
                    self.save_end(1.0)
            else:
                raise AssertionError("the saver never ends")

    @rule(tier=tiers_below, goes_up=st.sampled_from([True, True, False]))
    def agent_restarts(self, tier: int, goes_up: bool) -> None:
        capacity = self.world.cold_bytes if tier == COLD else self.world.hot_bytes
        if goes_up:
            self.world.cache.residency.up[tier] = capacity > 0
        else:
            self.world.lose_tier(tier)

    @rule(which=choice, gone=st.booleans())
    def damage(self, which: int, gone: bool) -> None:
        """A record is lost, or bits flip in it."""
        cold = self.world.media[COLD]
        if not cold:
            return
        name = sorted(cold)[which % len(cold)]
        if gone:
            del cold[name]
        else:
            cold[name] = cold[name]._replace(content=cold[name].content._replace(variant=-1))
        self.damaged.add((COLD, name))

    # -- slabs, restart ---------------------------------------------------------------------------------------

    @rule(name=spaces)
    def reclaim(self, name: str) -> None:
        if self.retiring:  # the keeper ends one thing before the next
            self.world.cache.allocator.retired(self.retiring.pop())
            return
        space = self.spaces[name]
        slab_id = self.world.cache.residency.lending.reclaim_slab(space.tenant, space.slot_bytes)
        if slab_id is not None:
            self.see("reclaimed")
            assert not self.world.cache.slots.in_slab(slab_id)
            self.retiring.append(slab_id)

    @rule(may=st.sampled_from([True, True, False]))
    def memory(self, may: bool) -> None:
        self.world.may_grow = may

    @rule(sure=st.sampled_from([True, False, False]))
    def restart(self, sure: bool) -> None:
        """Kill -9 and start again: everything but the cold medium is gone."""
        if not sure or not self.world.cold_bytes:
            return
        self.see("restarted")
        self.spaces = self.world.restart(self.spaces)
        self.told, self.offered, self.retiring = [], [], []
        self.world.cache.trim(COLD)
        for space in self.spaces.values():
            for name, block in space.blocks.items():
                assert block.copies in (0, COLD)
                assert bool(block.copies) == ((space.digest, name) in self.cold_names())

    def cold_names(self) -> set[tuple[bytes, bytes]]:
        return self.world.media[COLD].keys() - set(self.world.cache.residency.deletes[COLD])

    # -- what must hold ---------------------------------------------------------------------------------------

    @invariant()
    def everything_adds_up(self) -> None:
        check(self.world)

    @invariant()
    def a_reader_sees_its_own_bytes_or_none(self) -> None:
        for promise in self.told:
            content = self.world.memory.read(promise)
            if content is not None:
                assert (content.digest, content.key) == (promise.digest, promise.key)
                assert (content.epoch, content.checksum) == (promise.epoch, promise.checksum)

    @invariant()
    def a_lease_keeps_what_was_ready(self) -> None:
        for lease in self.leases():
            for part in lease.parts:
                for slot in part.slots[part.released :]:
                    if slot.state in (SlotState.READY, SlotState.RETIRING):
                        assert self.world.memory.generations[slot.ref] == slot.generation

    @invariant()
    def stored_prefixes_have_no_holes(self) -> None:
        for space in self.spaces.values():
            for block in space.blocks.values():
                while block.present and block.parent is not None:
                    assert block.parent.present
                    block = block.parent

    @invariant()
    def a_copy_below_is_on_its_medium(self) -> None:
        for block in live_blocks(self.world):
            name = name_of(block)
            for tier in (HOT, COLD):
                if block.copies & tier and (tier, name) not in self.damaged:
                    expected = block.lossy if tier == COLD and block.lossy else block.checksum
                    assert self.world.media[tier][name].checksum == expected
                    assert self.world.media[tier][name].content.epoch == block.namespace.epoch

    def teardown(self) -> None:
        """Everything ends, everything is cleared, and nothing is left."""
        if not hasattr(self, "world"):
            return
        world = self.world
        for plan in list(world.plans):
            self.finish(plan)
        while world.saves:
            self.save_end(1.0)
        self.load_everything()
        for session in range(1, 4):
            world.cache.reads.leases.end_session(session)
        world.cache.reads.leases.expire(world.now_s + 2 * TTL_S)
        check(world)
        for space in self.spaces.values():
            world.cache.clear(space)
        while world.cache.moves.reap(1):
            check(world)
        world.delete_all()
        check_nothing_left(world)
        for tier in (HOT, COLD):
            assert {(tier, name) for name in world.media[tier]} <= self.damaged
