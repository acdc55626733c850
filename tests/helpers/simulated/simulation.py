"""Runs a seeded simulation: workers, the daemon, its accidents, and checks after every step."""

from __future__ import annotations

import errno
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from kvstore.core.adaptive import Adaptive
from kvstore.core.block import COLD, HOT, WARM, Block, Blocks
from kvstore.core.leaf_lru import LeafLru
from kvstore.engine import agent_tier, mover, putting, saver
from kvstore.engine import store as store_module
from kvstore.protocol.errors import InvalidRequest, KVStoreError, NotFound, Unavailable
from kvstore.v1 import admin_pb2, types_pb2
from simulated.content import Contents, spec_of
from simulated.daemon import LEASE_TTL_S, Daemon, Disk, Setting
from simulated.holds import Holds, need
from simulated.stage import Actor, DaemonKilled, SimulationError, Stage, one_thread, replaced
from simulated.workers import Crowd, Space

PAGE = 4096
REST_EVERY = 4000  # steps between two times of rest
REST_STEPS_MAX = 12_000
CHECK_EVERY = 12  # steps between two full checks

_ORDERS = (
    "evict", "cool", "cool", "cool", "cool", "flush", "verify", "verify", "compact", "stats", "drain", "restart",
    "terms", "terms", "pin", "pin",
)  # fmt: skip
_RARE = ("kill daemon", "slow medium", "full disk", "memory", "catalogue")

Replacements = list[tuple[Any, str, Any]]


@dataclass
class Report:
    """What a simulation did."""

    seed: int
    asked: int  # steps
    steps: int
    counts: Counter[str]
    failure: str = ""
    lines: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.failure:
            return f"seed {self.seed}: {self.steps} steps, all held"
        last = "\n".join(self.lines)
        return (
            f"seed {self.seed}: after {self.steps} steps: {self.failure}\n{last}\n"
            f"again: python -m tests.simulation --seed {self.seed} --steps {self.asked}"
        )


def setting_of(rng: random.Random) -> Setting:
    """A small daemon, so that everything is short of room at times."""
    warm_bytes = rng.choice([16, 24, 24, 32, 48, 64]) * PAGE
    cold_bytes = rng.choice([0, 8, 24, 64, 64, 128, 128, 256]) << 10
    limits = {}
    if rng.random() < 0.3:
        limits = {WARM: {"u": warm_bytes // 3}, COLD: {"u": cold_bytes // 3}}
    return Setting(
        warm_bytes=warm_bytes,
        cold_bytes=cold_bytes,
        hot_bytes=rng.choice([0, 0, 4096, 16384]),
        tenant_bytes=limits,
        policy=rng.choice([LeafLru, Adaptive]),
        promote_hits=rng.choice([1, 2]),
        cold_bytes_per_day=rng.choice([0, 0, 0, 1 << 28]),
    )


def spaces() -> list[Space]:
    """Namespaces of two tenants: chains, sets, two size classes, a lossy one."""
    return [
        Space(spec_of("chain", 1024), "t"),
        Space(spec_of("twin", 1024), "t"),
        Space(spec_of("wide", 4352, block_tokens=32), "t"),
        Space(spec_of("set", 512, kind="set"), "t"),
        Space(spec_of("chain", 1024), "u"),
        Space(spec_of("lossy", 768, cold_codec="int8kv"), "u"),
    ]


class Simulation:
    """One seed."""

    def __init__(self, seed: int, check_every: int = CHECK_EVERY) -> None:
        self.seed = seed
        self.stage = Stage(seed)
        self.disk = Disk()
        self.contents = Contents()
        self.spaces = spaces()
        self._check_every = check_every
        self._setting = setting_of(self.stage.rng)
        self.disk.refuses = self.stage.happens(0.15)  # from before the first namespace is opened
        self._resting = False

    def run(self, steps: int, mutations: Callable[[Simulation], Replacements] | None = None) -> Report:
        """Take so many steps, and come to rest now and then and at the end. `mutations` break things on purpose."""
        failure = ""
        with ExitStack() as stack:
            stack.enter_context(_silence())
            stack.enter_context(replaced(self._replacements()))
            if mutations is not None:
                stack.enter_context(replaced(mutations(self)))
            try:
                self._run(steps)
            except SimulationError as error:
                failure = f"{error} at {_place(error)}"
            except (DaemonKilled, KeyboardInterrupt):
                raise
            except Exception as error:  # noqa: BLE001 - whatever the engine raises is a finding, and has a place
                failure = f"{type(error).__name__}: {error} at {_place(error)}"
        return Report(self.seed, steps, self.stage.steps, self.stage.counts, failure, tuple(self.stage.lines))

    # -- the course of things -------------------------------------------------------------------------------------

    def _run(self, steps: int) -> None:
        self._begin_life()
        try:
            while self.stage.steps < steps:
                stop = min(steps, self.stage.steps + REST_EVERY)
                while self.stage.steps < stop:
                    self._one()
                self._rest()
            self._empty()
        finally:
            self.daemon.vanish()

    def _one(self) -> None:
        try:
            self.stage.one()
        except DaemonKilled:
            self.stage.depth = 0
            self._begin_next_life()

    def _begin_life(self) -> None:
        self.daemon = Daemon(self.stage, self._setting, self.disk, self.contents)
        self.crowd = Crowd(self.stage, self.daemon, self.disk, self.contents, self.spaces)
        versions = _Versions(self.spaces)
        self.holds = Holds(self.daemon, self.disk, self.contents, versions)  # type: ignore[arg-type]
        self.stage.after_step = lambda: None
        self._cast([])
        self._wrap_pool()
        self.daemon.start()
        self.stage.after_step = self._check
        self._cast(
            [
                # One for each call that may be waiting while another comes.
                *(Actor(f"calls-{i}", 8, lambda: self.crowd.admits, self.crowd.act, depth_max=i) for i in range(4)),
                Actor("copies", 30, lambda: bool(self.crowd.tasks), self.crowd.task),
                Actor("operator", 4, lambda: not self._resting, self._operate, depth_max=1),
                Actor("accidents", 1, lambda: not self._resting, self._accident),
            ]
        )

    def _cast(self, others: list[Actor]) -> None:
        self.stage.cast([*self.daemon.actors(), Actor("clock", 6, lambda: True, self._pass_time), *others])

    def _begin_next_life(self) -> None:
        """What was in memory is gone."""
        self.stage.timers.clear()
        self.daemon.vanish()
        self.disk.busy = False
        self.disk.media[HOT].records.clear()
        self.disk.media[HOT].unheard.clear()
        self._begin_life()
        self.holds.fully()

    def _check(self) -> None:
        self.holds.cheaply()
        self.crowd.check_memory()
        if self.stage.steps % self._check_every == 0:
            self.holds.fully()

    def _pass_time(self) -> None:
        draw = self.stage.rng.random()
        if self._resting:
            self.stage.pass_time(0.2)
        elif draw < 0.0005:
            self.stage.note("half a minute passes")
            self.stage.pass_time(LEASE_TTL_S + 1)
        elif draw < 0.008:
            self.stage.pass_time(LEASE_TTL_S / 2 + 1)
        else:
            self.stage.pass_time(1.0 if draw < 0.02 else 0.08 * draw * draw)

    # -- rest -----------------------------------------------------------------------------------------------------

    def _rest(self) -> None:
        """Heal everything, send the workers away, and let what is on its way come to an end."""
        self.stage.note("-- rest")
        self._resting, self.crowd.admits = True, False
        self._heal()
        first = self.stage.steps
        self.crowd.leave()
        quiet = 0
        while quiet < 200:
            self._one()
            resting = self.holds.is_at_rest() and not self.crowd.tasks and not len(self.daemon.cache.reads.leases)
            quiet = quiet + 1 if resting else 0
            need(self.stage.steps - first < REST_STEPS_MAX, f"no rest after {REST_STEPS_MAX} steps")
        self.holds.at_rest()
        self.stage.count("times of rest")
        self._resting, self.crowd.admits = False, True

    def _empty(self) -> None:
        """Clear everything: nothing may be left."""
        self._resting, self.crowd.admits = True, False
        session = {tenant: self.daemon.store.open_session(_Peer(), "end", tenant) for tenant in ("t", "u")}
        for space in self.spaces:
            self.daemon.store.open_namespace(session[space.tenant], space.spec)
            self.daemon.store.clear(session[space.tenant], space.digest)
            space.version += 1
        for each in session.values():
            self.daemon.store.close_session(each)
        first = self.stage.steps
        while not self.holds.is_at_rest():
            self._one()
            need(self.stage.steps - first < REST_STEPS_MAX, "what was cleared does not go")
        self.holds.at_rest()
        cache = self.daemon.cache
        need(all(not b.used_bytes and not b.by_tenant for b in cache.residency.budgets.values()), "bytes are left")
        need(not any(len(n.blocks) for n in cache.index.namespaces.values()), "records are left")
        need(cache.index.orphans == 0, "orphans are left")

    def _heal(self) -> None:
        self.disk.refuses = False
        self.daemon.headroom_bytes = 1 << 40
        self.daemon.store.draining = False
        for medium in self.disk.media.values():
            medium.full, medium.delay_s = False, 0.0
        for agent in self.daemon.agents.values():
            if agent.process is not None and self._resting:
                agent.process.hung_until_s, agent.process.doom = 0.0, ""

    # -- operators and accidents ----------------------------------------------------------------------------------

    def _operate(self) -> None:
        store, rng = self.daemon.store, self.stage.rng
        name = rng.choice(_ORDERS)
        if name in ("restart", "drain") and (self.stage.depth or rng.random() < 0.85):
            return
        self.stage.count(f"operator: {name}")
        self.stage.note(f"operator: {name}")
        try:
            if name == "evict":
                store.evict(rng.choice([1, 2, 2, 3]), rng.randint(1, 8) * PAGE)
            elif name in ("flush", "cool"):
                _, left = store.flush(rng.choice([0.05, 2.0, 2.0]))
                if name == "cool" and left < 3:
                    store.evict(2, 64 * PAGE)
            elif name == "verify":
                store.verify(admin_pb2.VerifyRequest(tier=rng.choice([1, 2, 3]), limit=rng.choice([0, 3]), repair=True))
            elif name in ("compact", "stats"):
                getattr(store, name)()
            elif name in ("terms", "pin"):
                self._treat(name)
            elif name == "drain":
                store.draining = True
            else:
                self._restart_in_order()
        except KVStoreError as error:
            self.stage.count(f"operator: {type(error).__name__}")
            need(isinstance(error, InvalidRequest) or self.daemon.agents, f"{name}: {error}")

    def _treat(self, name: str) -> None:
        """Say how a namespace is treated, or pin one of its blocks, or unpin it."""
        if self.disk.busy:  # its catalogue has one lock
            return
        store, rng = self.daemon.store, self.stage.rng
        space = rng.choice(self.spaces)
        session = store.open_session(_Peer(), "operator", space.tenant)
        size = 4 * space.nbytes * rng.randint(1, 4)
        terms = types_pb2.NamespaceTerms(
            priority=rng.choice([0, 1, 2, 3]), ttl_ms=rng.choice([0, 0, 0, 4000, 30_000]),
            warm_bytes=rng.choice([0, 0, size]), cold_bytes=rng.choice([0, 0, size]),
        )  # fmt: skip
        try:
            if name == "terms":
                store.set_terms(session, admin_pb2.SetTermsRequest(namespace=space.digest, terms=terms))
            else:
                names = list(store._cache.namespace(space.digest, space.tenant).blocks)
                key = rng.choice(names) if names else bytes(32)
                store.pin(session, admin_pb2.PinRequest(key=key, namespace=space.digest, unpin=rng.random() < 0.4))
        except (NotFound, Unavailable) as error:  # it was never opened, or could not be written down
            self.stage.count(f"operator: {type(error).__name__}")
        finally:
            store.close_session(session)

    def _restart_in_order(self) -> None:
        """SIGTERM: calls end, what is dirty is saved, and another daemon starts."""
        self.crowd.admits = False
        self.stage.until(lambda: not self.crowd.tasks, None)
        self._resting = True
        for agent in self.daemon.agents.values():
            agent.medium.full = agent.medium.full and self.stage.happens(0.5)
        self.daemon.store.close(self.stage.rng.choice([0.0, 5.0]))
        need(not len(self.daemon.store._sessions), "a session outlived its daemon")
        for agent in self.daemon.agents.values():
            need(agent.process is None, "an agent outlived its daemon")
        self._resting = False
        raise DaemonKilled

    def _accident(self) -> None:
        rng = self.stage.rng
        accidents = (
            "kill agent", "hang agent", "slow medium", "full disk", "heal", "heal", "damage", "memory", "catalogue",
            "descriptors", "kill daemon", "lose record",
        )  # fmt: skip
        name = "kill daemon" if self.crowd.doomed else rng.choice(accidents)
        if name in _RARE and not self.crowd.doomed and rng.random() < 0.85:
            return
        agents = list(self.daemon.agents.values())
        agent = rng.choice(agents) if agents else None
        if agent is None and name not in ("heal", "memory", "catalogue", "descriptors", "kill daemon"):
            return
        self.stage.count(f"accident: {name}")
        self.stage.note(f"accident: {name}")
        if name == "heal":
            self._heal()
        elif name == "memory":
            self.daemon.headroom_bytes = 0
        elif name == "catalogue":
            self.disk.refuses = True
        elif name == "descriptors":
            self._no_descriptors = 2
        elif name == "kill daemon":
            raise DaemonKilled
        elif agent is not None:
            self._harm(name, agent)

    def _harm(self, name: str, agent: Any) -> None:
        rng, medium, process = self.stage.rng, agent.medium, agent.process
        if name in ("kill agent", "hang agent") and process is not None:
            if self.stage.happens(0.3):
                process.harm(name)
            else:
                process.doom = name
        elif name == "slow medium":
            medium.delay_s = rng.choice([0.01, 0.3])
        elif name == "full disk":
            medium.full = True
        elif name in ("damage", "lose record") and medium.records and medium.tier == COLD:
            ref = rng.choice(sorted(medium.records))
            medium.damaged.add(ref)
            record = medium.records[ref]
            if name == "damage":
                at = rng.randrange(len(record.data))
                flipped = record.data[:at] + bytes([record.data[at] ^ 0x10]) + record.data[at + 1 :]
                medium.records[ref] = record._replace(data=flipped)
            else:
                del medium.records[ref]

    def _wrap_pool(self) -> None:
        """Descriptors run out now and then."""
        pool = self.daemon.pool
        writable, make = pool.writable_fd, pool.make
        self._no_descriptors = 0

        def short() -> None:
            if self._no_descriptors:
                self._no_descriptors -= 1
                raise OSError(errno.EMFILE, "too many open files")

        def writable_fd(slab_id: int) -> tuple[int, int] | None:
            short()
            return writable(slab_id)

        def make_slab(slab_id: int, geometry: Any) -> None:
            short()
            make(slab_id, geometry)

        pool.writable_fd, pool.make = writable_fd, make_slab  # type: ignore[method-assign]

    # -- what is replaced -----------------------------------------------------------------------------------------

    def _replacements(self) -> Replacements:
        stage, rng = self.stage, self.stage.rng
        copy = putting._copy_hashed

        def copy_hashed(source: Any, target: Any) -> bytes:
            if stage.happens(0.3):
                stage.some(4)
            checksum = copy(source, target)
            if stage.happens(0.1):
                stage.some(3)
            return checksum

        sizes: Replacements = [
            (saver, "SAVE_BLOCKS", rng.choice([2, 4, 64])),
            (saver, "PROMOTE_BLOCKS", rng.choice([1, 8])),
            (saver, "_REAP_BLOCKS", rng.choice([1, 4, 256])),
            (saver, "_SETTLE_BLOCKS", rng.choice([1, 32])),
            (mover, "_LOAD_BLOCKS", rng.choice([1, 3, 64])),
            (agent_tier, "FRAME_ITEMS_MAX", rng.choice([1, 3, 1024])),
            (agent_tier, "DELETE_REFS_MAX", rng.choice([1, 8192])),
            (agent_tier, "SCAN_PAGE_RECORDS", rng.choice([2, 4000])),
        ]
        return [
            *one_thread(stage),
            *sizes,
            (agent_tier, "AgentChannel", lambda frames, timeout_s: frames),
            (store_module, "Catalogue", store_module.Catalogue),
            (putting, "_copy_hashed", copy_hashed),
            (Blocks, "__init__", _few_shards),
        ]


class _Shards(list[dict[bytes, Block]]):
    """Eight for the 256 first bytes of keys: the checks walk them all, again and again."""

    def __getitem__(self, first_byte: int) -> dict[bytes, Block]:  # type: ignore[override]
        return list.__getitem__(self, first_byte & 7)


def _few_shards(blocks: Blocks) -> None:
    blocks.shards = _Shards({} for _ in range(8))


@contextmanager
def _silence() -> Iterator[None]:
    """The engine tells of every accident, and there are thousands."""
    logger = logging.getLogger("kvstore")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Versions:
    """The version of each namespace's content, by digest."""

    def __init__(self, spaces: list[Space]) -> None:
        self._spaces = {space.digest: space for space in spaces}

    def __getitem__(self, digest: bytes) -> int:
        return self._spaces[digest].version


class _Peer:
    pid = 1
    uid = 1


def _place(error: BaseException) -> str:
    """The last lines of its traceback, innermost last."""

    def frames() -> Iterator[str]:
        at = error.__traceback__
        while at is not None:
            code = at.tb_frame.f_code
            yield f"{code.co_filename.rpartition('/')[2]}:{at.tb_lineno} {code.co_name}"
            at = at.tb_next

    return " < ".join(list(frames())[:-6:-1])
