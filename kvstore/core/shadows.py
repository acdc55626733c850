"""Small caches beside the real one, which tell how each order would have done.

A shadow holds names only: a sample of the keys, chosen by the key itself, so that it sees every use of a sampled block
and nothing of the others. It is flat: it knows no parents. Sampling by prefix tree fails where one root is most of a
trace; a sample of keys orders the candidates rightly once a shadow has room for a few hundred of them.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

KEY_BYTES = 32
GHOSTS = 4  # ghosts for each block of capacity: 1, 2, 8 and 16 did worse on one of two traces
SHADOW_BLOCKS = 256
FOREVER = 1 << 62

_LEVELS = 256  # a key is sampled where its first byte is below the level
_LEVEL_MIN = 3  # 1.2 %
_PLENTY = 2 * SHADOW_BLOCKS  # names of a shadow from which on 0.4 % will do: a third of the names to hold
_HALF_LIFE = 4  # of what was counted, in capacities
_DOUBT = 1.5  # standard deviations by which another order must lead
THRIFT = 0.0015
_EVIDENCE = 2.0  # standard deviations, as uses: there must be some that tell the two apart
_HALVINGS_MAX = 64.0  # in one call: a prefix may be thousands of times longer than a tiny cache
_RESCALE = 1e100


class Candidate(NamedTuple):
    """An order to try.

    Attributes:
        factor: capacities by which a block that was used again counts as younger.
        closed: whether a full cache takes only what it has seen leave.
    """

    factor: int
    closed: bool = False


class Shadow:
    """A flat cache of names in the order of core.adaptive: blocks used once, and blocks used again."""

    __slots__ = ("_again", "_bias", "_capacity", "_closed", "_factor", "_ghosts", "_ghosts_max", "_now", "_once")

    def __init__(self, candidate: Candidate) -> None:
        self._factor, self._closed = candidate
        self._once: OrderedDict[int, int] = OrderedDict()  # name: time of its last use, oldest first
        self._again: OrderedDict[int, int] = OrderedDict()
        self._ghosts: OrderedDict[int, None] = OrderedDict()
        self._now = 0
        self.resize(FOREVER)

    def __len__(self) -> int:
        return len(self._once) + len(self._again)

    def resize(self, capacity: int) -> None:
        """Hold so many names; FOREVER: all, as long as the real cache is not full."""
        self._capacity = capacity
        self._bias = min(FOREVER, self._factor * capacity)
        self._ghosts_max = GHOSTS * capacity
        while len(self._ghosts) > self._ghosts_max:
            self._ghosts.popitem(last=False)

    def keep(self, level: int) -> None:
        """Drop what a coarser sample does not contain."""
        for name in [name for name in self._once if name & 0xFF >= level]:
            del self._once[name]
        for name in [name for name in self._again if name & 0xFF >= level]:
            del self._again[name]
        for name in [name for name in self._ghosts if name & 0xFF >= level]:
            del self._ghosts[name]

    def use(self, names: Sequence[int]) -> list[bool]:
        """Uses of blocks, one after another; returns for each whether it is a hit."""
        once, again, ghosts, now = self._once, self._again, self._ghosts, self._now
        capacity, ghosts_max = self._capacity, self._ghosts_max
        hits = []
        for name in names:
            now += 1
            hit = name in again
            if hit:
                again[name] = now
                again.move_to_end(name)
            elif name in once:
                hit = True
                del once[name]
                again[name] = now
            else:
                known = name in ghosts
                if known:
                    del ghosts[name]
                if len(once) + len(again) < capacity or self._make_room(known, now):
                    (again if known else once)[name] = now
                else:  # not let in
                    ghosts[name] = None
                    if len(ghosts) > ghosts_max:
                        ghosts.popitem(last=False)
            hits.append(hit)
        self._now = now
        return hits

    def _make_room(self, known: bool, now: int) -> bool:
        """False where a new name would be the next to leave itself."""
        once, again, ghosts, capacity, bias = self._once, self._again, self._ghosts, self._capacity, self._bias
        while (held := len(once) + len(again)) >= capacity:
            if self._closed and not known and held == capacity:
                return False
            oldest = again[next(iter(again))] + bias if again and bias < FOREVER else FOREVER
            if once and (oldest >= FOREVER or once[next(iter(once))] <= oldest):
                ghosts[once.popitem(last=False)[0]] = None
            elif known or oldest <= now:
                ghosts[again.popitem(last=False)[0]] = None
            else:
                return False
            if len(ghosts) > self._ghosts_max:
                ghosts.popitem(last=False)
        return True


class Shadows:
    """One shadow for each candidate order; `best` is the number of the one to follow.

    Counted is only what tells two candidates apart: the uses that one of them hit and the other missed. Another order
    is followed once it leads by more of those than chance would give it (a sign test, with older uses counting less).
    """

    def __init__(self, candidates: Sequence[Candidate], thrifty: int | None = None) -> None:
        """`thrifty`: the number of a candidate to follow where it costs at most THRIFT of all uses against the best."""
        self._thrifty = thrifty
        self._uses = 0.0
        self._shadows = [Shadow(candidate) for candidate in candidates]
        self.best = 0
        self._leader = 0
        self._level = _LEVELS
        self._sampled = re.compile(b"[\\x00-\\xff]", re.DOTALL)
        self._half_life = 1.0
        self._weight = 1.0  # of a use now; it grows where older ones should shrink
        # _wins[a][b]: uses that a hit and b missed
        self._wins = [[0.0] * len(candidates) for _ in candidates]

    def __len__(self) -> int:
        """Names that are held."""
        return sum(map(len, self._shadows))

    def growing(self, blocks: int) -> None:
        """The cache holds `blocks` blocks and is not full."""
        self._sample(blocks)

    def resize(self, blocks: int) -> None:
        """The cache is full with `blocks` blocks."""
        self._sample(blocks)
        self._half_life = float(_HALF_LIFE * blocks)
        for shadow in self._shadows:
            shadow.resize(max(1, blocks * self._level // _LEVELS))

    def refer(self, salt: int, keys: bytes) -> None:
        """Packed keys of one prefix were asked for; from the last to the first, as the real order has them."""
        found = [match.start() for match in self._sampled.finditer(keys[::KEY_BYTES])]
        if self._half_life > 1.0:
            self._weight *= 2.0 ** min(_HALVINGS_MAX, len(keys) / KEY_BYTES / self._half_life)
            if self._weight > _RESCALE:
                self._wins = [[count / self._weight for count in row] for row in self._wins]
                self._uses /= self._weight
                self._weight = 1.0
        self._uses += len(found) * self._weight
        names = [
            int.from_bytes(keys[i * KEY_BYTES : i * KEY_BYTES + 8], "little") ^ salt for i in reversed(found)
        ]  # as name_of has it
        told = False
        for hits in zip(*[shadow.use(names) for shadow in self._shadows], strict=True):
            if True in hits and False in hits:
                told = True
                self._count(hits)
        if told:
            self._choose()

    def _count(self, hits: Sequence[bool]) -> None:
        for wins, hit in zip(self._wins, hits, strict=True):
            if hit:
                for other, also in enumerate(hits):
                    if not also:
                        wins[other] += self._weight

    def _choose(self) -> None:
        best, most = self._leader, 0.0
        for other in range(len(self._wins)):
            lead, doubt = self._lead(other, best)
            if lead > most and lead > _DOUBT * doubt:
                self._leader, most = other, lead
        self.best = self._leader
        if self._thrifty is not None:
            lead, doubt = self._lead(self._leader, self._thrifty)
            if doubt >= _EVIDENCE and lead <= THRIFT * self._uses / self._weight:
                self.best = self._thrifty

    def _lead(self, one: int, other: int) -> tuple[float, float]:
        """How many more uses `one` hit, and the standard deviation that chance alone would give."""
        for_it, against = self._wins[one][other] / self._weight, self._wins[other][one] / self._weight
        return for_it - against, math.sqrt(for_it + against)

    def _sample(self, blocks: int) -> None:
        """Sample the larger of 1 % and enough for SHADOW_BLOCKS blocks of a shadow; 0.4 % where that is _PLENTY."""
        level = _LEVELS
        while level > _LEVEL_MIN and blocks * level // 2 // _LEVELS >= SHADOW_BLOCKS:
            level //= 2
        level = max(level, _LEVEL_MIN) if blocks // _LEVELS < _PLENTY else 1
        if level == self._level:
            return
        if level < self._level:
            for shadow in self._shadows:
                shadow.keep(level)
        self._level = level
        self._sampled = re.compile(b"[\\x00-\\x%02x]" % (level - 1), re.DOTALL)


def name_of(key: bytes, salt: int) -> int:
    """64 bits of a key, other ones in every namespace (its salt); the lowest eight are those that choose the sample."""
    return int.from_bytes(key[:8], "little") ^ salt
