"""What the planes hold, bit by bit, and that decoding needs no second block."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from kvstore.codec.planes import BFLOAT16, FLOAT16, PlanesCodec, Split
from kvstore.codec.tiles import TILE_BYTES, pack_table


@pytest.mark.parametrize(
    ("split", "value", "exponent", "rest"),
    [
        (BFLOAT16, 0x3F80, 0x7F, 0x00),  # 1.0
        (BFLOAT16, 0xBF80, 0x7F, 0x80),  # -1.0
        (BFLOAT16, 0x3FFF, 0x7F, 0x7F),
        (BFLOAT16, 0xFFC1, 0xFF, 0xC1),  # a negative NaN with a payload
        (BFLOAT16, 0x0001, 0x00, 0x01),  # subnormal
        (FLOAT16, 0x3C00, 0x3C, 0x00),  # 1.0
        (FLOAT16, 0xBC01, 0xBC, 0x01),
    ],
)
def test_one_value(split: Split, value: int, exponent: int, rest: int) -> None:
    raw = np.array([value], dtype="<u2").view(np.uint8)
    payload = b"".join(PlanesCodec(split).encode(raw))
    assert payload == pack_table([1], TILE_BYTES) + bytes([rest, exponent])


@pytest.mark.parametrize("split", [BFLOAT16, FLOAT16], ids=lambda split: split.name)
def test_every_value_there_is(split: Split) -> None:
    codec = PlanesCodec(split)
    raw = np.arange(1 << 16, dtype="<u2").view(np.uint8)
    out = np.zeros_like(raw)
    codec.decode(memoryview(b"".join(codec.encode(raw))), out)
    assert np.array_equal(out, raw)


def test_the_odd_byte_is_at_the_end() -> None:
    raw = np.array([0x80, 0x3F, 0x77], dtype=np.uint8)
    assert b"".join(PlanesCodec(BFLOAT16).encode(raw))[-1] == 0x77


def test_decoding_allocates_a_tile_and_not_a_block() -> None:
    values = np.random.default_rng(1).standard_normal(8 << 20, dtype=np.float32)
    raw = (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
    codec, out = PlanesCodec(BFLOAT16), np.zeros_like(raw)
    payload = memoryview(b"".join(codec.encode(raw)))
    tracemalloc.start()
    try:
        codec.decode(payload, out)
        assert tracemalloc.get_traced_memory()[1] < 4 * TILE_BYTES
    finally:
        tracemalloc.stop()
    assert np.array_equal(out, raw)
