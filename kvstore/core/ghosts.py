"""Which keys left, or were turned away, a short while ago: membership only, in 20 bytes a remembered block.

A table of four-byte entries in buckets of eight: 20 bits of the name, and 12 bits that say when it was noted. An entry
counts while fewer than `span` others have been noted after it; a full bucket gives up its oldest. A set of four names a
block would take 400 bytes for every stored block (with the integers in it), more than all else the index holds of it.
"""

from __future__ import annotations

from array import array

_WAYS = 8
_PIECE = 512  # buckets of a piece of the table, made when the first name falls into it: 32 MB at once take 30 ms
_STEPS = 256  # the span is counted in so many steps
_STEP_BITS = 12
_STEP_MASK = (1 << _STEP_BITS) - 1
_FREE_SHARE = 2.0  # entries for each name of the span: in a bucket for four names eight seldom meet


class Ghosts:
    """A first-in first-out memory of names (integers of 64 bits), with one false answer in about 100,000."""

    def __init__(self, span: int = 1) -> None:
        """`span`: names that are remembered at once."""
        self._made_for = 0
        self.resize(span)

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return 4 * _WAYS * self._buckets

    def resize(self, span: int) -> None:
        """Remember so many names from now on. Beyond twice or half of before the table is new, and empty."""
        self._span = max(1, span)
        self._lifetime = min(self._span, _STEPS)
        self._per_step = -(-self._span // self._lifetime)
        if not 1 <= self._span <= 2 * self._made_for <= 4 * self._span:
            self._made_for = self._span
            self._buckets = max(1, int(self._span * _FREE_SHARE) // _WAYS)
            self._pieces: list[array[int] | None] = [None] * -(-self._buckets // _PIECE)
            self._step = 1
            self._left = self._per_step

    def add(self, name: int) -> None:
        """Note a name, as the newest."""
        number, at = divmod(name % self._buckets, _PIECE)
        table = self._pieces[number]
        if table is None:
            table = self._pieces[number] = array("I", bytes(4 * _WAYS * _PIECE))
        start, mark = at * _WAYS, name >> 44 or 1
        step, mask, oldest, chosen = self._step, _STEP_MASK, -1, 0
        for entry in table[start : start + _WAYS]:
            if entry >> _STEP_BITS == mark or not entry:
                chosen = entry
                break
            age = (step - entry) & mask
            if age > oldest:
                oldest, chosen = age, entry
        table[table.index(chosen, start)] = mark << _STEP_BITS | step
        self._left -= 1
        if not self._left:
            self._left = self._per_step
            self._step = (step + 1) & _STEP_MASK

    def __contains__(self, name: object) -> bool:
        return isinstance(name, int) and self._find(name) is not None

    def take(self, name: int) -> bool:
        """Forget a name; returns whether it was there."""
        found = self._find(name)
        if found is not None:
            table, at = found
            table[at] = 0
        return found is not None

    def _find(self, name: int) -> tuple[array[int], int] | None:
        number, at = divmod(name % self._buckets, _PIECE)
        table, start = self._pieces[number], at * _WAYS
        if table is None:
            return None
        mark = name >> 44 or 1  # 20 bits that the number of the bucket does not say, and never all of them 0
        for entry in table[start : start + _WAYS]:
            if entry >> _STEP_BITS == mark:
                return (
                    (table, table.index(entry, start)) if (self._step - entry) & _STEP_MASK <= self._lifetime else None
                )
        return None
