"""What a fetch costs and what it saves: is it worth waiting for a block, or is it quicker to compute it again?

Pure arithmetic on what was measured. `core.gate` asks it for real blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

WINDOW = 12
"""Samples remembered a tier: what has changed for good is believed after about so many loads."""
ENOUGH = 4
"""Samples before anything is believed: by fewer, one stall at the start would shut the gate."""
_CLIP = 3.0  # an outlier counts for so many times what is usual
_OUTLIERS = 4  # one sample of so many may be one
_SPREAD = 2  # loads whose sizes differ by less than this factor do not tell a fixed cost from a slow rate
PROBE_S = 0.1
PROBE_BYTES = 8 << 20
_REST = 9.0  # a probe may take a tenth of the medium's time ...
_REST_MAX_S = 10.0  # ... but a stall must not put the next one off for minutes


class WorkerCosts(NamedTuple):
    """What the worker would do without the blocks."""

    recompute_s: float  # token t, counted from the root, takes recompute_s + t * recompute_s2
    recompute_s2: float = 0.0
    copy_s_per_byte: float = 0.0  # of its copy out of warm; 0: not known

    def saved_s(self, first: int, tokens: int) -> float:
        """Time to compute tokens [first, first + tokens)."""
        return tokens * (self.recompute_s + self.recompute_s2 * (first + (tokens - 1) / 2))


class Cost(NamedTuple):
    """What it takes to load bytes from a tier."""

    fixed_s: float = 0.0
    s_per_byte: float = 0.0


UNKNOWN = Cost()


class Price(NamedTuple):
    """A tier's cost and what is waiting there already."""

    cost: Cost
    queued_bytes: int = 0
    stalled_s: float = 0.0  # since anything came of what is being loaded: a stall is expected to last as long again


class Run(NamedTuple):
    """Consecutive blocks that are fetched in the same way."""

    tier: int
    blocks: int
    loading: bool = False  # among those that are waiting already


class Span(NamedTuple):
    """Where a prefix begins and how large its blocks are."""

    first_token: int
    block_tokens: int
    block_nbytes: int


def worth(runs: Iterable[Run], span: Span, worker: WorkerCosts, prices: Mapping[int, Price]) -> int:
    """The number of leading blocks whose fetch saves most time, 0 where none saves any.

    To fetch a prefix takes the fixed cost, the queue and the stall of every tier it needs, its bytes at the tier's
    rate, and the worker's copy of all of it. The sum is meant: loads and copies overlap, but not reliably. Within a run
    each block saves no less than the one before it, so that only the ends of runs need a look.
    """
    best, most_s = 0, 0.0
    blocks, fetch_s = 0, 0.0
    entered: set[int] = set()
    for run in runs:
        nbytes = run.blocks * span.block_nbytes
        price = prices.get(run.tier)
        if price is not None:
            if run.tier not in entered:
                entered.add(run.tier)
                fetch_s += price.cost.fixed_s + price.queued_bytes * price.cost.s_per_byte + price.stalled_s
            if not run.loading:
                fetch_s += nbytes * price.cost.s_per_byte
        fetch_s += nbytes * worker.copy_s_per_byte
        blocks += run.blocks
        saved_s = worker.saved_s(span.first_token, blocks * span.block_tokens) - fetch_s
        if saved_s > most_s:
            best, most_s = blocks, saved_s
    return best


class _Sample(NamedTuple):
    begins: int  # 1: the medium was idle before it, so that its fixed cost is in it
    nbytes: int
    seconds: float


class _Meter:
    """Loads of one tier, several at a time: a sample goes from the first of them, or the sample before, to an end."""

    def __init__(self) -> None:
        self.running = 0
        self.begins = 1
        self.since_s = self.last_s = 0.0
        self.nbytes = 0
        self.samples: tuple[_Sample, ...] = ()  # replaced, never changed: a match reads it beside us
        self.fitted: tuple[tuple[_Sample, ...], Cost] = ((), UNKNOWN)
        self.rests_until_s = 0.0


class FetchCosts:
    """Learns what loads cost, by tier. Call sequence of a batch: began, came (any number of times), ended."""

    def __init__(self, tiers: Iterable[int]) -> None:
        self._meters = {tier: _Meter() for tier in tiers}

    def began(self, tier: int, now_s: float) -> None:
        """A batch has been asked for."""
        meter = self._meters[tier]
        if not meter.running:
            meter.begins, meter.since_s, meter.nbytes = 1, now_s, 0
        meter.running += 1

    def came(self, tier: int, nbytes: int, now_s: float) -> None:
        """Some of its blocks are there."""
        meter = self._meters[tier]
        meter.nbytes += nbytes
        meter.last_s = now_s

    def ended(self, tier: int) -> None:
        """Nothing more will come of it. What brought nothing says nothing of the medium."""
        meter = self._meters[tier]
        meter.running -= 1
        if meter.nbytes:
            seconds = max(meter.last_s - meter.since_s, 0.0)
            meter.samples = (*meter.samples, _Sample(meter.begins, meter.nbytes, seconds))[-WINDOW:]
            meter.rests_until_s = meter.last_s + min(_REST * seconds, _REST_MAX_S)
            meter.begins, meter.since_s, meter.nbytes = 0, meter.last_s, 0

    def cost(self, tier: int) -> Cost:
        """What is believed now; UNKNOWN, which is nothing, before there are samples. Safe beside one that writes."""
        meter = self._meters[tier]
        samples, cost = meter.fitted
        if samples is not meter.samples:
            samples = meter.samples
            cost = fit(samples) if len(samples) >= ENOUGH else UNKNOWN
            meter.fitted = (samples, cost)
        return cost

    def stalled_s(self, tier: int, now_s: float) -> float:
        """How long nothing has come of what is being loaded."""
        meter = self._meters[tier]
        return max(0.0, now_s - max(meter.since_s, meter.last_s)) if meter.running else 0.0

    def probe_bytes(self, tier: int, now_s: float) -> int:
        """How much may be loaded to see whether the tier is still so slow; 0: nothing yet."""
        meter = self._meters[tier]
        if meter.running or now_s < meter.rests_until_s:
            return 0
        rate = self.cost(tier).s_per_byte
        return max(1, int(min(PROBE_S / rate, PROBE_BYTES))) if rate else PROBE_BYTES


def fit(samples: Sequence[tuple[int, int, float]]) -> Cost:
    """Fixed cost and rate of (begins, nbytes, seconds): a line through medians, raised to the mean of what it took.

    By least squares one stall of 2 s on a small load became a fixed cost, and large loads seemed to be free. A quarter
    of the samples may be outliers and then count _CLIP times at most; more of them are the medium's nature.
    """
    slopes = [
        (seconds - other_s) / (nbytes - other_bytes)
        for (begins, nbytes, seconds), (other_begins, other_bytes, other_s) in combinations(samples, 2)
        if begins == other_begins and not nbytes / _SPREAD < other_bytes < nbytes * _SPREAD
    ]
    cost = Cost(0.0, _median([seconds / nbytes for _, nbytes, seconds in samples]))
    if slopes and (s_per_byte := _median(slopes)) > 0.0:
        firsts = [seconds - nbytes * s_per_byte for begins, nbytes, seconds in samples if begins]
        cost = Cost(max(0.0, _median(firsts)) if firsts else 0.0, s_per_byte)
    expected = [begins * cost.fixed_s + nbytes * cost.s_per_byte for begins, nbytes, _ in samples]
    taken = [seconds for _, _, seconds in samples]
    clipped = [min(seconds, _CLIP * usual_s) for seconds, usual_s in zip(taken, expected, strict=True)]
    outliers = sum(seconds > limit for seconds, limit in zip(taken, clipped, strict=True))
    scale = sum(clipped if outliers * _OUTLIERS <= len(samples) else taken) / (sum(expected) or 1.0)
    return Cost(cost.fixed_s * scale, cost.s_per_byte * scale)


def _median(numbers: list[float]) -> float:
    return sorted(numbers)[len(numbers) // 2]
