"""What the package says of itself."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest

import kvstore_client
from derived import chain
from kvstore.protocol import errors
from kvstore_client import Client, KVStoreError, Namespace


def test_all_names_exist_and_are_sorted() -> None:
    assert sorted(kvstore_client.__all__, key=lambda name: (not name.isupper(), name)) == kvstore_client.__all__
    assert all(hasattr(kvstore_client, name) for name in kvstore_client.__all__)


def test_every_error_is_exported_and_in_the_drawn_tree() -> None:
    kinds = {
        name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, KVStoreError)
    }
    assert len(kinds) > 8
    for name, kind in kinds.items():
        assert getattr(kvstore_client, name) is kind
        assert name in kvstore_client.__all__
        assert f" {name} " in f"{kvstore_client.__doc__}".replace("\n", " ")


def test_import_loads_no_heavy_module() -> None:
    code = (
        "import sys, kvstore_client\n"
        "heavy = {'numpy', 'torch', 'grpc', 'xxhash', 'lmdb', 'zstandard', 'psutil'} & set(sys.modules)\n"
        "sys.exit(str(sorted(heavy)) if heavy else 0)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 0, found.stderr


def test_what_belongs_to_a_process_cannot_be_pickled(client: Client, ns: Namespace) -> None:
    with ns.acquire(chain(ns, 1)) as lease, ns.stage(1) as buffers:
        for thing in (client, ns, lease, buffers):
            with pytest.raises(TypeError, match=r"cannot be pickled|handoff"):
                copy.copy(thing)  # asks __reduce_ex__, as pickle does


def test_package_is_typed() -> None:
    from importlib import resources

    assert resources.files("kvstore_client").joinpath("py.typed").is_file()
