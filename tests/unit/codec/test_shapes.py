"""What a layout text is understood to say, and the order in which values are coded."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvstore.codec.shapes import MIN_RUN, NO_AXIS, Plan, Tensor, gather, plan_of, scatter, tensors_of
from kvstore.protocol.layout import KVLayout, TensorSpec

TILE = 4096


def spec(name: str, dtype: str, shape: tuple[int, ...], axes: str) -> TensorSpec:
    return TensorSpec(name, dtype, shape, axes)


def test_a_layout_of_the_protocol_is_understood() -> None:
    layout = KVLayout(
        [
            spec("kv", "bfloat16", (2, 6, 64, 12, 32), "kv layer token head dim"),
            spec("index", "float8_e4m3", (6, 64, 33), "layer token dim"),
            spec("scale", "float32", (6, 64), "layer token"),
        ]
    )
    tensors = tensors_of(layout.text, layout.nbytes)
    assert [tensor.dtype for tensor in tensors] == ["bfloat16", "float8_e4m3", "float32"]
    assert [tensor.start for tensor in tensors] == list(layout.offsets)
    first = tensors[0]
    assert (first.shape, first.kv, first.layer, first.token) == ((2, 6, 64, 12, 32), 0, 1, 2)
    assert (tensors[1].kv, tensors[1].layer, tensors[1].token) == (NO_AXIS, 0, 1)


def test_padding_between_tensors_is_covered() -> None:
    layout = KVLayout([spec("a", "int8", (5,), "x"), spec("b", "float32", (3,), "x")])
    tensors = tensors_of(layout.text, layout.nbytes)
    assert [(tensor.dtype, tensor.start, tensor.nbytes) for tensor in tensors] == [
        ("int8", 0, 5),
        ("", 5, 3),
        ("float32", 8, 12),
    ]


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("", ""),
        ("bfloat16", "bfloat16"),
        ("bfloat16;", "bfloat16"),
        ("bfloat16 kv=2 token=50", "bfloat16"),  # not 1000 bytes
        ("bfloat16 x=500; int8", "bfloat16"),
        ("bfloat16 x=0", "bfloat16"),
        ("bfloat16 x=-500", "bfloat16"),
        ("bfloat16 x", "bfloat16"),
        ("bfloat16 x=5e2", "bfloat16"),
        ("bfloat16 x=" + "1" * 400, "bfloat16"),
        ("bfloat16 " + "a=1 " * 17 + "x=500", "bfloat16"),
        ("fancy8 x=1000", ""),
        (";;;", ""),
        ("\0\n x=1000", ""),
        ("; ".join(["int8 x=1"] * 1000), "int8"),
    ],
)
def test_what_is_not_understood_is_flat(layout: str, dtype: str) -> None:
    assert tensors_of(layout, 1000) == (Tensor(dtype, 0, 1000),)


def plan_for(layout: str) -> tuple[Plan, tuple[int, ...]]:
    shape = tuple(int(word.partition("=")[2]) for word in layout.split()[1:])
    (tensor,) = tensors_of(layout, 2 * math.prod(shape))
    return plan_of(tensor, TILE), shape


LAYOUTS = {
    "bfloat16 kv=2 layer=3 token=16 head=2 dim=32": "kltd",
    "bfloat16 layer=3 kv=2 token=16 head=2 dim=32": "lktd",
    "bfloat16 layer=3 token=16 kv=2 head=2 dim=32": "ltkd",
    "bfloat16 token=16 layer=3 kv=2 head=2 dim=32": "tlkd",
    "bfloat16 layer=3 head=2 kv=2 token=16 dim=32": "lhktd",
    "bfloat16 layer=2 kv=2 token=16 dim=2048": "long rows",
    "bfloat16 layer=2 kv=2 token=5000 dim=32": "groups larger than a tile",
    "bfloat16 layer=3 dim=64": "no tokens",
    "bfloat16 kv=2 layer=1 token=16 dim=8192": "rows longer than a tile",
    "bfloat16 kv=1 layer=3 token=16 dim=64": "latent",
    "bfloat16 token=16 dim=32 kv=2": "K and V in turns",
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUTS.values())
def test_tiles_cover_every_value_once_and_never_both_k_and_v(layout: str) -> None:
    plan, shape = plan_for(layout)
    axes = [word.partition("=")[0] for word in layout.split()[1:]]
    values = np.arange(math.prod(shape)).astype(np.uint32)
    kinds = (
        np.broadcast_to(
            np.arange(shape[axes.index("kv")]).reshape([-1 if axis == "kv" else 1 for axis in axes]), shape
        ).reshape(-1)
        if "kv" in axes
        else np.zeros(values.size)
    )
    if plan.run < MIN_RUN and plan.runs is None and axes[-1] == "kv":
        kinds = np.zeros(values.size)  # too fine to be told apart
    number = 0
    back = np.zeros(values.size, dtype=np.uint16)
    seen = np.zeros(values.size, dtype=np.int64)
    for start, count in plan.tiles:
        assert start == number
        assert 0 < count <= TILE
        number += count
        tile, of_kind, places = (np.empty(count, dtype=np.uint16) for _ in range(3))
        gather(values.astype(np.uint16), plan, start, tile)
        gather(kinds.astype(np.uint16), plan, start, of_kind)
        gather((values >> 16).astype(np.uint16), plan, start, places)
        assert len(set(of_kind.tolist())) == 1
        seen[tile.astype(np.int64) | places.astype(np.int64) << 16] += 1
        scatter(tile, plan, start, back)
        if plan.tokens:
            group = plan.tokens * plan.inner
            assert start % plan.inner == count % plan.inner == 0
            assert start // group == (start + count - 1) // group or start % group == count % group == 0
    assert number == values.size
    assert (seen == 1).all()
    assert np.array_equal(back, values.astype(np.uint16))


def test_k_comes_before_v_layer_by_layer() -> None:
    plan, shape = plan_for("bfloat16 layer=3 kv=2 token=16 head=2 dim=32")
    layers = np.broadcast_to(np.arange(3)[:, None, None, None, None] + 10 * np.arange(2)[:, None, None, None], shape)
    order = []
    for start, count in plan.tiles:
        tile = np.empty(count, dtype=np.uint16)
        gather(layers.reshape(-1).astype(np.uint16), plan, start, tile)
        order += tile.tolist()
    assert order == sorted(order)


def test_few_tokens_are_not_predicted_by() -> None:
    assert plan_for("bfloat16 kv=2 token=4 dim=64")[0].tokens == 0
    assert plan_for("bfloat16 kv=2 token=8 dim=64")[0].tokens == 8
    assert plan_for("bfloat16 kv=2 token=8 dim=16")[0].tokens == 0
