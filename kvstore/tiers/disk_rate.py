"""How fast a disk reads what is not in memory: what decides whether to compress is a ratio to this."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import time
from pathlib import Path

_CHUNK_BYTES = 2 << 20
_CHUNKS = 16  # 10 ms on a fast NVMe drive, 0.3 s at 100 MB/s
_LIMIT_S = 0.5
_ALIGN = 4096


def read_bytes_s(folder: Path) -> float:
    """Bytes a second of one thread's reads of 2 MiB around the largest file below `folder`, past the page cache.

    0 where that cannot be told: no file of some size yet, or a file system that has no direct reads (tmpfs).
    """
    sizes = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            found = path.stat()
            sizes.append((min(found.st_size, found.st_blocks * 512), path))
    nbytes, path = max(sizes, default=(0, folder))
    if nbytes < _CHUNKS * _CHUNK_BYTES:
        return 0.0
    try:
        return _measure(path, nbytes)
    except OSError:
        return 0.0


def _measure(path: Path, nbytes: int) -> float:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        with mmap.mmap(-1, _CHUNK_BYTES) as buffer:  # a direct read needs a page's alignment
            done, start_s = 0, time.perf_counter()
            for _ in range(_CHUNKS):
                done += os.preadv(fd, [buffer], random.randrange(0, nbytes - _CHUNK_BYTES) // _ALIGN * _ALIGN)
                elapsed_s = time.perf_counter() - start_s
                if elapsed_s > _LIMIT_S:
                    break
    finally:
        os.close(fd)
    return done / elapsed_s
