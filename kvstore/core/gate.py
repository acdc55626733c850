"""The benefit gate: of what is stored, only what is worth its fetch is promised.

A tier that is thought too slow is not loaded from any more, and nothing would be learned of its recovery. So a little
of what was withheld is loaded for nobody: the worker recomputes meanwhile, and no request pays for the probe. What a
probe brought is warm, and the next asker gets it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from kvstore.core.benefit import FetchCosts, Price, Run, Span, WorkerCosts, worth
from kvstore.core.block import COLD, HOT, WARM, Block, Namespace
from kvstore.core.index import KEY_BYTES, Index
from kvstore.core.reads import AcquireGroup, Reads
from kvstore.core.residency import Residency
from kvstore.core.slots import SlotState

_COPIES = attrgetter("copies")


class Verdict(NamedTuple):
    """How many blocks of a stored prefix to promise, and how many more there are."""

    blocks: int
    withheld: int


class BenefitGate:
    """Judges prefixes by what loads were seen to cost and what the worker says of itself."""

    def __init__(self, index: Index, residency: Residency, reads: Reads) -> None:
        self._index = index
        self._residency = residency
        self._reads = reads
        self.costs = FetchCosts((HOT, COLD))
        self.copy_bytes_per_s = 0.0  # what a worker said last
        self.withheld_blocks = 0
        self.gated_acquires = 0
        self.probes = 0

    def judge(self, group: AcquireGroup, worker: WorkerCosts, now_s: float) -> Verdict:
        """What of the group's stored prefix is worth its fetch. Safe beside one thread that changes the core."""
        namespace, keys, _, _ = group
        found = self._reads.servable_prefix(group)
        costs = {tier: self.costs.cost(tier) for tier in (HOT, COLD)}
        if not found or not (worker.copy_s_per_byte or any(map(any, costs.values()))):
            return Verdict(found, 0)
        blocks = self._index.prefix_blocks(namespace, keys[: found * KEY_BYTES])
        if not blocks:  # gone meanwhile
            return Verdict(0, 0)
        span = Span(blocks[0].depth * namespace.block_tokens, namespace.block_tokens, namespace.block_nbytes)
        prices = {
            tier: Price(cost, self._reads.queued_bytes[tier], self.costs.stalled_s(tier, now_s) if any(cost) else 0.0)
            for tier, cost in costs.items()
        }
        count = worth(self._runs(blocks), span, worker, prices)
        return Verdict(count, len(blocks) - count)

    def note(self, group: AcquireGroup, verdict: Verdict, worker: WorkerCosts, now_s: float) -> None:
        """An acquire has been answered by the verdict: count it, and see whether the tier is still so slow."""
        if worker.copy_s_per_byte:
            self.copy_bytes_per_s = 1 / worker.copy_s_per_byte
        if verdict.withheld:
            self.gated_acquires += 1
            self.withheld_blocks += verdict.withheld
            self._probe(
                group.namespace, group.keys[verdict.blocks * KEY_BYTES :][: verdict.withheld * KEY_BYTES], now_s
            )

    def _probe(self, namespace: Namespace, withheld: bytes, now_s: float) -> None:
        block = self._index.find(namespace, withheld[:KEY_BYTES])
        tier, loading = (0, False) if block is None else self._way(block)
        if tier not in (HOT, COLD) or loading or self._reads.queued_bytes[tier]:
            return
        nbytes = self.costs.probe_bytes(tier, now_s)
        if nbytes and self._reads.prefetch(namespace, withheld[: max(1, nbytes // namespace.block_nbytes) * KEY_BYTES]):
            self.probes += 1

    def _runs(self, blocks: Iterable[Block]) -> Iterator[Run]:
        """By what holds them, without a line of bytecode a block: 8,192 of them took 5 ms. Only loads need more."""
        for copies, same in groupby(blocks, _COPIES):
            held = list(same)
            if copies & WARM:
                yield Run(WARM, len(held))
            elif not self._reads.waiting:
                yield Run(self._reads.source(held[0]), len(held))
            else:
                for (tier, loading), alike in groupby(map(self._way, held)):
                    yield Run(tier, len(list(alike)), loading)

    def _way(self, block: Block) -> tuple[int, bool]:
        """From which tier a block comes, and whether it is on its way."""
        slot = block.slot
        if slot is None:
            return self._reads.source(block), False
        if slot.state is SlotState.FILLING:
            return self._reads.waiting.get(block, COLD), True
        return WARM, False
