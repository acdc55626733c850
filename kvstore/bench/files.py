"""Plain files, read and written without anything of ours: what the cold tier is compared with."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class PlainFile:
    """Blocks of one size in a file, as they are."""

    def __init__(self, path: Path, blocks: NDArray[np.uint8]) -> None:
        """Write `blocks`, (count, bytes of one) uint8, to the disk."""
        self._path = path
        self._block = np.empty(blocks.shape[1], np.uint8)
        with path.open("wb") as file:
            for block in blocks:
                file.write(block.data)
            file.flush()
            os.fsync(file.fileno())

    def read_seconds(self, order: Sequence[int]) -> float:
        """One thread's pread of every block in this order."""
        descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            started = time.perf_counter()
            for index in order:
                if os.preadv(descriptor, [self._block.data], index * self._block.nbytes) != self._block.nbytes:
                    raise OSError(f"{self._path} is shorter than it was")
            return time.perf_counter() - started
        finally:
            os.close(descriptor)

    @staticmethod
    def write_seconds(path: Path, blocks: NDArray[np.uint8], nbytes: int) -> float:
        """A write of `nbytes` in pieces of a block, then fsync; the file is removed afterwards."""
        started = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            for start in range(0, nbytes, blocks.shape[1]):
                block = blocks[start // blocks.shape[1] % len(blocks)]
                file.write(block[: min(block.nbytes, nbytes - start)].data)
            os.fsync(file.fileno())
        taken_s = time.perf_counter() - started
        path.unlink()
        return taken_s


def drop_from_page_cache(folder: Path) -> None:
    """Have the next read of every file below `folder` come from the disk. Nobody may map them."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
