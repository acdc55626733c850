"""No compression: the bytes as they are, and the fallback of every codec that does not pay."""

from __future__ import annotations

import numpy as np

from kvstore.codec.base import Bytes, CodecError, Pieces
from kvstore.codec.shapes import Tensor


class RawCodec:
    """Stores a tensor as it is."""

    name = "raw"
    codec_id = 1
    version = 1

    def encode(self, raw: Bytes, tensor: Tensor) -> Pieces:
        """The bytes themselves, without a copy: valid as long as `raw` is."""
        return [raw.data]

    def decode(self, payload: memoryview, tensor: Tensor, out: Bytes) -> None:
        """Copy the payload.

        Raises:
            CodecError: the payload is not as long as `out`.
        """
        if payload.nbytes != out.nbytes:
            raise CodecError(f"raw payload of {payload.nbytes} bytes for a tensor of {out.nbytes}")
        np.copyto(out, np.frombuffer(payload, dtype=np.uint8))
