"""Which codec takes what, when nothing does, and what the machine's speed has to do with it."""

from __future__ import annotations

import numpy as np
import pytest

from kv_content import content, item_for
from kvstore.codec import kernels as kernels_module
from kvstore.codec.base import UnknownFormatError
from kvstore.codec.frame import FrameFormat, FrameHeader
from kvstore.codec.kernels import compiled_loops, make_kernels
from kvstore.codec.rates import Rates, choose, measure
from kvstore.codec.select import CHOICES, CodecSet
from kvstore.codec.shapes import Tensor
from kvstore.codec.skip import worth_trying

RAW, EXPHUF, HUF = 1, 5, 6


@pytest.mark.parametrize(
    ("policy", "layout", "codec"),
    [
        ("auto", "bfloat16", EXPHUF),
        ("auto", "float16", EXPHUF),
        ("auto", "float8_e5m2", HUF),
        ("auto", "int8", HUF),
        ("auto", "float32", HUF),
        ("auto", "", HUF),
        ("exphuf", "bfloat16", EXPHUF),
        ("exphuf", "int8", RAW),
        ("raw", "bfloat16", RAW),
        ("raw", "", RAW),
    ],
)
def test_codec_by_policy_and_dtype(policy: str, layout: str, codec: int) -> None:
    raw = content("sparse", 70_000) if layout in ("", "int8", "float32", "float8_e5m2") else content("channels", 70_000)
    encoded = FrameFormat(policy, numba=False).encode(item_for(raw, layout), raw)
    assert encoded.codec == codec


def test_an_unknown_policy_says_which_there_are() -> None:
    with pytest.raises(ValueError, match="'lzma' is none of auto, raw, exphuf"):
        FrameFormat("lzma")


def test_an_unknown_codec_is_unknown() -> None:
    with pytest.raises(UnknownFormatError):
        CodecSet(numba=False).reader(2, 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "float8_e4m3", "", "float32"])
def test_noise_is_not_even_tried(dtype: str) -> None:
    raw = content("random", 1 << 20)
    assert not worth_trying(raw, Tensor(dtype, 0, raw.nbytes))


@pytest.mark.parametrize(
    ("kind", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16"), ("sparse", "int8"), ("zeros", "")]
)
def test_what_pays_is_tried(kind: str, dtype: str) -> None:
    raw = content(kind, 1 << 20)
    assert worth_trying(raw, Tensor(dtype, 0, raw.nbytes))
    assert worth_trying(raw[:6], Tensor(dtype, 0, 6)), "a sample of six bytes says nothing"


def rates(copy: float, decode: float) -> Rates:
    return Rates(copy=copy, exphuf=decode, huf=decode, exphuf_ratio=1.5, huf_ratio=1.2)


@pytest.mark.parametrize(
    ("ssd", "readers", "decode", "compressed"),
    [
        (0, 2, 1e9, True),  # not known
        (0.5e9, 2, 1e9, True),  # min(0.75, 2) against 0.5
        (3e9, 2, 1e9, False),  # min(4.5, 2) against 3
        (3e9, 4, 1e9, True),  # min(4.5, 4) against 3
        (50e9, 2, 1e9, False),
        (50e9, 2, 11e9, True),  # nothing here is faster than copying
    ],
)
def test_auto_takes_what_is_read_sooner(ssd: float, readers: int, decode: float, compressed: bool) -> None:
    assert choose(rates(10e9, decode), ssd, readers).floats == compressed


def test_auto_compresses_until_it_knows_better() -> None:
    raw = content("bf16", 100_000)
    item = item_for(raw, "bfloat16")
    quick = FrameFormat(numba=False, ssd_bytes_s=1e15, readers=1)
    assert quick.encode(item, raw).codec == EXPHUF
    quick.warm()
    frame = b"".join(quick.encode(item, raw).pieces)
    assert FrameHeader.parse(memoryview(frame))[0].codec_id == RAW
    assert quick.describe().startswith("raw, numpy, decodes ")


def test_measured_rates_are_of_this_machine() -> None:
    found = measure(CodecSet(numba=False))
    assert all(rate > 0 for rate in found)
    assert 1.4 < found.exphuf_ratio < 1.6
    assert CHOICES["auto"] == choose(found, 0, 1)


def test_going_over_to_the_compiled_path() -> None:
    codec_format = FrameFormat(numba=False)
    assert codec_format.describe() == "exphuf, numpy"
    assert codec_format.compile() == (compiled_loops() is not None)
    if compiled_loops():
        assert codec_format.describe().startswith("exphuf, numba, decodes ")


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_module, "compiled_loops", lambda: None)
    assert make_kernels(None).name == make_kernels(False).name == "numpy"
    with pytest.raises(ImportError, match="fast"):
        FrameFormat(numba=True)
    codec_format = FrameFormat()
    assert not codec_format.compile()
    assert codec_format.describe() == "exphuf, numpy"


def test_pieces_of_one_thread_do_not_outlive_its_next_encode() -> None:
    """They are views of memory that is used again; the tier copies them at once."""
    codec_format = FrameFormat(numba=False)
    raw = content("channels", 200_000)
    first = codec_format.encode(item_for(raw, "bfloat16"), raw)
    kept = b"".join(first.pieces)
    other = content("bf16", 200_000)
    codec_format.encode(item_for(other, "bfloat16"), other)
    out = np.zeros_like(raw)
    codec_format.decode(memoryview(kept), item_for(raw), out)
    assert np.array_equal(out, raw)
