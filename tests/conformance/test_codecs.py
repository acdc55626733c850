"""The codec contract: every codec, on every kind of bytes, in awkward sizes, gives back exactly what it was given."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kv_content import KINDS, Bytes, content, item_for
from kvstore.codec.base import Codec, CodecError
from kvstore.codec.exphuf import ExpHufCodec
from kvstore.codec.frame import FrameFormat, FrameHeader
from kvstore.codec.huf import TILE_BYTES, HufCodec
from kvstore.codec.kernels import TILE_VALUES, compiled_loops, make_kernels
from kvstore.codec.raw import RawCodec
from kvstore.codec.select import POLICIES
from kvstore.codec.shapes import ITEM_BYTES, Tensor, tensors_of
from kvstore.codec.zstd import ZstdContexts
from kvstore.tiers.base import TierItem

HAS_NUMBA = compiled_loops() is not None
IMPLEMENTATIONS = [
    pytest.param(False, id="numpy"),
    pytest.param(True, id="numba", marks=pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed")),
]


def exphuf(numba: bool) -> ExpHufCodec:
    return ExpHufCodec(make_kernels(numba), ZstdContexts())


# (codec, dtype) by name
CODECS: dict[str, tuple[Callable[[], Codec], str]] = {
    "raw": (RawCodec, "bfloat16"),
    "exphuf-bf16-numpy": (lambda: exphuf(False), "bfloat16"),
    "exphuf-fp16-numpy": (lambda: exphuf(False), "float16"),
    "huf-fp8": (lambda: HufCodec(ZstdContexts()), "float8_e5m2"),
    "huf-float32": (lambda: HufCodec(ZstdContexts()), "float32"),
    "huf-unknown": (lambda: HufCodec(ZstdContexts()), ""),
}
if HAS_NUMBA:
    CODECS["exphuf-bf16-numba"] = (lambda: exphuf(True), "bfloat16")
    CODECS["exphuf-fp16-numba"] = (lambda: exphuf(True), "float16")

LAYOUTS = (
    "bfloat16",
    "float16",
    "",
    "new",
    "; ;bfloat16 kv=0",
    "bfloat16 kv=2 token=8",
    "bfloat16 x=" + "9" * 30,
    *(f"{dtype} x=150000" for dtype in ITEM_BYTES if dtype),
)
SIZES = (0, 1, 2, 3, 255, 4096, TILE_BYTES, 2 * TILE_VALUES - 1, 2 * TILE_VALUES + 1, 2 * TILE_VALUES + 3, 1_000_003)


@pytest.fixture(params=CODECS)
def subject(request: pytest.FixtureRequest) -> tuple[Codec, str]:
    make, dtype = CODECS[request.param]
    return make(), dtype


def encoded(codec: Codec, raw: Bytes, tensor: Tensor) -> memoryview:
    pieces = codec.encode(raw, tensor)
    assert pieces is not None
    return memoryview(b"".join(pieces))


def decoded(codec: Codec, payload: memoryview, tensor: Tensor) -> Bytes:
    out = np.full(tensor.nbytes, 0xA5, dtype=np.uint8)
    codec.decode(payload, tensor, out)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nbytes", SIZES)
def test_exact_round_trip(subject: tuple[Codec, str], kind: str, nbytes: int) -> None:
    codec, dtype = subject
    raw, tensor = content(kind, nbytes), Tensor(dtype, 0, nbytes)
    before = raw.copy()
    payload = encoded(codec, raw, tensor)
    assert np.array_equal(raw, before), "encoding changes its input"
    assert np.array_equal(decoded(codec, payload, tensor), before)


def test_unaligned_source_and_destination(subject: tuple[Codec, str]) -> None:
    codec, dtype = subject
    raw, tensor = content("channels", 70_001), Tensor(dtype, 0, 70_001)
    shifted = np.empty(raw.nbytes + 1, dtype=np.uint8)
    shifted[1:] = raw
    payload = encoded(codec, shifted[1:], tensor)
    out = np.zeros(raw.nbytes + 1, dtype=np.uint8)
    codec.decode(payload, tensor, out[1:])
    assert np.array_equal(out[1:], raw)


def test_read_only_source(subject: tuple[Codec, str]) -> None:
    codec, dtype = subject
    raw, tensor = content("bf16", 70_001), Tensor(dtype, 0, 70_001)
    raw.flags.writeable = False
    assert np.array_equal(decoded(codec, encoded(codec, raw, tensor), tensor), raw)


def test_one_instance_forgets_the_block_before(subject: tuple[Codec, str]) -> None:
    codec, dtype = subject
    blocks = [content(kind, nbytes) for kind in KINDS for nbytes in (600_001, 5, 4096)]
    payloads = [encoded(codec, block, Tensor(dtype, 0, block.nbytes)) for block in blocks]
    for block, payload in zip(blocks, payloads, strict=True):
        assert np.array_equal(decoded(codec, payload, Tensor(dtype, 0, block.nbytes)), block)


def test_incompressible_bytes_cost_no_more_than_a_table(subject: tuple[Codec, str]) -> None:
    codec, dtype = subject
    raw = content("random", 1 << 20)
    assert encoded(codec, raw, Tensor(dtype, 0, raw.nbytes)).nbytes <= 1.001 * raw.nbytes


def test_a_payload_of_another_size_is_an_error(subject: tuple[Codec, str]) -> None:
    codec, dtype = subject
    raw = content("bf16", 300_001)
    payload = encoded(codec, raw, Tensor(dtype, 0, raw.nbytes))
    for nbytes in (0, 1, raw.nbytes - 2, raw.nbytes - 1, raw.nbytes + 1, raw.nbytes + 2, 2 * raw.nbytes):
        with pytest.raises(CodecError):
            codec.decode(payload, Tensor(dtype, 0, nbytes), np.zeros(nbytes, dtype=np.uint8))
    for cut in (0, 1, 3, 4, 5, payload.nbytes // 2, payload.nbytes - 1):
        with pytest.raises(CodecError):
            decoded(codec, payload[:cut], Tensor(dtype, 0, raw.nbytes))
    with pytest.raises(CodecError):
        decoded(codec, memoryview(bytes(payload) + b"x"), Tensor(dtype, 0, raw.nbytes))


def test_arbitrary_payloads_never_do_harm(subject: tuple[Codec, str]) -> None:
    """Whatever the bytes, a decode either raises CodecError or fills `out` and nothing else."""
    codec, dtype = subject
    rng = np.random.default_rng(11)
    raw, tensor = content("bf16", 20_001), Tensor(dtype, 0, 20_001)
    good = np.frombuffer(encoded(codec, raw, tensor), dtype=np.uint8)
    for turn in range(600):
        bad = good.copy()
        places = rng.integers(0, 40 if turn % 2 else bad.size, 3)  # half of them in the tables
        bad[places] = rng.integers(0, 256, 3)
        around = np.full(raw.nbytes + 16, 0xA5, dtype=np.uint8)
        with contextlib.suppress(CodecError):
            codec.decode(bad.data, tensor, around[8:-8])
        assert (around[:8] == 0xA5).all()
        assert (around[-8:] == 0xA5).all()


def frame_of(codec_format: FrameFormat, raw: Bytes, layout: str) -> tuple[memoryview, TierItem]:
    item = item_for(raw, layout)
    return memoryview(b"".join(codec_format.encode(item, raw).pieces)), item


@pytest.mark.parametrize("numba", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_layout_through_the_frame(policy: str, layout: str, numba: bool) -> None:
    codec_format = FrameFormat(policy, numba=numba)
    for kind in KINDS:
        for nbytes in (1, 4097, 300_000):
            raw = content(kind, nbytes)
            frame, item = frame_of(codec_format, raw, layout)
            _, payload = FrameHeader.parse(frame)
            assert payload.nbytes <= raw.nbytes, "a codec that does not pay gives way to raw"
            out = np.zeros(nbytes, dtype=np.uint8)
            codec_format.decode(frame, item, out)
            assert np.array_equal(out, raw)


def test_what_one_policy_wrote_every_other_reads() -> None:
    raw = content("bf16", 300_001)
    for writer in POLICIES:
        frame, item = frame_of(FrameFormat(writer), raw, "bfloat16")
        for reader in POLICIES:
            out = np.zeros(raw.nbytes, dtype=np.uint8)
            FrameFormat(reader).decode(frame, item, out)
            assert np.array_equal(out, raw)


@pytest.mark.parametrize("numba", IMPLEMENTATIONS)
def test_threads_share_a_format_but_no_codec(numba: bool) -> None:
    """A zstd context shared between threads corrupts decodes; every thread must get contexts and scratch of its own."""
    codec_format = FrameFormat(numba=numba)
    wrong: list[str] = []

    def run(seed: int) -> None:
        raw = np.roll(content("channels", 600_000), 2 * seed)
        for turn in range(10):
            frame, item = frame_of(codec_format, raw, "bfloat16 token=3000 dim=100" if turn % 2 else "")
            out = np.zeros(raw.nbytes, dtype=np.uint8)
            codec_format.decode(frame, item, out)
            if not np.array_equal(out, raw):
                wrong.append(f"thread {seed}, turn {turn}")

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong


SAMPLES = {"minilm_l6_bf16_t64.npy": 1.5, "tinylm_rope_gqa_bf16_t64.npy": 1.5}


def samples(folder: Path) -> Iterator[tuple[str, str, Bytes]]:
    for name in SAMPLES:
        blocks = np.load(folder / "kv_samples" / name)
        axes = zip(("layer", "kv", "token", "head", "dim"), blocks.shape[1:], strict=True)
        layout = " ".join(["bfloat16", *(f"{axis}={size}" for axis, size in axes)])
        yield name, layout, blocks.reshape(len(blocks), -1).view(np.uint8)


def test_real_keys_and_values(kvtier_data: Path) -> None:
    """Exact, and worth it: real K/V in bfloat16 shrinks by more than 1.5, frame included (raw zstd-3: 1.27 to 1.31)."""
    codec_format = FrameFormat()
    for name, layout, blocks in samples(kvtier_data):
        stored = 0
        for raw in blocks[::4]:
            frame, item = frame_of(codec_format, raw, layout)
            out = np.zeros(raw.nbytes, dtype=np.uint8)
            codec_format.decode(frame, item, out)
            assert np.array_equal(out, raw)
            stored += frame.nbytes
        assert blocks[::4].nbytes / stored > SAMPLES[name]


@pytest.mark.parametrize(
    ("kind", "layout", "least"),
    [
        ("bf16", "bfloat16", 1.49),
        ("fp16", "float16", 1.1),
        ("channels", "bfloat16 kv=2 layer=4 token=64 head=32 dim=64", 1.5),
        ("fp16", "float16 kv=2 layer=4 token=64 head=32 dim=64", 1.1),
    ],
)
def test_two_byte_floats_shrink(kind: str, layout: str, least: float) -> None:
    raw = content(kind, 2 << 20)
    assert tensors_of(layout, raw.nbytes)[0].dtype == layout.partition(" ")[0]
    frame, _ = frame_of(FrameFormat(), raw, layout)
    assert raw.nbytes / frame.nbytes > least
