"""The two implementations of exphuf's inner loops behind one interface. Instances have no state: any thread."""

from __future__ import annotations

import functools
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvstore.codec import vectors
from kvstore.codec.loops import MANTISSA_BITS, U8, U16, Form, Loops, Rows, compile_loops

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

    def join(self, symbols: U8, rest: U8, rows: Rows, form: Form, out: U16) -> None:
        """Undo pack."""

    def pack_fields(self, left: U16, symbols: U8, rest: U8) -> None:
        """Cut bfloat16 values into fields, and the bits below with the sign."""

    def join_fields(self, symbols: U8, rest: U8, rows: Rows, out: U16) -> None:
        """Undo pack_fields."""

    def offsets(self, codes: U8, shift: int) -> U16:
        """What prediction codes stand for, in their shape."""


class NumpyKernels:
    """Vectors."""

    name = "numpy"

    survey = staticmethod(vectors.survey)
    split = staticmethod(vectors.split_values)
    pack = staticmethod(vectors.pack_values)
    join = staticmethod(vectors.join_values)
    pack_fields = staticmethod(vectors.pack_fields)
    join_fields = staticmethod(vectors.join_fields)

    def offsets(self, codes: U8, shift: int) -> U16:
        """See Kernels."""
        offsets = np.empty(codes.shape, dtype=np.uint16)
        vectors.offsets_of(codes, MANTISSA_BITS[shift], offsets)
        return offsets


class NumbaKernels:
    """Compiled loops."""

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

    def join(self, symbols: U8, rest: U8, rows: Rows, form: Form, out: U16) -> None:
        """See Kernels."""
        self._loops.join(_read_only(symbols), _read_only(rest), rows, form, out)

    def pack_fields(self, left: U16, symbols: U8, rest: U8) -> None:
        """See Kernels."""
        self._loops.pack_fields(_read_only(left), symbols, rest)

    def join_fields(self, symbols: U8, rest: U8, rows: Rows, out: U16) -> None:
        """See Kernels."""
        self._loops.join_fields(_read_only(symbols), _read_only(rest), rows, out)

    def offsets(self, codes: U8, shift: int) -> U16:
        """See Kernels."""
        offsets = np.empty(codes.shape, dtype=np.uint16)
        self._loops.offsets(_read_only(codes).reshape(-1), MANTISSA_BITS[shift], offsets.reshape(-1))
        return offsets


def _read_only(values: NDArray[_T]) -> NDArray[_T]:
    """A view that is read-only: to numba that is a type of its own, and all sources shall have one type."""
    if not values.flags.writeable:
        return values
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
    """Kernels: compiled, numpy's, or (None) compiled where numba is installed.

    Raises:
        ImportError: numba was asked for and is not installed.
    """
    loops = None if numba is False else compiled_loops()
    if loops is None and numba:
        raise ImportError("numba is not installed: pip install 'kvtier[fast]'")
    return NumpyKernels() if loops is None else NumbaKernels(loops)
