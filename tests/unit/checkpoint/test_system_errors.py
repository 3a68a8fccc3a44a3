"""An error of the operating system is no damage: it names the limit that was met, and nothing is set aside for it."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.checkpoints import Training
from support.files import snapshot_of

from windlass import mapped_file
from windlass.checkpoint import inspect
from windlass.checkpoint.tensors import empty_on_host
from windlass.errors import DoesNotFit, RunFolderError, SystemLimit
from windlass.exchange.dcp import DcpFolder
from windlass.exchange.huggingface import Weight, write_weights
from windlass.mapped_file import map_file
from windlass.models.huggingface_folder import CONFIG, HuggingFaceFolder
from windlass.os_errors import limits_named, remedy, require_open_files
from windlass.parallel.mesh import Mesh
from windlass.untrusted import Malformed


@contextmanager
def refusing(number: int, word: str) -> Iterator[None]:
    """Files whose paths have `word` in them cannot be opened."""
    real = os.open

    def refuse(path: os.PathLike[str] | str, *arguments: int, **more: int) -> int:
        if word in os.fspath(path):
            raise OSError(number, os.strerror(number), os.fspath(path))
        return real(path, *arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", refuse)
        yield


@pytest.mark.parametrize("word", ["manifest.json", ".safetensors"])
@pytest.mark.parametrize(
    ("number", "says"), [(errno.EMFILE, "ulimit -n"), (errno.ENOMEM, "memory"), (errno.EACCES, "permissions of")]
)
def test_a_checkpoint_that_the_system_does_not_give_is_not_damaged(
    number: int, says: str, word: str, tmp_path: Path, mesh: Mesh
) -> None:
    Training().checkpointer(tmp_path, mesh, keep=0).save(1)
    checkpointer = Training().checkpointer(tmp_path, mesh, keep=0)
    checkpointer.save(2)
    before = snapshot_of(tmp_path)
    actions: list[Callable[[], object]] = [
        lambda: inspect.verify(tmp_path),
        Training(5).checkpointer(tmp_path, mesh).restore_latest,
    ]
    for action in actions:
        with refusing(number, word), pytest.raises(RunFolderError, match=says) as caught:
            action()
        assert "damaged" not in str(caught.value)
    assert snapshot_of(tmp_path) == before
    if word == "manifest.json":
        with refusing(number, word):
            assert [row.problem is None for row in inspect.list_checkpoints(tmp_path)] == [False, False]


def test_folders_of_others_that_the_system_does_not_give(tmp_path: Path) -> None:
    weight = Weight("a", (3,), torch.float32, lambda: torch.arange(3.0))
    for name in ("hf", "dcp"):
        (tmp_path / name).mkdir()
    write_weights(tmp_path / "hf", [weight], {"config.json": b"{}"}, 1 << 20, lambda _: None)
    (tmp_path / "dcp/.metadata").write_bytes(b"x")
    for word in ("config.json", "index.json", "00001.safetensors"):
        with refusing(errno.EMFILE, word), pytest.raises(RunFolderError, match="ulimit -n"):
            HuggingFaceFolder(tmp_path / "hf")
    folder = HuggingFaceFolder(tmp_path / "hf")
    with refusing(errno.EMFILE, "00001.safetensors"), pytest.raises(RunFolderError, match="ulimit -n"):
        folder.read("a")
    assert torch.equal(folder.read("a"), torch.arange(3.0))
    with refusing(errno.EMFILE, ".metadata"), pytest.raises(RunFolderError, match="ulimit -n"):
        DcpFolder(tmp_path / "dcp")
    with refusing(errno.EACCES, CONFIG), pytest.raises(RunFolderError, match="permissions"):
        HuggingFaceFolder(tmp_path / "hf")


def test_files_are_mapped_without_descriptors(tmp_path: Path) -> None:
    views, num_before = [], len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # other tests of this process have some
    for number in range(50):
        path = tmp_path / str(number)
        path.write_bytes(b"%05d" % number * 1000)
        views.append(map_file(path, copy_on_write=number % 2 == 1, begin=4095 if number % 3 else 0))
    assert len(os.listdir("/proc/self/fd")) < num_before + 10  # noqa: PTH208
    assert bytes(views[3][:5]) == b"00003" and bytes(views[1][:5]) == b"00001"
    assert views[0].readonly and not views[1].readonly
    views[1][0] = 7
    assert (tmp_path / "1").read_bytes()[4095:4096] == b"0", "what is written is not in the file"
    assert bytes(map_file(tmp_path / "0", begin=4997, size=3)) == b"000"
    for begin, size in ((4998, 3), (5001, None), (0, 1 << 62)):
        with pytest.raises(Malformed, match="5,000 bytes"):
            map_file(tmp_path / "0", begin=begin, size=size)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Malformed, match="no regular file"):
        map_file(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError):
        map_file(tmp_path)


def test_memory_is_given_back_with_the_last_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(8192))
    given_back: list[int] = []
    monkeypatch.setattr(mapped_file._LIBC, "munmap", lambda _, size: given_back.append(size))
    view = map_file(tmp_path / "file", copy_on_write=True)
    tensor = torch.frombuffer(view[4096:], dtype=torch.uint8)
    del view
    assert given_back == []
    del tensor
    assert given_back == [8192]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_limit_is_one_message_wherever_it_is_met(number: int) -> None:
    with pytest.raises(SystemLimit, match=os.strerror(number)), limits_named():
        raise OSError(number, os.strerror(number), "/some/file")
    with pytest.raises(SystemLimit, match="memory"), limits_named():
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
    with pytest.raises(OSError, match="gone"), limits_named():
        raise OSError(errno.EIO, "gone")
    with pytest.raises(RuntimeError, match="other"), limits_named():
        raise RuntimeError("other")


def test_the_limit_is_named_as_it_is() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert f"more open files than {soft}: `ulimit -n" in remedy(OSError(errno.EMFILE, ""), "")
    assert remedy(OSError(errno.EIO, ""), "look") == "look"


def test_a_tensor_that_no_machine_holds_is_refused() -> None:
    with pytest.raises(DoesNotFit, match="GiB of memory"):
        empty_on_host((2**40,), torch.float32, "w")


def test_a_limit_that_is_too_low_is_raised_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    limits, wanted = [(20, 64)], []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[0])
    monkeypatch.setattr(resource, "setrlimit", lambda _, now: wanted.append(now))
    require_open_files(20)
    require_open_files(32)
    assert wanted == [(32, 64)]
    limits[0] = (20, resource.RLIM_INFINITY)
    require_open_files(1000)
    limits[0] = (20, 20)
    with pytest.raises(SystemLimit, match="ulimit -n=20: a job of these ranks needs at least 32"):
        require_open_files(32)
