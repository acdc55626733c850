"""What the daemon asks of the interpreter, the C library and the kernel."""

from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
import ctypes, gc, os, struct, sys, threading
from kvstore import runtime
runtime.tune()
assert sys.getswitchinterval() < 0.001, sys.getswitchinterval()
assert gc.get_threshold()[2] > 100_000, gc.get_threshold()
attributes = ctypes.create_string_buffer(48)
number = {"x86_64": 315, "aarch64": 275}.get(os.uname().machine)
slices = []
def read():
    if number and ctypes.CDLL(None).syscall(number, 0, attributes, 48, 0) == 0:
        slices.append(struct.unpack("=IIQiIQQQ", attributes.raw)[5])
thread = threading.Thread(target=read)
thread.start()
thread.join()
assert all(slice_ns in (0, 100_000) or slice_ns < 1_000_000 for slice_ns in slices), slices
assert os.nice(0) == int(sys.argv[1]), "the time slice is not a priority"
"""


def test_every_wish_is_made_and_threads_inherit_them() -> None:
    for niceness in (0, 5):
        command = ["nice", "-n", str(niceness), sys.executable, "-c", _PROGRAM, str(niceness)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
