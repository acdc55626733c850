"""Zstd of one thread: Huffman codes alone for planes and bytes without repeats, a low level for anything else."""

from __future__ import annotations

from functools import cached_property
from typing import Final

import numpy as np
import zstandard
from numpy.typing import NDArray

from kvstore.codec.base import CodecError

_MAX_WINDOW_BYTES: Final = 1 << 20  # nobody has written larger frames


def huffman_parameters() -> zstandard.ZstdCompressionParameters:
    """Zstd reduced to its Huffman coder.

    Exponents of K/V have an entropy of 2.6 to 2.8 bits and no repeats: every match zstd finds is a spurious one (level
    3 reaches a ratio of 1.415 where this reaches 1.48). A target length of 1, like any negative level, would switch
    the coding of literals off.
    """
    return zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_FAST,
        window_log=17,
        chain_log=6,
        hash_log=6,
        search_log=1,
        min_match=7,
        target_length=0,
        write_content_size=1,
        write_checksum=0,
        write_dict_id=0,
    )


class ZstdContexts:
    """Belongs to one thread: a context shared between threads corrupts decodes. Each is made at its first use."""

    @cached_property
    def _huffman(self) -> zstandard.ZstdCompressor:
        return zstandard.ZstdCompressor(compression_params=huffman_parameters())

    @cached_property
    def _level(self) -> zstandard.ZstdCompressor:
        parameters = zstandard.ZstdCompressionParameters.from_level(
            1, window_log=17, write_content_size=1, write_checksum=0, write_dict_id=0
        )
        return zstandard.ZstdCompressor(compression_params=parameters)

    @cached_property
    def _decompressor(self) -> zstandard.ZstdDecompressor:
        return zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)

    def huffman(self, plain: NDArray[np.uint8]) -> bytes:
        """One frame of Huffman codes."""
        frame: bytes = self._huffman.compress(plain.data)
        return frame

    def huffman_blocks(self, plain: NDArray[np.uint8], block: int) -> bytes:
        """One frame of Huffman codes, with a table of its own for each `block` bytes."""
        if plain.nbytes <= block:
            return self.huffman(plain)
        compressor = self._huffman.compressobj(size=plain.nbytes)
        parts = []
        for start in range(0, plain.nbytes, block):
            parts.append(compressor.compress(plain[start : start + block].data))
            last = start + block >= plain.nbytes
            flush = zstandard.COMPRESSOBJ_FLUSH_FINISH if last else zstandard.COMPRESSOBJ_FLUSH_BLOCK
            parts.append(compressor.flush(flush))
        return b"".join(parts)

    def level_1(self, plain: NDArray[np.uint8]) -> bytes:
        """One frame of level 1, which also finds repeats."""
        frame: bytes = self._level.compress(plain.data)
        return frame

    def decompress(self, frame: memoryview, nbytes: int) -> NDArray[np.uint8]:
        """The `nbytes` bytes in a frame, read-only.

        A fresh buffer for each frame costs no more than a reused one: it is the one just freed.

        Raises:
            CodecError: not a frame of exactly `nbytes` bytes. Nothing was allocated for what it claims to hold.
        """
        try:
            if zstandard.frame_content_size(frame) != nbytes:
                raise CodecError(f"zstd frame does not hold {nbytes} bytes")
            plain = self._decompressor.decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise CodecError(f"damaged zstd frame: {error}") from error
        if len(plain) != nbytes:
            raise CodecError(f"zstd frame of {len(plain)} bytes where {nbytes} belong")
        return np.frombuffer(plain, dtype=np.uint8)
