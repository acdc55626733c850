"""The lossy codec: how far off it may be, what it leaves alone, and how it is marked."""

from __future__ import annotations

import numpy as np
import pytest

from kv_content import bf16_bits, bf16_values, content, item_for
from kvstore.codec.frame import FrameFormat, FrameHeader
from kvstore.tiers.checksums import block_checksum

LAYOUT = "bfloat16 kv=2 layer=3 token=32 head=4 dim=16"
INT8KV = 7
NBYTES = 2 * 2 * 3 * 32 * 64


def stored(raw: np.ndarray, layout: str = LAYOUT, lossy: str = "int8kv") -> tuple[bytes, bool, np.ndarray]:
    """The frame, whether it is lossy, and what it decodes to."""
    codec_format = FrameFormat(numba=False)
    item = item_for(raw, layout, lossy=lossy)
    encoded = codec_format.encode(item, raw)
    frame = b"".join(encoded.pieces)
    out = np.zeros_like(raw)
    codec_format.decode(memoryview(frame), item._replace(checksum=encoded.checksum), out)
    assert block_checksum(out) == encoded.checksum, "the checksum is that of what comes out"
    header, _ = FrameHeader.parse(memoryview(frame))
    assert header.lossy == encoded.lossy == (encoded.codec == INT8KV)
    return frame, encoded.lossy, out


def test_errors_are_half_a_step() -> None:
    raw = content("channels", NBYTES)
    frame, lossy, out = stored(raw)
    assert lossy
    assert raw.nbytes / len(frame) > 1.7
    values, back = (bf16_values(part).reshape(2, 3, 32, 64) for part in (raw, out))
    for kv, axis in ((0, 1), (1, 2)):  # K: a scale for each channel; V: for each token
        step = np.abs(values[kv]).max(axis=axis, keepdims=True) / 127
        error = np.abs(values[kv] - back[kv])
        assert (error <= step * 0.51 + np.abs(back[kv]) * 2**-8).all()


@pytest.mark.parametrize(
    "layout",
    [
        LAYOUT,
        "bfloat16 layer=3 kv=2 token=32 head=4 dim=16",
        "bfloat16 token=32 layer=3 dim=64 kv=2",
        "bfloat16 kv=2 token=96 dim=64",
        "float16 kv=2 layer=3 token=32 head=4 dim=16",
    ],
)
def test_every_order_of_axes(layout: str) -> None:
    raw = content("fp16" if layout.startswith("float16") else "bf16", NBYTES)
    _, lossy, out = stored(raw, layout)
    assert lossy
    as_values = (lambda part: part.view(np.float16).astype(np.float32)) if "float16 k" in layout[:9] else bf16_values
    values, back = as_values(raw), as_values(out)
    assert np.abs(values - back).max() < 0.02 * np.abs(values).max()


@pytest.mark.parametrize(
    "layout",
    [
        "bfloat16",
        "bfloat16 layer=6 token=32 dim=64",
        "bfloat16 kv=2 layer=192 dim=32",
        "bfloat16 kv=3 layer=2 token=32 dim=64",
        "float32 kv=2 layer=3 token=16 dim=64",
    ],
)
def test_other_layouts_stay_exact(layout: str) -> None:
    raw = content("bf16", NBYTES)
    _, lossy, out = stored(raw, layout)
    assert not lossy
    assert np.array_equal(out, raw)


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0x7F81])
def test_a_value_that_is_not_finite_keeps_the_block_exact(bits: int) -> None:
    raw = content("channels", NBYTES)
    raw.view(np.uint16)[777] = bits
    _, lossy, out = stored(raw)
    assert not lossy
    assert np.array_equal(out, raw)


def test_nobody_loses_a_bit_who_did_not_ask() -> None:
    raw = content("channels", NBYTES)
    for lossy in ("", "other"):
        assert np.array_equal(stored(raw, lossy=lossy)[2], raw)


def test_only_k_and_v_are_touched() -> None:
    raw = np.concatenate([content("channels", NBYTES), content("bf16", 2000)])
    _, lossy, out = stored(raw, LAYOUT + "; bfloat16 x=1000")
    assert lossy
    assert np.array_equal(out[NBYTES:], raw[NBYTES:])


@pytest.mark.parametrize("value", [0.0, 1e-40, 3.38e38, -3.38e38])
def test_extreme_values(value: float) -> None:
    raw = bf16_bits(np.full(NBYTES // 2, value, dtype=np.float32))
    _, lossy, out = stored(raw)
    assert lossy
    back = bf16_values(out)
    assert np.isfinite(back).all()
    assert np.abs(back - bf16_values(raw)).max() <= 0.01 * abs(value)


def test_the_largest_float16_does_not_become_infinite() -> None:
    raw = np.full(NBYTES // 2, 65504, dtype=np.float16).view(np.uint8)
    _, lossy, out = stored(raw, "float16 kv=2 layer=3 token=32 head=4 dim=16")
    assert lossy
    assert np.isfinite(out.view(np.float16)).all()
