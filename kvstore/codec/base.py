"""What a codec is: pure bytes to bytes, exact both ways.

A codec knows nothing of files, tiers or checksums: the frame around its payload has them. One instance is used
by one thread only (a zstandard context shared between threads corrupts decodes).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class CodecError(ValueError):
    """A payload that cannot be what this codec wrote."""


class Codec(Protocol):
    """One way of writing a block's bytes."""

    name: str
    codec_id: int  # u16, in the frame; never reused

    def encode(self, raw: NDArray[np.uint8]) -> list[bytes | memoryview]:
        """Encode a block; the pieces are written one after the other. May be larger than `raw`."""

    def decode(self, payload: memoryview, out: NDArray[np.uint8]) -> None:
        """Decode into `out`, whose size is the raw size.

        Raises:
            CodecError: the payload is damaged or does not fill `out` exactly; `out` may hold anything then.
        """
