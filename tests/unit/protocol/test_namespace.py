"""Layouts and namespaces: golden digests, canonical form, refusals."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from kvstore.protocol.convert import from_proto, to_proto
from kvstore.protocol.errors import InvalidRequest
from kvstore.protocol.layout import ITEM_BYTES
from kvstore.protocol.namespace import MAX_BLOCK_NBYTES, KVLayout, NamespaceSpec, TensorSpec

GOLDEN = json.loads((Path(__file__).parent / "golden" / "namespace.json").read_text())
KV = TensorSpec("kv", "bfloat16", (2, 32, 16, 8, 128), "kv layer token head dim")


def make(**changes: Any) -> NamespaceSpec:
    fields: dict[str, Any] = {"model": "org/name", "revision": "main", "block_tokens": 16, "kind": "chain"}
    return NamespaceSpec(**{**fields, "layout": KVLayout([KV]), **changes})


def from_golden(spec: Mapping[str, Any]) -> NamespaceSpec:
    layout = KVLayout(TensorSpec(**tensor) for tensor in spec["layout"])
    return NamespaceSpec(**{**spec, "layout": layout})


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_golden_digests(case: dict[str, Any]) -> None:
    assert from_golden(case["spec"]).digest(case["tenant"]).hex() == case["digest"]


def test_golden_block_sizes() -> None:
    assert [from_golden(case["spec"]).block_nbytes for case in GOLDEN] == [
        2 << 20,
        2 << 20,
        2 << 20,
        2_498_560,
        2 << 20,
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "org/other"},
        {"revision": "v2"},
        {"revision": ""},
        {"block_tokens": 17},
        {"kind": "set"},
        {"layout": KVLayout([TensorSpec("kv", "float16", KV.shape, KV.axes)])},
        {"layout": KVLayout([TensorSpec("vk", KV.dtype, KV.shape, KV.axes)])},
        {"layout": KVLayout([TensorSpec("kv", KV.dtype, (32, 2, 16, 8, 128), KV.axes)])},
        {"layout": KVLayout([TensorSpec("kv", KV.dtype, KV.shape, "layer kv token head dim")])},
        {"layout": KVLayout([KV, TensorSpec("x", "uint8", (1,), "x")])},
        {"layout": KVLayout([TensorSpec("x", "uint8", (1,), "x"), KV])},
        {"shard": {"tp": (0, 2)}},
        {"shard": {"tp": (1, 2)}},
        {"shard": {"tp": (0, 4)}},
        {"shard": {"pp": (0, 2)}},
        {"identity": {"weights": "fp8"}},
        {"identity": {"weights": ""}},
        {"identity": {"fp8": "weights"}},
        {"salt": "s"},
    ],
    ids=str,
)
def test_any_difference_gives_another_digest(changes: dict[str, Any]) -> None:
    base, other = make(), make(**changes)
    assert base != other
    assert base.digest("default") != other.digest("default")


def test_tenants_never_meet() -> None:
    assert make().digest("a") != make().digest("b")
    for tenant in ("", "x" * 1025, "a\0b"):
        with pytest.raises(InvalidRequest, match="tenant"):
            make().digest(tenant)


def test_neighbouring_strings_cannot_be_shifted_into_each_other() -> None:
    assert make(model="ab", revision="c").digest("t") != make(model="a", revision="bc").digest("t")
    assert make(model="tm").digest("t") != make(model="m").digest("tt")
    one = make(identity={"a": "b", "c": "d"})
    assert one.digest("t") != make(identity={"a": "bc", "d": ""}).digest("t")


def test_equal_specs_in_other_words_are_equal() -> None:
    spec = make(shard={"tp": (1, 2), "pp": (0, 4)}, identity={"b": "2", "a": "1"})
    other = make(
        layout=KVLayout((TensorSpec("kv", "bfloat16", [2, 32, 16, 8, 128], " kv  layer token head dim"),)),  # type: ignore[arg-type]
        shard=MappingProxyType({"pp": [0, 4], "tp": [1, 2]}),
        identity=(("a", "1"), ("b", "2")),
    )
    assert spec == other
    assert hash(spec) == hash(other)
    assert spec.digest("t") == other.digest("t")
    assert spec.shard == spec.shard_axes == (("pp", (0, 4)), ("tp", (1, 2)))
    assert dict(spec.identity) == {"a": "1", "b": "2"}


def test_all_ranks_may_be_said_as_all_or_as_nothing() -> None:
    assert make(shard="all") == make(shard={}) == make()
    assert make().shard == ()


def test_replace_keeps_the_canonical_form() -> None:
    spec = make(shard={"tp": (0, 2)}, identity={"a": "1"})
    assert dataclasses.replace(spec, salt="x") == make(shard={"tp": (0, 2)}, identity={"a": "1"}, salt="x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "model is empty"),
        ({"model": "x" * 65_536}, "model has 65536 bytes; the limit is 1024"),
        ({"model": "é" * 513}, "model has 1026 bytes; the limit is 1024"),
        ({"model": 7}, "model must be a string, not int"),
        ({"model": "a\0b"}, "model contains a NUL"),
        ({"model": "\ud800"}, "model cannot be written in UTF-8"),
        ({"revision": "x" * 1025}, "revision has 1025 bytes"),
        ({"salt": "\0"}, "salt contains a NUL"),
        ({"block_tokens": 0}, "block_tokens is 0; it must be within 1..65536"),
        ({"block_tokens": 65_537}, "block_tokens is 65537"),
        ({"block_tokens": 16.0}, "block_tokens must be an integer, not float"),
        ({"block_tokens": 8}, "tensor 'kv' has 16 tokens on its token axis; a block has 8"),
        ({"kind": "tree"}, "kind is 'tree'; it must be one of chain, set"),
        ({"hash_algorithm": "md5"}, "hash_algorithm is 'md5'; known: sha256"),
        ({"layout": [KV]}, "layout must be a KVLayout, not list"),
        ({"shard": {"tp": (2, 2)}}, "rank of shard axis 'tp' is 2; it must be within 0..1"),
        ({"shard": {"tp": (0, 0)}}, "size of shard axis 'tp' is 0"),
        ({"shard": {"tp": (-1, 2)}}, "rank of shard axis 'tp' is -1"),
        ({"shard": {"tp": 2}}, "shard axis 'tp' must be a pair"),
        ({"shard": {"": (0, 1)}}, "shard axis is empty"),
        ({"shard": "tp"}, "shard must be a mapping"),
        ({"shard": None}, "shard must be a mapping"),
        ({"shard": (("tp", (0, 2)), ("tp", (1, 2)))}, "shard axis 'tp' is given twice"),
        ({"shard": {f"axis{i}": (0, 1) for i in range(17)}}, "17 entries of kind shard axis; the limit is 16"),
        ({"identity": {"": "x"}}, "identity name is empty"),
        ({"identity": {"weights": 8}}, "identity 'weights' must be a string, not int"),
        ({"identity": {"weights": "x" * 1025}}, "identity 'weights' has 1025 bytes"),
        ({"identity": {str(i): "" for i in range(257)}}, "257 entries of kind identity name; the limit is 256"),
        ({"identity": 5}, "identity must be a mapping"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_field_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(message)) as caught:
        make(**changes)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", "uint8", (1,), "x"), "tensor name is empty"),
        (("t", "float3", (1,), "x"), "tensor 't' has dtype 'float3'; known are bfloat16"),
        (("t", "uint8", (), "x"), "tensor 't' has 0 axes"),
        (("t", "uint8", (1,) * 17, " ".join(map(str, range(17)))), "tensor 't' has 17 axes"),
        (("t", "uint8", 3, "x"), "shape of tensor 't' must be a sequence"),
        (("t", "uint8", (0,), "x"), "axis size of tensor 't' is 0"),
        (("t", "uint8", (1.5,), "x"), "axis size of tensor 't' must be an integer"),
        (("t", "uint8", (1, 2), "x"), "names 1 axes"),
        (("t", "uint8", (1, 2), "x x"), "names an axis twice"),
        (("t", "uint8", (1,), ""), "axes of tensor 't' is empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_tensor_is_named(arguments: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(message)):
        TensorSpec(*arguments)


def test_a_layout_has_tensors_with_unique_names() -> None:
    with pytest.raises(InvalidRequest, match="0 tensors"):
        KVLayout([])
    with pytest.raises(InvalidRequest, match="'kv' twice"):
        KVLayout([KV, KV])
    with pytest.raises(InvalidRequest, match="made of TensorSpec, not str"):
        KVLayout("kv")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="4097 tensors"):
        KVLayout(TensorSpec(str(i), "uint8", (1,), "x") for i in range(4097))


def test_tensors_are_packed_in_order_at_multiples_of_their_item_size() -> None:
    layout = KVLayout(
        [
            TensorSpec("a", "uint8", (3,), "x"),
            TensorSpec("b", "float32", (2, 2), "x y"),
            TensorSpec("c", "float8_e5m2", (1,), "x"),
            TensorSpec("d", "bfloat16", (1,), "x"),
        ]
    )
    assert layout.offsets == (0, 4, 20, 22)
    assert layout.nbytes == 24
    assert [tensor.nbytes for tensor in layout.tensors] == [3, 16, 1, 2]


def test_every_dtype_has_its_size() -> None:
    assert {name: TensorSpec("t", name, (3,), "x").nbytes for name in ITEM_BYTES} == {
        name: 3 * size for name, size in ITEM_BYTES.items()
    }
    assert ITEM_BYTES["bfloat16"] == 2
    assert ITEM_BYTES["float8_e4m3"] == 1


def test_axis_sizes_are_found_by_name() -> None:
    assert KV.axis_size("token") == 16
    assert KV.axis_size("tok") is None


def test_a_block_is_at_most_a_gibibyte() -> None:
    def layout(nbytes: int) -> KVLayout:
        return KVLayout([TensorSpec("t", "uint8", (nbytes,), "x")])

    assert make(layout=layout(MAX_BLOCK_NBYTES)).block_nbytes == 1 << 30
    with pytest.raises(InvalidRequest, match="1073741825 bytes; the limit is 1073741824"):
        make(layout=layout(MAX_BLOCK_NBYTES + 1))


def test_a_window_may_be_shorter_than_the_block_and_in_a_set_longer() -> None:
    assert make(block_tokens=64).block_nbytes == 2 << 20
    assert make(block_tokens=1, kind="set").block_nbytes == 2 << 20


def test_a_layout_in_words() -> None:
    pair = KVLayout([TensorSpec("kv", "bfloat16", (2, 16), "kv token"), TensorSpec("i", "int8", (3,), "dim")])
    assert pair.text == "bfloat16 kv=2 token=16; int8 dim=3"
    many = KVLayout([TensorSpec(f"t{i}", "float16", (2, 16), "kv token") for i in range(100)])
    assert many.text == "float16"


def test_a_lossy_codec_is_part_of_the_name_and_must_be_known() -> None:
    exact = NamespaceSpec("m", "", 16, "chain", KVLayout([KV]))
    lossy = dataclasses.replace(exact, cold_codec="int8kv")
    assert lossy.digest("t") != exact.digest("t")
    assert from_proto(to_proto(lossy)) == lossy
    with pytest.raises(InvalidRequest, match="cold_codec is 'int4'; it must be empty"):
        dataclasses.replace(exact, cold_codec="int4")
