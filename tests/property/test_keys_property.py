"""Key chains under hypothesis: steps equal the whole, slices, and no two inputs share a key."""

from __future__ import annotations

import hashlib
import itertools
from array import array

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvstore.protocol.errors import InvalidRequest
from kvstore.protocol.keys import MAX_TOKEN_ID, ROOT, Keys, chain_keys

NAMESPACE = bytes(range(32))
Extra = tuple[int, bytes]

# Few different values, so that near misses come often; and the ends of the range.
token = st.sampled_from([0, 1, 2, 8, 255, 256, 2**31 - 1, 2**31, MAX_TOKEN_ID]) | st.integers(0, MAX_TOKEN_ID)
tokens_lists = st.lists(token, max_size=40)
block_sizes = st.integers(1, 9)
short_bytes = st.binary(max_size=3) | st.sampled_from([bytes(8), bytes(7) + b"\1", b"\1" + bytes(7), bytes(16)])


@st.composite
def sequences(draw: st.DrawFn) -> tuple[list[int], list[Extra]]:
    """Tokens with extras at them."""
    tokens = draw(tokens_lists)
    if not tokens:
        return tokens, []
    places = st.integers(0, len(tokens) - 1)
    return tokens, draw(st.lists(st.tuples(places, short_bytes), max_size=4))


def reference_keys(root: bytes, tokens: list[int], block_tokens: int, extra: list[Extra]) -> list[bytes]:
    """The encoding of docs/protocol.md, one block after the other, as plainly as it can be said."""
    keys, parent = [], root
    for first in range(0, len(tokens) - block_tokens + 1, block_tokens):
        packed = b"".join(number.to_bytes(4, "little") for number in tokens[first : first + block_tokens])
        inside = sorted((at - first, value) for at, value in extra if first <= at < first + block_tokens)
        parts = [parent, len(packed).to_bytes(8, "little"), packed, len(inside).to_bytes(8, "little")]
        for at, value in inside:
            parts += [at.to_bytes(8, "little"), len(value).to_bytes(8, "little"), value]
        parent = hashlib.sha256(b"".join(parts)).digest()
        keys.append(parent)
    return keys


@given(sequences(), block_sizes)
def test_keys_are_what_the_document_says(sequence: tuple[list[int], list[Extra]], block_tokens: int) -> None:
    tokens, extra = sequence
    keys = chain_keys(NAMESPACE, tokens, block_tokens, extra)
    assert list(keys) == reference_keys(NAMESPACE, tokens, block_tokens, extra)


@given(sequences(), block_sizes, st.lists(st.integers(0, 40), max_size=5))
def test_step_by_step_equals_the_whole(
    sequence: tuple[list[int], list[Extra]], block_tokens: int, cuts: list[int]
) -> None:
    tokens, extra = sequence
    edges = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    keys = chain_keys(NAMESPACE, [], block_tokens)
    for start, stop in itertools.pairwise(edges):
        keys = keys.extend(tokens[start:stop], [pair for pair in extra if start <= pair[0] < stop])
    assert keys == chain_keys(NAMESPACE, tokens, block_tokens, extra)


@given(tokens_lists, block_sizes)
def test_the_form_of_the_tokens_does_not_matter(tokens: list[int], block_tokens: int) -> None:
    keys = chain_keys(NAMESPACE, tokens, block_tokens)
    packed = np.array(tokens, dtype="<u4").tobytes()
    for form in (tuple(tokens), array("I", tokens), array("q", tokens), np.array(tokens, dtype=np.int64), packed):
        assert chain_keys(NAMESPACE, form, block_tokens) == keys


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=8))
def test_lists_and_arrays_are_refused_alike(numbers: list[int]) -> None:
    outcomes: list[bytes | str] = []
    for form in (numbers, np.array(numbers, dtype=np.int64), array("q", numbers)):
        try:
            outcomes.append(bytes(chain_keys(NAMESPACE, form, 1)))
        except InvalidRequest as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1] == outcomes[2]


@given(tokens_lists, block_sizes, st.integers(-45, 45), st.integers(-45, 45), st.integers(-45, 45))
def test_slices_are_those_of_a_list_with_the_right_parent(
    tokens: list[int], block_tokens: int, start: int, stop: int, again: int
) -> None:
    keys = chain_keys(NAMESPACE, tokens, block_tokens)
    listed = list(keys)
    part = keys[start:stop]
    assert list(part) == listed[start:stop]
    first, _, _ = slice(start, stop).indices(len(listed))
    assert part.parent == (listed[first - 1] if first else ROOT)
    assert list(part[again:]) == listed[start:stop][again:]
    assert Keys.from_bytes(bytes(part), part.parent) == part


@given(tokens_lists, tokens_lists, block_sizes, st.integers(0, 45))
def test_a_slice_to_the_end_extends_like_the_whole(
    tokens: list[int], more: list[int], block_tokens: int, start: int
) -> None:
    keys = chain_keys(NAMESPACE, tokens, block_tokens)
    start = min(start, len(keys))
    assert keys[start:].extend(more) == chain_keys(NAMESPACE, tokens + more, block_tokens)[start:]


def last_key(root: bytes, tokens: list[int], block_tokens: int, extra: list[Extra]) -> bytes:
    keys = chain_keys(root, tokens, block_tokens, extra)
    return keys[len(keys) - 1]


@st.composite
def full_blocks(draw: st.DrawFn) -> tuple[bytes, int, list[int], list[Extra]]:
    """Root, block size, tokens of one block or more, and sorted extras: all that a last key stands for."""
    size = draw(st.integers(1, 4))
    count = size * draw(st.integers(1, 3))
    tokens = draw(st.lists(st.sampled_from([0, 1, 8]), min_size=count, max_size=count))
    extra = draw(st.lists(st.tuples(st.integers(0, count - 1), short_bytes), max_size=2))
    return draw(st.sampled_from([NAMESPACE, bytes(32)])), size, tokens, sorted(extra)


@given(full_blocks(), full_blocks())
def test_different_blocks_have_different_keys(
    one: tuple[bytes, int, list[int], list[Extra]], other: tuple[bytes, int, list[int], list[Extra]]
) -> None:
    left, right = (last_key(root, tokens, size, extra) for root, size, tokens, extra in (one, other))
    assert (left == right) == (one == other)


@given(st.lists(token, min_size=1, max_size=6), st.data())
def test_bytes_cannot_move_between_tokens_and_extras(tokens: list[int], data: st.DataObject) -> None:
    """The same bytes on the wire, cut elsewhere: what a length extension or a missing length would confuse."""
    extra = data.draw(st.lists(st.tuples(st.integers(0, len(tokens) - 1), short_bytes), min_size=1, max_size=3))
    base = last_key(NAMESPACE, tokens, len(tokens), extra)
    # The encoded extras as if they were tokens of a longer block.
    tail = b"".join(at.to_bytes(8, "little") + len(value).to_bytes(8, "little") + value for at, value in sorted(extra))
    tail = len(extra).to_bytes(8, "little") + tail + bytes(-len(tail) % 4)
    longer = tokens + array("I", tail).tolist()
    assert last_key(NAMESPACE, longer, len(longer), []) != base
    # One extra as long as two, and an extra split in two.
    at, value = extra[0]
    joined = value + at.to_bytes(8, "little") + len(value).to_bytes(8, "little") + value
    assert last_key(NAMESPACE, tokens, len(tokens), [(at, value), (at, value)]) != last_key(
        NAMESPACE, tokens, len(tokens), [(at, joined)]
    )
    for cut in range(len(value)):
        split = [(at, value[:cut]), (at, value[cut:]), *extra[1:]]
        assert last_key(NAMESPACE, tokens, len(tokens), split) != base


@given(st.binary(max_size=200), st.integers(1, 40))
def test_digests_map_one_to_one(data: bytes, size: int) -> None:
    digests = [data[i : i + size] for i in range(0, len(data) - size + 1, size)]
    keys = Keys.from_digests(b"".join(digests), size)
    assert list(keys) == [hashlib.sha256(digest).digest() for digest in digests]
    assert len(set(keys)) == len(set(digests))
