"""One life of a daemon: the real store with its core, pool, mover, saver, keeper and tiers, and no thread of theirs."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from kvstore.core.block import COLD, HOT
from kvstore.core.moves import Copy
from kvstore.core.policy import PolicyFactory
from kvstore.core.puts import PutPlan
from kvstore.engine import store as store_module
from kvstore.engine.catalogue import Catalogue
from kvstore.engine.store import Store, StoreConfig
from kvstore.engine.supervisor import BACKOFF_MIN_S, AgentSupervisor
from kvstore.protocol.errors import KVStoreError
from kvstore.tiers.base import BlockRef
from kvstore.v1 import admin_pb2, agent_pb2
from simulated.agents import Medium, Process
from simulated.content import Contents
from simulated.stage import Actor, LoopEvent, SimulationError, Stage

LEASE_TTL_S = 30.0
_BACKOFF_MAX_S = 0.8  # shorter than the real one: accidents are more frequent here
_NAMES = {HOT: "hot", COLD: "cold"}


@dataclass(frozen=True)
class Setting:
    """How a daemon is started. Sizes in bytes."""

    warm_bytes: int
    cold_bytes: int
    hot_bytes: int
    tenant_bytes: Mapping[int, Mapping[str, int]]
    policy: PolicyFactory
    promote_hits: int
    cold_bytes_per_day: int


@dataclass
class Disk:
    """What outlives a daemon: its catalogue, the mark of a clean end, and the media."""

    namespaces: bytes = b""
    clean: bool = False
    refuses: bool = False  # to write the catalogue
    busy: bool = False  # the catalogue is being written
    media: dict[int, Medium] = field(default_factory=lambda: {HOT: Medium(HOT), COLD: Medium(COLD)})


class Shelf(Catalogue):
    """A catalogue whose file is a value."""

    def __init__(self, disk: Disk, stage: Stage) -> None:
        super().__init__(Path("/nowhere"))
        self._disk = disk
        self._stage = stage

    def load(self) -> None:
        message = admin_pb2.ListNamespacesResponse.FromString(self._disk.namespaces)
        self.entries = {entry.namespace: entry for entry in message.namespaces}

    def take_clean_mark(self) -> bool:
        clean, self._disk.clean = self._disk.clean, False
        return clean

    def leave_clean_mark(self) -> None:
        self._disk.clean = True

    def _write(self) -> None:
        if self._disk.refuses:
            raise OSError(errno.ENOSPC, "no space left on device")
        data = admin_pb2.ListNamespacesResponse(namespaces=list(self.entries.values())).SerializeToString()
        self._disk.busy = True
        try:
            before = self._stage.happens(0.5)  # the daemon may be killed before the file is there, or after
            if before:
                self._disk.namespaces = data
            self._stage.some(3)
            self._disk.namespaces = data
        finally:
            self._disk.busy = False


class Saving(NamedTuple):
    """A copy under way."""

    copy: Copy
    tier: int


class Supervision:
    """Keeps the agent of a tier: the steps of its supervisor's thread."""

    def __init__(self, stage: Stage, tier: AgentSupervisor, medium: Medium, contents: Contents) -> None:
        self.tier = tier
        self.medium = medium
        self._stage = stage
        self._contents = contents
        self._start_s = 0.0
        self._delay_s = BACKOFF_MIN_S
        self._last: Process | None = None

    @property
    def process(self) -> Process | None:
        """The agent that lives, if one does."""
        process: Any = self.tier._process
        return None if process is None or process.reaped.is_set() else process

    def ready(self) -> bool:
        life = self.tier._life
        if life is not None:
            return life.process.reaped.is_set()
        return not self.tier._closing.is_set() and self._stage.now_s >= self._start_s

    def step(self) -> None:
        """Mourn the last agent, or start the next."""
        tier, life = self.tier, self.tier._life
        if life is not None:
            tier._state = f"down: {life.process.ending}"
            tier._mourn(life)
            self._start_s = self._stage.now_s + self._delay_s
            self._delay_s = min(2 * self._delay_s, _BACKOFF_MAX_S)
            return
        self._last = process = Process(self._stage, self.medium, self._contents)
        tier._process = process  # type: ignore[assignment]
        try:
            tier._introduce(process)  # type: ignore[arg-type]
            tier._started.set()
            tier._on_up()
        except KVStoreError as error:
            process.end(str(error))
            tier._state = f"down: {error}"
            self._start_s = self._stage.now_s + self._delay_s

    def news(self) -> bool:
        return self._last is not None and self._last.frames.has_news()

    def hear(self) -> None:
        assert self._last is not None
        self._last.frames.hear()

    def can_work(self) -> bool:
        return self._last is not None and self._last.has_work()

    def work(self) -> None:
        assert self._last is not None
        self._last.step()


class SaverThread:
    """The saver's thread as its close() sees it: it ends after what is under way."""

    def __init__(self, stage: Stage) -> None:
        self.ended = False
        self._stage = stage

    def is_alive(self) -> bool:
        return not self.ended

    def join(self, timeout: float) -> None:
        self._stage.until(lambda: self.ended, timeout)


class Daemon:
    """A store and its agents, and the steps of the threads that they would have."""

    def __init__(self, stage: Stage, setting: Setting, disk: Disk, contents: Contents) -> None:
        self.stage = stage
        self.headroom_bytes = 1 << 40
        self.plans: list[PutPlan] = []
        self.savings: list[Saving] = []
        self.agents: dict[int, Supervision] = {}
        self._disk = disk
        store_module.Catalogue = lambda folder: Shelf(disk, stage)  # type: ignore[misc, assignment]
        config = StoreConfig(
            state_dir=Path("/nowhere"),
            warm_bytes=setting.warm_bytes,
            cold_bytes=setting.cold_bytes,
            hot_bytes=setting.hot_bytes,
            tenant_bytes={tier: dict(limits) for tier, limits in setting.tenant_bytes.items()},
            lease_ttl_s=LEASE_TTL_S,
            lock_pages=False,
            policy=setting.policy,
            promote_hits=setting.promote_hits,
            cold_bytes_per_day=setting.cold_bytes_per_day,
        )
        self.store = Store(config, lambda: self.headroom_bytes, lambda: stage.now_s)
        self.cache = self.store._cache
        self.pool = self.store._pool
        self.mover = self.store._mover
        self.saver = self.mover._saver
        self.keeper = self.store._slabs
        self._tick_s = stage.now_s + 1.0
        self.saver_wake = self.saver._wake = LoopEvent(stage)  # type: ignore[assignment]
        self.keeper_wake = self.keeper._wake = LoopEvent(stage)  # type: ignore[assignment]
        self._saver_thread = self.saver._thread = SaverThread(stage)  # type: ignore[assignment]
        self._track()
        for tier, nbytes in ((COLD, setting.cold_bytes), (HOT, setting.hot_bytes)):
            if nbytes:
                self._add_agent(tier, nbytes, contents)

    def _add_agent(self, tier: int, nbytes: int, contents: Contents) -> None:
        config = agent_pb2.AgentConfig(tier=_NAMES[tier], capacity_bytes=nbytes)
        agent = AgentSupervisor(
            _NAMES[tier],
            config,
            on_up=lambda: self.store.tier_up(tier, agent.capacity_bytes),
            on_down=lambda: self.store.tier_down(tier),
        )
        self.store.attach_tier(tier, agent)
        self.agents[tier] = Supervision(self.stage, agent, self._disk.media[tier], contents)

    def start(self) -> None:
        """Start the agents, then recover."""
        for agent in self.agents.values():
            while agent.tier._life is None:
                agent.step()
        self.store._recover()
        self._disk.media[COLD].unheard.clear()  # whatever it holds has been found

    def _track(self) -> None:
        """Know which puts and copies are under way: the core's own callers do, on their stacks."""
        puts, moves, media = self.cache.puts, self.cache.moves, self._disk.media
        begin, finish, cancel = puts.begin, puts.finish, puts.cancel
        begin_saves, saved = moves.begin_saves, moves.saved
        begin_promotions, promoted = moves.begin_promotions, moves.promoted

        def tracked_begin(*arguments: Any) -> PutPlan:
            plan = begin(*arguments)
            self.plans.append(plan)
            return plan

        def ends(plan: PutPlan, end: Callable[[PutPlan], None]) -> None:
            self.plans = [other for other in self.plans if other is not plan]
            end(plan)

        def tracked_saves(*arguments: Any, **named: Any) -> list[Copy]:
            batch = begin_saves(*arguments, **named)
            self.savings += [Saving(copy, COLD) for copy in batch]
            return batch

        def tracked_promotions(count: int) -> list[Copy]:
            batch = begin_promotions(count)
            self.savings += [Saving(copy, HOT) for copy in batch]
            return batch

        def told(copy: Copy, tier: int, stored: bool) -> None:
            self.savings.remove(Saving(copy, tier))
            self.stage.count(f"saved to {_NAMES[tier]}", stored)
            if stored:
                media[tier].unheard.discard(BlockRef(copy.block.namespace.digest, copy.block.key))

        def tracked_saved(copy: Copy, stored_bytes: int | None, lossy: bytes = b"") -> None:
            told(copy, COLD, stored_bytes is not None)
            saved(copy, stored_bytes, lossy)

        def tracked_promoted(copy: Copy, stored: bool) -> None:
            told(copy, HOT, stored)
            promoted(copy, stored)

        puts.begin = tracked_begin  # type: ignore[method-assign, assignment]
        puts.finish = lambda plan: ends(plan, finish)  # type: ignore[method-assign]
        puts.cancel = lambda plan: ends(plan, cancel)  # type: ignore[method-assign]
        moves.begin_saves, moves.saved = tracked_saves, tracked_saved  # type: ignore[method-assign, assignment]
        moves.begin_promotions, moves.promoted = tracked_promotions, tracked_promoted  # type: ignore[method-assign]

    # -- the threads' steps ---------------------------------------------------------------------------------------

    def actors(self) -> list[Actor]:
        """The engine's threads, and those of its agents."""
        cast = [
            Actor("loader-0", 5, self._has_loads, self.load),
            Actor("loader-1", 3, self._has_loads, self.load),
            Actor("saver", 6, self._saver_ready, self.save),
            Actor("slab-keeper", 3, self.keeper_wake.awake, self.keeper._work),
            Actor("ticker", 2, lambda: self.stage.now_s >= self._tick_s, self.tick),
        ]
        for tier, agent in self.agents.items():
            name = _NAMES[tier]
            cast += [
                Actor(f"{name} agent", 14, agent.can_work, agent.work),
                Actor(f"{name} receiver", 8, agent.news, agent.hear),
                Actor(f"{name} keeper", 2, agent.ready, agent.step),
            ]
        return cast

    def _has_loads(self) -> bool:
        return bool(self.cache.reads.loads) and not self.mover._closing

    def _saver_ready(self) -> bool:
        return self.saver_wake.awake() and not self._saver_thread.ended

    def save(self) -> None:
        """A turn of the saver's loop, or of its end."""
        if not self.saver._closing:
            self.saver._step()
        elif self.saver._under_way:
            self.saver._end_save()
        else:
            self._saver_thread.ended = True

    def load(self) -> None:
        """A loader's step, without its wait for work."""
        with self.store._lock:
            tier, batch = self.mover._next_loads()
        if batch:
            self.stage.count("loads", len(batch))
            self.mover._load(tier, batch)

    def tick(self) -> None:
        """Leases end whose sessions have been silent, and no others."""
        self._tick_s = self.stage.now_s + 1.0
        heard = {session.id: session.last_frame_s for session in self.store._sessions.all()}
        before = [lease for lease in self.cache.reads.leases if not lease.handoff]
        self.store._tick()
        ended = set(before) - set(self.cache.reads.leases)
        self.stage.count("leases expired", len(ended))
        if any(self.stage.now_s - heard[lease.session_id] < LEASE_TTL_S for lease in ended):
            raise SimulationError("a lease ended before its time")

    # -- its end --------------------------------------------------------------------------------------------------

    def vanish(self) -> None:
        """The process is killed, and its agents with it. What the kernel would free is freed here."""
        for agent in self.agents.values():
            if agent.process is not None:
                agent.process.end()
            slabs = agent.tier._slabs
            while slabs:
                os.close(slabs.popitem()[1][0])
        for session in self.store._sessions.all():
            if session.staging is not None:
                session.staging.close()
        self.pool.close()
