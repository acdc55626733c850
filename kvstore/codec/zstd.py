"""Zstd of one thread: Huffman codes alone for planes and bytes without repeats, a low level for anything else."""

from __future__ import annotations

from functools import cached_property
from typing import Final, Protocol

import numpy as np
import zstandard
from numpy.typing import NDArray

from kvstore.codec.base import CodecError
from kvstore.codec.huffman import MAX_SYMBOL

_MAGIC: Final = b"\x28\xb5\x2f\xfd\xa0"  # and: one segment, its size in four bytes, no checksum
_MAX_WINDOW_BYTES: Final = 1 << 20  # nobody has written larger frames
_FRAME_HEAD: Final = 9
_LEAST_FRAME: Final = 256  # symbols
_LEAST_BLOCK: Final = 8 << 10  # symbols; the last may be shorter
_FEW_BITS: Final = 5  # below a fifth of a byte for each symbol, repeats are worth looking for


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


class BlocksWriter(Protocol):
    """The part of Kernels that this needs."""

    def blocks(self, symbols: NDArray[np.uint8], top: int, step: int, out: NDArray[np.uint8]) -> int:
        """All blocks of a zstd frame, of `step` symbols each (a multiple of 8); answers their bytes."""


class FrameWriter:
    """Writes zstd frames of Huffman codes block by block, each with a table that suits it.

    Zstd's own encoder takes over for symbols beyond MAX_SYMBOL, and where there is so little in them that they may
    repeat.
    """

    def __init__(self, kernels: BlocksWriter, zstd: ZstdContexts) -> None:
        self._kernels = kernels
        self._zstd = zstd

    def write(self, symbols: NDArray[np.uint8], top: int, block: int, out: NDArray[np.uint8]) -> int:
        """A frame of all symbols in `out`; answers its bytes.

        `out` has room for 64 bytes more than they are, `top` is the greatest of them, and `block` is how many share a
        table, about (at least _LEAST_BLOCK; there are at most 128 Ki).
        """
        nbytes = 0
        if top <= MAX_SYMBOL and symbols.size >= _LEAST_FRAME:
            out[:_FRAME_HEAD] = np.frombuffer(_MAGIC + symbols.size.to_bytes(4, "little"), dtype=np.uint8)
            step = max(-(-block // 8) * 8, _LEAST_BLOCK)
            nbytes = _FRAME_HEAD + self._kernels.blocks(symbols, top, step, out[_FRAME_HEAD:])
        if nbytes > symbols.size // _FEW_BITS:
            return nbytes
        frame = np.frombuffer(self._zstd.huffman(symbols), dtype=np.uint8)
        if nbytes and nbytes <= frame.size:
            return nbytes
        out[: frame.size] = frame
        return frame.size
