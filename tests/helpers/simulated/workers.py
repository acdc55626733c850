"""Inference workers: they put, read, hand over, die and lie about their time, and check every byte that they get."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvstore.core.benefit import WorkerCosts
from kvstore.core.puts import PutStatus, Reject
from kvstore.core.slots import SlotState
from kvstore.engine import putting
from kvstore.engine.sessions import Session
from kvstore.protocol.errors import LeaseExpired, NotFound, PermissionDenied, QuotaExceeded, Unavailable
from kvstore.protocol.namespace import NamespaceSpec
from kvstore.v1 import kvstore_pb2
from simulated.content import Contents, checksum_of, keys_of
from simulated.daemon import Daemon, Disk
from simulated.holds import need
from simulated.stage import SimulationError, Stage

STAGING_BYTES = 96 << 10
WORKERS_MAX = 6
REMEMBERED = 300

Task = Generator[str, None, None]


@dataclass(eq=False)
class Space:
    """A namespace as its workers know it. `version`: of the bytes that belong under its keys now."""

    spec: NamespaceSpec
    tenant: str
    version: int = 0
    recent: deque[str] = field(default_factory=lambda: deque(maxlen=12))  # paths that were put

    def __post_init__(self) -> None:
        self.digest = self.spec.digest(self.tenant)
        self.nbytes = self.spec.block_nbytes
        self.is_chain = self.spec.kind == "chain"


@dataclass(eq=False)
class Promise:
    """What a lease told of one block, with the worker's mapping of its slab."""

    slab: Any  # the pool's; a mapping outlives the slab
    slot: int
    generation: int
    space: Space
    key: bytes
    expected: bytes

    def read(self) -> bytes | None:
        """Bytes that the reader has proof for, at one stroke."""
        if self.slab.generations[self.slot] != self.generation:
            return None
        return self.half(0) + self.half(1)

    def half(self, which: int) -> bytes:
        """Half of the bytes that lie there now."""
        start, nbytes = self.slab.geometry.offset(self.slot), self.space.nbytes
        cut = nbytes // 2
        part = slice(start, start + cut) if which == 0 else slice(start + cut, start + nbytes)
        return bytes(self.slab.segment.array[part].data)


@dataclass(eq=False)
class Held:
    """A lease as its worker knows it: promises of each part, from `first` block on."""

    lease_id: int
    parts: list[tuple[int, list[Promise | None]]]
    released: int = 0
    ended: bool = False


@dataclass(eq=False)
class Worker:
    """One session. A silent one sends no frame any more, and lives."""

    session: Session
    spaces: list[Space]
    leases: list[Held] = field(default_factory=list)
    slabs: dict[int, Any] = field(default_factory=dict)
    taken: list[tuple[int, int]] = field(default_factory=list)  # ranges of staging
    silent: bool = False

    @property
    def gone(self) -> bool:
        """Whether its session has ended."""
        return self.session.closed


class Crowd:
    """All workers of one daemon's life."""

    def __init__(self, stage: Stage, daemon: Daemon, disk: Disk, contents: Contents, spaces: list[Space]) -> None:
        self.workers: list[Worker] = []
        self.tasks: list[Task] = []
        self.admits = True
        self.doomed = False  # the daemon is killed soon, because of what has just been cleared
        self.calling: list[Space] = []  # whose put has begun and not ended
        self.offers: list[tuple[bytes, str, Held]] = []
        self.remembered: list[Promise] = []
        self._stage = stage
        self._rng = stage.rng
        self._daemon = daemon
        self._store = daemon.store
        self._disk = disk
        self._contents = contents
        self._spaces = spaces
        deeds = _DEEDS.items()
        self._urn = [(name, getattr(self, f"_{name}")) for name, weight in deeds for _ in range(weight)]

    # -- who is there ---------------------------------------------------------------------------------------------

    def act(self) -> None:
        """One deed of one worker."""
        if len(self.workers) < 2 or (len(self.workers) < WORKERS_MAX and self._stage.happens(0.01)):
            self._attach()
            return
        worker = self._rng.choice(self.workers)
        if worker.silent:
            if self._stage.happens(0.05):
                self._end_session(worker)
            return
        name, deed = self._rng.choice(self._urn)
        if self._daemon.keeper._starving and self._stage.happens(0.03):  # somebody waits for a slab
            name, deed = "clear", self._clear_now
        self._stage.count(name)
        self._store.touch(worker.session)
        worker.leases = [held for held in worker.leases if not held.ended]
        try:
            deed(worker)
        except (NotFound, LeaseExpired) as error:
            need(worker.gone, f"{name}: {error}")

    def task(self) -> None:
        """One step of something that takes several."""
        task = self._rng.choice(self.tasks)
        if next(task, "ended") == "ended":
            self.tasks.remove(task)

    def leave(self) -> None:
        """Everybody goes, without a word."""
        for worker in list(self.workers):
            self._end_session(worker)

    def check_memory(self) -> None:
        """A reader that follows an old promise sees its own bytes or none."""
        if self.remembered:
            promise = self._rng.choice(self.remembered)
            found = promise.read()
            if found is not None and found != promise.expected:
                raise SimulationError(self._wrong(promise, found))

    def _attach(self) -> None:
        tenant = self._rng.choice(["t", "t", "u"])
        session = self._store.open_session(_Peer(), "worker", tenant)
        try:
            need(self._store.attach_staging(session, STAGING_BYTES) == STAGING_BYTES, "a smaller staging segment")
        except QuotaExceeded:
            self._store.close_session(session)
            return
        worker = Worker(session, [space for space in self._spaces if space.tenant == tenant])
        for space in worker.spaces:
            if self._disk.busy:
                self._store.close_session(session)
                return
            found = self._store.open_namespace(session, space.spec)
            need(found.digest == space.digest, "another namespace was opened")
        self.workers.append(worker)
        self._stage.count("attach")

    def _end_session(self, worker: Worker) -> None:
        """It is killed, or ends without giving anything back."""
        self._stage.note(f"session {worker.session.id} ends with {len(worker.leases)} leases")
        self._store.close_session(worker.session)
        if worker in self.workers:
            self.workers.remove(worker)
        for held in worker.leases:
            held.ended = True

    def _go_silent(self, worker: Worker) -> None:
        """It is stopped, and its process lives: only time ends its leases."""
        worker.silent = True

    # -- puts -----------------------------------------------------------------------------------------------------

    def _path(self, space: Space) -> str:
        """One that was put of late, or any."""
        rng = self._rng
        if space.recent and rng.random() < 0.6:
            return rng.choice(space.recent)
        if not space.is_chain:
            return "".join(rng.choices("abcdefgh", k=rng.randint(1, 4)))
        return "".join(rng.choices("aaab", k=rng.randint(1, 7)))

    def _keys(self, space: Space, path: str = "") -> list[bytes]:
        path = path or self._path(space)
        return keys_of(path) if space.is_chain else list(dict.fromkeys(keys_of(c)[0] for c in path))

    def _request(self, worker: Worker) -> tuple[Space, list[bytes], kvstore_pb2.PutRequest, tuple[int, int]] | None:
        space = self._rng.choice(worker.spaces)
        path, parent = self._path(space), b""
        keys = self._keys(space, path)
        space.recent.append(path)
        if space.is_chain and self._rng.random() < 0.4:
            start = self._rng.randrange(len(keys))
            parent, keys = (keys[start - 1] if start else b""), keys[start:]
        room = self._range(worker, len(keys) * space.nbytes)
        if room is None:
            return None  # STAGING_BUSY, says the client
        staging = worker.session.staging
        assert staging is not None
        rows = [self._contents.of(space.digest, key, space.version, space.nbytes) for key in keys]
        staging.array[room[0] : room[1]] = np.frombuffer(b"".join(rows), np.uint8)
        checked = self._rng.random() < 0.5
        request = kvstore_pb2.PutRequest(
            namespace=space.digest,
            parent=parent,
            keys=b"".join(keys),
            staging_offset=room[0],
            checksums=b"".join(map(checksum_of, rows)) if checked else b"",
            block_nbytes=space.nbytes,
        )
        return space, keys, request, room

    def _range(self, worker: Worker, nbytes: int) -> tuple[int, int] | None:
        """A free range of the worker's staging segment; it is taken until its put has been answered."""
        for _ in range(3):
            start = self._rng.randrange(0, STAGING_BYTES - nbytes + 1, 64)
            stop = start + nbytes
            if all(stop <= a or b <= start for a, b in worker.taken):
                worker.taken.append((start, stop))
                return start, stop
        return None

    def _deadline_s(self) -> float:
        return self._stage.now_s + self._rng.choice([5.0, 5.0, 5.0, 0.004])

    def _put(self, worker: Worker) -> None:
        """A whole call; others act while it copies, or waits for a slab."""
        made = self._request(worker)
        if made is None:
            return
        space, keys, request, room = made
        if request.checksums and self._rng.random() < 0.2:
            self.tasks.append(self._scribble(worker, room))
        self._stage.note(f"put {space.spec.model} {len(keys)} blocks by session {worker.session.id}")
        self.calling.append(space)
        statuses, reasons = self._store.put(worker.session, request, self._deadline_s())
        self.calling.remove(space)
        self._answered(worker, space, keys, statuses, reasons, room)

    def _put_slowly(self, worker: Worker) -> None:
        """The same, a block at a time, so that it may end before or after others that began later."""
        made = self._request(worker)
        if made is not None:
            task = self._copying(worker, *made)
            if next(task, "ended") != "ended":
                self.tasks.append(task)

    def _copying(
        self,
        worker: Worker,
        space: Space,
        keys: list[bytes],
        request: kvstore_pb2.PutRequest,
        room: tuple[int, int],
    ) -> Task:
        store, staging = self._store, worker.session.staging
        if staging is None:
            return
        namespace = store._namespace(worker.session, space.digest)
        source = putting.source_of(request, staging.array, len(keys), space.nbytes)
        plan = store._begin_put(namespace, request, keys)
        if plan is None:
            worker.taken.remove(room)
            return
        deadline_s = self._deadline_s()
        self.calling.append(space)
        yield "goes on"
        for at in range(len(plan.items)):
            part = putting.Source(
                source.staging, source.offset + at * space.nbytes, source.stride, space.nbytes, source.expected(at)
            )
            putting.copy_in(plan.items[at : at + 1], part, store._pool, deadline_s)
            yield "goes on"
        self.calling.remove(space)
        with store._lock:
            store._cache.puts.finish(plan)
        store._mover.kick_saves()
        statuses = bytes(item.status for item in plan.items)
        self._answered(worker, space, keys, statuses, bytes(item.reason for item in plan.items), room)

    def _scribble(self, worker: Worker, room: tuple[int, int]) -> Task:
        """A worker that goes on writing into what it has put."""
        yield "goes on"
        staging = worker.session.staging
        if staging is not None and room in worker.taken:
            at = self._rng.randrange(*room)
            staging.array[at] ^= 0xFF
            self._stage.count("scribbles")

    def _answered(
        self, worker: Worker, space: Space, keys: list[bytes], statuses: bytes, reasons: bytes, room: tuple[int, int]
    ) -> None:
        worker.taken.remove(room)
        need(len(statuses) == len(reasons) == len(keys), "a put did not answer for every block")
        for key, status, reason in zip(keys, map(PutStatus, statuses), map(Reject, reasons), strict=True):
            self._stage.count(f"put {status.name}" if status is not PutStatus.REJECTED else f"put {reason.name}")
            need((status is PutStatus.REJECTED) == (reason is not Reject.NONE), "a status without its reason")
            if status is PutStatus.STORED:
                found = self._daemon.cache.index.find(self._daemon.cache.index.namespaces[space.digest], key)
                need(found is not None, "a block was said to be stored, and its prefix is not there")

    # -- reads ----------------------------------------------------------------------------------------------------

    def _match(self, worker: Worker) -> None:
        space = self._rng.choice(worker.spaces)
        keys = self._keys(space)
        costs = self._costs() if self._rng.random() < 0.2 else None
        found = self._store.match(worker.session, space.digest, b"".join(keys), costs)
        need(found.blocks <= len(keys) and found.hot + found.warm + found.cold == found.blocks, "a match miscounts")

    def _exists(self, worker: Worker) -> None:
        space = self._rng.choice(worker.spaces)
        keys = self._keys(space)
        bits = self._store.exists(worker.session, space.digest, b"".join(keys))
        if space.is_chain:
            whole = bits.find(0) if 0 in bits else len(bits)
            up = self._daemon.cache.residency.up
            need(not any(bits[whole:]) or not all(up[tier] for tier in self._daemon.agents), "a prefix has a hole")

    def _costs(self) -> WorkerCosts:
        return WorkerCosts(self._rng.choice([1e-6, 1e-4, 1e-2]), 0.0, self._rng.choice([0.0, 1e-10]))

    def _acquire(self, worker: Worker) -> None:
        """A prefix; or only what is worth its fetch, or what is exact, or in a set one block at the end."""
        space, rng = self._rng.choice(worker.spaces), self._rng
        keys, costs = self._keys(space), self._costs() if rng.random() < 0.15 else None
        mode = kvstore_pb2.ACQUIRE_MODE_LAST if rng.random() < 0.1 else kvstore_pb2.ACQUIRE_MODE_PREFIX
        exact = rng.random() < 0.3
        reply = self._store.acquire(worker.session, [(space.digest, b"".join(keys), mode)], exact, costs)
        self._leased(worker, [(space, keys)], reply, exact)

    def _acquire_two(self, worker: Worker) -> None:
        """Several ranks or pools at once: the longest position that all can serve."""
        rng = self._rng
        asked = [(space, self._keys(space)) for space in rng.choices(worker.spaces, k=2)]
        last = rng.random() < 0.5
        modes = [kvstore_pb2.ACQUIRE_MODE_PREFIX, kvstore_pb2.ACQUIRE_MODE_LAST if last else 1]
        groups = [(s.digest, b"".join(keys), mode) for (s, keys), mode in zip(asked, modes, strict=True)]
        self._leased(worker, asked, self._store.acquire(worker.session, groups), exact=False)

    def _leased(
        self, worker: Worker, asked: list[tuple[Space, list[bytes]]], reply: kvstore_pb2.LeaseReply, exact: bool
    ) -> None:
        if not reply.lease_id:
            self._stage.count("acquire: nothing")
            return
        held = Held(reply.lease_id, [])
        for (space, keys), group in zip(asked, reply.groups, strict=True):
            held.parts.append((group.first_block, self._promises(worker, space, keys, group, exact)))
        self._stage.count("blocks leased", sum(len(promises) for _, promises in held.parts))
        worker.leases.append(held)
        if reply.ready < len(held.parts[0][1]) and self._rng.random() < 0.6:
            self._wait_for(worker, held)

    def _promises(
        self, worker: Worker, space: Space, keys: list[bytes], group: Any, exact: bool
    ) -> list[Promise | None]:
        need(group.namespace == space.digest and group.block_nbytes == space.nbytes, "a group of another namespace")
        slots = np.frombuffer(group.slots, np.uint32).tolist()
        slabs = np.frombuffer(group.slab_ids, np.uint32).tolist()
        generations = np.frombuffer(group.generations, np.uint64).tolist()
        self._map(worker, slabs)
        found: list[Promise | None] = []
        for i, (slab_id, slot, generation) in enumerate(zip(slabs, slots, generations, strict=True)):
            key, lossy = keys[group.first_block + i], bool(group.lossy and group.lossy[i])
            need(not (lossy and exact), "a lossy copy was given to who wants exact ones")
            expected = self._contents.of(space.digest, key, space.version, space.nbytes, lossy)
            need(group.checksums[16 * i : 16 * i + 16] == checksum_of(expected), "a lease gives another checksum")
            slab = worker.slabs.get(slab_id)
            promise = None if slab is None else Promise(slab, slot, generation, space, key, expected)
            if promise is not None:
                self.remembered.append(promise)
            found.append(promise)
        del self.remembered[:-REMEMBERED]
        return found

    def _map(self, worker: Worker, slab_ids: list[int]) -> None:
        missing = [slab_id for slab_id in dict.fromkeys(slab_ids) if slab_id not in worker.slabs]
        if not missing:
            return
        for info, fd in self._store.map_slabs(worker.session, missing):
            os.close(fd)
            worker.slabs[info.slab_id] = self._daemon.pool._slabs[info.slab_id]

    def _begin_read(self, worker: Worker) -> None:
        """Copy some blocks of a lease: generation, half, half, generation."""
        readable = [held for held in worker.leases if not held.ended]
        if readable:
            held = self._rng.choice(readable)
            part = self._rng.randrange(len(held.parts))
            first, promises = held.parts[part]
            at = self._rng.randrange(len(promises))
            if first + at >= held.released and promises[at] is not None:
                self.tasks.append(self._reading(worker, held, part, at))

    def _reading(self, worker: Worker, held: Held, part: int, at: int) -> Task:
        promise = held.parts[part][1][at]
        assert promise is not None
        sure = self._is_sure(worker, held, part, at)
        good = promise.slab.generations[promise.slot] == promise.generation
        data = promise.half(0)
        yield "goes on"
        data += promise.half(1)
        good = good and promise.slab.generations[promise.slot] == promise.generation
        sure = sure and self._is_sure(worker, held, part, at)
        need(good or not sure, "a block went while a lease held it")
        if good and data != promise.expected:
            raise SimulationError(self._wrong(promise, data))
        self._stage.count("blocks read" if good else "blocks not readable")

    def _is_sure(self, worker: Worker, held: Held, part: int, at: int) -> bool:
        """Whether the lease holds the block now, and its bytes are there."""
        if held.ended or worker.gone:
            return False
        lease = self._daemon.cache.reads.leases._leases.get(held.lease_id)
        if lease is None or lease.session_id != worker.session.id:
            return False
        mine = lease.parts[part]
        return at >= mine.released and mine.slots[at].state in (SlotState.READY, SlotState.RETIRING)

    def _wrong(self, promise: Promise, found: bytes | None) -> str:
        owner = None if found is None else self._contents.owner(found)
        said = "a mixture" if owner is None else f"key {owner.key[:4].hex()} version {owner.version}"
        return f"WRONG BYTES: {said} under key {promise.key[:4].hex()} of {promise.space.spec.model}"

    def _wait(self, worker: Worker) -> None:
        """Poll, or wait until some blocks are readable."""
        if worker.leases:
            self._wait_for(worker, self._rng.choice(worker.leases))

    def _wait_for(self, worker: Worker, held: Held) -> None:
        stop = max(first + len(promises) for first, promises in held.parts)
        stop = self._rng.randint(1, stop)
        timeout_s = self._rng.choice([0.0, 0.0, 0.1, 2.0])
        try:
            ready, lost = self._store.wait(worker.session, held.lease_id, stop, timeout_s)
        except LeaseExpired:
            held.ended = True
            return
        except PermissionDenied:
            need(held.ended, "a lease is another session's, and was not adopted")
            return
        lease = self._daemon.cache.reads.leases._leases.get(held.lease_id)
        need(lease is not None and ready <= stop, "a wait for a lease that is not there")
        for part in lease.parts:  # type: ignore[union-attr]
            for i in range(part.released, min(ready - part.first_block, len(part.slots))):
                need(part.slots[i].state is not SlotState.FILLING, "a block was called ready while it is filled")
                need(part.slots[i].state is not SlotState.FREE, "a block was called ready, and is lost")
        self._stage.count("wait: all" if ready >= stop else "wait: lost" if lost else "wait: not yet")

    def _read_old(self, worker: Worker) -> None:
        for _ in range(3):
            self.check_memory()

    # -- leases ---------------------------------------------------------------------------------------------------

    def _release(self, worker: Worker) -> None:
        if worker.leases:
            held = self._rng.choice(worker.leases)
            self._store.release(worker.session, held.lease_id, 0)
            held.ended = True

    def _release_to(self, worker: Worker) -> None:
        if worker.leases:
            held = self._rng.choice(worker.leases)
            held.released = max(held.released, self._rng.randint(1, 4))
            self._store.release(worker.session, held.lease_id, held.released)

    def _handoff(self, worker: Worker) -> None:
        if worker.leases:
            held = self._rng.choice(worker.leases)
            try:
                token = self._store.handoff(worker.session, held.lease_id)
            except LeaseExpired:
                held.ended = True
                return
            self.offers = [offer for offer in self.offers if offer[2] is not held]
            self.offers.append((token, worker.session.tenant, held))

    def _adopt(self, worker: Worker) -> None:
        if not self.offers:
            return
        token, tenant, held = self.offers.pop(self._rng.randrange(len(self.offers)))
        try:
            reply = self._store.adopt(worker.session, token)
        except (NotFound, PermissionDenied) as error:
            need(isinstance(error, NotFound) or tenant != worker.session.tenant, f"adopt: {error}")
            return
        need(tenant == worker.session.tenant, "a lease of another tenant was adopted")
        need(reply.lease_id == held.lease_id, "another lease was adopted")
        for group in reply.groups:
            self._map(worker, np.frombuffer(group.slab_ids, np.uint32).tolist())
        held.ended = True  # for who had it
        worker.leases.append(Held(held.lease_id, held.parts, held.released))
        self._stage.count("adopted")

    def _renew(self, worker: Worker) -> None:
        _, retired = self._store.renew(worker.session)
        for slab_id in retired:
            worker.slabs.pop(slab_id, None)

    # -- hints and deletes ----------------------------------------------------------------------------------------

    def _prefetch(self, worker: Worker) -> None:
        space = self._rng.choice(worker.spaces)
        self._store.prefetch(worker.session, space.digest, b"".join(self._keys(space)))

    def _delete(self, worker: Worker) -> None:
        space = self._rng.choice(worker.spaces)
        key = self._keys(space)[-1]
        self._store.delete(worker.session, space.digest, key)
        need(self._store.exists(worker.session, space.digest, key) == b"\0", "a deleted block is there")

    def _clear(self, worker: Worker) -> None:
        if self._rng.random() < 0.04:
            self._clear_now(worker)

    def _clear_now(self, worker: Worker) -> None:
        if self._disk.busy:
            return
        called = [space for space in self.calling if space in worker.spaces]  # where it matters most
        space = self._rng.choice(called[-2:] or worker.spaces)
        namespace = self._daemon.cache.index.namespaces[space.digest]
        epoch = namespace.epoch
        self._stage.note(f"clear {space.spec.model}")
        try:
            got = self._store.clear(worker.session, space.digest)
        except Unavailable:
            need(namespace.epoch == epoch, "a clear that failed has cleared")
            return
        need(got == epoch + 1 == namespace.epoch and not len(namespace.blocks), "a cleared namespace has blocks")
        space.version += 1
        self.doomed = self.doomed or self._stage.happens(0.1)


_DEEDS = {
    "put": 14, "put_slowly": 12, "match": 3, "exists": 2, "acquire": 14, "acquire_two": 5, "begin_read": 24, "wait": 6,
    "read_old": 3, "release": 9, "release_to": 5, "handoff": 2, "adopt": 2, "renew": 3, "prefetch": 3, "delete": 1,
    "clear": 1, "end_session": 1, "go_silent": 1,
}  # fmt: skip


class _Peer:
    pid = 1
    uid = 1
