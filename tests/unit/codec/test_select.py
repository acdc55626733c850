"""Which codec writes what, and that threads have their own."""

from __future__ import annotations

import threading

import pytest

from kvstore.codec.select import POLICIES, CodecSet, ThreadCodecs, UnknownFormatError
from kvstore.codec.zstd import ZstdCodec


@pytest.mark.parametrize(
    ("policy", "dtype", "name"),
    [
        ("auto", "bfloat16", "planes-bf16"),
        ("auto", "float16", "planes-fp16"),
        ("auto", "float8_e4m3", "zstd-huffman"),
        ("auto", "float8_e5m2", "zstd-huffman"),
        ("auto", "int8", "zstd-huffman"),
        ("auto", "uint8", "zstd-huffman"),
        ("auto", "float32", "zstd-1"),
        ("auto", "", "zstd-1"),
        ("auto", "a dtype of next year", "zstd-1"),
        ("planes", "bfloat16", "planes-bf16"),
        ("planes", "float8_e4m3", "raw"),
        ("raw", "bfloat16", "raw"),
        ("raw", "float32", "raw"),
    ],
)
def test_policy(policy: str, dtype: str, name: str) -> None:
    assert CodecSet(policy).for_dtype(dtype).name == name


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_reads_everything(policy: str) -> None:
    codecs = CodecSet(policy)
    assert [codecs.by_id(codec_id, 1).codec_id for codec_id in (1, 2, 3, 4)] == [1, 2, 3, 4]


@pytest.mark.parametrize(("codec_id", "version"), [(0, 1), (5, 1), (65535, 1), (2, 2), (2, 0)])
def test_unknown_codecs(codec_id: int, version: int) -> None:
    with pytest.raises(UnknownFormatError, match=f"codec {codec_id} version {version}"):
        CodecSet().by_id(codec_id, version)


def test_unknown_policy_and_level_say_what_there_is() -> None:
    with pytest.raises(ValueError, match="auto, raw, planes"):
        CodecSet("best")
    for level in (0, 4, -1):
        with pytest.raises(ValueError, match=r"1\.\.3"):
            ZstdCodec.level(level)


def test_every_thread_has_its_own_set() -> None:
    shared = ThreadCodecs("raw")
    seen = [shared.codecs]

    def note() -> None:
        seen.append(shared.codecs)

    threads = [threading.Thread(target=note) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len({id(codecs) for codecs in seen}) == 4
    assert shared.codecs is seen[0]
    assert all(codecs.for_dtype("bfloat16").name == "raw" for codecs in seen), "the policy reaches every thread"
