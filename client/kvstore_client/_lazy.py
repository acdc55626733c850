"""Heavy modules, imported on first use.

`import kvstore_client` happens in every inference worker, also in those that never attach: it must not cost more
than a few protobuf classes. numpy takes about 80 ms, grpc 60 ms, importlib.metadata 13 ms, torch seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


class LazyModule:
    """Stands for a module and imports it when an attribute is first asked for.

    Attributes are kept here after the first look, so that a hot path pays an ordinary attribute access. Unlike
    importlib.util.LazyLoader it puts nothing into sys.modules, which belongs to the user's process.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the module has
        if name.startswith("__"):  # copy, pickle and inspect probe for these; none of them is worth an import
            raise AttributeError(name)
        value = getattr(importlib.import_module(self._name), name)
        setattr(self, name, value)
        return value


torch: Any = LazyModule("torch")

if TYPE_CHECKING:
    from importlib import metadata

    import grpc
    import numpy as np
    import xxhash

    from kvstore.v1 import admin_pb2, admin_pb2_grpc, kvstore_pb2_grpc
else:
    metadata = LazyModule("importlib.metadata")
    grpc = LazyModule("grpc")
    np = LazyModule("numpy")
    xxhash = LazyModule("xxhash")
    admin_pb2 = LazyModule("kvstore.v1.admin_pb2")
    admin_pb2_grpc = LazyModule("kvstore.v1.admin_pb2_grpc")
    kvstore_pb2_grpc = LazyModule("kvstore.v1.kvstore_pb2_grpc")

__all__ = ["admin_pb2", "admin_pb2_grpc", "grpc", "kvstore_pb2_grpc", "metadata", "np", "torch", "xxhash"]
