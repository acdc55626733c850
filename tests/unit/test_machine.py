"""What the machine offers, read from laid-out /proc, /sys and /dev trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.machine import Machine, disk_used_bytes, free_disk_bytes

GIB = 1 << 30


def lay_out(root: Path, files: dict[str, str]) -> Machine:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Machine(root)


MEMINFO = f"MemTotal: {32 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {24 * GIB // 1024} kB\n"


def test_without_a_cgroup_limit_the_kernel_says_what_is_available(tmp_path: Path) -> None:
    machine = lay_out(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n"})
    assert machine.memory_bytes() == 32 * GIB
    assert machine.available_bytes() == 24 * GIB
    assert machine.cgroup_headroom_bytes() is None


def test_the_tightest_cgroup_above_us_counts(tmp_path: Path) -> None:
    base = "sys/fs/cgroup"
    machine = lay_out(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/pods/one\n",
            f"{base}/pods/one/memory.max": "max\n",
            f"{base}/pods/one/memory.current": f"{GIB}\n",
            f"{base}/pods/memory.max": f"{8 * GIB}\n",
            f"{base}/pods/memory.current": f"{5 * GIB}\n",
        },
    )
    assert machine.available_bytes() == 3 * GIB


def test_page_cache_in_the_cgroup_is_not_use(tmp_path: Path) -> None:
    base = "sys/fs/cgroup"
    machine = lay_out(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/\n",
            f"{base}/memory.max": f"{8 * GIB}\n",
            f"{base}/memory.current": f"{7 * GIB}\n",
            f"{base}/memory.stat": f"anon 1\ninactive_file {4 * GIB}\n",
        },
    )
    assert machine.available_bytes() == 5 * GIB


def test_cgroup_v1_is_read_too(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/memory/box"
    machine = lay_out(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "5:cpuset:/\n4:memory:/box\n",
            f"{base}/memory.limit_in_bytes": f"{4 * GIB}\n",
            f"{base}/memory.usage_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert machine.available_bytes() == 3 * GIB


@pytest.mark.parametrize(("nodes", "count"), [([], 0), (["nvidiactl", "nvidia-uvm"], 0), (["nvidia0", "nvidia1"], 2)])
def test_cuda_devices_are_counted_by_their_nodes(tmp_path: Path, nodes: list[str], count: int) -> None:
    assert lay_out(tmp_path, {f"dev/{node}": "" for node in ["null", *nodes]}).cuda_devices() == count


def test_a_machine_without_proc_has_nothing(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    assert (machine.available_bytes(), machine.cuda_devices()) == (0, 0)


def test_free_disk_is_asked_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert free_disk_bytes(tmp_path / "not" / "yet") > 0


def test_used_disk_counts_blocks_not_lengths(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(GIB)
    assert disk_used_bytes(tmp_path) < GIB
    assert disk_used_bytes(tmp_path / "nothing") == 0
