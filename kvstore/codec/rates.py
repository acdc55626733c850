"""How fast this machine decodes, and whether a block is read sooner compressed than raw."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Final, NamedTuple

import numpy as np

from kvstore.codec.base import Bytes, Codec
from kvstore.codec.select import CHOICES, Choice, CodecSet
from kvstore.codec.shapes import Tensor

_VALUES: Final = 256 << 10
_SHAPE: Final = (2, 4, 32, 1024)  # kv, layer, token, channel
_ROUNDS: Final = 5


class Rates(NamedTuple):
    """Raw bytes that one thread decodes in a second, and the ratios on normally distributed values."""

    copy: float
    exphuf: float
    huf: float
    exphuf_ratio: float
    huf_ratio: float


def measure(codecs: CodecSet) -> Rates:
    """Decode half a MiB of made-up K/V a few times, 20 ms in all; the first encode and decode compile the loops."""
    bits = np.random.default_rng(1).standard_normal(_VALUES, dtype=np.float32).view(np.uint32) >> 16
    raw = bits.astype(np.uint16).view(np.uint8)
    out = np.empty_like(raw)
    half = Tensor("float16", 0, raw.nbytes, _SHAPE, kv=0, layer=1, token=2)
    floats = replace(half, dtype="bfloat16")
    wide = raw.copy()
    wide[:2] = 0
    for others, tensor in ((raw, half), (wide, floats)):  # their loops are others
        _decode_rate(codecs.exphuf, others, tensor, out)
    exphuf, exphuf_ratio = _decode_rate(codecs.exphuf, raw, floats, out)
    exponents = raw[1::2].copy()
    huf, huf_ratio = _decode_rate(codecs.huf, exponents, Tensor("float8_e5m2", 0, exponents.nbytes), out[:_VALUES])
    return Rates(_rate(lambda: np.copyto(out, raw), raw.nbytes), exphuf, huf, exphuf_ratio, huf_ratio)


def choose(rates: Rates, ssd_bytes_s: float, readers: int) -> Choice:
    """Compress what is read at least as fast: min(medium x ratio, readers x decode) against min(medium, copies).

    Compressed blocks also wear the medium less and leave it room, so a draw goes to them; and a medium of unknown speed
    is taken for the slower part.
    """
    if ssd_bytes_s <= 0:
        return CHOICES["auto"]
    raw = min(ssd_bytes_s, readers * rates.copy)
    floats = min(ssd_bytes_s * rates.exphuf_ratio, readers * rates.exphuf) >= raw
    one_byte = min(ssd_bytes_s * rates.huf_ratio, readers * rates.huf) >= raw
    return Choice(floats, one_byte, others=one_byte)


def _decode_rate(codec: Codec, raw: Bytes, tensor: Tensor, out: Bytes) -> tuple[float, float]:
    pieces = codec.encode(raw, tensor)
    assert pieces is not None
    payload = memoryview(b"".join(pieces))
    codec.decode(payload, tensor, out)
    return _rate(lambda: codec.decode(payload, tensor, out), raw.nbytes), raw.nbytes / payload.nbytes


def _rate(work: Callable[[], None], nbytes: int) -> float:
    seconds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return nbytes / max(median(seconds), 1e-9)
