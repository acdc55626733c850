"""Namespaces under hypothesis: equal digests mean equal specs, and the message loses nothing."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvstore.protocol.convert import from_proto, to_proto
from kvstore.protocol.layout import ITEM_BYTES
from kvstore.protocol.namespace import KVLayout, NamespaceSpec, TensorSpec
from kvstore.v1 import types_pb2

# Two letters make near misses ("ab", "c" against "a", "bc") frequent.
near = st.text("ab", max_size=3)
text = near | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
names = text.filter(bool)
axis_names = st.text("abcde", min_size=1, max_size=2)


@st.composite
def tensors(draw: st.DrawFn) -> TensorSpec:
    """A small tensor."""
    axes = draw(st.lists(axis_names, min_size=1, max_size=3, unique=True))
    shape = draw(st.lists(st.integers(1, 4), min_size=len(axes), max_size=len(axes)))
    return TensorSpec(draw(names), draw(st.sampled_from(sorted(ITEM_BYTES))), tuple(shape), " ".join(axes))


@st.composite
def ranks(draw: st.DrawFn) -> tuple[int, int]:
    """A rank and its size."""
    size = draw(st.integers(1, 3))
    return draw(st.integers(0, size - 1)), size


layouts = st.lists(tensors(), min_size=1, max_size=3, unique_by=lambda spec: spec.name).map(KVLayout)
fields: dict[str, st.SearchStrategy[Any]] = {
    "model": names,
    "revision": text,
    "block_tokens": st.integers(1, 3),
    "kind": st.sampled_from(["chain", "set"]),
    "layout": layouts,
    "shard": st.dictionaries(names, ranks(), max_size=2) | st.just("all"),
    "identity": st.dictionaries(names, text, max_size=2),
    "salt": text,
}
specs = st.builds(NamespaceSpec, **fields)


@given(specs, specs, names, names)
def test_equal_digests_mean_equal_specs_of_one_tenant(
    one: NamespaceSpec, other: NamespaceSpec, tenant: str, visitor: str
) -> None:
    assert (one.digest(tenant) == other.digest(visitor)) == (one == other and tenant == visitor)


@given(specs, st.sampled_from(sorted(fields)), st.data())
def test_one_field_changed_changes_the_digest(spec: NamespaceSpec, name: str, data: st.DataObject) -> None:
    values = {field: getattr(spec, field) for field in fields}
    other = NamespaceSpec(**{**values, name: data.draw(fields[name])})
    assert (spec.digest("t") == other.digest("t")) == (getattr(spec, name) == getattr(other, name))


@given(specs)
def test_the_message_loses_nothing(spec: NamespaceSpec) -> None:
    message = types_pb2.NamespaceSpec.FromString(to_proto(spec).SerializeToString())
    again = from_proto(message)
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.digest("t") == spec.digest("t")


@given(layouts)
def test_tensors_lie_aligned_and_apart(layout: KVLayout) -> None:
    end = 0
    for spec, offset in zip(layout.tensors, layout.offsets, strict=True):
        assert offset % spec.item_nbytes == 0
        assert 0 <= offset - end < spec.item_nbytes
        assert spec.nbytes == math.prod(spec.shape) * ITEM_BYTES[spec.dtype]
        end = offset + spec.nbytes
    assert layout.nbytes == end
