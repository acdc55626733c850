"""Makes and retires slabs: ahead of demand on a thread of its own, at once where a class has none."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from kvstore.core.block import Namespace
from kvstore.core.cache import BlockCache
from kvstore.core.lending import ClassKey
from kvstore.core.slabs import Slab
from kvstore.engine.guarded import guarded
from kvstore.protocol.slab import SlabGeometry
from kvstore.tiers.warm import WarmPool

# Left to the rest of the machine whatever --warm-bytes says.
_RESERVE_BYTES = 128 << 20
_RETRY_S = 1.0

_log = logging.getLogger(__name__)


class Need(NamedTuple):
    """What a class asks for: so many free slots, from a certain class where that matters."""

    slots: int
    lender: ClassKey | None = None


class SlabKeeper:
    """Moves memory between size classes and tenants as demand shifts.

    The first class that is opened gets populated slabs until the pool is full. A class that comes later and finds
    nothing takes slabs from those that need them least.
    """

    def __init__(
        self,
        lock: threading.Lock,
        cache: BlockCache,
        pool: WarmPool,
        headroom: Callable[[], int],
        retired: Callable[[int], None],
    ) -> None:
        """`headroom` says how many bytes the machine and the cgroup can still give; `retired` is told slab ids."""
        self._lock = lock
        self._cache = cache
        self._pool = pool
        self._headroom = headroom
        self._retired = retired
        self.changed = threading.Condition(lock)  # a slab was made, or none can be
        self._wake = threading.Event()
        self._closing = False
        self._demand: ClassKey | None = None
        self._starving: dict[ClassKey, Need] = {}
        self._unpopulated: deque[int] = deque()
        self.short_of_memory = 0
        cache.residency.grow = self._grow_now
        self._thread = threading.Thread(target=self._run, name="slab-keeper", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def expect(self, namespace: Namespace) -> None:
        """Blocks of this namespace are about to come."""
        self._demand = (namespace.tenant, namespace.slot_bytes)
        self._wake.set()

    def starve(self, namespace: Namespace, slots: int) -> None:
        """Blocks of this namespace found too few of `slots` slots: take slabs from other classes. Under the lock."""
        self._starving[(namespace.tenant, namespace.slot_bytes)] = Need(slots)
        self._wake.set()

    def balance(self) -> None:
        """Let classes that drop their own blocks borrow from one that has much older ones. Under the lock."""
        pressed = self._cache.residency.pressed
        while pressed:
            key, _ = pressed.popitem()
            lender = None if key in self._starving else self._cache.residency.lending.lender(key)
            if lender is not None:
                self._starving[key] = Need(1, lender)
                self._wake.set()

    def await_slabs(self, namespace: Namespace, timeout_s: float) -> None:
        """Wait until the class that starves has been fed, or cannot be. Under the lock, which the wait lets go."""
        key = (namespace.tenant, namespace.slot_bytes)
        self.changed.wait_for(lambda: key not in self._starving or self._closing, timeout_s)

    def close(self) -> None:
        """Stop, and give all memory back."""
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(10.0)
        self._pool.close()

    # -- at once, under the engine's lock ---------------------------------------------------------------------

    def _grow_now(self, tenant: str, slot_size: int) -> bool:
        """A slab without its pages: about 100 µs for any size. They are taken by its first user or the thread."""
        slab = self._planned(tenant, slot_size)
        if slab is None:
            return False
        try:
            self._pool.make(slab.slab_id, slab.geometry)
        except (OSError, MemoryError, ValueError) as error:
            self._cache.allocator.failed(slab.slab_id)
            _log.warning("cannot make a slab: %s", error)
            return False
        self._cache.allocator.made(slab.slab_id)
        self._unpopulated.append(slab.slab_id)
        self._wake.set()
        return True

    def _planned(self, tenant: str, slot_size: int) -> Slab | None:
        slab = self._cache.allocator.plan(tenant, slot_size)
        if slab is not None and self._room() < slab.geometry.segment_bytes + _RESERVE_BYTES:
            self._cache.allocator.failed(slab.slab_id)
            self.short_of_memory += 1
            return None
        return slab

    def _room(self) -> int:
        try:
            return self._headroom()
        except (OSError, ValueError) as error:
            _log.warning("cannot tell how much memory there is: %s", error)
            return 0

    # -- on the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing:
            if not guarded(self._work):  # who starves is not kept waiting by a defect, nor asks for it again and again
                with self._lock:
                    self._starving.clear()
                    self._demand = None
                    self.changed.notify_all()

    def _work(self) -> None:
        if not self._step():
            self._wake.wait(_RETRY_S if self._starving else None)
            self._wake.clear()

    def _step(self) -> bool:
        """Do one piece of work; False where there is none."""
        if self._unpopulated:
            self._populate(self._unpopulated.popleft())
            return True
        with self._lock:
            starving = next(iter(self._starving), None)
        if starving is not None:
            return self._feed(starving)
        return self._demand is not None and self._make(self._demand)

    def _feed(self, key: ClassKey) -> bool:
        """One step towards slabs for a class that has too few free slots."""
        allocator = self._cache.allocator
        with self._lock:
            need = self._starving[key]
            done = allocator.free_slots(*key) >= need.slots
            reclaimed = (
                None if done or self._can_plan(key) else self._cache.residency.lending.reclaim_slab(*key, need.lender)
            )
        if reclaimed is not None:
            self._drop(reclaimed)
        made = not done and self._make(key)
        with self._lock:
            # A large slot can need several small slabs: ask on until there are enough, or nobody has any to give.
            if done or not (made or reclaimed is not None) or allocator.free_slots(*key) >= need.slots:
                self._starving.pop(key, None)
            self.changed.notify_all()
        return made or reclaimed is not None

    def _can_plan(self, key: ClassKey) -> bool:
        """Whether there is room for a slab of half its size at least: a splinter would only be asked for again."""
        allocator = self._cache.allocator
        slab = allocator.plan(*key)
        if slab is None:
            return False
        allocator.failed(slab.slab_id)
        whole = SlabGeometry.for_class(key[1], allocator.target_bytes)
        return 2 * slab.geometry.slots >= whole.slots

    def _make(self, key: ClassKey) -> bool:
        with self._lock:
            slab = self._planned(*key)
        if slab is None:
            return False
        try:
            self._pool.make(slab.slab_id, slab.geometry)
        except (OSError, MemoryError, ValueError) as error:
            _log.warning("cannot make a slab: %s", error)
            with self._lock:
                self._cache.allocator.failed(slab.slab_id)
            return False
        self._populate(slab.slab_id)
        with self._lock:
            self._cache.allocator.made(slab.slab_id)
            self.changed.notify_all()
        return True

    def _populate(self, slab_id: int) -> None:
        try:
            self._pool.populate(slab_id)
        except MemoryError as error:
            _log.warning("slab %d is used without being populated: %s", slab_id, error)

    def _drop(self, slab_id: int) -> None:
        try:
            self._pool.drop(slab_id)
        except OSError as error:  # its pages go when the last worker unmaps it
            _log.warning("slab %d: %s", slab_id, error)
        self._retired(slab_id)
        with self._lock:
            self._cache.allocator.retired(slab_id)
