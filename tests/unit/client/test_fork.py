"""fork(): the child's client is dead and closes its descriptors, and the parent notices nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore_client.testing import FakeDaemon

SCRIPT = """
import gc, json, os, sys, threading, time
import numpy as np
from kvstore_client import Client, InvalidRequest, LeaseExpired
from derived import chain, contents, fetch, namespace
client = Client(sys.argv[1], transport=sys.argv[2])
ns = namespace(client, "model", 16384)
keys = chain(ns, 5)
ns.put(keys, contents(keys, 16384))
lease = ns.acquire(keys)
out = np.zeros((5, 16384), np.uint8)
lease.read_into(out)
while any("populate" in thread.name for thread in threading.enumerate()):
    time.sleep(0.01)


def sockets():
    kinds = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            kinds.append(os.readlink("/proc/self/fd/" + fd))
        except FileNotFoundError:  # the folder's own
            pass
    return sum(kind.startswith("socket:") for kind in kinds), sum("eventfd" in kind for kind in kinds)


before = sockets()
reading, writing = os.pipe()
child = os.fork()
if child == 0:
    report = {}
    for name, call in {
        "match": lambda: ns.match(keys), "put": lambda: ns.put(keys, contents(keys, 16384)), "ping": client.ping,
        "namespace": lambda: namespace(client, "other", 16384), "read_into": lambda: lease.read_into(out),
        "wait": lease.wait, "check": lease.check, "handoff": lease.handoff,
    }.items():
        try:
            call()
        except (InvalidRequest, LeaseExpired) as error:
            report[name] = "fork" in str(error)
    lease.release()
    after = sockets()
    report["slabs mapped"] = sum("r--s" in line and "kvstore-fake" in line for line in open("/proc/self/maps"))
    client.close()
    del client, ns, lease
    gc.collect()
    report["closed"] = before[0] - after[0] >= 1
    os.write(writing, json.dumps(report).encode())
    os._exit(0)
os.close(writing)
report = json.loads(os.read(reading, 65536))
status = os.waitpid(child, 0)[1]
out[:] = 0
lease.read_into(out)
report["parent reads on"] = bool((out == contents(keys, 16384)).all())
report["parent calls on"] = ns.match(keys).blocks
report["status"] = status
lease.release()
client.close()
print(json.dumps(report))
"""


@pytest.mark.parametrize("transport", ["local", "grpc"])
def test_a_child_cannot_use_its_parents_client(transport: str) -> None:
    with FakeDaemon(with_grpc=transport == "grpc") as daemon:
        helpers = str(Path(__file__).parents[2] / "helpers")
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SCRIPT, daemon.address, transport],
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
            env={**os.environ, "PYTHONPATH": helpers, "GRPC_VERBOSITY": "NONE"},
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == {
            **dict.fromkeys(["match", "put", "ping", "namespace", "read_into", "wait", "check", "handoff"], True),
            "closed": True,
            "slabs mapped": 0,
            "parent reads on": True,
            "parent calls on": 5,
            "status": 0,
        }
        assert daemon.calls["HELLO"] == 1
