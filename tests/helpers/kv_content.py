"""Bytes of many kinds for tests of codecs, the same ones each time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvstore.tiers.base import BlockRef, SlabRange, TierItem
from kvstore.tiers.checksums import block_checksum

Bytes = NDArray[np.uint8]

KINDS = ("zeros", "ones", "random", "bf16", "fp16", "channels", "nans", "ramp", "sparse", "some zeros")


def content(kind: str, nbytes: int) -> Bytes:
    """`nbytes` bytes of a kind; "channels" is like K: 64 channels, each with a size and a mean of its own."""
    rng = np.random.default_rng(nbytes)
    count = nbytes // 2 + 1
    normal = rng.standard_normal(count, dtype=np.float32)
    if kind == "zeros":
        made = np.zeros(nbytes, dtype=np.uint8)
    elif kind == "ones":
        made = np.full(nbytes, 0xFF, dtype=np.uint8)
    elif kind == "bf16":
        made = bf16_bits(normal)
    elif kind == "fp16":
        made = normal.astype("<f2").view(np.uint8)
    elif kind == "channels":
        channel = np.arange(count) % 64
        made = bf16_bits((normal + np.sin(channel) * 2) * np.exp2(channel % 7 - 3).astype(np.float32))
    elif kind == "nans":  # with payloads and signs, quiet and signalling
        made = (rng.integers(0, 1 << 16, count) | 0x7F80).astype("<u2").view(np.uint8)
    elif kind == "ramp":  # every 16-bit pattern in turn
        made = np.arange(count).astype("<u2").view(np.uint8)
    elif kind == "sparse":
        made = (rng.random(nbytes) < 0.01).astype(np.uint8)
    elif kind == "some zeros":  # an exponent of 0 among those about 127: too wide a range for symbols
        made = bf16_bits(np.where(rng.random(count) < 0.01, np.float32(0), normal * 4))
    else:
        made = rng.integers(0, 256, nbytes, dtype=np.uint8)
    return made[:nbytes].copy()


def bf16_bits(values: NDArray[np.floating]) -> Bytes:
    """Values cut to bfloat16."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype("<u2").view(np.uint8)


def bf16_values(raw: Bytes) -> NDArray[np.float32]:
    """The numbers that bfloat16 bytes stand for."""
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def item_for(raw: Bytes, layout: str = "", parent: bytes = b"p" * 32, lossy: str = "") -> TierItem:
    """A block of its own, with the checksum of these bytes."""
    ref = BlockRef(b"n" * 32, b"k" * 32)
    return TierItem(ref, SlabRange(1, 0, raw.nbytes), block_checksum(raw), parent, 5, layout, lossy)
