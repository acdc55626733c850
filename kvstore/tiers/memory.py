"""Slab memory over a plain array, for tests and for tiers that run inside one process."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvstore.tiers.base import SlabMemory, SlabRange


class ArrayMemory(SlabMemory):
    """One slab that is one numpy array of zeros."""

    def __init__(self, nbytes: int, slab_id: int = 1) -> None:
        self.array: NDArray[np.uint8] = np.zeros(nbytes, dtype=np.uint8)
        self.slab_id = slab_id
        self._used = 0

    def view(self, place: SlabRange) -> NDArray[np.uint8]:
        """The bytes of a range, writable, without a copy.

        Raises:
            KeyError: another slab, or a range that is not wholly inside this one.
        """
        end = place.offset + place.nbytes
        if place.slab_id != self.slab_id or not 0 <= place.offset <= end <= self.array.nbytes:
            raise KeyError(place)
        return self.array[place.offset : end]

    def segment(self, slab_id: int) -> NDArray[np.uint8]:
        """Every byte of the slab.

        Raises:
            KeyError: another slab.
        """
        if slab_id != self.slab_id:
            raise KeyError(slab_id)
        return self.array

    def reserve(self, nbytes: int, align: int = 1) -> SlabRange:
        """The next range that was never reserved before; nothing is ever given back.

        Raises:
            ValueError: the slab is used up.
        """
        offset = -(-self._used // align) * align
        if offset + nbytes > self.array.nbytes:
            raise ValueError(f"{nbytes} bytes do not fit a slab of {self.array.nbytes} with {self._used} used")
        self._used = offset + nbytes
        return SlabRange(self.slab_id, offset, nbytes)
