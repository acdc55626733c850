"""Settings of the interpreter, the C library and the kernel that keep short calls short beside long ones.

All are wishes: where one cannot be had, calls are only slower.
"""

from __future__ import annotations

import ctypes
import gc
import os
import struct
import sys

# A one-key call must not wait behind another thread's bytecode for Python's usual 5 ms.
_SWITCH_INTERVAL_S = 0.0001
# A full collection walks every block's record with the interpreter held: 10 ms for 100,000 blocks, 0.1 s for a million.
# Records are freed by reference counts; what cycles there are die young, and the two young generations find them.
_GC_THRESHOLDS = (2_000, 5, 1_000_000)

# mallopt(3). By default a message of 256 KiB has the C library move the end of the heap, or map and unmap pages, up to
# a hundred times; each waits, with the GIL held, while another thread takes the pages of a slab.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
_HEAP_KEPT_BYTES = 64 << 20
_HEAP_STEP_BYTES = 8 << 20
_HEAP_BLOCK_MAX_BYTES = 32 << 20

# A thread that wakes preempts one with a longer time slice (Linux 6.12 and later; 2.8 ms are usual on two cores).
_TIME_SLICE_NS = 100_000
# Who waits for the interpreter looks again after the switch interval and the kernel's slack, 50 us by default.
_PR_SET_TIMERSLACK = 29
_TIMER_SLACK_NS = 1_000
_SYS_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
_SCHED_ATTR = struct.Struct("=IIQiIQQQ")  # size, policy, flags, nice, priority, runtime, deadline, period


def tune() -> None:
    """Make this process answer promptly. Before its threads start: they inherit the time slice."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    gc.set_threshold(*_GC_THRESHOLDS)
    libc = ctypes.CDLL(None)
    _steady_heap(libc)
    _short_slices(libc)
    libc.prctl(_PR_SET_TIMERSLACK, _TIMER_SLACK_NS, 0, 0, 0)


def _steady_heap(libc: ctypes.CDLL) -> None:
    try:
        mallopt = libc.mallopt
    except AttributeError:  # not the GNU C library
        return
    mallopt(_M_ARENA_MAX, 1)  # the GIL leaves little use for more, and theirs grow page by page
    mallopt(_M_TRIM_THRESHOLD, _HEAP_KEPT_BYTES)
    mallopt(_M_TOP_PAD, _HEAP_STEP_BYTES)
    mallopt(_M_MMAP_THRESHOLD, _HEAP_BLOCK_MAX_BYTES)


def _short_slices(libc: ctypes.CDLL) -> None:
    number = _SYS_SCHED_SETATTR.get(os.uname().machine)
    if number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = _SCHED_ATTR.pack(_SCHED_ATTR.size, os.SCHED_OTHER, 0, nice, 0, _TIME_SLICE_NS, 0, 0)
    libc.syscall(number, 0, attributes, 0)
