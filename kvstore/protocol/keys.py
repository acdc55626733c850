"""Block keys: SHA-256 chained over parent key, tokens and extra keys.

The name of a block says all that went into it, so two workers meet exactly where their prompts agree. The
canonical encoding that is hashed is written down, with golden vectors, in docs/protocol.md:

    parent key (32 bytes; the namespace digest for the first block)
    u64  byte length of the tokens, then the tokens as u32
    u64  number of extra keys, then for each, sorted by (index, bytes):
         u64 index of its token within the block, u64 byte length, the bytes

All integers are little-endian. Every variable part has its length before it, so no two different inputs share
an encoding.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, SupportsIndex, TypeAlias, cast, overload

from kvstore.protocol.errors import InvalidRequest

KEY_BYTES = 32
ROOT = b""  # as a parent: there is none
TOKEN_BYTES = 4
MAX_TOKEN_ID = (1 << 32) - 1
MAX_BLOCK_TOKENS = 65_536

Extra: TypeAlias = tuple[int, bytes]

_U64 = struct.Struct("<Q")
_NO_EXTRA = _U64.pack(0)


class _Chain(NamedTuple):
    """Where a chain goes on: what is known of the block that is not full yet."""

    parent: bytes  # hashed in before the next block: the last key, or the namespace digest
    block_tokens: int
    first_token: int  # index of the next block's first token, counted from the start of the sequence
    tokens: bytes  # u32le, fewer than block_tokens
    extra: tuple[Extra, ...]  # at those tokens, indexes counted from the start of the sequence


class Keys(Sequence[bytes]):
    """Keys of consecutive blocks; treat it as immutable.

    `data` holds n keys of 32 bytes one after the other, `parent` the key before the first one (ROOT if there is
    none). Made by `chain_keys`, `from_digests` or `from_bytes`.
    """

    __slots__ = ("_chain", "data", "parent")

    data: bytes
    parent: bytes

    def __init__(self, data: bytes, parent: bytes = ROOT, _chain: _Chain | None = None) -> None:
        self.data = data
        self.parent = parent
        self._chain = _chain

    @classmethod
    def from_digests(cls, data: bytes, size: int) -> Keys:
        """Keys for blocks that an engine named itself.

        Args:
            data: n digests, `size` bytes each, one after the other.
            size: bytes of one digest. Each is hashed with SHA-256 to the 32 bytes of a key.

        Raises:
            InvalidRequest: `data` is not a whole number of digests.
        """
        raw = _raw(data, "digests")
        if size < 1 or len(raw) % size:
            raise InvalidRequest(f"{len(raw)} bytes are not a whole number of digests of {size} bytes")
        digests = struct.iter_unpack(f"{size}s", raw)
        return cls(b"".join([hashlib.sha256(digest).digest() for (digest,) in digests]))

    @classmethod
    def from_bytes(cls, data: bytes, parent: bytes = ROOT) -> Keys:
        """Keys from the bytes of `bytes(keys)`.

        Raises:
            InvalidRequest: `data` is not n times 32 bytes, or `parent` neither empty nor 32 bytes.
        """
        raw, before = _raw(data, "keys"), _raw(parent, "the parent key")
        if len(raw) % KEY_BYTES:
            raise InvalidRequest(f"{len(raw)} bytes are not a whole number of keys of {KEY_BYTES} bytes")
        if len(before) not in (0, KEY_BYTES):
            raise InvalidRequest(f"the parent key has {len(before)} bytes; give {KEY_BYTES}, or none for the root")
        return cls(raw, before)

    def extend(self, token_ids: object, extra: Iterable[Extra] = ()) -> Keys:
        """Continue the chain with more tokens, after those of a last block that was not full yet.

        Extending step by step gives the very keys that the whole sequence gives at once.

        Args:
            token_ids: the tokens that follow; see `chain_keys`.
            extra: (token index, bytes) pairs. The index counts from the start of the whole sequence, not of
                `token_ids`, and must lie in a block that was not full before this call.

        Raises:
            InvalidRequest: these keys are the front or middle of a chain, or never came from tokens; or the
                arguments are not what `chain_keys` takes.
        """
        if self._chain is None:
            raise InvalidRequest(
                "only keys that reach to the end of their chain_keys() can be extended, not slices that cut it off, "
                "from_digests() or from_bytes()"
            )
        data, chain = _advance(self._chain, _tokens_u32(token_ids), extra)
        return Keys(self.data + data, self.parent, chain)

    def __len__(self) -> int:
        return len(self.data) // KEY_BYTES

    @overload
    def __getitem__(self, index: SupportsIndex) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> Keys: ...

    def __getitem__(self, index: SupportsIndex | slice) -> bytes | Keys:
        """One key, or the keys of consecutive blocks with the right parent."""
        if isinstance(index, slice):
            return self._cut(index)
        at = operator.index(index)
        count = len(self)
        if not -count <= at < count:
            raise IndexError(f"key {at} of {count}")
        first = (at % count) * KEY_BYTES
        return self.data[first : first + KEY_BYTES]

    def _cut(self, span: slice) -> Keys:
        count = len(self)
        start, stop, step = span.indices(count)
        if step != 1:
            raise InvalidRequest(f"keys of consecutive blocks are needed; the slice has step {step}")
        stop = max(start, stop)
        first = start * KEY_BYTES
        parent = self.data[first - KEY_BYTES : first] if start else self.parent
        chain = self._chain if stop == count else None
        return Keys(self.data[first : stop * KEY_BYTES], parent, chain)

    def __iter__(self) -> Iterator[bytes]:
        return map(operator.itemgetter(0), struct.iter_unpack(f"{KEY_BYTES}s", self.data))

    def __bytes__(self) -> bytes:
        return self.data

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Keys):
            return NotImplemented
        return self.data == other.data and self.parent == other.parent

    def __hash__(self) -> int:
        return hash((self.data, self.parent))

    def __repr__(self) -> str:
        parent = self.parent.hex()[:12] or "root"
        last = f", last={self.data[-KEY_BYTES:].hex()[:12]}" if self.data else ""
        return f"Keys({len(self)} blocks after {parent}{last})"


def chain_keys(root: bytes, token_ids: object, block_tokens: int, extra: Iterable[Extra] = ()) -> Keys:
    """Keys of the full blocks of a token sequence.

    131,072 tokens in blocks of 16 take 4 to 5 ms (list or numpy array) on one core with SHA extensions.

    Args:
        root: the 32-byte namespace digest.
        token_ids: token numbers in 0..2**32-1, one-dimensional: a list, tuple, array, numpy array or CPU tensor of
            integers; bytes, bytearray and a memoryview of bytes are taken as packed u32 little-endian.
        block_tokens: tokens per block; what is left over is remembered for `Keys.extend`.
        extra: (token index, bytes) pairs: what else the block's KV depends on (LoRA, image or audio ids), at the
            token where it begins.

    Raises:
        InvalidRequest: an argument is not as above; the message names the offending index.
    """
    digest = _raw(root, "the namespace digest")
    if len(digest) != KEY_BYTES:
        raise InvalidRequest(f"the namespace digest has {len(digest)} bytes; it must have {KEY_BYTES}")
    if not 1 <= block_tokens <= MAX_BLOCK_TOKENS:
        raise InvalidRequest(f"block_tokens is {block_tokens}; it must be within 1..{MAX_BLOCK_TOKENS}")
    data, chain = _advance(_Chain(digest, block_tokens, 0, b"", ()), _tokens_u32(token_ids), extra)
    return Keys(data, ROOT, chain)


def _advance(chain: _Chain, fresh: bytes, extra: Iterable[Extra]) -> tuple[bytes, _Chain]:
    tokens = chain.tokens + fresh
    block_nbytes = chain.block_tokens * TOKEN_BYTES
    blocks = len(tokens) // block_nbytes
    next_token = chain.first_token + blocks * chain.block_tokens
    extras = _checked_extra(extra, chain.first_token, chain.first_token + len(tokens) // TOKEN_BYTES)
    extras = sorted(chain.extra + tuple(extras)) if chain.extra else sorted(extras)
    keys = _hash_blocks(chain.parent, tokens, block_nbytes, _extra_parts(chain, extras, blocks))
    rest = tuple(pair for pair in extras if pair[0] >= next_token)
    parent = keys[-1] if keys else chain.parent
    return b"".join(keys), _Chain(parent, chain.block_tokens, next_token, tokens[blocks * block_nbytes :], rest)


def _hash_blocks(parent: bytes, tokens: bytes, block_nbytes: int, extra_parts: Iterable[bytes]) -> list[bytes]:
    size = _U64.pack(block_nbytes)
    join, sha256 = b"".join, hashlib.sha256
    keys: list[bytes] = []
    whole = memoryview(tokens)[: len(tokens) // block_nbytes * block_nbytes]
    # One join and one sha256 a block: 0.5 us. A reused bytearray took 0.7, copying a hash object 0.6.
    for (block,), part in zip(struct.iter_unpack(f"{block_nbytes}s", whole), extra_parts, strict=False):
        parent = sha256(join((parent, size, block, part))).digest()
        keys.append(parent)
    return keys


def _extra_parts(chain: _Chain, extras: list[Extra], blocks: int) -> Iterable[bytes]:
    """The last part of each block's encoding."""
    if not extras:
        return itertools.repeat(_NO_EXTRA)
    parts = [_NO_EXTRA] * blocks
    for block, pairs in itertools.groupby(extras, lambda pair: (pair[0] - chain.first_token) // chain.block_tokens):
        if block >= blocks:
            break
        first = chain.first_token + block * chain.block_tokens
        listed = [_U64.pack(index - first) + _U64.pack(len(value)) + value for index, value in pairs]
        parts[block] = _U64.pack(len(listed)) + b"".join(listed)
    return parts


def _checked_extra(extra: Iterable[Extra], first: int, stop: int) -> list[Extra]:
    checked: list[Extra] = []
    for position, pair in enumerate(extra):
        try:
            index, value = pair
            at = operator.index(index)
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"extra[{position}] is not a pair of token index and bytes") from error
        if not first <= at < stop:
            why = "its block is already full" if 0 <= at < first else f"the tokens end at {stop}"
            raise InvalidRequest(f"extra[{position}] is at token {at}: {why}")
        checked.append((at, _raw(value, f"extra[{position}]")))
    return checked


def _raw(value: object, what: str) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    raise InvalidRequest(f"{what} must be bytes, not {type(value).__name__}")


def _tokens_u32(token_ids: object) -> bytes:
    """Token numbers as packed u32 little-endian."""
    if isinstance(token_ids, (list, tuple)):
        return _from_numbers(token_ids)
    if isinstance(token_ids, (bytes, bytearray, memoryview)):
        packed = _from_packed(token_ids)
        if packed is not None:
            return packed
    try:
        view = memoryview(cast(bytes, token_ids))
    except (TypeError, ValueError, BufferError):  # no buffer (a tensor, an iterator), or a type it cannot express
        return _from_numbers(_as_list(token_ids))
    if view.ndim != 1:
        raise InvalidRequest(f"token_ids must be one-dimensional; the shape is {view.shape}")
    fast = _from_buffer(view) if sys.byteorder == "little" else None
    return fast if fast is not None else _from_numbers(_as_list(token_ids))


def _from_packed(token_ids: bytes | bytearray | memoryview) -> bytes | None:
    if isinstance(token_ids, memoryview) and token_ids.format not in ("B", "c"):
        return None
    if (nbytes := memoryview(token_ids).nbytes) % TOKEN_BYTES:
        raise InvalidRequest(f"packed token_ids have {nbytes} bytes; that is no whole number of u32")
    return bytes(token_ids)


def _from_buffer(view: memoryview) -> bytes | None:
    """u32 from a native integer buffer without a Python integer per token; None where that cannot be done."""
    kind, width = view.format[-1:], view.itemsize
    if view.format[:-1] not in ("", "@", "=", "<") or kind not in "iIlLqQ" or width not in (4, 8):
        return None
    raw = memoryview(view if view.c_contiguous else view.tobytes()).cast("B")
    if width == 4:
        # isascii() is the fastest test that no byte has its top bit set, that is, that no number is negative.
        good = kind.isupper() or raw[3::4].tobytes().isascii()
        return bytes(raw) if good else None
    halves = raw.cast("I")
    high = halves[1::2].tobytes()
    return halves[::2].tobytes() if high == bytes(len(high)) else None


def _as_list(token_ids: object) -> list[int]:
    try:
        values = token_ids.tolist() if hasattr(token_ids, "tolist") else list(cast(Iterable[int], token_ids))
    except TypeError as error:
        raise InvalidRequest(f"token_ids must be a sequence of integers, not {type(token_ids).__name__}") from error
    return values if isinstance(values, list) else [values]


def _from_numbers(token_ids: Sequence[int]) -> bytes:
    try:
        numbers = array("I", token_ids)
    except (TypeError, OverflowError) as error:
        raise _bad_token(token_ids) from error
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def _bad_token(token_ids: Sequence[int]) -> InvalidRequest:
    for position, token in enumerate(token_ids):
        try:
            number = operator.index(token)
        except TypeError:
            return InvalidRequest(f"token_ids[{position}] is {token!r:.80}, not an integer")
        if not 0 <= number <= MAX_TOKEN_ID:
            return InvalidRequest(f"token_ids[{position}] is {number}; a token id is within 0..{MAX_TOKEN_ID}")
    return InvalidRequest("token_ids are not a sequence of integers")
