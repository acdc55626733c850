"""Any layout, any dtype, any bytes: what comes back is what was given, and both implementations write the same."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kv_content import KINDS, content, item_for
from kvstore.codec.frame import FrameFormat
from kvstore.codec.kernels import compiled_loops
from kvstore.codec.shapes import DTYPES, ITEM_BYTES

FORMATS = [FrameFormat(numba=choice) for choice in ((False, True) if compiled_loops() else (False,))]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[str, int]:
    """A layout text as the protocol makes it, and the bytes of its block."""
    words, end = [], 0
    for _ in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from([*DTYPES[1:], "bfloat16", "bfloat16", "float16"]))
        axes = draw(st.permutations(["kv", "layer", "token", "dim", "head"]))[: draw(st.integers(1, 5))]
        limit = {"kv": 2, "layer": 4, "token": 70, "dim": 130, "head": 3}
        sizes = [draw(st.integers(1, limit[axis])) for axis in axes]
        words.append(" ".join([dtype, *(f"{axis}={size}" for axis, size in zip(axes, sizes, strict=True))]))
        start = -(-end // ITEM_BYTES[dtype]) * ITEM_BYTES[dtype]
        end = start + math.prod(sizes) * ITEM_BYTES[dtype]
    return "; ".join(words), end


def check(layout: str, raw: np.ndarray) -> None:
    item = item_for(raw, layout)
    frames = [b"".join(codec_format.encode(item, raw).pieces) for codec_format in FORMATS]
    assert len(set(frames)) == 1
    for codec_format in FORMATS:
        out = np.zeros_like(raw)
        codec_format.decode(memoryview(frames[0]), item, out)
        assert np.array_equal(out, raw)


@given(layouts(), st.sampled_from(KINDS))
def test_round_trip_of_any_layout(layout: tuple[str, int], kind: str) -> None:
    check(layout[0], content(kind, layout[1]))


@given(st.text(max_size=200), st.binary(min_size=1, max_size=5000))
def test_round_trip_of_any_text_and_bytes(layout: str, data: bytes) -> None:
    check(layout, np.frombuffer(data, dtype=np.uint8))


@given(st.sampled_from(["bfloat16", "float16"]), st.lists(st.integers(0, 65535), min_size=1, max_size=60), st.data())
def test_round_trip_of_few_distinct_values(dtype: str, choices: list[int], data: st.DataObject) -> None:
    """Any bit patterns, in any mixture: exponents of 0 and 255, narrow and wide ranges, one symbol alone."""
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    values = rng.choice(np.array(choices, dtype=np.uint16), 8 * 2 * 32 * 32)
    check(f"{dtype} kv=2 layer=8 token=32 dim=32", values.view(np.uint8))
