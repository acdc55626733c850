"""Key chains: golden vectors, forms of input, slices, extension, refusals."""

import json
import re
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.protocol.errors import InvalidRequest
from kvstore.protocol.keys import KEY_BYTES, MAX_TOKEN_ID, ROOT, Keys, chain_keys

GOLDEN = json.loads((Path(__file__).parent / "golden" / "keys.json").read_text())
NAMESPACE = bytes(range(32))


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_golden_vectors(case: dict[str, Any]) -> None:
    extra = [(index, bytes.fromhex(value)) for index, value in case["extra"]]
    keys = chain_keys(bytes.fromhex(case["root"]), case["tokens"], case["block_tokens"], extra)
    assert [key.hex() for key in keys] == case["keys"]
    assert keys.parent == ROOT


TOKENS = [0, 1, 2**16 - 1, 7, 2**15, 40_000, 5, 6, 99]


@pytest.mark.parametrize(
    "form",
    [
        tuple(TOKENS),
        range(9),
        array("I", TOKENS),
        array("i", TOKENS),
        array("q", TOKENS),
        array("H", TOKENS),
        array("I", TOKENS).tobytes(),
        bytearray(array("I", TOKENS).tobytes()),
        memoryview(array("I", TOKENS).tobytes()),
        memoryview(array("I", TOKENS)),
        *[
            np.array(TOKENS, dtype=kind)
            for kind in ("int32", "uint32", "int64", "uint64", "uint16", ">i4", ">i8", ">u4", "object")
        ],
        np.array(TOKENS).repeat(2)[::2],
        np.array(TOKENS, dtype=np.int32)[::-1][::-1],
        [np.int64(token) for token in TOKENS],
        iter(TOKENS),
    ],
    ids=lambda form: f"{type(form).__name__}-{getattr(form, 'dtype', getattr(form, 'typecode', ''))}",
)
def test_every_form_of_tokens_gives_the_same_keys(form: Any) -> None:
    tokens = list(form) if isinstance(form, range) else TOKENS
    assert chain_keys(NAMESPACE, form, 4) == chain_keys(NAMESPACE, tokens, 4)


def test_a_numpy_uint8_array_holds_numbers_not_packed_tokens() -> None:
    assert chain_keys(NAMESPACE, np.array([1, 2, 3, 4], dtype=np.uint8), 2) == chain_keys(NAMESPACE, [1, 2, 3, 4], 2)


@pytest.mark.parametrize(
    "form", [[], (), b"", np.array([], dtype=np.int64), np.array([], dtype=np.int32), array("q"), array("i")]
)
def test_no_tokens_give_no_keys(form: Any) -> None:
    keys = chain_keys(NAMESPACE, form, 4)
    assert len(keys) == 0
    assert bytes(keys) == b""
    assert list(keys) == []


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, -1], "token_ids[1] is -1"),
        ([1, 2, MAX_TOKEN_ID + 1], f"token_ids[2] is {MAX_TOKEN_ID + 1}"),
        ([1, 2.0], "token_ids[1] is 2.0, not an integer"),
        ([1, None], "token_ids[1] is None"),
        ("abc", "token_ids[0] is 'a'"),
        (np.array([1, -1]), "token_ids[1] is -1"),
        (np.array([1, 2, -5], dtype=np.int32), "token_ids[2] is -5"),
        (np.array([1 << 32]), "token_ids[0] is 4294967296"),
        (np.array([1, 1 << 63], dtype=np.uint64), "token_ids[1] is 9223372036854775808"),
        (np.array([1.0]), "token_ids[0] is 1.0"),
        (np.zeros((2, 4), dtype=np.int64), "one-dimensional; the shape is (2, 4)"),
        (np.array(7), "one-dimensional; the shape is ()"),
        (array("q", [-(1 << 40)]), "token_ids[0] is -1099511627776"),
        (b"12345", "5 bytes"),
        (7, "not int"),
        (None, "not NoneType"),
    ],
)
def test_a_bad_token_is_named(tokens: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(message)):
        chain_keys(NAMESPACE, tokens, 2)


@pytest.mark.parametrize("root", [b"", b"short", bytes(33), "x" * 32, None])
def test_the_root_must_be_a_digest(root: Any) -> None:
    with pytest.raises(InvalidRequest, match="digest"):
        chain_keys(root, [1], 1)


@pytest.mark.parametrize("block_tokens", [0, -1, 65_537])
def test_block_tokens_are_bounded(block_tokens: int) -> None:
    with pytest.raises(InvalidRequest, match="block_tokens"):
        chain_keys(NAMESPACE, [1], block_tokens)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([(8, b"x")], "extra[0] is at token 8: the tokens end at 8"),
        ([(0, b"x"), (-1, b"x")], "extra[1] is at token -1"),
        ([(0, "x")], "extra[0] must be bytes, not str"),
        ([(0.5, b"x")], "extra[0] is not a pair"),
        ([0], "extra[0] is not a pair"),
        ([(0, b"x", 1)], "extra[0] is not a pair"),
    ],
)
def test_a_bad_extra_is_named(extra: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(message)):
        chain_keys(NAMESPACE, range(8), 4, extra)


def test_an_extra_changes_its_block_and_those_after_it() -> None:
    plain = chain_keys(NAMESPACE, range(16), 4)
    marked = chain_keys(NAMESPACE, range(16), 4, [(5, b"image")])
    assert [a == b for a, b in zip(plain, marked, strict=True)] == [True, False, False, False]


def test_extras_are_a_sorted_list_whatever_their_order() -> None:
    pairs = [(1, b"b"), (1, b"a"), (5, bytearray(b"c")), (1, b"a")]
    keys = chain_keys(NAMESPACE, range(8), 4, pairs)
    assert keys == chain_keys(NAMESPACE, range(8), 4, pairs[::-1])
    assert keys != chain_keys(NAMESPACE, range(8), 4, pairs[:3])


def test_keys_are_a_sequence() -> None:
    keys = chain_keys(NAMESPACE, range(20), 4)
    listed = list(keys)
    assert len(keys) == len(listed) == 5
    assert b"".join(listed) == bytes(keys) == keys.data
    assert [keys[i] for i in range(-5, 5)] == listed * 2
    assert keys[np.int64(2)] == listed[2]
    assert listed[3] in keys
    for index in (5, -6):
        with pytest.raises(IndexError):
            keys[index]


def test_slices_know_their_parent() -> None:
    keys = chain_keys(NAMESPACE, range(20), 4)
    assert keys[:3].parent == ROOT
    assert keys[2:].parent == keys[1]
    assert keys[1:4][1:].parent == keys[1]
    assert list(keys[1:4]) == list(keys)[1:4]
    assert keys[4:2].parent == keys[3]
    assert len(keys[4:2]) == 0
    assert keys[:] == keys
    assert keys[-2:] == keys[3:]
    with pytest.raises(InvalidRequest, match="step 2"):
        keys[::2]


def test_equality_and_hash_include_the_parent() -> None:
    keys = chain_keys(NAMESPACE, range(8), 4)
    again = Keys.from_bytes(bytes(keys))
    assert keys == again
    assert hash(keys) == hash(again)
    assert keys[1:] != Keys.from_bytes(bytes(keys[1:]))
    assert keys != list(keys)


def test_extend_goes_on_with_the_partial_block() -> None:
    whole = chain_keys(NAMESPACE, range(21), 4)
    keys = chain_keys(NAMESPACE, range(3), 4)
    assert len(keys) == 0
    for start, stop in ((3, 3), (3, 4), (4, 11), (11, 21)):
        keys = keys.extend(range(start, stop))
    assert keys == whole


def test_extend_takes_extras_by_their_place_in_the_whole_sequence() -> None:
    extra = [(1, b"a"), (6, b"b"), (7, b"c"), (9, b"d"), (17, b"e")]
    whole = chain_keys(NAMESPACE, range(20), 4, extra)
    keys = chain_keys(NAMESPACE, range(7), 4, extra[:2])
    keys = keys.extend(range(7, 10), extra[2:4])
    assert keys.extend(range(10, 20), extra[4:]) == whole


def test_an_extra_may_join_the_partial_block_later_but_not_a_full_one() -> None:
    keys = chain_keys(NAMESPACE, range(6), 4)
    assert keys.extend([6, 7], [(4, b"x")]) == chain_keys(NAMESPACE, range(8), 4, [(4, b"x")])
    with pytest.raises(InvalidRequest, match="already full"):
        keys.extend([6, 7], [(3, b"x")])


def test_a_slice_that_reaches_the_end_can_be_extended() -> None:
    keys = chain_keys(NAMESPACE, range(10), 4)
    whole = chain_keys(NAMESPACE, range(20), 4)
    assert keys[1:].extend(range(10, 20)) == whole[1:]
    assert keys[2:].extend(range(10, 20)) == whole[2:]


@pytest.mark.parametrize(
    "keys",
    [
        chain_keys(NAMESPACE, range(10), 4)[:1],
        Keys.from_digests(bytes(64), 32),
        Keys.from_bytes(bytes(64)),
    ],
)
def test_what_has_no_end_of_a_chain_cannot_be_extended(keys: Keys) -> None:
    with pytest.raises(InvalidRequest, match="extended"):
        keys.extend([1])


def test_extending_leaves_the_old_keys_alone() -> None:
    keys = chain_keys(NAMESPACE, range(6), 4)
    one, other = keys.extend([1, 2]), keys.extend([3, 4])
    assert len(keys) == 1
    assert one[0] == other[0] == keys[0]
    assert one[1] != other[1]


def test_digests_of_any_size_become_keys() -> None:
    digests = bytes(range(72))
    keys = Keys.from_digests(digests, size=36)
    assert len(keys) == 2
    assert len(bytes(keys)) == 2 * KEY_BYTES
    assert keys[1] == Keys.from_digests(digests[36:], size=36)[0]
    assert keys.parent == ROOT
    assert len(Keys.from_digests(b"", 8)) == 0


@pytest.mark.parametrize(("data", "size"), [(bytes(35), 36), (bytes(37), 36), (b"x", 0), (b"x", -1), ("x", 1)])
def test_digests_must_be_whole(data: Any, size: int) -> None:
    with pytest.raises(InvalidRequest):
        Keys.from_digests(data, size)


@pytest.mark.parametrize(("data", "parent"), [(bytes(33), b""), (bytes(32), b"x"), (bytes(32), bytes(31)), (None, b"")])
def test_raw_keys_must_be_whole(data: Any, parent: bytes) -> None:
    with pytest.raises(InvalidRequest):
        Keys.from_bytes(data, parent)


def test_repr_is_short() -> None:
    keys = chain_keys(NAMESPACE, range(4096), 1)
    assert len(repr(keys)) < 80
    assert repr(keys[:0]) == "Keys(0 blocks after root)"
