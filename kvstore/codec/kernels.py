"""The two implementations of exphuf's inner loops behind one interface, with the memory that a thread needs."""

from __future__ import annotations

import functools
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvstore.codec import vectors
from kvstore.codec.huffman import U8, Work, make_work
from kvstore.codec.loops import U16, Form, Loops, Rows, compile_loops

_T = TypeVar("_T", bound=np.generic)

TILE_VALUES = 128 << 10  # at most, in a zstd frame


class Kernels(Protocol):
    """What exphuf is made of; every array is contiguous, and every result is the same in each implementation."""

    name: str

    def survey(self, values: U16, shift: int, codes: U8) -> None:
        """Codes (groups, inner) that predict the channels of values (groups, tokens, inner)."""

    def split(self, values: U16, rows: Rows, shift: int, left: U16) -> tuple[int, int]:
        """Fill `left` with values - offsets; answers the least and greatest field above `shift`, without the sign."""

    def pack(self, left: U16, form: Form, symbols: U8, rest: U8) -> None:
        """Cut what is left into symbols and the bits below, using it up; `form` is (base, shift)."""

    def blocks(self, symbols: U8, top: int, step: int, out: U8) -> int:
        """All blocks of a zstd frame, of `step` symbols each (a multiple of 8); answers their bytes."""

    def join(self, symbols: U8, rest: U8, rows: Rows, form: Form, out: U16) -> None:
        """Undo pack."""


class NumpyKernels:
    """Vectors."""

    name = "numpy"

    survey = staticmethod(vectors.survey)
    split = staticmethod(vectors.split_values)
    pack = staticmethod(vectors.pack_values)
    blocks = staticmethod(vectors.write_blocks)
    join = staticmethod(vectors.join_values)


class NumbaKernels:
    """Compiled loops; an instance belongs to one thread, for its tables' sake."""

    name = "numba"

    def __init__(self, loops: Loops) -> None:
        self._loops = loops

    def survey(self, values: U16, shift: int, codes: U8) -> None:
        """See Kernels."""
        self._loops.survey[shift](_read_only(values), codes)

    def split(self, values: U16, rows: Rows, shift: int, left: U16) -> tuple[int, int]:
        """See Kernels."""
        return self._loops.split(_read_only(values), rows, shift, left)

    def pack(self, left: U16, form: Form, symbols: U8, rest: U8) -> None:
        """See Kernels."""
        base, shift = form
        self._loops.pack[shift](left, base, symbols, rest)

    @functools.cached_property
    def _work(self) -> Work:
        """Not before a block is written: threads that only read can do without."""
        return make_work(TILE_VALUES)

    def blocks(self, symbols: U8, top: int, step: int, out: U8) -> int:
        """See Kernels."""
        return self._loops.blocks(symbols, top, step, out, self._work)

    def join(self, symbols: U8, rest: U8, rows: Rows, form: Form, out: U16) -> None:
        """See Kernels."""
        self._loops.join(_read_only(symbols), _read_only(rest), rows, form, out)


def _read_only(values: NDArray[_T]) -> NDArray[_T]:
    """A view that is read-only: to numba that is a type of its own, and all sources shall have one type."""
    view = values.view()
    view.flags.writeable = False
    return view


@functools.cache
def compiled_loops() -> Loops | None:
    """The process's compiled loops; None where numba is not installed."""
    try:
        return compile_loops()
    except ImportError:
        return None


def make_kernels(numba: bool | None) -> Kernels:
    """Kernels for one thread: compiled, numpy's, or (None) compiled where numba is installed.

    Raises:
        ImportError: numba was asked for and is not installed.
    """
    loops = None if numba is False else compiled_loops()
    if loops is None and numba:
        raise ImportError("numba is not installed: pip install 'kvtier[fast]'")
    return NumpyKernels() if loops is None else NumbaKernels(loops)
