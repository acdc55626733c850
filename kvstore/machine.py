"""What the machine offers: memory, disk and GPUs, read from /proc, /sys and /dev without a library.

Defaults are worked out from these figures. Everything takes a root directory so that a test can lay out
a machine of its own.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED_BYTES = 1 << 60  # cgroup v1 writes "no limit" as a number just under 2**63
_NVIDIA_DEVICE = re.compile(r"nvidia\d+")


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine as seen from this process.

    Attributes:
        root: where /proc, /sys and /dev are found; "/" but in tests.
    """

    root: Path = Path("/")

    def memory_bytes(self) -> int:
        """All memory of the machine."""
        return self._meminfo("MemTotal")

    def available_bytes(self) -> int:
        """Memory that can be had now: MemAvailable, capped by what the cgroup still allows."""
        available = self._meminfo("MemAvailable")
        headroom = self.cgroup_headroom_bytes()
        return available if headroom is None else min(available, headroom)

    def cgroup_headroom_bytes(self) -> int | None:
        """Limit less use of the tightest memory cgroup above this process; None where nothing limits it."""
        spare = [room for room in map(_headroom, self._cgroup_folders()) if room is not None]
        return min(spare, default=None)

    def cuda_devices(self) -> int:
        """How many NVIDIA device nodes there are. Says nothing about a working driver."""
        try:
            return sum(_NVIDIA_DEVICE.fullmatch(node.name) is not None for node in (self.root / "dev").iterdir())
        except OSError:
            return 0

    def cpu_model(self) -> str:
        """Name of the first CPU, for reports."""
        for line in _lines(self.root / "proc/cpuinfo"):
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
        return platform.machine()

    def _meminfo(self, field: str) -> int:
        for line in _lines(self.root / "proc/meminfo"):
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) * 1024
        return 0

    def _cgroup_folders(self) -> list[Path]:
        """Folders of the memory controller, from this process's own cgroup up to the mount, v2 and v1."""
        folders = []
        for line in _lines(self.root / "proc/self/cgroup"):
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                base = self.root / "sys/fs/cgroup"
            elif "memory" in controllers.split(","):
                base = self.root / "sys/fs/cgroup/memory"
            else:
                continue
            own = base / path.strip().lstrip("/")
            folders += [own, *(parent for parent in own.parents if parent.is_relative_to(base))]
        return folders


def free_disk_bytes(folder: Path) -> int:
    """Free bytes on the filesystem that holds, or will hold, `folder`."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def disk_used_bytes(folder: Path) -> int:
    """Bytes that the files under `folder` take on the disk (holes take none); 0 where there is none."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(path) / name).lstat().st_blocks * 512
            except OSError:  # gone meanwhile
                continue
    return total


def _headroom(folder: Path) -> int | None:
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit, used = _number(folder / limit_name), _number(folder / used_name)
        if limit is not None and limit < _UNLIMITED_BYTES:
            return max(0, min(limit, limit - (used or 0) + _reclaimable_bytes(folder)))
    return None


def _reclaimable_bytes(folder: Path) -> int:
    """Page cache that the kernel drops before it refuses memory; model files just read would else look like use."""
    for line in _lines(folder / "memory.stat"):
        name, _, value = line.partition(" ")
        if name in ("total_inactive_file", "inactive_file") and value.isdigit():
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
