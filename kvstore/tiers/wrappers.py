"""Tiers around a tier: count what it does, slow it down, make it fail.

Each passes on whatever it does not change. `inner` is the tier inside, for what only that one has (scan, flush).
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Literal, Protocol

from kvstore.tiers.base import BlockRef, Outcome, SlabMemory, Tier, TierItem, WriteResult
from kvstore.tiers.tally import Tally

Operation = Literal["write", "read"]


class _Wrapper(Tier):
    """Passes everything on."""

    def __init__(self, inner: Tier) -> None:
        self.inner = inner
        self.name = inner.name
        self.capacity_bytes = inner.capacity_bytes

    def write(self, items: Sequence[TierItem]) -> list[WriteResult]:
        """See Tier."""
        return self.inner.write(items)

    def read(self, items: Sequence[TierItem]) -> list[Outcome]:
        """See Tier."""
        return self.inner.read(items)

    def delete(self, refs: Sequence[BlockRef]) -> None:
        """See Tier."""
        self.inner.delete(refs)

    def stats(self) -> Mapping[str, int]:
        """See Tier."""
        return self.inner.stats()

    def close(self) -> None:
        """See Tier."""
        self.inner.close()


class Metered(_Wrapper):
    """Counts calls, blocks, bytes and time.

    stats() adds, for write and for read: `<op>_calls`, `<op>_blocks`, `<op>_ok`, `<op>_bytes` (raw bytes of blocks
    that were OK), `<op>_ns` (sum over calls; several threads add up) and `<op>_ns_max`.
    """

    def __init__(self, inner: Tier, clock_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        super().__init__(inner)
        self._clock_ns = clock_ns
        kinds = ("calls", "blocks", "ok", "bytes", "ns", "ns_max")
        self._tally = Tally(f"{operation}_{kind}" for operation in ("write", "read") for kind in kinds)

    def write(self, items: Sequence[TierItem]) -> list[WriteResult]:
        """Pass on, and count."""
        start_ns = self._clock_ns()
        results = self.inner.write(items)
        self._count("write", items, [result.outcome for result in results], start_ns)
        return results

    def read(self, items: Sequence[TierItem]) -> list[Outcome]:
        """Pass on, and count."""
        start_ns = self._clock_ns()
        outcomes = self.inner.read(items)
        self._count("read", items, outcomes, start_ns)
        return outcomes

    def stats(self) -> Mapping[str, int]:
        """The inner tier's counters and the metered ones."""
        return {**self.inner.stats(), **self._tally.snapshot()}

    def _count(self, operation: Operation, items: Sequence[TierItem], outcomes: list[Outcome], start_ns: int) -> None:
        elapsed_ns = self._clock_ns() - start_ns
        good = [item.range.nbytes for item, outcome in zip(items, outcomes, strict=True) if outcome is Outcome.OK]
        self._tally.add(f"{operation}_calls")
        self._tally.add(f"{operation}_blocks", len(items))
        self._tally.add(f"{operation}_ok", len(good))
        self._tally.add(f"{operation}_bytes", sum(good))
        self._tally.add(f"{operation}_ns", elapsed_ns)
        self._tally.high(f"{operation}_ns_max", elapsed_ns)


class Throttled(_Wrapper):
    """Lets through so many raw bytes a second, all threads and both directions together."""

    def __init__(
        self,
        inner: Tier,
        bytes_per_s: float,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`sleep` and `clock` are in seconds. A batch waits before it runs, for its turn and for its own size."""
        super().__init__(inner)
        if bytes_per_s <= 0:
            raise ValueError(f"bytes_per_s must be above 0, not {bytes_per_s}")
        self._bytes_per_s = bytes_per_s
        self._sleep = sleep
        self._clock = clock
        self._lock = threading.Lock()
        self._free_at_s = 0.0  # when the last batch that was let in will have passed

    def write(self, items: Sequence[TierItem]) -> list[WriteResult]:
        """Wait, then pass on."""
        self._wait(items)
        return self.inner.write(items)

    def read(self, items: Sequence[TierItem]) -> list[Outcome]:
        """Wait, then pass on."""
        self._wait(items)
        return self.inner.read(items)

    def _wait(self, items: Sequence[TierItem]) -> None:
        cost_s = sum(item.range.nbytes for item in items) / self._bytes_per_s
        with self._lock:
            now_s = self._clock()
            self._free_at_s = max(now_s, self._free_at_s) + cost_s
            delay_s = self._free_at_s - now_s
        if delay_s > 0:
            self._sleep(delay_s)


class Fault(Enum):
    """What may go wrong with one block; but for FLIP, the inner tier is then not asked for it."""

    MISSING = "missing"
    CORRUPT = "corrupt"
    BUSY = "busy"
    FULL = "full"
    FLIP = "flip"  # a read that says OK and has one wrong byte: whoever is above must notice. Nothing for a write.


class FaultPlan(Protocol):
    """Decides block by block; may be asked from several threads at once."""

    def next_fault(self, operation: Operation, item: TierItem) -> Fault | None:
        """The fault of this block in this operation, or None for none."""


class SeededFaults:
    """Faults at given rates, the same ones for the same seed and the same sequence of questions."""

    def __init__(self, seed: int, rates: Mapping[Fault, float]) -> None:
        """`rates` are probabilities per block; together at most 1."""
        if sum(rates.values()) > 1:
            raise ValueError(f"rates add up to more than 1: {dict(rates)}")
        self._lock = threading.Lock()
        self._random = random.Random(seed)
        self._rates = dict(rates)

    def next_fault(self, operation: Operation, item: TierItem) -> Fault | None:
        """Draw."""
        with self._lock:
            drawn = self._random.random()
        for fault, rate in self._rates.items():
            drawn -= rate
            if drawn < 0:
                return fault
        return None


class ScriptedFaults:
    """Faults in a fixed order, one entry per block of the named operation; none once the script is over."""

    def __init__(self, operation: Operation, script: Iterable[Fault | None]) -> None:
        self._operation = operation
        self._lock = threading.Lock()
        self._script = deque(script)

    def next_fault(self, operation: Operation, item: TierItem) -> Fault | None:
        """The next entry."""
        with self._lock:
            return self._script.popleft() if operation == self._operation and self._script else None


class Faulty(_Wrapper):
    """Fails as a plan says; whatever the plan lets through goes to the inner tier."""

    def __init__(self, inner: Tier, memory: SlabMemory, plan: FaultPlan) -> None:
        """`memory` is the inner tier's (to flip a byte of what was read)."""
        super().__init__(inner)
        self._memory = memory
        self._plan = plan

    def write(self, items: Sequence[TierItem]) -> list[WriteResult]:
        """Write the blocks that have no fault."""
        faults = [self._plan.next_fault("write", item) for item in items]
        passed = [item for item, fault in zip(items, faults, strict=True) if fault in (None, Fault.FLIP)]
        inner = iter(self.inner.write(passed))
        return [
            next(inner) if fault is None or fault is Fault.FLIP else WriteResult(Outcome[fault.name])
            for fault in faults
        ]

    def read(self, items: Sequence[TierItem]) -> list[Outcome]:
        """Read the blocks that have no fault; flip a byte of those whose fault is FLIP."""
        faults = [self._plan.next_fault("read", item) for item in items]
        passed = [item for item, fault in zip(items, faults, strict=True) if fault in (None, Fault.FLIP)]
        inner = iter(self.inner.read(passed))
        outcomes = []
        for item, fault in zip(items, faults, strict=True):
            outcome = next(inner) if fault is None or fault is Fault.FLIP else Outcome[fault.name]
            if fault is Fault.FLIP and outcome is Outcome.OK:
                view = self._memory.view(item.range)
                view[view.nbytes // 2] ^= 0x10
            outcomes.append(outcome)
        return outcomes
