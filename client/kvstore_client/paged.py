"""Between an engine's paged KV cache and blocks: gather pages into blocks to put, scatter blocks that were read.

    pages = PagedCache(kv_caches.values(), "kv block token head dim", layout)      # vLLM: (2, blocks, 16, heads, dim)
    with ns.acquire(keys) as lease:
        for layer in pages.load(lease, page_ids):
            forward(layer)
    ns.put(keys, pages.gather(page_ids))

torch is imported when a PagedCache is made and not before.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from kvstore.protocol.errors import InvalidRequest
from kvstore.protocol.layout import KVLayout, TensorSpec
from kvstore_client._lazy import torch

if TYPE_CHECKING:
    from kvstore_client.lease import Lease

_BITS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}
_DTYPES = {"float8_e4m3": "float8_e4m3fn"}

_log = logging.getLogger(__name__)


class _Layer(NamedTuple):
    """Pages of one layer, and where a block has it.

    Attributes:
        pages: bits, a view of the engine's own memory with the page as its first axis.
        axes: the other axes of `pages`, in the engine's order: no other is copied as fast.
        spec: the layout's tensor it is part of.
        offset: of that tensor in a block, in bytes.
        number: of the layer within that tensor; None where the tensor has no such axis.
    """

    pages: Any
    axes: Sequence[str]
    spec: TensorSpec
    offset: int
    number: int | None


class PagedCache:
    """The pages of an engine's KV cache, all layers of one rank. A block of the namespace is one page or several."""

    def __init__(self, layers: Iterable[Any], axes: str, layout: KVLayout, *, kernels: bool | None = None) -> None:
        """Look at the engine's tensors; nothing is copied.

        Args:
            layers: one tensor a layer, in the layout's order, of any strides; all on one device.
            axes: what their axes are, blank separated: "block" and "token" (within a page) and those of the layout, as
                "kv block token head dim", "block kv token head dim", "kv block head token dim" or "block token dim".
            layout: of the namespace: one tensor with an axis "layer", or one tensor for each layer.
            kernels: whether to use the Triton kernels; None: on CUDA, where they can be compiled and prove right.

        Raises:
            InvalidRequest: the tensors do not fit the layout.
        """
        tensors = list(layers)
        self._layout = layout
        self._layers = [_layer(tensor, axes, *place) for tensor, place in _paired(tensors, layout)]
        first = self._layers[0]
        self.device = tensors[0].device
        self.page_tokens = int(first.pages.shape[1 + first.axes.index("token")])
        self.pages_per_block = (first.spec.axis_size("token") or 1) // self.page_tokens
        self.pages = min(int(layer.pages.shape[0]) for layer in self._layers)
        if layout.nbytes % max(spec.item_nbytes for spec in layout.tensors):
            raise InvalidRequest(f"a block of {layout.nbytes} bytes leaves its neighbour's items unaligned")
        self._kernels = self._proven_kernels(kernels)

    def gather(self, page_ids: Any, out: Any = None, layers: Sequence[int] | None = None) -> Any:  # noqa: ANN401
        """Copy pages into blocks.

        Args:
            page_ids: of the pages in order, `pages_per_block` for each block: a list or 1-D tensor of integers.
            out: (n, block_nbytes) uint8 tensor on the cache's device; None: a new one.
            layers: which ones; None: all.

        Returns:
            `out`; on CUDA the copies are on the current stream.

        Raises:
            InvalidRequest: there is no such page, or they are no whole number of blocks.
        """
        ids = self._ids(page_ids)
        blocks = len(ids) // self.pages_per_block
        rows = torch.empty((blocks, self._layout.nbytes), dtype=torch.uint8, device=self.device) if out is None else out
        self._check_rows(rows, blocks)
        for layer in self._chosen(layers):
            self._copy(rows, layer, ids, to_pages=False)
        return rows

    def scatter(self, rows: Any, page_ids: Any, layers: Sequence[int] | None = None) -> None:  # noqa: ANN401
        """Copy blocks into pages; the arguments are those of gather(). No page may be named twice."""
        ids = self._ids(page_ids)
        self._check_rows(rows, len(ids) // self.pages_per_block)
        for layer in self._chosen(layers):
            self._copy(rows, layer, ids, to_pages=True)

    def load(self, lease: Lease, page_ids: Any, layers: Sequence[int] | None = None) -> Iterator[int]:  # noqa: ANN401
        """Read the blocks of a lease into pages, layer by layer: Lease.read_layers(), and a scatter after each.

        Yields:
            The number of each layer whose pages are there, on CUDA for what comes later on the current stream.

        Raises:
            As Lease.read_layers(), and InvalidRequest where the pages are not those of the lease's blocks.
        """
        ids = self._ids(page_ids)
        if len(ids) != lease.blocks * self.pages_per_block:
            raise InvalidRequest(
                f"{len(ids)} pages for {lease.blocks} blocks of {self.pages_per_block} pages; name just these"
            )
        rows = torch.empty((lease.blocks, self._layout.nbytes), dtype=torch.uint8, device=self.device)
        for layer in lease.read_layers(rows, layers):
            self._copy(rows, self._layers[layer], ids, to_pages=True)
            yield layer

    def _copy(self, rows: Any, layer: _Layer, ids: Any, *, to_pages: bool) -> None:  # noqa: ANN401
        if self._kernels is None:
            copy_pages(self._block_side(rows, layer), layer.pages, ids, to_pages=to_pages)
        else:
            self._kernels.copy_pages(self._block_side(rows, layer), layer.pages, ids, to_pages)

    def _block_side(self, rows: Any, layer: _Layer) -> Any:  # noqa: ANN401
        """A layer's part of the blocks, (n, pages_per_block, …) bits with the axes of its pages, as a view."""
        spec, bits = layer.spec, getattr(torch, _BITS[layer.spec.item_nbytes])
        whole = rows[:, layer.offset : layer.offset + spec.nbytes].view(bits).unflatten(1, spec.shape)
        names = spec.axes.split()
        if layer.number is not None:
            whole = whole.select(1 + names.index("layer"), layer.number)
            names.remove("layer")
        token = 1 + names.index("token")
        paged = whole.unflatten(token, (self.pages_per_block, self.page_tokens)).movedim(token, 1)
        return paged.permute(0, 1, *(2 + names.index(name) for name in layer.axes))

    def _ids(self, page_ids: Any) -> Any:  # noqa: ANN401
        ids = torch.as_tensor(page_ids, dtype=torch.int64)
        if ids.dim() != 1 or len(ids) % self.pages_per_block:
            raise InvalidRequest(f"{tuple(ids.shape)} page ids; a block has {self.pages_per_block} pages, in one list")
        if ids.device.type == "cpu" and len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.pages:
            raise InvalidRequest(f"page ids from {int(ids.min())} to {int(ids.max())}; the cache has {self.pages}")
        return ids.to(self.device)

    def _check_rows(self, rows: Any, blocks: int) -> None:  # noqa: ANN401
        wanted = (blocks, self._layout.nbytes)
        if tuple(rows.shape) != wanted or rows.dtype != torch.uint8 or not rows.is_contiguous():
            raise InvalidRequest(f"blocks are {tuple(rows.shape)} of {rows.dtype}; give contiguous {wanted} of uint8")
        if rows.device != self.device:
            raise InvalidRequest(f"blocks are on {rows.device}, the cache on {self.device}; give memory of one device")

    def _chosen(self, layers: Sequence[int] | None) -> Sequence[_Layer]:
        if layers is None:
            return self._layers
        strange = [layer for layer in layers if not 0 <= layer < len(self._layers)]
        if strange:
            raise InvalidRequest(f"there is no layer {strange[0]}; the cache has {len(self._layers)}")
        return [self._layers[layer] for layer in layers]

    def _proven_kernels(self, wanted: bool | None) -> Any:  # noqa: ANN401 - a module that needs triton
        """The kernels, once they gave the bits that plain torch gives; None where they cannot or shall not be used."""
        if wanted is False or (wanted is None and self.device.type != "cuda"):
            return None
        try:
            kernels = importlib.import_module("kvstore_client.paged_triton")
            for layer in (self._layers[0], self._layers[-1]):
                self._prove(kernels, layer)
        except Exception as error:  # a compiler and a driver that may fail in any way; the plain path is always right
            if wanted:
                raise InvalidRequest(f"the Triton kernels cannot be used here: {error}") from error
            _log.warning("pages are copied by plain torch: %s", error)
            return None
        return kernels

    def _prove(self, kernels: Any, layer: _Layer) -> None:  # noqa: ANN401
        """Both ways with noise, on pages of its own: those of an engine that starts are all zero."""
        count, device = self.pages_per_block, self.device
        like = layer.pages[:count] if count <= self.pages else layer.pages[:1].repeat_interleave(count, 0)
        plain_pages, fast_pages = torch.zeros_like(like), torch.zeros_like(like)  # strides of the same order
        noise = torch.randint(0, 256, (1, self._layout.nbytes), dtype=torch.uint8, device=device)
        ids = torch.arange(count - 1, -1, -1, device=device)
        copy_pages(self._block_side(noise, layer), plain_pages, ids, to_pages=True)
        kernels.copy_pages(self._block_side(noise, layer), fast_pages, ids, True)
        plain, fast = torch.zeros_like(noise), torch.zeros_like(noise)
        copy_pages(self._block_side(plain, layer), plain_pages, ids, to_pages=False)
        kernels.copy_pages(self._block_side(fast, layer), plain_pages, ids, False)
        if not torch.equal(plain_pages, fast_pages) or not torch.equal(plain, fast):
            raise InvalidRequest("the Triton kernels gave other bytes than plain torch")
        self._prove_where_it_lies(kernels, layer)

    def _prove_where_it_lies(self, kernels: Any, layer: _Layer) -> None:  # noqa: ANN401
        ids = torch.arange(min(self.pages_per_block, self.pages), device=self.device).repeat(self.pages_per_block)
        ids = ids[: self.pages_per_block]
        plain = torch.zeros((1, self._layout.nbytes), dtype=torch.uint8, device=self.device)
        fast = plain.clone()
        copy_pages(self._block_side(plain, layer), layer.pages, ids, to_pages=False)
        kernels.copy_pages(self._block_side(fast, layer), layer.pages, ids, False)
        if not torch.equal(plain, fast):
            raise InvalidRequest("the Triton kernels gave other bytes than plain torch")


def copy_pages(blocks: Any, pages: Any, ids: Any, *, to_pages: bool) -> None:  # noqa: ANN401 - tensors
    """Copy between a layer's part of blocks and its pages, by plain torch.

    Args:
        blocks: (n, pages_per_block, …) bits.
        pages: (page, …) bits.
        ids: (n x pages_per_block,) page numbers.
        to_pages: which way.
    """
    if to_pages:
        pages.index_copy_(0, ids, blocks.flatten(0, 1))
    else:
        blocks.copy_(pages.index_select(0, ids).unflatten(0, tuple(blocks.shape[:2])))


def _paired(tensors: Sequence[Any], layout: KVLayout) -> Iterator[tuple[Any, tuple[TensorSpec, int, int | None]]]:
    """Each layer's tensor with the layout's, its offset, and the layer's index in it."""
    places = list(zip(layout.tensors, layout.offsets, strict=True))
    layered = places[0][0].axis_size("layer") if len(places) == 1 else None
    count = layered or len(places)
    if len(tensors) != count:
        raise InvalidRequest(f"{len(tensors)} layers were given; the layout has {count}")
    for at, tensor in enumerate(tensors):
        spec, offset = places[0] if layered else places[at]
        yield tensor, (spec, offset, at if layered else None)


def _layer(tensor: Any, axes: str, spec: TensorSpec, offset: int, number: int | None) -> _Layer:  # noqa: ANN401
    names = axes.split()
    own = [name for name in spec.axes.split() if name != "layer" or number is None]
    if sorted(names) != sorted([*own, "block"]) or "token" not in own:
        raise InvalidRequest(
            f"axes are {axes!r}; they must be block and those of tensor {spec.name!r}: {' '.join(own)}"
        )
    if tensor.dim() != len(names):
        raise InvalidRequest(f"a layer has shape {tuple(tensor.shape)} and {len(names)} axes: {axes!r}")
    dtype = getattr(torch, _DTYPES.get(spec.dtype, spec.dtype))
    if tensor.dtype != dtype and tensor.element_size() != spec.item_nbytes:
        raise InvalidRequest(f"a layer is of {tensor.dtype}, tensor {spec.name!r} of {spec.dtype}")
    sizes = dict(zip(names, tensor.shape, strict=True))
    tokens = spec.axis_size("token") or 1
    wrong = [name for name in own if name != "token" and sizes[name] != spec.axis_size(name)]
    if wrong or not sizes["token"] or tokens % sizes["token"]:
        raise InvalidRequest(
            f"a layer has shape {tuple(tensor.shape)} for {axes!r}, tensor {spec.name!r} {spec.shape} for "
            f"{spec.axes!r}; a block's {tokens} tokens must be whole pages, and the other axes the same"
        )
    bits = tensor.detach().view(getattr(torch, _BITS[spec.item_nbytes]))
    others = [name for name in names if name != "block"]
    return _Layer(bits.movedim(names.index("block"), 0), others, spec, offset, number)
