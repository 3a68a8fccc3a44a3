"""The memory and the cores that this process may use."""

from __future__ import annotations

from pathlib import Path

import pytest

from windlass.machine import memory
from windlass.machine.control_groups import cpu_quota, memory_limit
from windlass.machine.memory import host_memory


def test_limits_are_the_tightest_on_the_way_up(tmp_path: Path) -> None:
    root, membership = tmp_path / "cgroup", tmp_path / "self"
    inner = root / "pod" / "task"
    inner.mkdir(parents=True)
    membership.write_text("1:name=systemd:/x\n0::/pod/task\n")
    assert memory_limit(root, membership) == (None, 0) and cpu_quota(root, membership) is None
    for folder, limit, use, cpu in (
        (inner, "max", "10", "max 100000"),
        (root / "pod", "4096", "1024", "150000 100000"),
        (root, "8192", "2048", "400000 100000"),
    ):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text(use + "\n")
        (folder / "cpu.max").write_text(cpu + "\n")
    assert memory_limit(root, membership) == (4096, 1024)
    assert cpu_quota(root, membership) == 1.5
    (root / "memory").mkdir()
    (root / "memory" / "memory.limit_in_bytes").write_text("100\n")
    (root / "memory" / "memory.usage_in_bytes").write_text("60\n")
    assert memory_limit(root, tmp_path / "none") == (100, 60)


def test_cached_files_do_not_count_as_used_and_shared_memory_does(tmp_path: Path) -> None:
    (tmp_path / "self").write_text("0::/\n")
    (tmp_path / "memory.max").write_text("4096\n")
    (tmp_path / "memory.current").write_text("2048\n")
    (tmp_path / "memory.stat").write_text("anon 800\nfile 1200\nshmem 200\n")
    assert memory_limit(tmp_path, tmp_path / "self") == (4096, 1048)


def test_the_hosts_memory_is_plausible() -> None:
    available, total = host_memory()
    assert 0 < available <= total


def test_the_memory_of_the_host_ends_at_the_groups_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_limit", lambda: (1 << 20, 1 << 18))
    assert memory.host_memory() == ((1 << 20) - (1 << 18), 1 << 20)
