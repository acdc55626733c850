"""Which codec writes a tensor, and which reads a stored one.

Adding a codec is one new file and one line in CodecSet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kvstore.codec.arena import Arena
from kvstore.codec.base import Codec, UnknownFormatError
from kvstore.codec.exphuf import ExpHufCodec
from kvstore.codec.huf import ONE_BYTE_DTYPES, HufCodec
from kvstore.codec.int8kv import Int8KvCodec
from kvstore.codec.kernels import make_kernels
from kvstore.codec.raw import RawCodec
from kvstore.codec.shapes import Tensor
from kvstore.codec.zstd import ZstdContexts

POLICIES: Final = ("auto", "raw", "exphuf")

EXPHUF_DTYPES: Final = ("bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Choice:
    """What a policy came to: whether two-byte floats, one-byte dtypes, and everything else are worth compressing."""

    floats: bool
    one_byte: bool
    others: bool


CHOICES: Final = {
    "auto": Choice(floats=True, one_byte=True, others=True),
    "raw": Choice(floats=False, one_byte=False, others=False),
    "exphuf": Choice(floats=True, one_byte=False, others=False),
}


class CodecSet:
    """Every codec, for one thread only (a zstd context shared between threads corrupts decodes)."""

    def __init__(self, numba: bool | None = None) -> None:
        """`numba`: see kernels.make_kernels."""
        self.zstd = ZstdContexts()
        self.kernels = make_kernels(numba)
        self.arena = Arena()
        self.raw = RawCodec()
        self.huf = HufCodec(self.zstd)
        self.exphuf = ExpHufCodec(self.kernels, self.zstd, self.arena)
        self.int8kv = Int8KvCodec(self.zstd)
        known: tuple[Codec, ...] = (self.raw, self.huf, self.exphuf, self.int8kv)
        self._by_id = {(codec.codec_id, codec.version): codec for codec in known}

    def writer(self, tensor: Tensor, choice: Choice) -> Codec:
        """The codec that writes a tensor without loss."""
        if tensor.dtype in EXPHUF_DTYPES:
            return self.exphuf if choice.floats else self.raw
        if tensor.dtype in ONE_BYTE_DTYPES:
            return self.huf if choice.one_byte else self.raw
        return self.huf if choice.others else self.raw

    def reader(self, codec_id: int, version: int) -> Codec:
        """The codec that reads what was stored under this id and version.

        Raises:
            UnknownFormatError: no such codec in this build.
        """
        try:
            return self._by_id[codec_id, version]
        except KeyError:
            raise UnknownFormatError(f"codec {codec_id} version {version} is not known to this build") from None
