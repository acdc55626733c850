"""Working sets in this process's memory, and memcpy over them: what every transfer is compared with."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

_PATTERN_BYTES = 16 << 20


class WorkingSet:
    """Blocks to copy from and blocks to copy to, of one size, all touched beforehand.

    Attributes:
        source: (blocks, block_nbytes) uint8, the bits of normally distributed bfloat16 as K and V have them, no two
            blocks alike.
        out: the same shape, where copies go.
    """

    def __init__(self, blocks: int, block_nbytes: int) -> None:
        self.source = kv_like_blocks(blocks, block_nbytes)
        self.out = np.ones_like(self.source)  # written, not just reserved: a first touch is 2-5 times slower
        self.nbytes = self.source.nbytes

    def memcpy_seconds(self) -> float:
        """Copy the whole set block by block in this thread."""
        started = time.perf_counter()
        for target, source in zip(self.out, self.source, strict=True):
            np.copyto(target, source)
        return time.perf_counter() - started

    def check(self) -> None:
        """After a read: every byte must be there.

        Raises:
            ArithmeticError: a wrong byte, which no benchmark may go on from.
        """
        wrong = [
            index for index, pair in enumerate(zip(self.out, self.source, strict=True)) if (pair[0] != pair[1]).any()
        ]
        if wrong:
            raise ArithmeticError(f"blocks {wrong[:8]} came back wrong")


def kv_like_blocks(blocks: int, block_nbytes: int, seed: int = 7) -> NDArray[np.uint8]:
    """(blocks, block_nbytes) of bfloat16 noise; each block begins with its number."""
    bits = np.random.default_rng(seed).standard_normal(_PATTERN_BYTES // 2, dtype=np.float32).view(np.uint32) >> 16
    pattern = bits.astype(np.uint16).view(np.uint8)
    made = np.resize(pattern, (blocks, block_nbytes))
    made[:, :8] = np.arange(blocks, dtype=np.uint64).view(np.uint8).reshape(blocks, 8)
    return made
