"""Reads the limits of this process's control groups (cgroups)."""

from __future__ import annotations

from pathlib import Path

ROOT, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def memory_limit(root: Path = ROOT, membership: Path = MEMBERSHIP) -> tuple[int | None, int]:
    """The tightest memory limit of this process's groups (v2, else v1), and the use under it, in bytes.

    Cached files do not count as used: they give way to whoever asks for memory.

    Returns:
        (limit, used); (None, 0) where nothing limits it.
    """
    places = [(folder / "memory.max", folder / "memory.current") for folder in _folders(root, membership)]
    places.append((root / "memory/memory.limit_in_bytes", root / "memory/memory.usage_in_bytes"))
    found: list[tuple[int, int]] = []
    for limit_file, use_file in places:
        limit, used = _words(limit_file), _words(use_file)
        if limit and used and limit[0].isdigit():
            cached = _cached_bytes(limit_file.with_name("memory.stat"))
            found.append((int(limit[0]), max(0, int(used[0]) - cached)))
    return min(found, key=lambda pair: pair[0] - pair[1]) if found else (None, 0)


def cpu_quota(root: Path = ROOT, membership: Path = MEMBERSHIP) -> float | None:
    """The fewest cores that a group (v2) of this process grants it; None without a quota."""
    quotas = []
    for folder in _folders(root, membership):
        words = _words(folder / "cpu.max")
        if len(words) == 2 and words[0].isdigit():
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def _folders(root: Path, membership: Path) -> list[Path]:
    """The group (v2) of this process and those above it: each may set a limit."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    path = next((line[3:] for line in lines if line.startswith("0::")), None)
    if path is None:
        return []
    folder = root / path.strip("/")
    return [place for place in (folder, *folder.parents) if place.is_relative_to(root)]


def _cached_bytes(stat_file: Path) -> int:
    """Bytes of cached files, shared memory not among them, which looks like files and is not given back."""
    words = _words(stat_file)
    fields = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    cached = fields.get("file", fields.get("total_cache", 0))  # v2, v1
    return cached - fields.get("shmem", fields.get("total_shmem", 0))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
