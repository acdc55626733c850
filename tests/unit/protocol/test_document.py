"""docs/protocol.md says what the golden files and the code say."""

from __future__ import annotations

import re
from pathlib import Path

from kvstore.protocol import errors, frames, keys, layout, namespace, slab
from kvstore.protocol.errors import KVStoreError
from kvstore.protocol.frames import Method

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
GOLDEN = "".join(path.read_text(encoding="utf-8") for path in (Path(__file__).parent / "golden").glob("*.json"))


def test_every_vector_of_the_document_is_a_golden_one() -> None:
    vectors = re.findall(r"\b[0-9a-f]{32,}\b", TEXT)
    assert len(vectors) >= 12
    assert [vector for vector in vectors if vector not in GOLDEN] == []


def test_the_encoding_that_is_shown_is_a_golden_one() -> None:
    shown = TEXT.split("of the second row:")[1].split("```")[1]
    encoding = "".join(line.split("   ")[0] for line in shown.splitlines())
    assert f'"first_encoding": "{encoding.replace(" ", "")}"' in GOLDEN


def test_methods_and_statuses_are_listed_with_their_numbers() -> None:
    for method in Method:
        name = "".join(word.capitalize() for word in method.name.split("_"))
        assert f"| {int(method)} | {name} |" in TEXT
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, KVStoreError) and kind is not KVStoreError:
            assert f"| {kind.code} | {kind.__name__} |" in TEXT


def test_limits_and_names_are_those_of_the_code() -> None:
    for number in (
        frames.MAX_PAYLOAD_BYTES,
        keys.MAX_BLOCK_TOKENS,
        layout.MAX_STRING_BYTES,
        layout.MAX_TENSORS,
        slab.PAGE_BYTES,
    ):
        assert f"{number:,}" in TEXT
    assert f"Protocol version: {frames.PROTOCOL_VERSION}." in TEXT
    assert f"At most {frames.MAX_CALLS_IN_FLIGHT} calls" in TEXT
    assert f"1 to {frames.MAX_FDS_PER_MESSAGE} slab ids" in TEXT
    assert f"{layout.MAX_AXES} axes; {namespace.MAX_SHARD_AXES} shard axes" in TEXT
    assert f"{namespace.MAX_IDENTITY_ENTRIES} identity entries" in TEXT
    assert f"`{slab.MAGIC.decode()}`" in TEXT
    assert all(dtype in TEXT for dtype in layout.ITEM_BYTES)
