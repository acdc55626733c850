"""NamespaceSpec to its message and back."""

from typing import Any

import pytest

from kvstore.protocol.convert import from_proto, to_proto
from kvstore.protocol.errors import InvalidRequest
from kvstore.protocol.namespace import KVLayout, NamespaceSpec, TensorSpec
from kvstore.v1 import types_pb2

SPEC = NamespaceSpec(
    model="mödel",
    revision="main",
    block_tokens=64,
    kind="set",
    layout=KVLayout(
        [
            TensorSpec("latent", "float8_e4m3", (61, 64, 512), "layer token dim"),
            TensorSpec("rope", "bfloat16", (61, 64, 64), "layer token dim"),
        ]
    ),
    shard={"tp": (1, 4), "pp": (0, 2)},
    identity={"weights": "fp8", "empty": ""},
    salt="s",
)


def test_round_trip_through_bytes() -> None:
    message = types_pb2.NamespaceSpec.FromString(to_proto(SPEC).SerializeToString())
    assert from_proto(message) == SPEC
    assert from_proto(message).digest("t") == SPEC.digest("t")


def test_shared_by_all_ranks_is_an_empty_shard() -> None:
    spec = NamespaceSpec("m", "", 1, "chain", KVLayout([TensorSpec("t", "uint8", (1,), "x")]))
    message = to_proto(spec)
    assert len(message.shard) == 0
    assert message.kind == types_pb2.NAMESPACE_KIND_CHAIN
    assert from_proto(message) == spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": types_pb2.NAMESPACE_KIND_UNSPECIFIED}, "kind is 0"),
        ({"kind": 9}, "kind is 9"),
        ({"block_tokens": 0}, "block_tokens is 0"),
        ({"block_tokens": 2**64 - 1}, "block_tokens is 18446744073709551615"),
        ({"model": ""}, "model is empty"),
        ({"model": "x" * 65_536}, "model has 65536 bytes"),
        ({"hash_algorithm": ""}, "hash_algorithm is ''"),
        ({"salt": "a\0"}, "salt contains a NUL"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_field_is_an_invalid_request(changes: dict[str, Any], message: str) -> None:
    sent = to_proto(SPEC)
    for name, value in changes.items():
        setattr(sent, name, value)
    with pytest.raises(InvalidRequest, match=message):
        from_proto(sent)


def test_bad_parts_are_invalid_requests() -> None:
    sent = to_proto(SPEC)
    sent.layout[0].shape[0] = 2**64 - 1
    with pytest.raises(InvalidRequest, match="axis size of tensor 'latent' is 18446744073709551615"):
        from_proto(sent)
    sent = to_proto(SPEC)
    del sent.layout[:]
    with pytest.raises(InvalidRequest, match="0 tensors"):
        from_proto(sent)
    sent = to_proto(SPEC)
    sent.shard.add(axis="tp", rank=0, size=4)
    with pytest.raises(InvalidRequest, match="'tp' is given twice"):
        from_proto(sent)
    sent = to_proto(SPEC)
    sent.shard[0].rank = 2
    with pytest.raises(InvalidRequest, match="rank of shard axis 'pp' is 2"):
        from_proto(sent)


def test_an_empty_message_is_an_invalid_request() -> None:
    with pytest.raises(InvalidRequest):
        from_proto(types_pb2.NamespaceSpec())
