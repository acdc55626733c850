"""Reading the pages of an LMDB file without LMDB.

LMDB trusts its pages: a damaged tree can abort the process or, worse, hand out a page twice. So after a power loss the
trees are walked here first, by plain reads that can fail but not kill. And LMDB's own cursors touch the values that
they pass (with the kernel's read-ahead, all of their bytes), where a walk over keys alone needs the tree's pages: some
3,000 of them for 100,000 blocks.

The format is liblmdb 0.9's, data version 1, on 64-bit little-endian machines.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np

from kvstore.tiers.cold_records import OVERFLOW_HEADER_BYTES, PAGE_BYTES

DATA_VERSION: Final = 1

_MAGIC = 0xBEEFC0DE
_META = struct.Struct("<IIQQ")  # magic, version, map address, map size; behind the page's header
_TREE = struct.Struct("<IHHQQQQQ")  # page size, flags, depth, branch pages, leaf pages, overflow pages, entries, root
_TAIL = struct.Struct("<QQ")  # last page, transaction
_HEAD = struct.Struct("<QHHHH")  # page, -, flags, lower, upper; lower and upper are one u32 in an overflow page
_OVERFLOW_HEAD = struct.Struct("<QHHI")
_NODE = struct.Struct("<HHHH")  # low and high half of the size, flags, key bytes
_BRANCH, _LEAF, _OVERFLOW = 1, 2, 4
_KIND_MASK = 0xF
_BIG, _SUBTREE = 1, 2
_NO_PAGE = (1 << 64) - 1
_DEPTH_MAX = 32  # as in LMDB
_META_PAGES = 2


class DamagedPagesError(Exception):
    """Pages that cannot be what LMDB wrote; the message says where."""


class Tree(NamedTuple):
    """Root and counts of one B-tree, as LMDB keeps them."""

    page_bytes: int
    flags: int
    depth: int
    branch_pages: int
    leaf_pages: int
    overflow_pages: int
    entries: int
    root: int


class Meta(NamedTuple):
    """One of the two pages that say where everything is."""

    version: int
    free: Tree
    main: Tree
    last_page: int
    transaction: int


class Node(NamedTuple):
    """An entry of a leaf: `page` is the first page of a value that has pages of its own, else 0 with the value."""

    key: bytes
    nbytes: int
    page: int
    value: bytes
    is_tree: bool


def read_metas(fd: int) -> list[Meta]:
    """The meta pages that have LMDB's magic, the newest first. Versions are for the caller to judge."""
    found = []
    for number in range(_META_PAGES):
        page = os.pread(fd, PAGE_BYTES, number * PAGE_BYTES)
        at = _HEAD.size
        if len(page) < PAGE_BYTES:
            continue
        magic, version, _, _ = _META.unpack_from(page, at)
        if magic == _MAGIC:
            at += _META.size
            free, main = (Tree(*_TREE.unpack_from(page, at + turn * _TREE.size)) for turn in range(2))
            found.append(Meta(version, free, main, *_TAIL.unpack_from(page, at + 2 * _TREE.size)))
    return sorted(found, key=lambda meta: -meta.transaction)


def subtree(fd: int, main: Tree, name: bytes) -> Tree | None:
    """The named tree, or None.

    Raises:
        DamagedPagesError: what was read is no tree.
    """
    for node in walk(fd, main):
        if node.key == name and node.is_tree:
            return Tree(*_TREE.unpack(node.value))
    return None


def walk(fd: int, tree: Tree, after: bytes = b"") -> Iterator[Node]:
    """Entries of a tree behind the key `after`, in order, with a read per page of the tree and none of values.

    The caller sees to it that no page is reused meanwhile (a read transaction of that snapshot).

    Raises:
        DamagedPagesError: what was read is no tree.
    """
    if tree.root != _NO_PAGE:
        for page in _descend(fd, tree.root, tree.depth, after):
            for node in page.leaves():
                if node.key > after or not after:
                    yield node


class _Page:
    """A page of a tree, its node offsets checked."""

    def __init__(self, fd: int, number: int, depth: int) -> None:
        """`depth` is 1 for a leaf, which every leaf of a tree must be at once."""
        self.number = number
        self.data = data = os.pread(fd, PAGE_BYTES, number * PAGE_BYTES)
        if len(data) < PAGE_BYTES or depth < 1:
            raise DamagedPagesError(f"page {number} is behind the end of the file, or too deep")
        found, _, flags, lower, upper = _HEAD.unpack_from(data)
        wanted = _LEAF if depth == 1 else _BRANCH
        if found != number or flags & _KIND_MASK != wanted or not _HEAD.size <= lower <= upper <= PAGE_BYTES:
            raise DamagedPagesError(f"page {number} says it is page {found} with flags {flags:#x}")
        self.offsets = struct.unpack_from(f"<{(lower - _HEAD.size) // 2}H", data, _HEAD.size)
        if any(not upper <= offset <= PAGE_BYTES - _NODE.size for offset in self.offsets):
            raise DamagedPagesError(f"page {number} has a node outside of itself")
        self.is_leaf = depth == 1

    def leaves(self) -> Iterator[Node]:
        """The nodes of a leaf."""
        for offset in self.offsets:
            low, high, flags, key_bytes = _NODE.unpack_from(self.data, offset)
            at = offset + _NODE.size
            key, nbytes = self.data[at : at + key_bytes], low | high << 16
            at += key_bytes
            end = at + (8 if flags & _BIG else nbytes)
            if end > PAGE_BYTES:
                raise DamagedPagesError(f"page {self.number} has a node that leaves it")
            page = int.from_bytes(self.data[at:end], "little") if flags & _BIG else 0
            yield Node(key, nbytes, page, b"" if flags & _BIG else self.data[at:end], bool(flags & _SUBTREE))

    def children(self) -> list[tuple[bytes, int]]:
        """Least key (empty for the first) and page of each child of a branch."""
        found = []
        for turn, offset in enumerate(self.offsets):
            low, high, top, key_bytes = _NODE.unpack_from(self.data, offset)
            key = self.data[offset + _NODE.size :][:key_bytes] if turn else b""
            found.append((key, low | high << 16 | top << 32))
        return found


def _descend(fd: int, number: int, depth: int, after: bytes) -> Iterator[_Page]:
    """Pages below `number`, in order, without the branches that lie wholly before `after`."""
    if depth > _DEPTH_MAX:
        raise DamagedPagesError(f"a tree of depth {depth}")
    page = _Page(fd, number, depth)
    if page.is_leaf:
        yield page
        return
    children = page.children()
    for turn, (_, child) in enumerate(children):
        if turn + 1 < len(children) and children[turn + 1][0] <= after:
            continue
        yield from _descend(fd, child, depth - 1, after)


def verify(fd: int) -> None:
    """Walk every tree of the newest snapshot, the free list included: no page may have two owners.

    Counts, order of keys, page numbers and the heads of overflow pages must all agree. The values are not read: each
    has a checksum of its own, which is looked at when it is.

    Raises:
        DamagedPagesError: something does not agree.
    """
    metas = read_metas(fd)
    if not metas or metas[0].version != DATA_VERSION or metas[0].free.page_bytes != PAGE_BYTES:
        raise DamagedPagesError("no meta page is whole")
    _Audit(fd, metas[0]).run()


class _Audit:
    """One verification: who owns which page."""

    def __init__(self, fd: int, meta: Meta) -> None:
        self._fd = fd
        self._meta = meta
        if os.fstat(fd).st_size < (meta.last_page + 1) * PAGE_BYTES:
            raise DamagedPagesError(f"the file is too short for its {meta.last_page + 1} pages")
        self._owned = np.zeros(meta.last_page + 1, dtype=np.bool_)
        self._owned[:_META_PAGES] = True

    def run(self) -> None:
        """Both trees, their subtrees, and the pages that the free list names."""
        for node in self._tree(self._meta.free, ordered=False):
            listed = node.value
            if node.page:
                listed = os.pread(self._fd, node.nbytes, node.page * PAGE_BYTES + OVERFLOW_HEADER_BYTES)
            count = int.from_bytes(listed[:8], "little")
            if 8 * (count + 1) > len(listed):
                raise DamagedPagesError(f"a free list of {count} pages in {len(listed)} bytes")
            for page in np.frombuffer(listed, dtype="<u8", count=count, offset=8).tolist():
                self._own(page, 1)
        for node in self._tree(self._meta.main):
            if node.is_tree:
                for _ in self._tree(Tree(*_TREE.unpack(node.value))):
                    pass

    def _own(self, page: int, count: int) -> None:
        if not _META_PAGES <= page < page + count <= self._owned.size or self._owned[page : page + count].any():
            raise DamagedPagesError(f"page {page} has two owners, or does not exist")
        self._owned[page : page + count] = True

    def _tree(self, tree: Tree, *, ordered: bool = True) -> Iterator[Node]:
        """The entries of a tree, its pages owned as they come; whether its counts agree shows at the end."""
        branches = leaves = overflow = entries = 0
        last = b""
        for page in self._pages(tree.root, tree.depth) if tree.root != _NO_PAGE else ():
            branches += not page.is_leaf
            leaves += page.is_leaf
            nodes = list(page.leaves()) if page.is_leaf else []
            overflow += self._own_values(nodes)
            for node in nodes:
                if ordered and entries and last >= node.key:
                    raise DamagedPagesError(f"page {page.number} is out of order")
                last = node.key
                entries += 1
                yield node
        counts = (branches, leaves, overflow, entries)
        if counts != (tree.branch_pages, tree.leaf_pages, tree.overflow_pages, tree.entries):
            raise DamagedPagesError(f"branches, leaves, overflow pages and entries are {counts}, not as {tree} says")

    def _pages(self, number: int, depth: int) -> Iterator[_Page]:
        self._own(number, 1)
        page = _Page(self._fd, number, depth)
        yield page
        if not page.is_leaf:
            for _, child in page.children():
                yield from self._pages(child, depth - 1)

    def _own_values(self, nodes: list[Node]) -> int:
        """Pages of the values that have pages of their own."""
        large = [node for node in nodes if node.page]
        for node in large:  # the whole leaf's at once, or each would wait for the disk alone
            os.posix_fadvise(self._fd, node.page * PAGE_BYTES, PAGE_BYTES, os.POSIX_FADV_WILLNEED)
        total = 0
        for node in large:
            count = -(-(node.nbytes + OVERFLOW_HEADER_BYTES) // PAGE_BYTES)
            self._own(node.page, count)
            head = os.pread(self._fd, _OVERFLOW_HEAD.size, node.page * PAGE_BYTES)
            number, _, flags, pages = _OVERFLOW_HEAD.unpack(head)
            if (number, flags & _KIND_MASK, pages) != (node.page, _OVERFLOW, count):
                raise DamagedPagesError(f"page {node.page} is no value of {node.nbytes} bytes")
            total += count
        return total
