"""Two-byte floats: signs and exponents in Huffman codes, the mantissa, which is noise, as it is.

The mantissa of a cached K or V has 6.97 of 7 bits of entropy, its exponent 2.6 to 2.8 of 8. A sign alone is noise too,
but channels have a sign and a size of their own: half of a BERT's channels of K have their mean more than 0.6 standard
deviations beside zero. So every channel has a prediction (prediction.py) that is subtracted from its values as one
16-bit number; sign and exponent of what is left make one symbol. The ratio is 1.523; 1.497 with the signs as they are.

dtype     field (exponent and what goes with it)   bits below
bfloat16  8 bits of exponent                       7 bits of mantissa
float16   5 bits of exponent, 2 of mantissa        8 bits of mantissa

Payload, little-endian: u32 bytes of the predictions, u32 number of tiles; for each tile u32 stored bytes, u8 base,
u8 mode, two zeros; the predictions (one zstd frame, a byte a channel); the tiles; the odd last byte of a tensor that
has one. A tile is at most 128 Ki values, never of both K and V: the bits below, one byte a value (of bfloat16, 7 bytes
for 8 values), and one zstd frame. Its mode says of what: SYMBOLS, 2 * (field - base) + sign; or FIELDS, where the range
of exponents is too wide for that, and the sign is with the bits below. A tile that does not shrink is STORED.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

import numpy as np

from kvstore.codec.arena import Arena
from kvstore.codec.base import Bytes, CodecError, Pieces, pieces_nbytes
from kvstore.codec.kernels import TILE_VALUES, Kernels
from kvstore.codec.loops import U8, U16
from kvstore.codec.prediction import Prediction
from kvstore.codec.shapes import Plan, Tensor, gather, plan_of, scatter
from kvstore.codec.zstd import ZstdContexts

STORED: Final = 0
SYMBOLS: Final = 1
FIELDS: Final = 2

_SHIFTS: Final = {"bfloat16": 7, "float16": 8}
_HEAD: Final = struct.Struct("<II")
_TILE: Final = struct.Struct("<IBBxx")
_MAX_BYTE: Final = 255


class _Tile(NamedTuple):
    """One tile in a payload: its values in coding order, and how it is stored."""

    start: int
    values: int
    stored_bytes: int
    base: int
    mode: int


class ExpHufCodec:
    """Stores a tensor of two-byte floats. One instance per thread."""

    name = "exphuf"
    codec_id = 5
    version = 1

    def __init__(self, kernels: Kernels, zstd: ZstdContexts, arena: Arena | None = None) -> None:
        """Payloads are written to `arena`, or without one to fresh memory."""
        self._kernels = kernels
        self._zstd = zstd
        self._arena = arena or Arena()
        self._values = np.empty(0, dtype=np.uint16)
        self._symbols = np.empty(0, dtype=np.uint8)
        self._left = np.empty(0, dtype=np.uint16)

    def encode(self, raw: Bytes, tensor: Tensor) -> Pieces | None:
        """Encode any bits (NaNs and their payloads are kept); None for other dtypes."""
        shift = _SHIFTS.get(tensor.dtype)
        if shift is None:
            return None
        plan = plan_of(tensor, TILE_VALUES)
        self._reserve(max((values for _, values in plan.tiles), default=0))
        source = _values(raw)
        memory = self._arena.take(raw.nbytes)
        prediction = Prediction(plan, shift)
        records: list[bytes] = []
        tiles: Pieces = []
        for start, values in plan.tiles:
            tile = self._gather(source, plan, start, values)
            pieces, base, mode = self._encode_tile(tile, prediction, start, memory[2 * start :])
            records.append(_TILE.pack(pieces_nbytes(pieces), base, mode))
            tiles += pieces
        codes = self._zstd.huffman(prediction.codes.reshape(-1)) if prediction.used else b""
        head = b"".join((_HEAD.pack(len(codes), len(records)), *records, codes))
        return [head, *tiles, raw[2 * source.size :].tobytes()]

    def decode(self, payload: memoryview, tensor: Tensor, out: Bytes) -> None:
        """Merge symbols and the bits below straight into `out`, tile by tile.

        Raises:
            CodecError: the payload is damaged or does not fill `out` exactly.
        """
        shift = _SHIFTS.get(tensor.dtype)
        if shift is None or out.nbytes != tensor.nbytes:
            raise CodecError(f"not a tensor of two-byte floats: {tensor.dtype!r} of {out.nbytes} bytes")
        plan = plan_of(tensor, TILE_VALUES)
        target = _values(out)
        prediction = Prediction(plan, shift)
        codes, tiles, position = _read_head(payload, plan, shift, out.nbytes % 2)
        if codes.nbytes:
            prediction.load(self._kernels, self._zstd.decompress(codes, prediction.channels))
        direct = plan.runs is None and target.flags.aligned
        for tile in tiles:
            into = target[tile.start : tile.start + tile.values] if direct else self._buffer(tile.values)
            self._decode_tile(payload[position : position + tile.stored_bytes], tile, prediction, into)
            if not direct:
                scatter(into, plan, tile.start, target)
            position += tile.stored_bytes
        out[2 * target.size :] = np.frombuffer(payload[position:], dtype=np.uint8)

    def _encode_tile(self, tile: U16, prediction: Prediction, start: int, memory: U8) -> tuple[Pieces, int, int]:
        """The pieces of one tile, its base and its mode. `memory` has room for the tile as it is."""
        shift = prediction.shift
        left, symbols = self._left[: tile.size], self._symbols[: tile.size]
        rows = prediction.survey(self._kernels, tile, start)
        low, high = self._kernels.split(tile, rows, shift, left)
        mode = SYMBOLS if 2 * (high - low) + 1 <= _MAX_BYTE else FIELDS
        rest = memory[: _rest_nbytes(tile.size, shift, mode)]
        if mode == SYMBOLS:
            self._kernels.pack(left, (low, shift), symbols, rest)
        else:
            low = 0
            self._kernels.pack_fields(left, symbols, rest)
        frame = self._zstd.huffman_blocks(symbols, prediction.stretch)
        if rest.size + len(frame) < 2 * tile.size:
            return [rest.data, frame], low, mode
        stored = memory[: 2 * tile.size]
        np.copyto(stored, tile.view(np.uint8))
        return [stored.data], 0, STORED

    def _decode_tile(self, stored: memoryview, tile: _Tile, prediction: Prediction, into: U16) -> None:
        if tile.mode == STORED:
            np.copyto(into.view(np.uint8), np.frombuffer(stored, dtype=np.uint8))
            return
        shift = prediction.shift
        rows = prediction.rows(tile.start, tile.values)
        kept = _rest_nbytes(tile.values, shift, tile.mode)
        rest = np.frombuffer(stored[:kept], dtype=np.uint8)
        symbols = self._zstd.decompress(stored[kept:], tile.values)
        if tile.mode == SYMBOLS:
            self._kernels.join(symbols, rest, rows, (tile.base, shift), into)
        else:
            self._kernels.join_fields(symbols, rest, rows, into)

    def _gather(self, source: U16, plan: Plan, start: int, values: int) -> U16:
        """A tile in coding order, aligned; a view of `source` where that is so there."""
        if plan.runs is None and source.flags.aligned:
            return source[start : start + values]
        tile = self._buffer(values)
        gather(source, plan, start, tile)
        return tile

    def _buffer(self, values: int) -> U16:
        if self._values.size < values:
            self._values = np.empty(values, dtype=np.uint16)
        return self._values[:values]

    def _reserve(self, values: int) -> None:
        if self._symbols.size < values:
            self._symbols = np.empty(values, dtype=np.uint8)
            self._left = np.empty(values, dtype=np.uint16)


def _values(block: Bytes) -> U16:
    """The whole 16-bit values of a tensor, as a view (blocks and this machine are little-endian)."""
    return block[: block.nbytes & ~1].view(np.uint16)


def _rest_nbytes(values: int, shift: int, mode: int) -> int:
    """Bytes of the bits below in a tile."""
    return values - values // 8 if mode == SYMBOLS and shift == 7 else values


def _read_head(payload: memoryview, plan: Plan, shift: int, tail_bytes: int) -> tuple[memoryview, list[_Tile], int]:
    """Stored predictions, tiles, and where the first tile lies.

    Raises:
        CodecError: it is cut off, or does not add up to the payload.
    """
    if payload.nbytes < _HEAD.size:
        raise CodecError("payload ends inside its head")
    codes_bytes, count = _HEAD.unpack_from(payload)
    start = _HEAD.size + _TILE.size * len(plan.tiles)
    if count != len(plan.tiles) or payload.nbytes < start + codes_bytes:
        raise CodecError(f"{count} tiles where {len(plan.tiles)} belong, or a payload that ends inside its table")
    records = _TILE.iter_unpack(payload[_HEAD.size : start])
    tiles = [_Tile(*extent, *record) for extent, record in zip(plan.tiles, records, strict=True)]
    for tile in tiles:
        if not _is_possible(tile, shift):
            raise CodecError(f"tile of {tile.values} values claims {tile.stored_bytes} bytes in mode {tile.mode}")
    first = start + codes_bytes
    if first + sum(tile.stored_bytes for tile in tiles) + tail_bytes != payload.nbytes:
        raise CodecError(f"payload of {payload.nbytes} bytes does not encode a tensor of {plan.values} values")
    return payload[start:first], tiles, first


def _is_possible(tile: _Tile, shift: int) -> bool:
    """Whether a tile has room for its bits below: the compiled loops do not look."""
    if tile.mode == STORED:
        return tile.stored_bytes == 2 * tile.values
    known = tile.mode == SYMBOLS or (tile.mode == FIELDS and shift == 7)
    return known and _rest_nbytes(tile.values, shift, tile.mode) < tile.stored_bytes < 2 * tile.values
