"""The doctor on this machine, and on machines that are made to ail."""

from __future__ import annotations

import errno
import json
import os
import resource
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from windlass.machine import measure as speed
from windlass.machine.speeds import Machine, ssd_key
from windlass.plan import doctor
from windlass.plan.doctor import (
    Check,
    Status,
    check_torch_version,
    diagnose,
    exit_status,
    render,
)

Usage = namedtuple("Usage", "total used free")


def _made_up(machine: Machine, folder: Path) -> None:
    machine.memcpy_bytes_per_s = 1e9
    machine.ssd[ssd_key(folder)] = {
        "read_bytes_per_s": 1e9,
        "write_bytes_per_s": 1e9,
        "cpu_s_per_byte": 0.0,
        "is_direct": True,
    }


def only(name: str, folder: Path) -> Check:
    return next(check for check in diagnose(folder) if check.name == name)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements of tests are not for plans."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(speed, "SSD_BYTES", 32 << 20)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes long and is not asked about."""
    monkeypatch.setattr(doctor, "measure_speed", _made_up)
    monkeypatch.setattr(doctor, "_WRITE_BYTES", 1 << 20)
    monkeypatch.setattr(doctor, "_WRITE_CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(doctor, "measured_matmul_flops", lambda device, dtype: 1e9)


@pytest.mark.slow
def test_this_machine_is_looked_over_in_time_and_left_as_it_was(tmp_path: Path) -> None:
    begin = time.perf_counter()
    checks = diagnose(tmp_path)
    assert time.perf_counter() - begin < 8.0
    names = [check.name for check in checks]
    assert len(set(names)) == len(names) == 15
    by_name = {check.name: check for check in checks}
    for name in ("python", "torch", "gloo", "disk write"):
        assert by_name[name].status is not Status.fail, by_name[name].detail
    assert "all-reduce of 2 ranks works" in by_name["gloo"].detail
    assert torch.__version__ in by_name["torch"].detail
    assert all((check.fix is None) == (check.status is Status.passed) for check in checks)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("2.10.3", Status.fail),
        ("1.13.1+cu117", Status.fail),
        ("2.11.0", Status.passed),
        ("2.15.1+cpu", Status.passed),
        ("2.16.0.dev20270101", Status.warn),
        ("3.0.0", Status.warn),
    ],
)
def test_torch_versions(version: str, status: Status) -> None:
    check = check_torch_version(version)
    assert check.status is status and version in check.detail


CHECKS = [
    Check("python", Status.passed, "3.12"),
    Check("shared memory", Status.warn, "64.0 MiB free", "remount it"),
    Check("gloo", Status.fail, "no route", "set GLOO_SOCKET_IFNAME=lo"),
]


def test_text_to_the_letter() -> None:
    assert render(CHECKS, as_json=False).splitlines() == [
        "pass  python         3.12",
        "WARN  shared memory  64.0 MiB free",
        "                     fix: remount it",
        "FAIL  gloo           no route",
        "                     fix: set GLOO_SOCKET_IFNAME=lo",
        "1 passed, 1 to note, 1 failed",
    ]


def test_json_and_exit_status_follow_the_worst() -> None:
    worst = {3: ("fail", 1), 2: ("warn", 0), 1: ("pass", 0), 0: ("pass", 0)}
    for number, (status, code) in worst.items():
        read = json.loads(render(CHECKS[:number], as_json=True))
        assert (read["status"], exit_status(CHECKS[:number])) == (status, code)
    assert json.loads(render(CHECKS, as_json=True))["checks"][1] == {
        "name": "shared memory",
        "status": "warn",
        "detail": "64.0 MiB free",
        "fix": "remount it",
    }


def test_a_check_that_breaks_is_a_failure_and_the_others_go_on(tmp_path: Path, quick: None) -> None:
    checks = diagnose(tmp_path / "missing")
    failed = {check.name: check for check in checks if check.status is Status.fail}
    assert set(failed) == {"disk space", "disk write", "direct I/O"}
    assert all("FileNotFoundError" in check.detail and check.fix for check in failed.values())


def test_little_room_is_told(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage(10 << 30, 0, 100 << 20))
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: SimpleNamespace(total=8 << 30, available=1 << 30))
    monkeypatch.setattr(doctor, "memory_limit", lambda: (None, 0))
    checks = {check.name: check for check in diagnose(tmp_path)}
    assert checks["shared memory"].status is Status.warn and "--shm-size" in str(checks["shared memory"].fix)
    assert checks["disk space"].status is Status.fail and "100.0 MiB of 10.0 GiB" in checks["disk space"].detail
    assert checks["memory"].status is Status.warn
    monkeypatch.setattr(doctor, "memory_limit", lambda: (1 << 30, 900 << 20))
    memory = only("memory", tmp_path)
    assert memory.status is Status.fail and "container limit 1.0 GiB" in memory.detail


@pytest.mark.slow
def test_slow_disks_and_slow_bfloat16_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_WRITE_BUDGET_S", 0.2)
    monkeypatch.setattr(doctor, "_WRITE_CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(doctor.os, "fsync", lambda fd: time.sleep(0.1))
    monkeypatch.setattr(doctor, "measured_matmul_flops", lambda _, dtype: 1e9 if dtype.itemsize == 2 else 4e9)
    checks = {check.name: check for check in diagnose(tmp_path)}
    assert checks["disk write"].status is Status.warn and "MiB written" in checks["disk write"].detail
    assert checks["matmul"].status is Status.warn and "train.dtype=float32" in str(checks["matmul"].fix)


@pytest.mark.parametrize("refused", ["open", "write"])
def test_a_disk_without_direct_io(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    direct: set[int] = set()
    really_open, really_write = os.open, os.write

    def open_(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if not flags & os.O_DIRECT:
            return really_open(path, flags, *rest, **more)
        if refused == "open":
            raise OSError(errno.EINVAL, "Invalid argument")
        fd = really_open(path, flags & ~os.O_DIRECT, *rest, **more)
        direct.add(fd)
        return fd

    def write(fd: int, data: Any) -> int:
        if fd in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return really_write(fd, data)

    monkeypatch.setattr(doctor.os, "open", open_)
    monkeypatch.setattr(doctor.os, "write", write)
    check = only("direct I/O", tmp_path)
    assert check.status is Status.warn and "Invalid argument" in check.detail


def test_the_codec_that_is_used_and_what_to_do_about_it(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_CODEC_SHARD_BYTES", 1 << 16)
    if doctor.isal.load() is not None:
        check = only("erasure codec", tmp_path)
        assert check.status is Status.passed and check.detail.startswith("isa-l: ") and "GB/s" in check.detail
    monkeypatch.setattr(doctor.isal, "load", lambda: None)
    check = only("erasure codec", tmp_path)
    assert check.status is Status.warn and check.detail.startswith("torch: ")
    assert "pip install pyeclib" in str(check.fix)


def test_gloo_that_cannot_meet_fails(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    check = only("gloo", tmp_path)
    assert check.status is Status.fail and "GLOO_SOCKET_IFNAME" in str(check.fix)


def test_too_few_open_files(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_NOFILE: 256, resource.RLIMIT_MEMLOCK: resource.RLIM_INFINITY}
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda kind: (limits[kind], limits[kind]))
    check = only("limits", tmp_path)
    assert check.status is Status.warn and check.detail == "256 open files, unlimited locked memory"


def test_more_threads_than_cores(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cpu_quota", lambda: 1.5)
    monkeypatch.setattr(doctor.torch, "get_num_threads", lambda: 8)
    check = only("cpu", tmp_path)
    assert check.status is Status.warn and "set OMP_NUM_THREADS=1" in str(check.fix)


def test_a_gpu_that_torch_does_not_see(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    node = tmp_path / "nvidia0"
    node.touch()
    monkeypatch.setattr(doctor, "_GPU_NODE", node)
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    assert only("gpu", tmp_path).status is Status.warn
