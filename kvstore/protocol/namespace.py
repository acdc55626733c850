"""A namespace: all that must agree for two workers to share blocks.

Its digest is the root of every key chain, so what differs in any field can never meet. The tenant is part of
the digest and never of the spec: the daemon takes it from the session. The canonical encoding is written down,
with golden vectors, in docs/protocol.md.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, cast

from kvstore.protocol.errors import InvalidRequest
from kvstore.protocol.keys import MAX_BLOCK_TOKENS
from kvstore.protocol.layout import MAX_STRING_BYTES, KVLayout, TensorSpec, check_integer, check_string

__all__ = [
    "CHAIN",
    "HASH_ALGORITHMS",
    "KINDS",
    "LOSSY_CODECS",
    "MAX_BLOCK_NBYTES",
    "MAX_STRING_BYTES",
    "SET",
    "Identity",
    "KVLayout",
    "Kind",
    "NamespaceSpec",
    "Shard",
    "TensorSpec",
]

Kind: TypeAlias = Literal["chain", "set"]
Shard: TypeAlias = tuple[tuple[str, tuple[int, int]], ...]
"""Sorted (axis, (rank, size)) pairs; empty: shared by all ranks."""
Identity: TypeAlias = tuple[tuple[str, str], ...]
"""Sorted (name, value) pairs."""

CHAIN: Kind = "chain"
SET: Kind = "set"
KINDS = (CHAIN, SET)
HASH_ALGORITHMS = ("sha256",)
LOSSY_CODECS = ("int8kv",)
MAX_BLOCK_NBYTES = 1 << 30
MAX_SHARD_AXES = 16
MAX_SHARD_SIZE = 1 << 32
MAX_IDENTITY_ENTRIES = 256

_DOMAIN = b"kvtier namespace 1"
_U64 = struct.Struct("<Q")


@dataclass(frozen=True)
class NamespaceSpec:
    """What a worker says of its blocks.

    Attributes:
        model: model id.
        revision: of the model; may be empty.
        block_tokens: tokens per block, 1..65536.
        kind: "chain" (prefixes: every block has a parent) or "set" (independent blocks).
        layout: the tensors of one block.
        shard: axis -> (rank, size) for tp, pp, dcp, …; "all" (or empty) where every rank holds the same bytes.
            Kept as `Shard`: dict(spec.shard) gives the mapping back.
        identity: whatever else must agree: weight quantisation, kv dtype and scales, rope overrides, page layout,
            producer format. Kept as `Identity`: dict(spec.identity) gives the mapping back.
        salt: keeps apart what would otherwise meet; may be empty.
        hash_algorithm: of the block keys.
        cold_codec: empty: blocks come back bit for bit. One of LOSSY_CODECS: their copies in the cold tier lose
            precision, and where no other copy is left readers are told so.

    Raises:
        InvalidRequest: a field is out of its limits; the message names field, value and limit.
    """

    model: str
    revision: str
    block_tokens: int
    kind: Kind
    layout: KVLayout
    shard: Mapping[str, tuple[int, int]] | Shard | Literal["all"] = "all"
    identity: Mapping[str, str] | Identity = field(default_factory=dict)
    salt: str = ""
    hash_algorithm: str = "sha256"
    cold_codec: str = ""

    def __post_init__(self) -> None:
        """Bring shard and identity into canonical form, then check everything."""
        object.__setattr__(self, "shard", _canonical_shard(self.shard))
        object.__setattr__(self, "identity", _canonical_identity(self.identity))
        self.validate()

    def validate(self) -> None:
        """Check every field; construction has done it already.

        Raises:
            InvalidRequest: a field is out of its limits.
        """
        check_string(self.model, "model")
        check_string(self.revision, "revision", empty=True)
        check_string(self.salt, "salt", empty=True)
        check_integer(self.block_tokens, "block_tokens", 1, MAX_BLOCK_TOKENS)
        if self.kind not in KINDS:
            raise InvalidRequest(f"kind is {self.kind!r:.80}; it must be one of {', '.join(KINDS)}")
        if self.hash_algorithm not in HASH_ALGORITHMS:
            raise InvalidRequest(f"hash_algorithm is {self.hash_algorithm!r:.80}; known: {', '.join(HASH_ALGORITHMS)}")
        if self.cold_codec and self.cold_codec not in LOSSY_CODECS:
            raise InvalidRequest(
                f"cold_codec is {self.cold_codec!r:.80}; it must be empty (exact), or one of {', '.join(LOSSY_CODECS)}"
            )
        if not isinstance(self.layout, KVLayout):
            raise InvalidRequest(f"layout must be a KVLayout, not {type(self.layout).__name__}")
        if not 1 <= self.block_nbytes <= MAX_BLOCK_NBYTES:
            raise InvalidRequest(f"a block has {self.block_nbytes} bytes; the limit is {MAX_BLOCK_NBYTES}")
        if self.kind == CHAIN:
            self._check_token_axes()

    def _check_token_axes(self) -> None:
        # Smaller is meant: a sliding window or a compressed tensor keeps fewer tokens than the block covers.
        for spec in self.layout.tensors:
            size = spec.axis_size("token")
            if size is not None and size > self.block_tokens:
                raise InvalidRequest(
                    f"tensor {spec.name!r} has {size} tokens on its token axis; a block has {self.block_tokens}"
                )

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block."""
        return self.layout.nbytes

    @property
    def shard_axes(self) -> Shard:
        """`shard` in its canonical form."""
        return cast(Shard, self.shard)

    @property
    def identity_pairs(self) -> Identity:
        """`identity` in its canonical form."""
        return cast(Identity, self.identity)

    def digest(self, tenant: str) -> bytes:
        """The namespace's id, 32 bytes.

        Raises:
            InvalidRequest: the tenant's name is empty or too long.
        """
        check_string(tenant, "tenant")
        encoded = b"".join(
            (
                _text(_DOMAIN),
                _text(tenant),
                _text(self.model),
                _text(self.revision),
                _U64.pack(self.block_tokens),
                _text(self.kind),
                _encode_layout(self.layout),
                _encode_shard(self.shard_axes),
                _encode_identity(self.identity_pairs),
                _text(self.hash_algorithm),
                _text(self.salt),
                _text(self.cold_codec) if self.cold_codec else b"",  # last, so that older digests stay as they are
            )
        )
        return hashlib.sha256(encoded).digest()


def _canonical_shard(shard: Mapping[str, tuple[int, int]] | Shard | Literal["all"]) -> Shard:
    if shard == "all":
        return ()
    axes: list[tuple[str, tuple[int, int]]] = []
    for axis, place in _pairs(shard, "shard"):
        name = check_string(axis, "shard axis")
        try:
            rank, size = cast(tuple[int, int], place)
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"shard axis {name!r} must be a pair of rank and size") from error
        total = check_integer(size, f"size of shard axis {name!r}", 1, MAX_SHARD_SIZE)
        axes.append((name, (check_integer(rank, f"rank of shard axis {name!r}", 0, total - 1), total)))
    _check_names([axis for axis, _ in axes], "shard axis", MAX_SHARD_AXES)
    return tuple(sorted(axes))


def _canonical_identity(identity: Mapping[str, str] | Identity) -> Identity:
    pairs: list[tuple[str, str]] = []
    for key, value in _pairs(identity, "identity"):
        name = check_string(key, "identity name")
        pairs.append((name, check_string(value, f"identity {name!r:.80}", empty=True)))
    _check_names([name for name, _ in pairs], "identity name", MAX_IDENTITY_ENTRIES)
    return tuple(sorted(pairs))


def _pairs(value: object, what: str) -> list[tuple[object, object]]:
    """The entries of a mapping, or of a sequence of pairs."""
    try:
        items = value.items() if isinstance(value, Mapping) else cast(Iterable[tuple[object, object]], value)
        return [(name, entry) for name, entry in items]
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{what} must be a mapping, not {value!r:.80}") from error


def _check_names(names: list[str], what: str, limit: int) -> None:
    if len(names) > limit:
        raise InvalidRequest(f"{len(names)} entries of kind {what}; the limit is {limit}")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"{what} {twice!r:.80} is given twice")


def _text(value: str | bytes) -> bytes:
    raw = value.encode("utf-8") if isinstance(value, str) else value
    return _U64.pack(len(raw)) + raw


def _encode_layout(layout: KVLayout) -> bytes:
    parts = [_U64.pack(len(layout.tensors))]
    for spec in layout.tensors:
        sizes = b"".join(_U64.pack(size) for size in spec.shape)
        parts += [_text(spec.name), _text(spec.dtype), _U64.pack(len(spec.shape)), sizes, _text(spec.axes)]
    return b"".join(parts)


def _encode_shard(shard: Shard) -> bytes:
    axes = (_text(axis) + _U64.pack(rank) + _U64.pack(size) for axis, (rank, size) in shard)
    return _U64.pack(len(shard)) + b"".join(axes)


def _encode_identity(identity: Identity) -> bytes:
    return _U64.pack(len(identity)) + b"".join(_text(name) + _text(value) for name, value in identity)
