"""Files of ours in folders that may be a stranger's."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from windlass.files import atomic_file, make_folder, open_growing, real_path, refuse_links


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "elsewhere" / "precious"
    path.parent.mkdir()
    path.write_text("precious")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "found"
    path.mkdir()
    return path


def test_a_link_is_replaced_and_not_followed(folder: Path, victim: Path) -> None:
    (folder / "file").symlink_to(victim)
    with atomic_file(folder / "file") as file:
        file.write(b"new")
    assert not (folder / "file").is_symlink()
    assert ((folder / "file").read_text(), victim.read_text()) == ("new", "precious")


def test_no_name_of_a_temporary_can_be_laid_in_wait(folder: Path) -> None:
    names = set()
    for _ in range(2):
        with atomic_file(folder / "file"):
            (temporary,) = (path for path in folder.iterdir() if path.name != "file")
            names.add(temporary.name)
    assert len(names) == 2
    assert all(re.fullmatch(rf"file\.{os.getpid()}-[0-9a-f]{{16}}\.tmp", name) for name in names)
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_a_body_that_fails_leaves_what_was_there(folder: Path) -> None:
    (folder / "file").write_text("before")
    with pytest.raises(ZeroDivisionError), atomic_file(folder / "file") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert [path.read_text() for path in folder.iterdir()] == ["before"]


def test_a_log_that_is_a_link_is_refused(folder: Path, victim: Path) -> None:
    (folder / "log").symlink_to(victim)
    with pytest.raises(OSError, match="log is a symbolic link") as raised:
        open_growing(folder / "log")
    assert raised.value.errno == errno.ELOOP
    assert victim.read_text() == "precious"


def test_a_log_that_is_a_pipe_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "log")
    with pytest.raises(OSError, match="log is no regular file"):
        open_growing(folder / "log")


def test_a_log_grows_and_obeys_the_umask(folder: Path) -> None:
    before = os.umask(0o002)
    try:
        for text in (b"a", b"b"):
            descriptor = open_growing(folder / "log")
            os.write(descriptor, text)
            os.close(descriptor)
    finally:
        os.umask(before)
    assert (folder / "log").read_bytes() == b"ab"
    assert (folder / "log").stat().st_mode & 0o777 == 0o664


def test_folders_are_not_made_through_links(folder: Path, victim: Path) -> None:
    make_folder(folder / "a" / "b", folder)
    assert (folder / "a" / "b").is_dir()
    (folder / "link").symlink_to(victim.parent)
    for path in (folder / "link", folder / "link" / "deeper"):
        with pytest.raises(OSError, match="link is a symbolic link"):
            make_folder(path, folder)
    assert list(victim.parent.iterdir()) == [victim]


def test_the_folder_itself_may_be_a_link(folder: Path, victim: Path) -> None:
    (folder / "link").symlink_to(victim.parent)
    make_folder(folder / "link" / "run" / "logs", folder / "link")
    assert (victim.parent / "run" / "logs").is_dir()


def test_a_path_elsewhere_is_a_mistake_of_ours(folder: Path, victim: Path) -> None:
    with pytest.raises(ValueError, match="is not inside of"):
        refuse_links(victim, folder)


def test_a_link_that_leads_to_itself_is_left_to_the_system(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "link").symlink_to(tmp_path)
    assert real_path(tmp_path / "loop") == tmp_path.resolve() / "loop"
    assert real_path(tmp_path / "link") == tmp_path.resolve()
    with pytest.raises(OSError, match="symbolic links"):
        (real_path(tmp_path / "loop") / "x").stat()
